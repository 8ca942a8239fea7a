"""Processes whose own clock is a day off: the database's decides what is overdue, timed out, archived or over."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, event, select, text, update
from sqlalchemy.exc import DBAPIError

from tests.books import table as rows_of
from tests.kept_results import keep_results
from tests.ledgers import migrated
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import DrawRequest, parse_request
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.entry import Entry
from tombola.producers.settings import Settings
from tombola.producers.storage import clock, requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import api_idempotency_requests as table
from tombola.producers.storage.schema import operator_sessions, replays
from tombola.producers.telemetry import metrics
from tombola.worker.dead_letters import letters as dead_letters
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.dead_letters.message import Parking
from tombola.worker.deliveries import Delivery
from tombola.worker.doctor import draws as doctor
from tombola.worker.doctor.checks import Facts
from tombola.worker.ledger import accounts
from tombola.worker.operators import actions
from tombola.worker.operators import users as operators
from tombola.worker.relay.given_up import time_out_once
from tombola.worker.relay.overdue import relay_once
from tombola.worker.relay.retention import archive_once
from tombola.worker.replays import replay
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.rules import Rules

WHEELS = {DEFAULT_CAMPAIGN.name: Wheel(DEFAULT_CAMPAIGN, b"seed" * 8)}
AFTER_S = 10.0
DAY = timedelta(hours=25)
AHEAD, BEHIND = DAY, datetime(2000, 1, 1, tzinfo=UTC) - datetime.now(UTC)

SetClock = Callable[[timedelta], None]
true_now = utc_now


@pytest.fixture
def engine(mariadb_url: str) -> Iterator[Engine]:
    made = open_engine(mariadb_url)
    migrated(made)
    yield made
    made.dispose()


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Put this process's clock wrong: every `utc_now` in every room, and time.time()."""
    true_time = time.time

    def set_clock(by: timedelta) -> None:
        monkeypatch.setattr(time, "time", lambda: true_time() + by.total_seconds())
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in ("producers", "worker") and hasattr(module, "utc_now"):
                monkeypatch.setattr(module, "utc_now", lambda: true_now() + by)

    return set_clock


class Keeps:
    """A broker that keeps what it is given."""

    def __init__(self) -> None:
        self.published: list[str] = []

    def publish(self, bodies: Sequence[bytes], headers: object = None) -> None:
        self.published += [parse_request(body).request_key for body in bodies]

    def backlog(self) -> int:
        return 0

    def close(self) -> None:
        pass


def draw(key: str) -> DrawRequest:
    return DrawRequest(account_id=1, request_key=key)


def is_true(moment: Any) -> bool:
    """Whether that is now, by a clock that is right."""
    return bool(abs(moment.replace(tzinfo=UTC) - true_now()) < timedelta(seconds=30))


def row(engine: Engine, key: str) -> dict[str, Any]:
    return next(it for it in rows_of(engine, table.name) if it["request_key"] == key)


def age(engine: Engine, by: timedelta, *columns: str) -> None:
    with engine.begin() as connection:
        connection.execute(update(table).values({name: true_now() - by for name in columns}))


@pytest.mark.parametrize("by", [AHEAD, BEHIND], ids=["a day ahead", "in the year 2000"])
def test_a_process_whose_clock_is_off_accepts_relays_and_settles_as_others_do(
    engine: Engine, set_clock: SetClock, by: timedelta
) -> None:
    account_id = accounts.open_account(engine, user_id=1, balance=Decimal(9))
    set_clock(by)
    entry, broker = Entry(engine, relay_after_s=AFTER_S), Keeps()
    entry.accept([Submission(draw("fresh"))])
    with engine.begin() as connection:
        entry.accept_with(connection, Submission(draw("joined")))
    fresh = row(engine, "fresh")
    assert all(is_true(fresh[it]) for it in ("created_at", "accepted_at", "published_at"))
    assert fresh["publish_at"] - fresh["accepted_at"] == timedelta(seconds=AFTER_S)
    # One that waits to be published is; one that was just published is neither overdue nor timed out.
    assert relay_once(engine, broker, after_s=AFTER_S, tries_max=1) == 1
    assert broker.published == ["joined"]
    assert relay_once(engine, broker, after_s=AFTER_S, tries_max=1) == 0
    assert time_out_once(engine) == 0
    assert {row(engine, key)["status"] for key in ("fresh", "joined")} == {"accepted"}

    answers = tries.settle(
        engine,
        [DrawRequest(account_id=account_id, request_key="fresh"), draw("new")],
        Rules(WHEELS, tries_max=3),
    )
    assert all(isinstance(it, Settled) and is_true(it.settled_at) for it in answers)
    assert all(is_true(row(engine, key)["settled_at"]) for key in ("fresh", "new"))
    keep_results(engine)
    assert archive_once(engine, older_than_s=3600) == 0
    assert all(is_true(it["created_at"]) for it in rows_of(engine, "asset_transactions"))

    # What is old is, whatever this process thinks.
    age(engine, timedelta(hours=24, minutes=5), "accepted_at", "publish_at", "settled_at")
    assert archive_once(engine, older_than_s=24 * 3600) == 2
    assert time_out_once(engine) == 1
    assert row(engine, "joined")["reason"] == "TIMED_OUT"
    with engine.begin() as connection:
        assert requests.revive(connection, ["joined"], clock.now(connection)) == 1
    assert time_out_once(engine) == 0
    entry.close()


