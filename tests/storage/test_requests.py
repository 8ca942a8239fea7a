"""A request's row from accept to archive, on both databases: what is promised, to whom, and what a repeat is told."""

import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import Connection, Engine, create_engine, select, text
from sqlalchemy.exc import OperationalError

import tombola.producers.entry
from tests.books import Row, assert_books, table
from tests.kept_results import keep_results
from tests.ledgers import migrated, recharge
from tombola.producers.domain import keys
from tombola.producers.domain.causes import DeadReason, Status
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.draw import wheels
from tombola.producers.domain.errors import InternalError, InvalidKey, RequestBusy, TransactionOutdated, UnknownCampaign
from tombola.producers.entry import Entry
from tombola.producers.results import KEY_PREFIX, ResultStore, StoredResult
from tombola.producers.storage import requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import Acceptance, RequestRecord, SessionState, Submission, accepting, records
from tombola.producers.storage.schema import api_idempotency_requests
from tombola.producers.storage.transactions import transaction
from tombola.worker.audit.audit import audit
from tombola.worker.ledger import post as ledger
from tombola.worker.ledger.accounts import open_account
from tombola.worker.relay.given_up import time_out_once
from tombola.worker.relay.retention import archive_once
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Answer, Refused, Settled
from tombola.worker.settle.rules import Rules

WHEELS = wheels(bytes(range(32)))
RELAY_AFTER_S = 10.0


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    yield from _engine(database_url)


@pytest.fixture
def mariadb(mariadb_url: str) -> Iterator[Engine]:
    """For what only a server with row locks can do."""
    yield from _engine(mariadb_url)


def _engine(url: str) -> Iterator[Engine]:
    migrated(url)
    engine = open_engine(url, lock_wait_s=10)
    yield engine
    assert_books(engine)
    engine.dispose()


@pytest.fixture
def entry(engine: Engine) -> Entry:
    return entry_of(engine)


def entry_of(engine: Engine) -> Entry:
    """A frontend's way in, as one that has just started: it remembers nothing."""
    return Entry(engine, relay_after_s=RELAY_AFTER_S)


def ask(engine: Engine, draw: DrawRequest, caller: str = "") -> Acceptance:
    (answer,) = entry_of(engine).accept([Submission(draw, caller)])
    return answer


def settle(engine: Engine, *draws: DrawRequest) -> list[Answer]:
    return tries.settle(engine, draws, Rules(WHEELS, tries_max=2), sleep=lambda _: None)


def settled(engine: Engine, draw: DrawRequest) -> Settled:
    (answer,) = settle(engine, draw)
    assert isinstance(answer, Settled), answer
    return answer


def state_of(entry: Entry, session_id: str) -> SessionState:
    state = entry.state_of(session_id)
    assert state is not None
    return state


def rows(engine: Engine) -> dict[str, Row]:
    return {row["request_key"]: row for row in table(engine, "api_idempotency_requests")}


def archive_all(engine: Engine) -> int:
    """Archive what older releases have settled: all that is."""
    keep_results(engine)
    return archive_once(engine, older_than_s=-3600)


def key_that(account_id: int, *, wins: bool) -> str:
    keys = (f"k{number}" for number in count())
    return next(key for key in keys if (WHEELS["default"].draw(account_id, key).amount > 0) is wins)


# ---- accept ----------------------------------------------------------------------------------------------------------


def test_what_is_new_is_accepted_once(engine: Engine, entry: Entry) -> None:
    draw = DrawRequest(account_id=6, request_key="k", lottery_session_id="s")
    (first,) = entry.accept([Submission(draw, "shop")])
    assert (first.request, first.is_new, first.is_conflict) == (draw, True, False)
    assert first.record is not None
    assert first.record.status == Status.ACCEPTED
    (row,) = before = table(engine, "api_idempotency_requests")
    assert (row["status"], row["caller"], row["publish_attempts"]) == (Status.ACCEPTED, "shop", 1)
    assert row["created_at"] == row["accepted_at"] == row["published_at"] < row["publish_at"]
    for again in (
        *entry.accept([Submission(draw, "shop")]),
        entry.recall(Submission(draw, "shop")),
        ask(engine, draw, "shop"),
    ):
        assert again == first._replace(is_new=False)
    assert table(engine, "api_idempotency_requests") == before


CHANGES: dict[str, dict[str, Any]] = {
    "account": {"account_id": 7},
    "campaign": {"campaign": "another"},
    "session": {"lottery_session_id": "another"},
    "only the session": {"request_key": "another"},
}


def test_what_belongs_to_another_is_a_conflict_that_tells_nothing(engine: Engine, entry: Entry) -> None:
    fields: dict[str, Any] = {"account_id": 6, "request_key": "k", "lottery_session_id": "s", "campaign": "default"}
    entry.accept([Submission(DrawRequest(**fields), "shop")])
    before = table(engine, "api_idempotency_requests")
    for change, changed in CHANGES.items():
        other = Submission(DrawRequest(**fields | changed), "shop")
        answers = [*entry.accept([other]), *entry_of(engine).accept([other])]
        if change != "only the session":  # that the memory does not know by key
            answers += [it for it in [entry.recall(other)] if it is not None]
            assert len(answers) == 3
        assert answers == [Acceptance(other.request, None)] * len(answers), change
        assert answers[0].is_conflict
    assert table(engine, "api_idempotency_requests") == before


