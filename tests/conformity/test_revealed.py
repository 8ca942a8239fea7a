"""Tickets of draws in seed epochs: not provable before the secret is revealed, and uniform after it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from tests.books.conftest import seal_all
from tests.campaigns.shops import SEED
from tests.conformity.test_counting import settings_of
from tests.ledgers import migrated
from tests.seeds.shops import LENGTH, PRIZES, SeededShop
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.storage import clock
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import books_blocks
from tombola.worker.books import head
from tombola.worker.conformity import counting, reading, revealed
from tombola.worker.conformity.tickets import Tickets


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SeededShop]:
    monkeypatch.setattr(head, "SEEN_EVERY", timedelta(0))
    engine = open_engine(f"sqlite:///{tmp_path}/ledger.db")
    migrated(engine)
    shop = SeededShop(engine)
    yield shop
    shop.entry.close()


def tickets(shop: SeededShop, campaign: str, **env: str) -> Tickets:
    secrets = revealed.secrets_of(shop.engine, settings_of(shop, **env))
    (version,) = reading.report_on(shop.engine, campaign, secrets=secrets).versions
    assert version.tickets is not None
    return version.tickets


def test_tickets_of_epochs(shop: SeededShop) -> None:
    shop.publish(PRIZES)
    id = shop.account(user=1)
    nonce = "n0nce-n0nce-n0nce"
    asked = [DrawRequest(account_id=id, request_key=f"d{number}") for number in range(20)]
    asked += [DrawRequest(account_id=id, request_key=f"n{number}", client_nonce=nonce) for number in range(10)]
    asked += [
        DrawRequest(account_id=id, request_key=f"a{number}", campaign="autumn", pulls=3, client_nonce=nonce)
        for number in range(10)
    ]
    shop.draw(*asked)
    seal_all(shop.engine)
    assert counting.count(shop.engine) == 40
    for campaign, draws, pulls in (("default", 30, 30), ("autumn", 10, 30)):
        unknown = tickets(shop, campaign)
        assert (unknown.draws, unknown.unknown, len(unknown.places), unknown.until) == (draws, draws, 0, None)
        known = tickets(shop, campaign, TOMBOLA_SEED=SEED.hex())  # as a worker has it
        assert (known.unknown, len(known.places), known.other) == (0, pulls, 0)
    shop.pass_time(LENGTH + timedelta(hours=2))
    with shop.engine.begin() as connection:
        connection.execute(update(books_blocks).values(sealed_at=clock.now(connection) - LENGTH))
    assert shop.reveal()
    for campaign, pulls in (("default", 30), ("autumn", 30)):
        found = tickets(shop, campaign)
        assert (found.unknown, len(found.places), found.other) == (0, pulls, 0)
        assert found.until is not None
        assert found.places == tickets(shop, campaign, TOMBOLA_SEED=SEED.hex()).places


def test_what_names_no_seed_is_not_known(shop: SeededShop) -> None:
    key_of = revealed.secrets_of(shop.engine, settings_of(shop, TOMBOLA_SEED=SEED.hex())).key_of
    assert key_of("1.1", "default") not in (None, key_of("1.1", "autumn"))
    for name in ("7.1", "1.99999", "x.y", "", "0123456789abcdef"):
        assert key_of(name, "default") is None, name
