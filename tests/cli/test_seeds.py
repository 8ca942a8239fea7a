"""`tombola seed` from a shell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.seeds.shops import LENGTH, SEED, SeededShop, open_seeded_shop
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import DrawError
from tombola.producers.domain.seeds import anchor_of
from tombola.worker.cli import app
from tombola.worker.operators import actions
from tombola.worker.seeds.masters import Masters

pytestmark = pytest.mark.slow

OTHER = b"other" * 8


@pytest.fixture
def shop(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SeededShop]:
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", database_url)
    monkeypatch.setenv("TOMBOLA_BROKER_URL", "redis://127.0.0.1:1")
    monkeypatch.setenv("TOMBOLA_SEED", SEED.hex())
    with open_seeded_shop(database_url) as opened:
        yield opened


def tombola(*arguments: object, code: int = 0) -> str:
    ended = CliRunner().invoke(app, [*map(str, arguments)])
    if isinstance(ended.exception, DrawError):
        return str(ended.exception)
    assert ended.exit_code == code, (ended.output, ended.exception)
    return ended.output


def status() -> Any:
    return json.loads(tombola("seed", "status", "--json"))


def test_status_and_anchor(shop: SeededShop, monkeypatch: pytest.MonkeyPatch) -> None:
    (chain,) = status()
    assert (chain["chain"], chain["anchor"], chain["open"]) == (1, anchor_of(SEED).hex(), "1.1")
    assert (chain["revealed"], chain["waiting"], chain["has_seed"], len(chain["commitment"])) == (0, 0, True, 64)
    assert f"epoch 1.1 is open; its commitment is {chain['commitment']}" in tombola("seed", "status")
    assert tombola("seed", "anchor") == f"1 {anchor_of(SEED).hex()}\n"
    assert [it["anchor"] for it in json.loads(tombola("seed", "anchor", "--json"))] == [anchor_of(SEED).hex()]
    # Neither needs the seed.
    monkeypatch.delenv("TOMBOLA_SEED")
    assert status()[0]["has_seed"] is False
    assert tombola("seed", "anchor").startswith("1 ")
    assert "TOMBOLA_SEED is not set" in tombola("seed", "reveal")
    assert "TOMBOLA_SEED is not set" in tombola("seed", "rotate", "--reason", "r", "--yes")


def test_no_chain_yet(shop: SeededShop) -> None:
    with shop.engine.begin() as connection:
        for table in ("seed_epochs", "seed_chains"):
            connection.exec_driver_sql(f"DELETE FROM {table}")
    assert "No chain has begun" in tombola("seed", "status")
    assert tombola("seed", "anchor") == ""
    shop.violations = list  # type: ignore[method-assign]


def test_revealing(shop: SeededShop) -> None:
    assert tombola("seed", "reveal") == "Every epoch that is over is revealed.\n"
    draw = DrawRequest(account_id=shop.account(user=1), request_key="k")
    shop.accept(draw)
    shop.pass_time(LENGTH)
    assert "epoch 1.1 stays secret: it was over at" in tombola("seed", "reveal", code=1)
    assert status()[0]["waiting"] == 1
    assert "and is secret still" in tombola("seed", "status")
    shop.settle(draw)
    assert tombola("seed", "reveal") == "epoch 1.1 is revealed\n"
    assert (status()[0]["waiting"], status()[0]["revealed"]) == (0, 1)


def test_rotating(shop: SeededShop, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "was used for chain 0" in tombola("seed", "rotate", "--reason", "a leak", "--yes")
    monkeypatch.setenv("TOMBOLA_SEED", f"{OTHER.hex()}, {SEED.hex()}")
    assert "no terminal" in tombola("seed", "rotate", "--reason", "a leak")
    told = tombola("seed", "rotate", "--reason", "a leak", "--yes")
    assert told.startswith("chain 2 opens at ")
    assert told.endswith(f"{anchor_of(OTHER).hex()}\n")
    with shop.engine.connect() as connection:
        (action,) = actions.recent(connection, rows_max=1)
    assert (action.action, action.reason, action.details["chain"]) == ("seed rotate", "a leak", 2)
    assert [it["chain"] for it in status()] == [1, 2]
    assert tombola("seed", "anchor").splitlines()[1] == f"2 {anchor_of(OTHER).hex()}"
    shop.masters = Masters([OTHER, SEED])
