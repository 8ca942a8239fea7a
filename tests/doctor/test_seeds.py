"""The doctor's checks of the seeds: which are here, whether an epoch is open, whether secrets become public in time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.seeds.shops import EPOCHS_ALONE, LENGTH, SEED, SeededShop, open_seeded_shop
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.settings import Settings
from tombola.worker.doctor.checks import CannotLook, Facts, Verdict
from tombola.worker.doctor.seeds import look_at_epochs, look_at_last_draw, look_at_revealing

OTHER = b"other" * 8


@pytest.fixture
def shop(database_url: str) -> Iterator[SeededShop]:
    with open_seeded_shop(database_url) as opened:
        yield opened


def look(shop: SeededShop, at: object, *seeds: bytes) -> Verdict:
    settings = Settings.from_env({"TOMBOLA_SEED": ",".join(it.hex() for it in seeds)})
    assert callable(at)
    with shop.engine.connect() as connection:
        verdict: Verdict = at(connection, settings, Facts())
    return verdict


def test_the_seed_of_the_last_draw(shop: SeededShop) -> None:
    assert look(shop, look_at_last_draw, SEED)[:2] == ("ok", "nothing was drawn lately")
    shop.draw(DrawRequest(account_id=shop.account(user=1)))
    assert look(shop, look_at_last_draw, SEED)[:2] == ("ok", "the last draw was made with ours (1.1)")
    assert look(shop, look_at_last_draw, OTHER, SEED)[0] == "ok"
    status, found, _ = look(shop, look_at_last_draw, OTHER)
    assert (status, "was made with seed 1.1, which" in found) == ("fail", True)
    with pytest.raises(CannotLook, match="no seed here"):
        look(shop, look_at_last_draw)


def test_an_epoch_is_open_and_the_chain_goes_on(shop: SeededShop) -> None:
    assert look(shop, look_at_epochs)[:2] == ("ok", "epoch 1.1 is open")
    shop.pass_time(3649 * LENGTH, *EPOCHS_ALONE)
    assert look(shop, look_at_epochs)[1].startswith(("epoch 1.3650 is open", "chain 1 ends at"))
    shop.pass_time(2 * LENGTH, *EPOCHS_ALONE)
    status, _, cure = look(shop, look_at_epochs)
    assert (status, "tombola seed rotate" in cure) == ("fail", True)
    with shop.engine.begin() as connection:
        for table in ("seed_epochs", "seed_chains"):
            connection.exec_driver_sql(f"DELETE FROM {table}")
    assert look(shop, look_at_epochs)[0] == "warn"


def test_secrets_become_public_in_time(shop: SeededShop) -> None:
    assert look(shop, look_at_revealing)[:2] == ("ok", "0 epochs are revealed")
    shop.pass_time(2 * LENGTH)
    status, found, cure = look(shop, look_at_revealing)
    assert (status, found.startswith("epoch 1.1 was over at"), "tombola seed reveal" in cure) == ("warn", True, True)
    assert shop.reveal() == ["1.1", "1.2"]
    assert look(shop, look_at_revealing)[:2] == ("ok", "2 epochs are revealed")
