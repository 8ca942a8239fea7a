"""The list of keys: listed before they sign, ended by their successor, never forgotten; and receipts from the rows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine, func, select, text

from tests.ledgers import migrated
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import ConfigurationError, ReceiptNotFound
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.receipt_keys import ReceiptKey, SigningKey
from tombola.producers.domain.receipts import parse, verify
from tombola.producers.domain.seeds import commitment_of, secret_of
from tombola.producers.entry import Entry
from tombola.producers.receipts import Receipts, keys_in, state_of
from tombola.producers.settings import Settings
from tombola.producers.storage import clock, receipt_keys
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.receipt_keys import list_keys, open_signer
from tombola.producers.storage.requests import Submission, give_up, revive, state_of_session
from tombola.producers.storage.schema import receipt_keys as table
from tombola.worker.seeds import chains
from tombola.worker.seeds.masters import Masters

OLD, NEW, NEWEST = SigningKey.make(), SigningKey.make(), SigningKey.make()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    migrated(engine)
    yield engine
    engine.dispose()


def listed(engine: Engine) -> dict[str, ReceiptKey]:
    with engine.connect() as connection:
        return {it.kid: it for it in list_keys(connection)}


def ends(engine: Engine) -> dict[str, bool]:
    """Whether each key has ended, in the order of the list."""
    return {kid: it.valid_until is not None for kid, it in listed(engine).items()}


def later(engine: Engine) -> None:
    """All moments in the list become a day older, so that the next key is newer whatever a clock's resolution is."""
    days: list[tuple[str, datetime, datetime | None]] = [
        (kid, it.valid_from - timedelta(days=1), it.valid_until and it.valid_until - timedelta(days=1))
        for kid, it in listed(engine).items()
    ]
    with engine.begin() as connection:
        for kid, since, until in days:
            connection.execute(table.update().where(table.c.kid == kid).values(valid_from=since, valid_until=until))


# ---- the list --------------------------------------------------------------------------------------------------------


def test_a_key_is_listed_once_and_keeps_its_beginning(engine: Engine) -> None:
    before = clock.now(engine)
    signer = open_signer(engine, [OLD])
    (only,) = listed(engine).values()
    assert (only.raw, only.valid_until) == (OLD.public_raw, None)
    assert before - timedelta(seconds=1) <= only.valid_from <= clock.now(engine) + timedelta(seconds=1)
    assert open_signer(engine, [OLD]) == signer
    assert listed(engine) == {OLD.kid: only}


def test_a_key_is_replaced_step_by_step(engine: Engine) -> None:
    open_signer(engine, [OLD])
    later(engine)
    assert [key.kid for _, key in open_signer(engine, [NEW, OLD]).keys] == [NEW.kid, OLD.kid]
    assert ends(engine) == {NEW.kid: False, OLD.kid: False}
    # A gateway with the old settings is restarted meanwhile: the new key goes on.
    open_signer(engine, [OLD])
    assert ends(engine) == {NEW.kid: False, OLD.kid: False}
    open_signer(engine, [NEW])
    assert ends(engine) == {NEW.kid: False, OLD.kid: True}
    ended = listed(engine)[OLD.kid]
    open_signer(engine, [NEW])
    assert listed(engine)[OLD.kid] == ended
    later(engine)
    open_signer(engine, [NEWEST])
    assert ends(engine) == {NEWEST.kid: False, NEW.kid: True, OLD.kid: True}


def test_a_key_that_comes_back_signs_again(engine: Engine) -> None:
    open_signer(engine, [OLD])
    later(engine)
    open_signer(engine, [NEW])
    assert ends(engine) == {NEW.kid: False, OLD.kid: True}
    open_signer(engine, [OLD])
    assert ends(engine) == {NEW.kid: False, OLD.kid: False}


def test_a_key_without_a_successor_is_ended_by_hand(engine: Engine) -> None:
    open_signer(engine, [OLD])
    with engine.begin() as connection:
        assert receipt_keys.end(connection, OLD.kid)
        assert not receipt_keys.end(connection, OLD.kid)
        assert not receipt_keys.end(connection, NEW.kid)
    assert ends(engine) == {OLD.kid: True}


def test_two_keys_that_come_together_are_in_the_order_of_the_settings(engine: Engine) -> None:
    signer = open_signer(engine, [NEW, OLD])
    assert len({since for since, _ in signer.keys}) == 1
    assert signer.keys[0][1] is NEW


