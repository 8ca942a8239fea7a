"""The audit of seeds: what it proves with and without them, and which forgeries of epochs it names."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import text, update

from tests.ledgers import recharge
from tests.seeds.shops import EPOCHS_ALONE, LENGTH, PRIZES, SEED, SeededShop, open_seeded_shop, short_chains
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.seeds import anchor_of, commitment_of, secret_of
from tombola.producers.storage.schema import seed_epochs
from tombola.producers.storage.seeds import by_id
from tombola.worker.audit import audits, parts
from tombola.worker.audit.report import Report

OTHER = b"other" * 8

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("short_chains")]

__all__ = ["short_chains"]


@pytest.fixture
def shop(database_url: str) -> Iterator[SeededShop]:
    with open_seeded_shop(database_url) as opened:
        opened.publish(PRIZES)
        yield opened


def draws(account_id: int, prefix: str, count: int) -> list[DrawRequest]:
    return [
        DrawRequest(account_id=account_id, request_key=f"{prefix}{it:02}", campaign="autumn" if it % 3 else "default")
        for it in range(count)
    ]


def execute(shop: SeededShop, statement: Any, **values: Any) -> None:
    with shop.engine.begin() as connection:
        connection.execute(text(statement) if isinstance(statement, str) else statement, values)


def i2(report: Report) -> list[str]:
    """What violates I2; nothing else is violated."""
    assert {it.invariant for it in report.violations} <= {"I2"}, report.violations
    return [f"{it.subject}: {it.what}" for it in report.violations]


# ---- with and without the seed ---------------------------------------------------------------------------------------


def test_what_is_revealed_is_proven_without_the_seed(shop: SeededShop) -> None:
    account = shop.account(user=1)
    shop.draw(*draws(account, "a", 12))
    shop.pass_time(LENGTH)
    shop.draw(*draws(account, "b", 9))
    report = shop.audit()
    assert (report.violations, report.unproven, report.states["I2"]) == ([], 21, "not provable yet")
    assert report.is_clean
    assert report.as_json()["not_provable_yet"] == 21
    assert shop.reveal() == ["1.1"]
    report = shop.audit()
    assert (report.violations, report.unproven) == ([], 9)
    with_seed = shop.audit(SEED)
    assert (with_seed.violations, with_seed.unproven, with_seed.states["I2"]) == ([], 0, "holds")
    shop.pass_time(LENGTH)
    assert shop.reveal() == ["1.2"]
    report = shop.audit()
    assert (report.violations, report.unproven, report.states["I2"]) == ([], 0, "holds")


def test_without_the_seed_a_forged_prize_shows_when_its_secret_is_public(shop: SeededShop) -> None:
    """An auditor needs no secret of ours."""
    account = shop.account(user=1)
    asked = draws(account, "a", 30)
    shop.draw(*asked)
    lost = next(it for it in asked if it.campaign == "default" and not shop.audit().violations)
    shop.pass_time(LENGTH)
    shop.reveal()
    # The loser's charge is said to be of the same epoch, under another key: its draw says otherwise.
    execute(shop, "UPDATE asset_transactions SET notes = REPLACE(notes, '1.1', '1.2') WHERE lottery_session_id = :s",
            s=lost.lottery_session_id)  # fmt: skip
    assert any("was drawn in epoch 1.2, and is bound to 10001" in it for it in i2(shop.audit()))
    execute(shop, "UPDATE asset_transactions SET notes = REPLACE(notes, '1.2', '1.1') WHERE lottery_session_id = :s",
            s=lost.lottery_session_id)  # fmt: skip


def test_draws_of_before_are_proven_when_their_seed_is_public(shop: SeededShop) -> None:
    account = shop.account(user=1)
    rules = shop.rules
    execute(shop, "DELETE FROM seed_epochs")
    execute(shop, "DELETE FROM seed_chains")
    shop.rules = rules._replace(seeds=None)
    shop.look()
    shop.draw(*draws(account, "before", 12))
    assert "." not in "".join(shop.noted().values())
    assert shop.audit().unproven == 12
    old = SeededShop(shop.engine, SEED)
    shop.rules = old.rules
    shop.look()
    shop.draw(*draws(account, "after", 9))
    assert shop.audit().unproven == 21
    assert shop.audit(SEED).unproven == 0
    assert i2(shop.audit(SEED)) == []
    shop.pass_time(LENGTH)
    shop.rotate(OTHER, SEED)
    shop.pass_time(LENGTH)
    assert "0.0" in shop.reveal()
    report = shop.audit()
    assert (report.violations, report.unproven) == ([], 0)
    old.entry.close()


def test_a_mark_does_not_pass_what_is_not_proven_yet(shop: SeededShop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "HORIZON_S", 0)
    monkeypatch.setattr("tombola.worker.audit.walk.PART_ROWS", 5)
    secret = {"mark_secret": b"shared with auditors"}
    account = shop.account(user=1)
    shop.draw(*draws(account, "a", 12))
    shop.pass_time(LENGTH)
    shop.reveal()
    shop.draw(*draws(account, "b", 9))
    recharge(shop.engine, account, Decimal("5.00"), by="ann")
    first = shop.audit(**secret)
    assert (first.is_clean, first.unproven) == (True, 9)
    audits.record(shop.engine, first, by="auditor")
    second = shop.audit(goes_on=True, **secret)
    assert not second.is_of_everything
    assert (second.violations, second.unproven) == ([], 9)
    assert second.after_id >= 12 - 5
    assert second.rows < first.rows
    audits.record(shop.engine, second, by="auditor")
    # What the mark has not passed is examined once it can be.
    shop.pass_time(LENGTH)
    assert shop.reveal() == ["1.2"]
    third = shop.audit(goes_on=True, **secret)
    assert (third.is_of_everything, third.violations, third.unproven) == (False, [], 0)
    audits.record(shop.engine, third, by="auditor")
    fourth = shop.audit(goes_on=True, **secret)
    assert (fourth.is_of_everything, fourth.rows, fourth.violations) == (False, 0, [])
    # Whoever has the seed goes on from the same mark.
    with_seed = shop.audit(SEED, goes_on=True, **secret)
    assert (with_seed.is_of_everything, with_seed.violations) == (False, [])


def test_without_any_secret_everything_is_audited(shop: SeededShop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "HORIZON_S", 0)
    shop.draw(*draws(shop.account(user=1), "a", 3))
    report = shop.audit()
    assert report.reached is None
    audits.record(shop.engine, report, by="auditor")
    assert shop.audit(goes_on=True).is_of_everything


# ---- forgeries -------------------------------------------------------------------------------------------------------


@pytest.fixture
def forged(database_url: str) -> Iterator[SeededShop]:
    """Draws in two epochs, of which the first is public; a test forges, and the audit must find it."""
    with open_seeded_shop(database_url) as opened:
        opened.publish(PRIZES)
        account = opened.account(user=1)
        opened.draw(*draws(account, "a", 6))
        opened.pass_time(LENGTH)
        opened.reveal()
        opened.draw(*draws(account, "b", 6))
        assert opened.audit(SEED).violations == opened.audit().violations == []
        opened.violations = list  # type: ignore[method-assign]
        yield opened


def test_a_row_that_is_bound_to_an_epoch_that_was_public(forged: SeededShop) -> None:
    """As if an insider had drawn in an epoch whose secret everybody knew: all rows fit together but the times."""
    account = forged.account(user=2)
    draw = DrawRequest(account_id=account, request_key="chosen")
    forged.pass_time(-LENGTH, *EPOCHS_ALONE)
    execute(forged, "UPDATE seed_epochs SET revealed = NULL, revealed_at = NULL WHERE id = 10001")
    forged.look()
    forged.draw(draw)
    assert forged.noted()["chosen"] == "1.1"
    forged.pass_time(LENGTH, *EPOCHS_ALONE)
    with forged.engine.connect() as connection:
        secret = secret_of(SEED, 1).hex()
        second = by_id(connection, 10_002)
    assert second is not None
    execute(forged, update(seed_epochs).where(seed_epochs.c.id == 10_001).values(
        revealed=secret, revealed_at=second.opens_at))  # fmt: skip
    for report in (forged.audit(SEED), forged.audit()):
        (found,) = i2(report)
        assert found.startswith("request chosen: was drawn at")
        assert "in epoch 1.1, whose secret was public by then" in found


def test_a_row_that_is_bound_to_an_epoch_that_was_over(forged: SeededShop) -> None:
    draw = DrawRequest(account_id=forged.account(user=2), request_key="chosen")
    forged.draw(draw)
    key = "WHERE request_key = 'chosen'"
    execute(forged, f"UPDATE api_idempotency_requests SET seed_epoch = 10001 {key}")
    (found,) = i2(forged.audit(SEED))
    assert found == "request chosen: was drawn in epoch 1.2, and is bound to 10001"
    execute(forged, f"UPDATE api_idempotency_requests SET seed_epoch = NULL {key}")
    (found,) = i2(forged.audit(SEED))
    assert found == "request chosen: was drawn in epoch 1.2, and is bound to none"


def test_a_draw_that_was_accepted_at_another_time_than_its_epoch(forged: SeededShop) -> None:
    forged.pass_time(LENGTH, *EPOCHS_ALONE)
    found = i2(forged.audit(SEED))
    assert len(found) == 12
    assert all("was not open then" in it for it in found), found


def test_a_draw_under_the_master_seed_after_the_epochs_began(forged: SeededShop) -> None:
    forged.rules = forged.rules._replace(seeds=None)
    forged.draw(DrawRequest(account_id=forged.account(user=2), request_key="chosen"))
    (found,) = i2(forged.audit(SEED))
    assert "without an epoch, after the epochs had begun" in found


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE seed_epochs SET commitment = REPEAT('0', 64) WHERE id = 10001", "its commitment is not the one of"),
        ("UPDATE seed_epochs SET revealed = REPEAT('0', 64) WHERE id = 10001", "does not hash down to the anchor"),
        ("UPDATE seed_chains SET anchor = REPEAT('0', 64) WHERE chain = 1", "anchor"),
        ("DELETE FROM seed_epochs WHERE id = 10002", "does not have the epochs 1 to 40"),
        ("UPDATE seed_epochs SET revealed_at = opens_at WHERE id = 10001", "was revealed before it was over"),
        ("UPDATE seed_epochs SET closes_at = NULL WHERE id = 10003", "has no end"),
        ("DELETE FROM seed_chains WHERE chain = 1", "has epochs, and no anchor"),
    ],
)
@pytest.mark.parametrize("seeds", [(SEED,), ()], ids=["with the seed", "without"])
def test_published_values_that_were_changed(
    forged: SeededShop, statement: str, what: str, seeds: tuple[bytes, ...]
) -> None:
    if forged.engine.dialect.name == "sqlite":
        statement = statement.replace("REPEAT('0', 64)", f"'{'0' * 64}'")
    execute(forged, statement)
    report = forged.audit(*seeds)
    assert any(it.invariant == "I2" and what in it.what for it in report.violations), report.violations


def test_a_secret_of_another_chain_that_its_commitment_fits(forged: SeededShop) -> None:
    """Who changes secret and commitment together, and the draws with them, still lacks the anchor."""
    secret = secret_of(OTHER, 1)
    execute(forged, update(seed_epochs).where(seed_epochs.c.id == 10_001).values(
        revealed=secret.hex(), commitment=commitment_of(secret)))  # fmt: skip
    found = [it for it in forged.audit().violations if it.subject == "epoch 1.1"]
    assert [it.what for it in found] == ["its revealed secret does not hash down to the anchor of its chain"]


def test_an_anchor_that_is_not_the_seeds(forged: SeededShop) -> None:
    execute(forged, "UPDATE seed_chains SET anchor = :anchor WHERE chain = 1", anchor=anchor_of(OTHER).hex())
    report = forged.audit(SEED)
    assert any(anchor_of(SEED).hex() in it.what for it in report.violations), report.violations


def test_a_chain_that_no_operator_has_begun(shop: SeededShop) -> None:
    shop.rotate(OTHER, SEED)
    assert shop.audit(OTHER, SEED).violations == []
    execute(shop, "UPDATE operator_actions SET action = 'seed wrote' WHERE action = 'seed rotate'")
    (found,) = shop.audit(OTHER, SEED).violations
    assert str(found) == "I12 chain 2: its beginning is not on record with this anchor"
    execute(shop, "UPDATE operator_actions SET action = 'seed rotate' WHERE action = 'seed wrote'")
    execute(
        shop, "UPDATE operator_actions SET details = REPLACE(details, '\\:2,', '\\:3,') WHERE action = 'seed rotate'"
    )
    assert {it.subject for it in shop.audit(OTHER, SEED).violations} == {"chain 2", "chain 3"}
    execute(
        shop, "UPDATE operator_actions SET details = REPLACE(details, '\\:3,', '\\:2,') WHERE action = 'seed rotate'"
    )