def test_one_batch_may_hold_everything(engine: Engine, entry: Entry) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(10))

    def draw(key: str, session: str = "", **fields: Any) -> DrawRequest:
        return DrawRequest(**{"account_id": account_id} | fields, request_key=key, lottery_session_id=session)

    known, told, archived, dead = draw("known"), draw("told", "s-told"), draw("archived"), draw("dead")
    entry.accept([Submission(it) for it in (known, told, archived, dead)])
    entry.accept([Submission(draw("shops"), "shop")])
    settled(engine, archived)
    assert archive_all(engine) == 1
    first = settled(engine, told)
    with engine.begin() as connection:
        requests.give_up(connection, "dead", dead.fingerprint(), DeadReason.PARKED)
    asked = {
        "new": Submission(draw("b-new")),
        "the new one again": Submission(draw("b-new")),
        "the new key for another": Submission(draw("b-new", account_id=9)),
        "known": Submission(known),
        "told": Submission(told),
        "archived": Submission(archived),
        "dead": Submission(dead),
        "a known key for another": Submission(draw("known", account_id=9)),
        "nobody's, now by a name": Submission(told, "rival"),
        "the rival's by now": Submission(told, "shop"),
        "nobody's again": Submission(told),
        "another's key": Submission(draw("shops"), "rival"),
        "another's session, and by now his own as well": Submission(draw("mine", "shops"), "rival"),
        "another's session": Submission(draw("visit", "archived"), "rival"),
        "a taken session": Submission(draw("a-thief", "known")),
        "new, too": Submission(draw("a-new", "s-new"), "shop"),
        "a session taken in this batch": Submission(draw("another-thief", "s-new"), "shop"),
    }
    answers = dict(zip(asked, entry_of(engine).accept(list(asked.values())), strict=True))
    renamed = {
        "the rival's by now": draw(keys.alias("shop", "told"), keys.alias("shop", "s-told")),
        "another's key": draw(keys.alias("rival", "shops")),
        "another's session": draw("visit", keys.alias("rival", "archived")),
    }
    assert {name: it.request for name, it in answers.items() if it.request != asked[name].request} == renamed
    assert {name for name, answer in answers.items() if answer.is_new} == {"new", "new, too", *renamed}
    statuses = {name: answer.record.status for name, answer in answers.items() if answer.record is not None}
    assert statuses == {
        "new": Status.ACCEPTED,
        "the new one again": Status.ACCEPTED,
        "known": Status.ACCEPTED,
        "told": Status.COMPLETED,
        "archived": Status.COMPLETED,
        "dead": Status.DEAD,
        "nobody's, now by a name": Status.COMPLETED,
        "nobody's again": Status.COMPLETED,
        "new, too": Status.ACCEPTED,
    } | dict.fromkeys(renamed, Status.ACCEPTED)
    known_told = answers["told"].record
    assert known_told is not None
    assert (known_told.result, known_told.settled_at) == (None, first.settled_at)
    found = rows(engine)
    given = {it.request_key for it in renamed.values()}
    assert set(found) == {"known", "told", "archived", "dead", "shops", "b-new", "a-new", *given}
    assert found["told"]["caller"] == "rival"
    for entry_or_new in (entry, entry_of(engine)):  # all of it again
        for name, answer in answers.items():
            (again,) = entry_or_new.accept([asked[name]])
            assert (again.request, again.is_new, again.is_conflict) == (answer.request, False, answer.is_conflict), name
    # What stands on record can be asked for as it stands there, by the one that it was given to alone.
    alias = draw(keys.alias("rival", "shops"))
    assert (ask(engine, alias, "rival").request, ask(engine, alias, "rival").is_new) == (alias, False)
    for caller in ("shop", "another"):
        with pytest.raises(InvalidKey, match="cannot be chosen"):
            ask(engine, alias, caller)


def test_within_a_batch_too_a_key_names_one_request_of_its_caller(engine: Engine, entry: Entry) -> None:
    mine, others = (open_account(engine, user_id=user, balance=Decimal(9)) for user in (1, 2))
    unowned = DrawRequest(account_id=others, request_key="k")
    settled(engine, unowned)  # by the broker alone: whoever asks for the same gets it, unless the key is taken
    draw = DrawRequest(account_id=mine, request_key="k")
    first, second, third = entry.accept([Submission(it, "shop") for it in (draw, unowned, draw)])
    assert first.request.request_key == third.request.request_key == keys.alias("shop", "k")
    assert (first.is_new, third.is_new, second.is_conflict) == (True, False, True)
    assert entry.accept([Submission(unowned, "shop")])[0].is_conflict
    assert ask(engine, unowned, "rival").record is not None


def test_nothing_to_accept_needs_no_answer(entry: Entry) -> None:
    assert entry.accept([]) == []


def test_keys_that_differ_in_case_are_two_requests(engine: Engine, entry: Entry) -> None:
    asked = [Submission(DrawRequest(account_id=1, request_key=key)) for key in ("Abc", "abc", "ABC")]
    assert [answer.is_new for answer in entry.accept(asked)] == [True] * 3


# ---- in parallel -----------------------------------------------------------------------------------------------------


def test_one_key_fifty_times_in_parallel_is_accepted_once(mariadb: Engine) -> None:
    """Through one frontend and through many."""
    shared = entry_of(mariadb)
    barrier = threading.Barrier(50, timeout=60)

    def click(number: int) -> list[Acceptance]:
        entry = shared if number % 2 else entry_of(mariadb)
        answers = []
        for turn in range(3):
            barrier.wait()
            answers += entry.accept([Submission(DrawRequest(account_id=1, request_key=f"k{turn}"))])
        return answers

    with ThreadPoolExecutor(50) as pool:
        everything = list(pool.map(click, range(50)))
    for answers in zip(*everything, strict=True):
        assert sum(answer.is_new for answer in answers) == 1
        assert {answer.record and answer.record.status for answer in answers} == {Status.ACCEPTED}
    assert set(rows(mariadb)) == {"k0", "k1", "k2"}