def test_processes_that_start_together_list_a_key_once(engine: Engine) -> None:
    with ThreadPoolExecutor(8) as threads:
        signers = list(threads.map(lambda _: open_signer(engine, [NEW, OLD]), range(8)))
    assert len(set(signers)) == 1
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(table)).scalar() == 2


# ---- receipts of rows ------------------------------------------------------------------------------------------------


def test_what_the_door_answers_has_the_receipt_of_its_row(engine: Engine) -> None:
    """A new request, a repeat that the door remembers, one that another door reads: one receipt, to the microsecond."""
    receipts = Receipts(engine, [OLD])
    receipts.learn()
    entries = [Entry(engine, relay_after_s=10) for _ in range(2)]
    asked = [Submission(DrawRequest(account_id=6, request_key=f"k{number}"), "shop") for number in range(3)]
    answers = entries[0].accept(asked)
    with engine.connect() as connection:
        rows = [state_of_session(connection, it.request.lottery_session_id) for it in asked]
    signed = [receipts.sign(it) for it in rows if it is not None]
    assert len(set(signed)) == 3
    for repeated in (answers, [entries[0].recall(it) for it in asked], entries[1].accept(asked)):
        states = [state_of(it) for it in repeated if it is not None]
        assert [receipts.sign(it) for it in states if it is not None] == signed
    keys = {OLD.kid: listed(engine)[OLD.kid]}
    assert [verify(it, keys).request_key for it in signed] == ["k0", "k1", "k2"]
    conflict = entries[1].accept([Submission(DrawRequest(account_id=7, request_key="k0"), "shop")])[0]
    assert conflict.is_conflict
    assert state_of(conflict) is None
    for entry in entries:
        entry.close()


def test_a_receipt_has_the_epoch_that_its_draw_is_bound_to(engine: Engine) -> None:
    chains.begin_first(engine, Masters((bytes(32),)), epoch_length=timedelta(days=100))
    receipts, entry = Receipts(engine, [OLD]), Entry(engine, relay_after_s=10)
    draw, recharge = (
        DrawRequest(account_id=6, request_key="d"),
        RechargeRequest(account_id=6, amount="1.00", request_key="r"),
    )
    answers = entry.accept([Submission(draw), Submission(recharge)])
    said = []
    for answer in answers:
        state = state_of(answer)
        assert state is not None
        with engine.connect() as connection:
            assert state_of_session(connection, answer.request.lottery_session_id) == state
        receipts.learn(state.seed_epoch)
        assert receipts.knows(state.seed_epoch)
        said.append(parse(receipts.sign(state)).receipt)
    assert (said[0].seed_epoch, said[0].commitment) == ("1.1", commitment_of(secret_of(bytes(32), 1)))
    assert (said[1].seed_epoch, said[1].commitment) == (None, None)
    entry.close()


def test_a_revived_request_is_accepted_anew(engine: Engine) -> None:
    receipts = Receipts(engine, [OLD])
    receipts.learn()
    entry = Entry(engine, relay_after_s=10)
    request = DrawRequest(account_id=6, request_key="dead-1")
    entry.accept([Submission(request)])

    def signed() -> str:
        with engine.connect() as connection:
            state = state_of_session(connection, "dead-1")
        assert state is not None
        return receipts.sign(state)

    first = signed()
    with engine.begin() as connection:
        give_up(connection, "dead-1", request.fingerprint(), "TIMED_OUT")
    assert signed() == first
    with engine.begin() as connection:
        revive(connection, ["dead-1"], clock.now(connection) + timedelta(hours=1))
    again = parse(signed()).receipt
    assert again.accepted_at is not None
    assert again.accepted_at > (parse(first).receipt.accepted_at or "")
    entry.close()


def test_without_a_key_or_a_table_there_is_no_receipt(engine: Engine) -> None:
    assert not Receipts(engine, [])
    with pytest.raises(ReceiptNotFound):
        Receipts(engine, []).learn()
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE receipt_keys"))
    with pytest.raises(ConfigurationError, match="tombola migrate"):
        Receipts(engine, [OLD]).learn()


def test_the_setting_names_itself_and_not_the_key() -> None:
    settings = Settings.from_env({"TOMBOLA_RECEIPT_KEY": f"{NEW.text},{OLD.text}"})
    assert [it.kid for it in keys_in(settings)] == [NEW.kid, OLD.kid]
    assert OLD.text not in repr(settings)
    with pytest.raises(ConfigurationError, match=r"^TOMBOLA_RECEIPT_KEY: ") as refusal:
        keys_in(Settings.from_env({"TOMBOLA_RECEIPT_KEY": OLD.text + "A"}))
    assert OLD.text not in str(refusal.value)