@pytest.mark.parametrize("by", [AHEAD, BEHIND], ids=["a day ahead", "in the year 2000"])
def test_dead_letters_replays_sessions_and_the_record_go_by_the_databases_clock(
    engine: Engine, set_clock: SetClock, by: timedelta
) -> None:
    operators.add(engine, "ann", "operator", "correct horse battery")
    token = operators.open_session(engine, "ann")
    set_clock(by)
    assert operators.session(engine, token) is not None
    mine = operators.open_session(engine, "ann")
    with engine.connect() as connection:
        seen = connection.execute(select(operator_sessions.c.seen_at)).scalars().all()
    assert [is_true(it) for it in seen] == [True, True]
    assert operators.session(engine, mine) is not None

    parking.park(engine, [Parking(Delivery(b"junk", 1), Cause.UNPARSABLE, "no JSON")], worker="w")
    (letter,) = rows_of(engine, "dead_letters")
    assert all(is_true(letter[it]) for it in ("first_parked_at", "last_parked_at", "state_at"))
    with engine.connect() as connection:
        for selection, found in ((Selection(newer_than_s=60), 1), (Selection(older_than_s=60), 0)):
            assert dead_letters.count(connection, selection) == found
            assert len(dead_letters.some(connection, selection, rows_max=9)) == found
    replay_id = replay.begin(engine, Selection(), replay.Options(), operator="ann", reason="again")
    with engine.connect() as connection:
        assert not replay.find(connection, replay_id).has_died
        assert all(is_true(it.at) for it in actions.recent(connection, rows_max=9))
    replay.begin(engine, Selection(), replay.Options(), operator="ann", reason="again")
    with engine.begin() as connection:
        assert [it.status for it in replay.recent(connection, 9)] == ["running", "running"]
        connection.execute(update(replays).values(seen_at=true_now() - timedelta(seconds=90)))
        assert replay.find(connection, replay_id).has_died
    with engine.begin() as connection:
        connection.execute(update(operator_sessions).values(seen_at=true_now() - timedelta(minutes=31)))
    assert operators.session(engine, token) is None


@pytest.mark.parametrize("by", [AHEAD, BEHIND], ids=["a day ahead", "in the year 2000"])
def test_what_is_told_of_ages(engine: Engine, set_clock: SetClock, by: timedelta) -> None:
    set_clock(by)
    entry = Entry(engine, relay_after_s=AFTER_S)
    entry.accept([Submission(draw("waits"))])
    settings, found = Settings(), Facts()
    with engine.connect() as connection:
        looks = dict(doctor.LOOKS)
        assert looks["oldest accepted"](connection, settings, found)[0] == "ok"
        assert looks["relay"](connection, settings, found)[0] == "ok"
    lookout = metrics.Lookout(Settings(), engine, Keeps())
    lookout.look()
    lookout.close()
    assert 0 <= metrics.OLDEST._value.get() < 30
    age(engine, timedelta(seconds=100), "accepted_at", "publish_at")
    with engine.connect() as connection:
        assert looks["oldest accepted"](connection, settings, found)[0] == "warn"
    entry.close()


def test_the_database_is_asked_once_in_a_while(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def count(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        asked.append(statement)

    entry = Entry(engine, relay_after_s=AFTER_S)
    asked.clear()
    began = clock.now(engine)
    for number in range(30):
        entry.accept([Submission(draw(f"k{number}"))])
        tries.settle(engine, [draw(f"k{number}")], Rules(WHEELS, tries_max=3))
        assert is_true(clock.now(engine))
    assert asked.count("SELECT UTC_TIMESTAMP(6)") <= 1 + (clock.now(engine) - began).total_seconds() / clock.ASK_EVERY_S
    asked.clear()
    elapsed_s = clock._elapsed_s
    monkeypatch.setattr(clock, "_elapsed_s", lambda: elapsed_s() + 3600)  # as after a sleep
    assert is_true(clock.now(engine))
    assert asked == ["SELECT UTC_TIMESTAMP(6)"]
    entry.close()


def test_it_is_the_servers_clock(engine: Engine) -> None:
    with engine.begin() as connection:
        before = clock.now(connection)
        connection.execute(text("SET SESSION timestamp = 946684800"))  # of this session alone: the year 2000
        assert before <= clock.now(connection)
        clock._readings.clear()
        assert clock.now(connection).year == 2000
        clock._readings.clear()
        connection.execute(text("SET SESSION timestamp = DEFAULT"))
    assert is_true(clock.now(engine))


def test_a_database_that_does_not_answer_has_no_clock() -> None:
    away = open_engine("mysql+pymysql://root@127.0.0.1:1/x")
    with pytest.raises(DBAPIError):
        clock.now(away)
    entry = Entry(away, relay_after_s=AFTER_S)
    acts: list[Callable[[], object]] = [
        lambda: entry.accept([Submission(draw("k"))]),
        lambda: tries.settle(away, [draw("k")], Rules(WHEELS, tries_max=2)),
        lambda: relay_once(away, Keeps()),
        lambda: time_out_once(away),
    ]
    for act in acts:
        with pytest.raises(ServiceUnavailable):
            act()
    entry.close()