def test_one_session_for_many_keys_in_parallel_goes_to_one(mariadb: Engine) -> None:
    barrier = threading.Barrier(10, timeout=60)

    def click(number: int) -> Acceptance:
        barrier.wait()
        return ask(mariadb, DrawRequest(account_id=1, request_key=f"k{number}", lottery_session_id="s"))

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(click, range(10)))
    (winner,) = (answer for answer in answers if answer.is_new)
    assert sum(answer.is_conflict for answer in answers) == 9
    assert set(rows(mariadb)) == {winner.request.request_key}


def test_one_key_and_session_for_many_callers_in_parallel_is_each_ones_own(mariadb: Engine) -> None:
    barrier = threading.Barrier(8, timeout=60)
    draw = DrawRequest(account_id=1, request_key="order-17", lottery_session_id="visit-17")

    def click(number: int) -> list[Request]:
        barrier.wait()
        return [ask(mariadb, draw, f"caller-{number}").request for _ in range(2)]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(click, range(8)))
    assert all(first == again for first, again in answers)
    assert len({first.request_key for first, _ in answers}) == len({it.lottery_session_id for it, _ in answers}) == 8
    assert {row["caller"] for row in rows(mariadb).values()} == {f"caller-{number}" for number in range(8)}


def test_overlapping_batches_in_opposite_orders_do_not_fail(mariadb: Engine) -> None:
    """Sessions in another order than the keys: there two inserts may wait for each other in a circle."""
    barrier = threading.Barrier(4, timeout=60)

    def send(number: int) -> list[Acceptance]:
        answers = []
        for turn in range(8):
            asked = [
                Submission(
                    DrawRequest(account_id=1, request_key=f"k{turn}-{i:03d}", lottery_session_id=f"s{turn}-{-i % 97}")
                )
                for i in range(90)
            ]
            barrier.wait()
            answers += entry_of(mariadb).accept(asked if number % 2 else asked[::-1])
        return answers

    with ThreadPoolExecutor(4) as pool:
        everything = [answer for answers in pool.map(send, range(4)) for answer in answers]
    assert not any(answer.is_conflict for answer in everything)
    new = [answer.request.request_key for answer in everything if answer.is_new]
    assert len(new) == len(set(new)) == len(rows(mariadb)) == 8 * 90


def test_an_accept_meets_the_worker_that_settles_the_same_key(mariadb: Engine) -> None:
    """The message came by the broker alone, while the client asks here."""
    accounts = [open_account(mariadb, user_id=number, balance=Decimal(100)) for number in range(1, 4)]
    draws = [DrawRequest(account_id=accounts[number % 3], request_key=f"k{number}") for number in range(60)]
    barrier = threading.Barrier(2, timeout=60)

    def work() -> list[Answer]:
        barrier.wait()
        return [answer for start in range(0, 60, 5) for answer in settle(mariadb, *draws[start : start + 5])]

    def client() -> list[Acceptance]:
        barrier.wait()
        return [answer for start in range(0, 60, 5) for answer in entry_of(mariadb).accept(
            [Submission(draw) for draw in draws[start : start + 5]]
        )]  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        working, asking = pool.submit(work), pool.submit(client)
    assert all(isinstance(answer, Settled) for answer in working.result())
    assert not any(answer.is_conflict for answer in asking.result())
    assert {row["status"] for row in rows(mariadb).values()} == {Status.COMPLETED}


# ---- a snapshot that is older than the request -----------------------------------------------------------------------


@pytest.fixture
def application(mariadb: Engine) -> Iterator[Connection]:
    """An application's transaction in MariaDB's default isolation, as of 11.6.2, whose snapshot is of now."""
    engine = create_engine(mariadb.url, isolation_level="REPEATABLE READ")
    with engine.connect() as connection:
        try:
            connection.exec_driver_sql("SET SESSION innodb_snapshot_isolation = ON")
        except OperationalError as error:
            pytest.skip(f"this server cannot do that: {error.orig}")
        connection.commit()
        assert connection.execute(select(api_idempotency_requests.c.request_key)).all() == []
        yield connection
    engine.dispose()


def orders(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return [str(row[0]) for row in connection.exec_driver_sql("SELECT kid FROM receipt_keys")]


ORDER = "INSERT INTO receipt_keys VALUES ('order', 'of the application', NOW(6), NULL)"


def test_a_repeat_that_the_applications_snapshot_cannot_see_gets_the_first_ticket(
    mariadb: Engine, application: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tombola.producers.entry, "SNAPSHOT_ISOLATION_SINCE", (0,))
    entry = entry_of(mariadb)
    draw, other = (DrawRequest(account_id=account_id, request_key="k") for account_id in (1, 2))
    entry.accept([Submission(draw)])
    application.exec_driver_sql(ORDER)
    again = entry.accept_with(application, Submission(draw))
    assert (again.request, again.is_new, again.is_conflict) == (draw, False, False)
    assert entry.accept_with(application, Submission(other)).is_conflict
    # A request without a caller becomes the caller's, as it does in a transaction that sees it.
    assert entry.accept_with(application, Submission(draw, "shop")).request == draw
    assert entry.accept_with(application, Submission(other, "shop")).is_conflict
    mine = DrawRequest(account_id=1, request_key="mine")
    assert entry.accept_with(application, Submission(mine)).is_new
    assert not entry.accept_with(application, Submission(mine)).is_new, "it sees its own"
    application.commit()
    assert orders(mariadb) == ["order"], "nothing of the application's was lost"
    assert set(rows(mariadb)) == {"k", "mine"}


def test_a_transaction_that_the_server_has_rolled_back_says_so(
    mariadb: Engine, application: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a server that is older than the default, and has the variable set."""
    monkeypatch.setattr(tombola.producers.entry, "SNAPSHOT_ISOLATION_SINCE", (99,))
    entry = entry_of(mariadb)
    draw = DrawRequest(account_id=1, request_key="k")
    for attempt in range(2):
        entry.accept([Submission(draw)])  # meanwhile, as far as the first attempt can see
        application.exec_driver_sql(ORDER)
        if attempt:
            assert not entry.accept_with(application, Submission(draw)).is_new
            application.commit()
            break
        with pytest.raises(TransactionOutdated, match="do all of it again"):
            entry.accept_with(application, Submission(draw))
        application.rollback()
        assert orders(mariadb) == []
    assert orders(mariadb) == ["order"]


# ---- what others hold ------------------------------------------------------------------------------------------------


def busy(engine: Engine, draws: Sequence[DrawRequest]) -> set[str]:
    with transaction(engine) as probe:
        return requests.busy(probe, [it.request_key for it in draws], [it.lottery_session_id for it in draws])


def test_busy_names_what_an_open_transaction_holds(mariadb: Engine) -> None:
    draws = [DrawRequest(account_id=1, request_key=f"k{number:03d}", lottery_session_id=f"s{number % 799:03d}")
             for number in range(800)]  # fmt: skip
    entry_of(mariadb).accept([Submission(draw) for draw in draws[600:799]])
    others = [DrawRequest(account_id=1, request_key=f"x{number}") for number in range(3)]
    assert busy(mariadb, []) == busy(mariadb, draws) == busy(mariadb, others) == set()
    with open_engine(mariadb.url.render_as_string(hide_password=False)).connect() as other:
        entry = entry_of(mariadb)
        # Inserted and not committed: its key, and its session under another key.
        entry.accept_with(other, Submission(draws[5]))
        entry.accept_with(other, Submission(DrawRequest(account_id=1, request_key="theirs", lottery_session_id="s007")))
        assert busy(mariadb, draws) == {"k005", "k007"}
        assert busy(mariadb, [draws[5]]) == {"k005"}
        assert busy(mariadb, others) == set()  # in a table so small that each search passes them
        # A row that is there, by its key.
        other.execute(text("SELECT 1 FROM api_idempotency_requests WHERE request_key = 'k700' FOR UPDATE"))
        assert busy(mariadb, draws) == {"k005", "k007", "k700"}
        for number in range(20, 57):
            entry.accept_with(other, Submission(draws[number * 8]))
        assert len(busy(mariadb, draws)) == 40
        # Two keys for one session.
        other.rollback()
        entry.accept_with(other, Submission(draws[0]))
        assert busy(mariadb, draws) == {"k000", "k799"}
        other.rollback()
    assert busy(mariadb, draws) == set()


def test_what_another_transaction_holds_keeps_only_itself_waiting(mariadb: Engine) -> None:
    entry = entry_of(mariadb)
    draws = [DrawRequest(account_id=1, request_key=f"k{number:03d}") for number in range(100)]
    with open_engine(mariadb.url.render_as_string(hide_password=False)).connect() as other:
        for number in (3, 50):
            entry_of(mariadb).accept_with(other, Submission(draws[number]))
        began = time.monotonic()
        answers = entry.accept_each([Submission(draw) for draw in draws], busy_wait_s=0)
        took_s = time.monotonic() - began
        assert [number for number, it in enumerate(answers) if isinstance(it, RequestBusy)] == [3, 50]
        assert all(
            isinstance(it, Acceptance) and it.is_new for number, it in enumerate(answers) if number not in (3, 50)
        )
        assert took_s < 0.9  # a lock that is waited for takes a second at least
        with pytest.raises(RequestBusy):
            entry.accept([Submission(draws[3])])
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(entry.accept, [Submission(draws[3])])
            time.sleep(0.2)
            other.rollback()
            (answer,) = waiting.result()
        assert answer.is_new
        with ThreadPoolExecutor(1) as pool:
            entry_of(mariadb).accept_with(other, Submission(draws[50]))
            waiting = pool.submit(entry.accept, [Submission(draws[50])])
            time.sleep(0.2)
            other.commit()
            (answer,) = waiting.result()
        assert (answer.is_new, answer.is_conflict) == (False, False)
    assert set(rows(mariadb)) == {draw.request_key for draw in draws}


def test_a_gap_that_a_stranger_holds_keeps_only_its_keys_waiting(mariadb: Engine) -> None:
    """At the server's own isolation level a locking read of what is not there holds the place where it would be."""
    entry = entry_of(mariadb)
    entry.accept([Submission(DrawRequest(account_id=1, request_key=key)) for key in ("k100", "k200", "k300")])
    draws = [DrawRequest(account_id=1, request_key=f"k{number}") for number in range(101, 300, 7)]
    url = mariadb.url.render_as_string(hide_password=False)
    with create_engine(url, isolation_level="REPEATABLE READ").connect() as stranger:
        stranger.execute(text("SELECT 1 FROM api_idempotency_requests WHERE request_key = 'k150' FOR UPDATE"))
        answers = entry.accept_each([Submission(draw) for draw in draws], busy_wait_s=0)
    told = {it.request_key: type(answer) for it, answer in zip(draws, answers, strict=True)}
    assert told == {it.request_key: RequestBusy if it.request_key < "k200" else Acceptance for it in draws}
    entry.accept([Submission(draw) for draw in draws])


# ---- what is wrong with one ------------------------------------------------------------------------------------------


def test_an_unknown_campaign_is_refused_before_anything_is_written(engine: Engine, entry: Entry) -> None:
    good, known = DrawRequest(account_id=1, request_key="good"), DrawRequest(account_id=1, request_key="known")
    stranger = DrawRequest(account_id=1, request_key="k", campaign="spring")
    old = DrawRequest(account_id=1, request_key="old", campaign="spring")
    with transaction(engine) as before:  # by an entry that knew this campaign
        requests.accept(before, [Submission(old)], utc_now(), publish_at=utc_now(), is_published=True)
    entry.accept([Submission(known)])
    other = DrawRequest(account_id=1, request_key="known", campaign="spring")
    told = entry_of(engine).accept_each([Submission(it) for it in (stranger, good, old, other)])
    assert isinstance(told[0], UnknownCampaign)
    assert "'spring'" in str(told[0])
    assert isinstance(told[1], Acceptance)
    assert told[1].is_new
    # What was accepted while there was such a campaign is told as the first time, and a key stays its owner's.
    assert isinstance(told[2], Acceptance)
    assert told[2].record is not None
    moment = told[2].record.accepted_at
    as_then = RequestRecord(old.fingerprint(), "", Status.ACCEPTED, accepted_at=moment, created_at=moment)
    assert told[2] == Acceptance(old, as_then)
    assert told[3] == Acceptance(other, None)
    assert set(rows(engine)) == {"good", "known", "old"}
    with engine.connect() as connection, pytest.raises(UnknownCampaign):
        entry.accept_with(connection, Submission(stranger))
    with engine.connect() as connection:
        assert not entry.accept_with(connection, Submission(old)).is_conflict
        assert entry.accept_with(connection, Submission(other)).is_conflict
    assert set(rows(engine)) == {"good", "known", "old"}


def test_a_mistake_of_ours_with_one_request_is_told_to_it_alone(
    engine: Engine, entry: Entry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = records.request_values

    def mistaken(request: DrawRequest, *others: str) -> Any:
        if request.request_key == "k13":
            raise TypeError("a mistake of ours")
        return values(request, *others)

    monkeypatch.setattr(accepting, "request_values", mistaken)
    asked = [Submission(DrawRequest(account_id=1, request_key=f"k{number:02d}")) for number in range(50)]
    answers = entry.accept_each(asked)
    assert [number for number, it in enumerate(answers) if not isinstance(it, Acceptance)] == [13]
    assert type(answers[13]) is InternalError
    assert len(rows(engine)) == 49
    (told,) = [it for it in caplog.records if it.exc_info]
    assert "k13" in told.getMessage()
    assert "TypeError" in caplog.text
    with pytest.raises(InternalError):
        entry.accept(asked[13:14])


def test_a_value_that_the_database_refuses_is_no_outage(mariadb: Engine) -> None:
    asked = [Submission(DrawRequest(account_id=1, request_key=f"k{number:02d}")) for number in range(50)]
    asked[20] = asked[20]._replace(caller="x" * 65)  # error 1406
    answers = entry_of(mariadb).accept_each(asked)
    assert [number for number, it in enumerate(answers) if not isinstance(it, Acceptance)] == [20]
    assert type(answers[20]) is InternalError
    assert len(rows(mariadb)) == 49


# ---- dead ------------------------------------------------------------------------------------------------------------


def test_who_is_dead_stays_dead_however_often_he_is_asked_for(engine: Engine, entry: Entry) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    draw = DrawRequest(account_id=account_id, request_key="k", lottery_session_id="s")
    entry.accept([Submission(draw)])
    with engine.begin() as connection:
        assert not requests.give_up(connection, "k", "another fingerprint", DeadReason.PARKED)
        assert requests.give_up(connection, "k", draw.fingerprint(), DeadReason.PARKED)
        assert not requests.give_up(connection, "k", draw.fingerprint(), DeadReason.NEVER_SETTLED)
    again = ask(engine, draw)
    assert again.record is not None
    assert (again.is_new, again.record.status, again.record.reason) == (False, Status.DEAD, DeadReason.PARKED)
    state = state_of(entry, "s")
    assert (state.request, state.status, state.reason, state.result) == (draw, Status.DEAD, DeadReason.PARKED, None)
    assert isinstance(settle(engine, draw)[0], Refused)
    assert [row["status"] for row in rows(engine).values()] == [Status.DEAD]


def test_revive_opens_only_what_is_dead(engine: Engine, entry: Entry) -> None:
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    draws = {key: DrawRequest(account_id=account_id, request_key=key) for key in ("accepted", "completed", "dead")}
    entry.accept([Submission(draw, "shop") for draw in draws.values()])
    first = settled(engine, draws["completed"])
    with engine.begin() as connection:
        requests.give_up(connection, "dead", draws["dead"].fingerprint(), DeadReason.PARKED)
    before = rows(engine)
    with engine.begin() as connection:
        assert requests.revive(connection, [*draws, "unknown"], utc_now()) == 1
    after = rows(engine)
    assert {key: after[key] == before[key] for key in draws} == {"accepted": True, "completed": True, "dead": False}
    revived = after["dead"]
    assert (revived["status"], revived["reason"], revived["publish_attempts"]) == (Status.ACCEPTED, None, 0)
    assert (revived["published_at"], revived["caller"]) == (None, "shop")
    assert not settled(engine, draws["dead"]).is_repeat
    assert settled(engine, draws["completed"]).result == first.result


@pytest.mark.parametrize("given_up_by", ["time_out", "give_up"])
def test_who_is_given_up_while_a_worker_has_him_in_hand_is_not_charged(
    mariadb: Engine, given_up_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dead is an answer that clients have seen: the worker read `accepted`, and must look again."""
    account_id = open_account(mariadb, user_id=1, balance=Decimal(10))
    draws = [DrawRequest(account_id=account_id, request_key=key) for key in ("k1", "k2")]
    entry_of(mariadb).accept([Submission(draw) for draw in draws])
    post = ledger.post

    def meanwhile(*arguments: Any) -> None:
        monkeypatch.undo()
        post(*arguments)
        with mariadb.begin() as connection:
            if given_up_by == "time_out":
                assert len(requests.time_out(connection, utc_now(), rows_max=1)) == 1
            else:
                assert requests.give_up(connection, "k1", draws[0].fingerprint(), DeadReason.PARKED)

    monkeypatch.setattr(ledger, "post", meanwhile)
    refused, answer = settle(mariadb, *draws)
    assert isinstance(refused, Refused)
    assert refused.cause == "never settled"
    assert isinstance(answer, Settled)
    assert {key: row["status"] for key, row in rows(mariadb).items()} == {"k1": Status.DEAD, "k2": Status.COMPLETED}


# ---- archive ---------------------------------------------------------------------------------------------------------


def test_what_is_archived_is_told_in_the_same_bytes(engine: Engine, entry: Entry, redis_url: str) -> None:
    rich = open_account(engine, user_id=1, balance=Decimal(10))
    poor = open_account(engine, user_id=2, balance=Decimal("0.70"))
    wins, loses = (DrawRequest(account_id=rich, request_key=key_that(rich, wins=it)) for it in (True, False))
    asked = [wins, loses, *(DrawRequest(account_id=it, request_key=f"account-{it}") for it in (poor, 4711))]
    entry.accept([Submission(draw, "shop") for draw in asked])
    first = [settled(engine, draw) for draw in asked]
    for is_kept in (False, True):
        told = [ask(engine, draw, "shop").record for draw in asked]
        kept = [(it.result if is_kept else None, it.settled_at) for it in first]
        assert [(it.result, it.settled_at) for it in told if it] == kept
        assert [state_of(entry, draw.lottery_session_id).result for draw in asked] == [it.result for it in first]
        assert audit(engine, WHEELS).violations == []
        keep_results(engine)
    store = ResultStore.open(redis_url, ttl_s=60, engine=engine)
    store.put([StoredResult(it.request.lottery_session_id, it.result, it.settled_at) for it in first])
    envelopes = store._client.mget([KEY_PREFIX + draw.lottery_session_id for draw in asked])

    for account_id in (rich, poor):
        recharge(engine, account_id, Decimal(5))
    assert [archive_all(engine) for _ in range(2)] == [4, 0]
    assert {row["result"] for row in rows(engine).values()} == {None}
    store._client.flushdb()
    assert [store.get(draw.lottery_session_id) for draw in asked] == [it.result for it in first]
    assert store._client.mget([KEY_PREFIX + draw.lottery_session_id for draw in asked]) == envelopes
    store.close()
    for draw, answer in zip(asked, first, strict=True):
        state = state_of(entry, draw.lottery_session_id)
        assert (state.request, state.caller, state.result) == (draw, "shop", answer.result)
        assert state.settled_at == answer.settled_at
        again = ask(engine, draw, "shop")
        assert again.record is not None
        assert (again.is_new, again.record.is_settled, again.record.settled_at) == (False, True, answer.settled_at)
        late = settled(engine, draw)
        assert (late.result, late.settled_at, late.is_repeat) == (answer.result, answer.settled_at, True)
        # It is as much his as before, and so is its session.
        assert ask(engine, draw, "rival").request.request_key == keys.alias("rival", draw.request_key)
        thief = DrawRequest(account_id=rich, request_key="thief", lottery_session_id=draw.lottery_session_id)
        assert ask(engine, thief, "shop").is_conflict
    assert audit(engine, WHEELS).violations == []


def test_only_what_settled_long_ago_is_archived_in_steps(engine: Engine, entry: Entry) -> None:
    rich, poor = open_account(engine, user_id=1, balance=Decimal(100)), open_account(engine, user_id=2)
    draws = [DrawRequest(account_id=(rich, poor)[number % 2], request_key=f"k{number:02d}") for number in range(30)]
    entry.accept([Submission(draw) for draw in draws[:20]])
    for draw in draws[4:]:  # by the broker alone, from 20 on
        settled(engine, draw)
    with engine.begin() as connection:
        requests.give_up(connection, "k00", draws[0].fingerprint(), DeadReason.PARKED)
        for key in ("k02", "k06", "k07", "k08", "k09", "k26", "k27", "k00"):
            connection.execute(
                text(
                    "UPDATE api_idempotency_requests SET accepted_at = :then, publish_at = :then, settled_at = "
                    "CASE WHEN settled_at IS NULL THEN NULL ELSE :then END WHERE request_key = :key"
                ),
                {"then": (utc_now() - timedelta(days=91)).strftime("%Y-%m-%d %H:%M:%S.%f"), "key": key},
            )
    keep_results(engine)
    before = rows(engine)
    day_s = 86_400
    assert [archive_once(engine, older_than_s=90 * day_s, rows_max=4) for _ in range(3)] == [4, 2, 0]
    after = rows(engine)
    old = {"k06", "k07", "k08", "k09", "k26", "k27"}
    assert {key for key in after if after[key] != before[key]} == old
    assert {key for key in old if after[key]["result"] is None} == old
    kept = ("status", "reason", "settled_at", "created_at", "fingerprint", "caller")
    assert all(after[key][name] == before[key][name] for key in old for name in kept)
    for key in old:
        state = state_of(entry, key)
        assert state.result == before[key]["result"].encode()
    overdue = {("I8", "request k02")}  # what waits for so long is a violation of its own
    assert {(it.invariant, it.subject) for it in audit(engine, WHEELS).violations} == overdue
    assert archive_all(engine) == 20
    assert {row["status"] for row in rows(engine).values() if row["result"] is None} == {
        *(Status.ACCEPTED, Status.COMPLETED, Status.REJECTED, Status.DEAD)
    }
    assert {(it.invariant, it.subject) for it in audit(engine, WHEELS).violations} == overdue


def test_a_session_that_also_names_other_rows_is_rebuilt_to_the_same_bytes(engine: Engine, entry: Entry) -> None:
    """Sessions are the clients' to choose, and recharges have one as well."""
    account_id = open_account(engine, user_id=1, balance=Decimal(10))
    (opening,) = table(engine, "asset_transactions")
    session_id = opening["lottery_session_id"]
    draw = DrawRequest(account_id=account_id, request_key="k", lottery_session_id=session_id)
    first = settled(engine, draw)
    archive_all(engine)
    state = state_of(entry, session_id)
    assert state.result == first.result
    assert settled(engine, draw).result == first.result
    with engine.begin() as connection:  # the books hold such a session for one that is not whole
        connection.execute(
            text("UPDATE asset_transactions SET lottery_session_id = 'x', business_id = 'x' WHERE transaction_id = 1")
        )


# ---- all of it in any order ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What must be on record of one key."""

    request: Request
    caller: str
    status: str
    reason: str | None = None
    result: bytes | None = None
    is_kept: bool = False  # the result's text, by an older release
    is_archived: bool = False
    attempts: int = 1


TRIES_MAX = 3
HOUR = timedelta(hours=1)
keys_ = st.sampled_from(["a", "b", "c", "d"])
draws_ = st.builds(
    DrawRequest,
    request_key=keys_,
    lottery_session_id=st.sampled_from(["", "", "s", "b"]),  # mostly its own; and one that is also a key
    account_id=st.sampled_from([1, 1, 2, 3]),  # rich, poor, not there
)
callers_ = st.sampled_from(["", "", "shop", "rival"])
NAMES = ("request_key", "lottery_session_id")


class Requests(RuleBasedStateMachine):
    """A request's row under every operation that there is, beside a dictionary that says what it must hold."""

    template: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self._folder = TemporaryDirectory()
        path = Path(self._folder.name) / "ledger.db"
        shutil.copy(self.template, path)
        self.engine = open_engine(f"sqlite:///{path}")
        self.entry = entry_of(self.engine)
        self.expected: dict[str, Expected] = {}
        self.given: dict[Submission, Request] = {}  # what stands on record for what was asked
        self.refused: list[Submission] = []

    def teardown(self) -> None:
        assert audit(self.engine, WHEELS).violations == []
        self.engine.dispose()
        self._folder.cleanup()

    def _is_taken(self, draw: DrawRequest) -> bool:
        return any(it.request.lottery_session_id == draw.lottery_session_id for it in self.expected.values())

    def _replace(self, chosen: dict[str, Expected], **changes: Any) -> None:
        self.expected |= {key: replace(it, **changes) for key, it in chosen.items()}

    def _that_are(self, *statuses: str) -> dict[str, Expected]:
        return {key: it for key, it in self.expected.items() if it.status in statuses}

    def _check_renamed(self, it: Submission, given: Request, known: list[Expected]) -> None:
        """Who gets an alias has asked for what another caller held, and it is an alias for that."""
        theirs = [one.request for one in known if one.caller != it.caller]
        for name in ("request_key", "lottery_session_id"):
            asked_name, given_name = getattr(it.request, name), getattr(given, name)
            if given_name != asked_name:
                assert given_name == keys.alias(it.caller, asked_name)
                assert asked_name in {getattr(other, other_name) for other in theirs for other_name in NAMES}
        assert (given.account_id, given.terms) == (it.request.account_id, it.request.terms)

    @rule(asked=st.lists(st.builds(Submission, draws_, callers_), min_size=1, max_size=4))
    def ask(self, asked: list[Submission]) -> None:
        recalled = [self.entry.recall(it) for it in asked]
        new: list[tuple[Submission, Request]] = []
        at_first = list(self.expected.values())
        for it, answer, recall in zip(asked, self.entry.accept(asked), recalled, strict=True):
            given, before = answer.request, self.given.get(it)
            known = self.expected.get(given.request_key)
            assert answer.is_new == (known is None and not answer.is_conflict)
            if before is not None:  # the same answer for ever
                assert (given, answer.is_new, answer.is_conflict) == (before, False, False)
            if answer.is_conflict:
                assert given == it.request
                self.refused.append(it)
                continue
            if known is None:
                self.expected[given.request_key] = Expected(given, it.caller, Status.ACCEPTED)
                new.append((it, given))
            else:
                assert known.request == given
                assert known.caller == it.caller or "" in (known.caller, it.caller)
                self.expected[given.request_key] = replace(known, caller=known.caller or it.caller)
                assert answer.record is not None
                assert (answer.record.status, answer.record.reason) == (known.status, known.reason)
            self.given[it] = given
            # What nobody's name stood for may have been named since, and is another's then: the memory does not know.
            if recall is not None and (it.caller or not recall.is_conflict):
                assert (recall.request, recall.is_conflict) == (given, False)
        for it, given in new:
            self._check_renamed(it, given, [*at_first, *self.expected.values()])
        for it in self.refused:  # by the caller's own request, under that key or with that session
            # Also what was nobody's before this batch, and has been named in it since.
            known_then = [*at_first, *self.expected.values()]
            mine = [known.request for known in known_then if known.caller in (it.caller, "")]
            names = {name for one in mine for name in (one.request_key, one.lottery_session_id)}
            asked_names = (it.request.request_key, it.request.lottery_session_id)
            assert names & {*asked_names, *(keys.alias(it.caller, name) for name in asked_names)}
        self.refused.clear()

    @rule(draws=st.lists(draws_, min_size=1, max_size=3))
    def settle(self, draws: list[DrawRequest]) -> None:
        for draw, answer in zip(draws, settle(self.engine, *draws), strict=True):
            known = self.expected.get(draw.request_key)
            if known is None and self._is_taken(draw):
                assert isinstance(answer, Refused)
            elif known is not None and (known.request != draw or known.status == Status.DEAD):
                assert isinstance(answer, Refused)
                assert answer.cause == ("never settled" if known.request == draw else "fingerprint mismatch")
            else:
                assert isinstance(answer, Settled)
                assert answer.is_repeat == (known is not None and known.result is not None)
                known = known or Expected(draw, "", Status.ACCEPTED, attempts=0)
                if known.result is None:
                    status = Status.COMPLETED if b'"completed"' in answer.result else Status.REJECTED
                    reason = (
                        None if status == Status.COMPLETED else str(answer.result).split('"reason":"')[1].split('"')[0]
                    )
                    known = replace(known, status=status, reason=reason, result=answer.result)
                self.expected[draw.request_key] = known
                assert answer.result == known.result

    @rule()
    def keep(self) -> None:
        keep_results(self.engine)
        chosen = self._that_are(Status.COMPLETED, Status.REJECTED)
        self._replace({key: it for key, it in chosen.items() if not it.is_archived}, is_kept=True)

    @rule()
    def archive(self) -> None:
        chosen = {key: it for key, it in self.expected.items() if it.is_kept}
        assert archive_once(self.engine, older_than_s=-2 * HOUR.total_seconds()) == len(chosen)
        self._replace(self._that_are(*{it.status for it in chosen.values()}), is_kept=False, is_archived=True)

    @rule(draw=draws_)
    def give_up(self, draw: DrawRequest) -> None:
        chosen = {key: it for key, it in self._that_are(Status.ACCEPTED).items() if it.request == draw}
        with self.engine.begin() as connection:
            given_up = requests.give_up(connection, draw.request_key, draw.fingerprint(), DeadReason.PARKED)
        assert given_up == bool(chosen)
        self._replace(chosen, status=Status.DEAD, reason=DeadReason.PARKED)

    @rule()
    @precondition(lambda self: self._that_are(Status.ACCEPTED))
    def time_out(self) -> None:
        chosen = self._that_are(Status.ACCEPTED)
        assert time_out_once(self.engine, timeout_s=-1) == len(chosen)
        self._replace(chosen, status=Status.DEAD, reason=DeadReason.TIMED_OUT)

    @rule(some=st.sets(keys_, min_size=1))
    @precondition(lambda self: self._that_are(Status.DEAD))
    def revive(self, some: set[str]) -> None:
        chosen = {key: it for key, it in self._that_are(Status.DEAD).items() if key in some}
        with self.engine.begin() as connection:
            assert requests.revive(connection, sorted(some), utc_now()) == len(chosen)
        self._replace(chosen, status=Status.ACCEPTED, reason=None, attempts=0)

    @rule(is_refused=st.booleans())
    @precondition(lambda self: self._that_are(Status.ACCEPTED))
    def relay(self, is_refused: bool) -> None:
        chosen = self._that_are(Status.ACCEPTED)
        last = {key: it for key, it in chosen.items() if it.attempts >= TRIES_MAX}
        due = {key: it for key, it in chosen.items() if key not in last}
        with self.engine.begin() as connection:
            lease = requests.lease(
                connection,
                utc_now() + HOUR,
                rows_max=100,
                tries_max=TRIES_MAX,
                delay_after=lambda _: timedelta(0),
                published_before=None,
            )
            if is_refused and lease.due:
                requests.put_off(connection, [it.request_key for it in lease.due], "down", utc_now() + HOUR)
        assert {it.request_key: it for it in lease.due} == {key: it.request for key, it in due.items()}
        assert {it.request_key for it in lease.dead} == set(last)
        self._replace(last, status=Status.DEAD, reason=DeadReason.NEVER_SETTLED)
        if not is_refused:
            self.expected |= {key: replace(it, attempts=it.attempts + 1) for key, it in due.items()}

    @rule()
    def restart(self) -> None:
        self.entry = entry_of(self.engine)

    @invariant()
    def the_table_holds_what_is_expected(self) -> None:
        assert {
            key: (row["status"], row["reason"], row["caller"], row["result"] is not None, row["publish_attempts"])
            for key, row in rows(self.engine).items()
        } == {key: (it.status, it.reason, it.caller, it.is_kept, it.attempts) for key, it in self.expected.items()}

    @invariant()
    def every_session_is_told_its_first_result(self) -> None:
        for it in self.expected.values():
            state = state_of(self.entry, it.request.lottery_session_id)
            assert (state.request, state.status, state.result) == (it.request, it.status, it.result)

    @invariant()
    def the_books_are_right(self) -> None:
        assert_books(self.engine)


@pytest.mark.slow
def test_a_requests_life_in_any_order(tmp_path: Path) -> None:
    Requests.template = tmp_path / "template.db"
    migrated(f"sqlite:///{Requests.template}")
    engine = open_engine(f"sqlite:///{Requests.template}")
    assert [open_account(engine, user_id=1, balance=Decimal(500)), open_account(engine, user_id=2)] == [1, 2]
    with engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA journal_mode=DELETE")  # all of it in the one file
    engine.dispose()
    machine: Any = hypothesis_settings(
        max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Requests, settings=machine)
