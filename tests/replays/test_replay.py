"""Replay: through the outbox, under the same key, so that nothing happens twice; and what a forecast says of it."""

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
import redis
from celery import Celery
from sqlalchemy import func, select, text, update

from tests.books import assert_books
from tests.ledgers import recharge
from tests.processes import House, draws
from tests.processes import wait_for as wait_until
from tombola.producers.brokers.registry import open_broker
from tombola.producers.domain.causes import OPEN_STATES, Cause, LetterState
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import DrawDead, InvalidRequest, ReplayNotFound
from tombola.producers.entry import Entry
from tombola.producers.results import ResultStore
from tombola.producers.storage.requests import Submission, accepting, records
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import dead_letters as table
from tombola.producers.storage.schema import operator_actions, replays
from tombola.worker.dead_letters import letters as dead_letters
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.dead_letters.message import Parking
from tombola.worker.deliveries import Delivery
from tombola.worker.operators import actions
from tombola.worker.relay.relay import Relay
from tombola.worker.replays import replay
from tombola.worker.replays.forecast import Forecast, forecast
from tombola.worker.replays.replay import Options, Replay
from tombola.worker.replays.replayer import Replayer
from tombola.worker.settle.consumer import Consumer

OVERDUE = datetime(2020, 1, 1, tzinfo=UTC)  # whoever's clock it is, and however late its answer came
WHO = "ada"
ALL = Selection()
WHY = "the bad deploy is rolled back"


@pytest.fixture
def house(database_url: str, redis_url: str) -> Iterator[House]:
    with House(database_url, redis_url, redis_url) as house:
        yield house


class Desk:
    """An operator with a consumer at work, or not."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.engine = house.engine
        self.broker = open_broker(house.settings.need("broker_url"), publish_timeout_s=10)
        self.replayer = Replayer(house.engine, self.broker, house.settings)
        self.consumer: Consumer | None = None

    def work(self, wheels: Any = None) -> None:
        self.consumer = Consumer.open(self.house.settings, self.engine, self.house.wheels if wheels is None else wheels)
        self.consumer.start()

    def rest(self) -> None:
        if self.consumer is not None:
            assert self.consumer.stop(timeout_s=20)
            self.consumer = None

    def park_by_worker(self, *bodies: bytes, wheels: Any = None) -> None:
        """Publish, and have a worker that knows only `wheels` consume all of it."""
        self.house.publish(*bodies)
        consumer = Consumer.open(self.house.settings, self.engine, self.house.wheels if wheels is None else wheels)
        while consumer.deliveries.fetch is not None:
            report = consumer.consume_once(wait_s=0.2)
            if not (report.settled or report.parked):
                break
        consumer.deliveries.close()

    def forecast(self, selection: Selection = ALL) -> Forecast:
        return forecast(self.engine, selection)

    def replay(self, selection: Selection = ALL, **options: Any) -> Replay:
        replay_id = replay.begin(self.engine, selection, Options(**options), operator=WHO, reason=WHY)
        return self.replayer.run(replay_id)

    def states(self) -> dict[str, int]:
        with self.engine.connect().execution_options(read_only=True) as connection:
            rows = connection.execute(select(table.c.state, func.count()).group_by(table.c.state))
            return {row[0]: row[1] for row in rows}

    def letters(self, *states: str) -> list[dead_letters.DeadLetter]:
        with self.engine.connect().execution_options(read_only=True) as connection:
            return dead_letters.some(connection, Selection(states=states or tuple(LetterState)), rows_max=1000)

    def actions(self) -> list[actions.Action]:
        with self.engine.connect().execution_options(read_only=True) as connection:
            return actions.recent(connection, rows_max=100)

    def balance(self, account_id: int) -> Decimal:
        with self.engine.connect().execution_options(read_only=True) as connection:
            found: Decimal = connection.execute(
                select(accounts.c.balance).where(accounts.c.id == account_id)
            ).scalar_one()
            return found


@pytest.fixture
def desk(house: House) -> Iterator[Desk]:
    desk = Desk(house)
    yield desk
    desk.rest()
    desk.broker.close()


def test_what_a_bad_deploy_parked_is_foretold_and_settles_once(house: House, desk: Desk) -> None:
    asked = draws(house.accounts(5), 30)
    desk.park_by_worker(*[draw.encode() for draw in asked], wheels={})
    assert house.causes() == ["unknown campaign"] * 30
    said = desk.forecast()
    assert (dict(said.counts), said.charged) == ({"would charge": 30}, {"POINT": Decimal("30.00")})
    assert house.settled() == 0

    desk.work()
    done = desk.replay()
    assert (done.status, done.sent, done.settled, done.parked_again, done.refused) == ("done", 30, 30, 0, 0)
    assert desk.states() == {"settled": 30}
    assert_books(house.engine)
    with pytest.raises(InvalidRequest, match="nothing to replay"):
        desk.replay()
    assert [(it.action, it.count, it.operator, it.reason) for it in desk.actions()] == [
        ("replay ended", 30, WHO, WHY),
        ("replay", 30, WHO, WHY),
    ]


def test_a_replay_keeps_the_nonce_of_a_draw(house: House, desk: Desk) -> None:
    (account_id,) = house.accounts(1)
    asked = [
        DrawRequest(account_id=account_id, request_key=f"k{number:02}", client_nonce=f"nonce-{number:010}")
        for number in range(40)
    ]
    desk.park_by_worker(*[draw.encode() for draw in asked], wheels={})
    assert {it.body for it in desk.letters()} == {it.encode() for it in asked}
    other = DrawRequest(account_id=account_id, request_key="k00", client_nonce="nonce-of-another")
    desk.work()
    done = desk.replay()
    assert (done.status, done.settled, done.parked_again, done.refused) == ("done", 40, 0, 0)
    with house.engine.connect().execution_options(read_only=True) as connection:
        found = {row.request_key: row for row in connection.execute(select(requests))}
    assert {key: (row.terms, row.fingerprint) for key, row in found.items()} == {
        it.request_key: (it.terms, it.fingerprint()) for it in asked
    }
    desk.rest()
    desk.park_by_worker(other.encode())  # the key's request is settled: another nonce is a conflict
    assert [it.cause for it in desk.letters(*OPEN_STATES)] == [Cause.FINGERPRINT_MISMATCH]
    assert house.violations() == []  # which draws each of them again, by its nonce


def test_a_forecast_comes_true_line_by_line(house: House, desk: Desk) -> None:
    rich, poor = house.accounts(2, balance=1)
    recharge(house.engine, rich, Decimal(5))
    stranger = 4711
    # What a draw wins is in no forecast: where the first one wins nothing, the forecast comes true all the same.
    losing = [
        key for key in (f"poor_{number}" for number in range(40)) if not house.wheels["default"].draw(poor, key).amount
    ][:12]
    asked = [
        *[DrawRequest(account_id=poor, request_key=key) for key in losing],
        DrawRequest(account_id=stranger, request_key="nobody"),
        DrawRequest(account_id=rich, request_key="first"),
        DrawRequest(account_id=rich, request_key="elsewhere", campaign="winter"),
    ]
    desk.park_by_worker(DrawRequest(account_id=rich, request_key="known").encode())
    desk.park_by_worker(
        *[draw.encode() for draw in asked],
        DrawRequest(account_id=poor, request_key="known").encode(),
        b'{"v":1,"request_key":"half',
        wheels={},
    )
    said = {line.request_key or "": (line.outcome, line.why) for line in desk.forecast().lines}
    assert said["nobody"] == ("would be rejected", "ACCOUNT_NOT_FOUND")
    assert said["first"] == ("would charge", "")
    assert said["elsewhere"][0] == "unknown campaign"
    assert said["known"][0] == "conflict"
    assert said[""][0] == "cannot be parsed"
    assert [said[key][0] for key in losing] == ["would charge"] + ["would be rejected"] * 11

    desk.work()
    done = desk.replay()
    assert (done.refused, done.parked_again) == (2, 1)
    with house.engine.connect().execution_options(read_only=True) as connection:
        found = connection.execute(select(requests.c.request_key, requests.c.status))
        became = {row.request_key: row.status for row in found}
    told = {"would charge": "completed", "would be rejected": "rejected"}
    assert {key: status for key, status in became.items() if key in said and key not in ("known", "elsewhere")} == {
        key: told[outcome] for key, (outcome, _) in said.items() if outcome in told
    }
    assert_books(house.engine)


def test_a_forecast_does_not_know_what_a_draw_would_win(house: House, desk: Desk) -> None:
    """Where it did, whether a later charge can be paid would give away who wins."""
    wheel = house.wheels["default"]
    lucky, unlucky = house.accounts(2, balance=1)
    asked = []
    for account_id, wins in ((lucky, True), (unlucky, False)):
        first = next(it for it in map(str, range(1000)) if bool(wheel.draw(account_id, f"a_{it}").amount) is wins)
        asked += [DrawRequest(account_id=account_id, request_key=key) for key in (f"a_{first}", f"then_{account_id}")]
    desk.park_by_worker(*[draw.encode() for draw in asked], wheels={})
    assert [line.outcome for line in desk.forecast().lines] == ["would charge", "would be rejected"] * 2
    desk.work()
    desk.replay()
    with house.engine.connect().execution_options(read_only=True) as connection:
        became = dict(connection.execute(select(requests.c.request_key, requests.c.status)).tuples().all())
    assert [became[it.request_key] for it in asked] == ["completed", "completed", "completed", "rejected"]


def test_a_forecast_writes_nothing(house: House, desk: Desk) -> None:
    desk.park_by_worker(*[draw.encode() for draw in draws(house.accounts(2), 10)], wheels={})
    before = everything(house)
    desk.forecast()
    assert everything(house) == before


def everything(house: House) -> list[Any]:
    from tombola.producers.storage.schema import metadata

    with house.engine.connect().execution_options(read_only=True) as connection:
        return [
            [tuple(row) for row in connection.execute(select(it).order_by(*it.primary_key.columns))]
            for it in metadata.sorted_tables
        ]


def test_what_had_happened_after_all_answers_with_its_first_result(house: House, desk: Desk) -> None:
    (draw,) = draws(house.accounts(1), 1)
    # Set aside as too often delivered, and settled through another copy.
    parking.park(
        house.engine,
        [Parking(Delivery(draw.encode(), 1, 9), Cause.TOO_MANY_DELIVERIES, "again and again", draw)],
        worker="w",
    )
    desk.park_by_worker(draw.encode())
    first = house.results()
    assert desk.forecast().counts == {"already settled": 1}
    done = desk.replay()  # nobody is at work: nothing had to be sent
    assert (done.status, done.settled) == ("done", 1)
    assert house.results() == first
    assert desk.states() == {"settled": 1}


def test_a_dead_request_is_accepted_again_and_dies_again_as_the_same_dead_letter(house: House, desk: Desk) -> None:
    (draw,) = draws(house.accounts(1), 1)
    client = desk_accept(house, draw)
    relay = Relay.from_settings(house.settings)
    with house.engine.begin() as connection:
        connection.execute(update(requests).values(publish_attempts=99, publish_at=OVERDUE))
    relay.run_once()
    (letter,) = desk.letters()
    assert (letter.cause, letter.state, letter.request_key, letter.account_id) == (
        "never settled", "parked", draw.request_key, draw.account_id,
    )  # fmt: skip
    desk.park_by_worker(draw.encode(), wheels={})  # a late copy: the request is dead, and that is known already
    (echo,) = desk.letters()
    assert (echo.cause, echo.state, echo.times_parked) == ("never settled", "parked", 2)

    replay_id = replay.begin(house.engine, Selection(), Options(), operator=WHO, reason=WHY)
    thread = threading.Thread(target=desk.replayer.run, args=(replay_id,))
    thread.start()
    wait_until(lambda: desk.states() == {"replaying": 1}, within_s=10, what=lambda: str(desk.states()))

    def is_given_up() -> bool:  # again and again: the replay may be about to publish it
        with house.engine.begin() as connection:
            connection.execute(update(requests).values(publish_attempts=99, publish_at=OVERDUE))
        lose_what_is_queued(house)
        relay.run_once()
        return desk.states() == {"parked again": 1}

    wait_until(is_given_up, within_s=20, what=lambda: str(desk.states()))
    thread.join(20)
    assert desk.states() == {"parked again": 1}
    (again,) = desk.letters()
    assert (again.id, again.times_parked) == (letter.id, 3)

    desk.work()
    assert desk.replay().settled == 1
    assert_books(house.engine)
    relay.close()
    client.close()


def lose_what_is_queued(house: House) -> None:
    with redis.Redis.from_url(house.settings.need("broker_url")) as client:
        client.delete("draws")


def desk_accept(house: House, draw: DrawRequest) -> Any:
    """Accept a draw whose message is lost."""
    from tombola.producers.entry import Entry
    from tombola.producers.storage.requests import Submission

    entry = Entry(house.engine, relay_after_s=10)
    entry.accept([Submission(draw)])
    return type("Client", (), {"close": lambda _self: None})()


def test_a_canary_stops_by_itself_when_the_cause_comes_back(house: House, desk: Desk) -> None:
    desk.park_by_worker(*[draw.encode() for draw in draws(house.accounts(3), 50)], wheels={})
    desk.work(wheels={})  # the deploy is still bad
    done = desk.replay(canary=5)
    assert (done.status, done.sent, done.parked_again) == ("stopped", 5, 5)
    assert "the cause came back: 5 of 5" in (done.stopped_because or "")
    assert desk.states() == {"parked": 45, "parked again": 5}
    desk.rest()
    desk.work()
    done = desk.replay(canary=5)
    assert (done.status, done.settled) == ("done", 50)
    assert_books(house.engine)


def test_a_replay_is_stopped_from_elsewhere_and_the_rest_stays_parked(house: House, desk: Desk) -> None:
    desk.park_by_worker(*[draw.encode() for draw in draws(house.accounts(3), 60)], wheels={})
    desk.work()
    replay_id = replay.begin(house.engine, Selection(), Options(rate=20), operator=WHO, reason=WHY)
    thread = threading.Thread(target=desk.replayer.run, args=(replay_id,))
    thread.start()
    wait_until(lambda: find(house, replay_id).sent > 0, within_s=10, what=lambda: str(find(house, replay_id)))
    replay.ask_to_stop(house.engine, replay_id, operator="grace")
    thread.join(15)
    done = find(house, replay_id)
    assert (done.status, done.stopped_because) == ("stopped", "stopped by grace")
    assert 0 < done.sent < 60
    assert desk.states() == {"settled": done.sent, "parked": 60 - done.sent}
    assert {it.action for it in desk.actions()} == {"replay", "stop replay", "replay ended"}


def find(house: House, replay_id: int) -> Replay:
    with house.engine.connect().execution_options(read_only=True) as connection:
        return replay.find(connection, replay_id)


def test_a_replay_keeps_to_its_rate_and_its_limit(house: House, desk: Desk) -> None:
    desk.park_by_worker(*[draw.encode() for draw in draws(house.accounts(3), 60)], wheels={})
    desk.work()
    began = time.monotonic()
    done = desk.replay(rate=20, limit=30)
    assert (done.selected, done.sent, done.settled) == (30, 30, 30)
    assert time.monotonic() - began > 1.2  # 30 at 20 a second
    assert desk.states() == {"settled": 30, "parked": 30}


def test_two_replays_at_once_do_nothing_twice(house: House, desk: Desk) -> None:
    desk.park_by_worker(*[draw.encode() for draw in draws(house.accounts(3), 400)], wheels={})
    desk.work()
    other = Replayer(house.engine, open_broker(house.settings.need("broker_url"), publish_timeout_s=10), house.settings)
    ids = [replay.begin(house.engine, Selection(), Options(), operator=WHO, reason=WHY) for _ in range(2)]
    done: list[Replay] = []
    threads = [
        threading.Thread(target=lambda it=it, by=by: done.append(by.run(it)))
        for it, by in zip(ids, (desk.replayer, other), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(it.sent for it in done) == 400
    assert desk.states() == {"settled": 400}
    assert_books(house.engine)


def test_what_a_killed_replay_had_sent_settles_through_the_relay(house: House, desk: Desk) -> None:
    """It died between its commit and its publish."""
    desk.park_by_worker(*[draw.encode() for draw in draws(house.accounts(3), 20)], wheels={})
    replay_id = replay.begin(house.engine, Selection(), Options(), operator=WHO, reason=WHY)

    class Dead(Exception):
        pass

    class Lost:
        def publish(self, bodies: Any, headers: Any = None) -> None:
            raise Dead

        def close(self) -> None: ...

        def backlog(self) -> int:
            return 0

    with pytest.raises(Dead):
        Replayer(house.engine, Lost(), house.settings).run(replay_id)
    assert desk.states() == {"replaying": 20}
    with house.engine.begin() as connection:
        connection.execute(update(replays).values(seen_at=func.coalesce(replays.c.ended_at, "2020-01-01 00:00:00")))
        connection.execute(update(requests).values(publish_at=OVERDUE))
    desk.work()
    relay = Relay.from_settings(house.settings)
    relay.run_once()
    house.wait_settled(20, within_s=15)
    relay.run_once()
    assert desk.states() == {"settled": 20}
    assert find(house, replay_id).has_died
    desk.park_by_worker(b"not json", wheels={})
    desk.replay()
    assert find(house, replay_id).status == "failed"
    relay.close()


# ---- edit, discard, restore ------------------------------------------------------------------------------------------


def test_an_edited_copy_settles_and_takes_its_original_with_it(house: House, desk: Desk) -> None:
    (account,) = house.accounts(1)
    desk.park_by_worker(b'{"v":1,"request_key":"k1","account_id":%d,"campain":"default"}' % account)
    (original,) = desk.letters()
    assert (original.cause, original.request_key, original.account_id) == ("invalid", "k1", account)
    edited = b'{"v":1,"request_key":"k1","account_id":%d,"campaign":"default"}' % account
    copy = dead_letters.edit(house.engine, original.id, edited, operator=WHO, reason="a typo")
    assert {line.id: line.outcome for line in desk.forecast().lines} == {
        original.id: "cannot be parsed",
        copy: "would charge",
    }
    desk.work()
    done = desk.replay(Selection(ids=(copy,)))
    assert done.settled == 1
    assert desk.states() == {"settled": 2}
    with pytest.raises(InvalidRequest, match="has settled meanwhile"):
        dead_letters.edit(house.engine, original.id, edited, operator=WHO, reason="again")
    assert_books(house.engine)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"v":1,"request_key":"k2","account_id":1}', "request_key cannot be edited"),
        (b'{"v":1,"request_key":"k1","account_id":2}', "account_id cannot be edited"),
        (b'{"v":1,"request_key":"k1","account_id":1,"amount":5}', "not a draw request"),
    ],
)
def test_key_and_account_cannot_be_edited(house: House, desk: Desk, body: bytes, why: str) -> None:
    desk.park_by_worker(b'{"v":1,"request_key":"k1","account_id":1,"campain":"default"}')
    (original,) = desk.letters()
    with pytest.raises(InvalidRequest, match=why):
        dead_letters.edit(house.engine, original.id, body, operator=WHO, reason="try")
    assert len(desk.letters()) == 1


def test_an_edited_copy_is_refused_once_its_original_has_settled(house: House, desk: Desk) -> None:
    (account,) = house.accounts(1)
    desk.park_by_worker(b'{"v":1,"request_key":"k1","account_id":%d,"campaign":"winter"}' % account, wheels={})
    (original,) = desk.letters()
    edited = b'{"v":1,"request_key":"k1","account_id":%d}' % account
    copy = dead_letters.edit(house.engine, original.id, edited, operator=WHO, reason="no winter")
    desk.park_by_worker(b'{"v":1,"request_key":"k1","account_id":%d,"lottery_session_id":"s"}' % account)  # settles
    assert desk.forecast(Selection(ids=(copy,))).counts == {"conflict": 1}
    done = desk.replay(Selection(ids=(copy,)))
    assert (done.sent, done.refused) == (0, 1)
    assert_books(house.engine)


def test_discarded_is_left_alone_until_it_is_restored(house: House, desk: Desk) -> None:
    desk.park_by_worker(*[draw.encode() for draw in draws(house.accounts(1), 4)], wheels={})
    some = Selection(ids=tuple(it.id for it in desk.letters()[:3]))
    with pytest.raises(InvalidRequest, match="say why"):
        dead_letters.discard(house.engine, some, operator=WHO, reason=" ")
    assert dead_letters.discard(house.engine, some, operator=WHO, reason="a load test") == 3
    assert dead_letters.discard(house.engine, some, operator=WHO, reason="a load test") == 0
    assert desk.forecast().total == 1
    assert dead_letters.restore(house.engine, Selection(), operator=WHO, reason="no, they were real") == 3
    assert desk.states() == {"parked": 4}
    assert [(it.action, it.count) for it in desk.actions()] == [("restore", 3), ("discard", 0), ("discard", 3)]


def test_what_is_not_there_is_said_in_one_line(house: House) -> None:
    with house.engine.connect().execution_options(read_only=True) as connection, pytest.raises(ReplayNotFound):
        replay.find(connection, 1)
    with pytest.raises(ReplayNotFound):
        replay.ask_to_stop(house.engine, 1, operator=WHO)


def test_what_operators_did_stays_as_it_was_written(house: House, desk: Desk) -> None:
    """The record is only added to, whatever is done next, also by a replay that ends long after it began."""
    desk.park_by_worker(b"one", b"two", b"three")
    discarded = Selection(states=(LetterState.DISCARDED,))
    select_all = select(operator_actions).order_by(operator_actions.c.id)
    seen: list[Any] = []
    for act in (
        lambda: dead_letters.discard(house.engine, ALL, operator=WHO, reason="noise"),
        lambda: dead_letters.restore(house.engine, discarded, operator=WHO, reason="no"),
        desk.replay,
        desk.replay,
    ):
        act()
        with house.engine.connect() as connection:
            found = [tuple(row) for row in connection.execute(select_all)]
        assert found[: len(seen)] == seen
        assert len(found) > len(seen), "nothing was recorded: nothing was tested"
        seen = found


def test_a_request_that_died_unseen_is_parked_by_the_next_relay(house: House, desk: Desk) -> None:
    """As a relay of the release before leaves it: dead, and no dead letter."""
    (draw,) = draws(house.accounts(1), 1)
    desk_accept(house, draw)
    with house.engine.begin() as connection:
        connection.execute(update(requests).values(status="dead", reason="TIMED_OUT"))
    relay = Relay.from_settings(house.settings)
    relay.run_once()
    (letter,) = desk.letters()
    assert (letter.cause, letter.request_key) == ("never settled", draw.request_key)
    desk.work()
    assert desk.replay().settled == 1
    relay.close()


def test_the_audit_finds_a_replay_that_nobody_answers_for(house: House, desk: Desk) -> None:
    desk.park_by_worker(*[draw.encode() for draw in draws(house.accounts(1), 3)], wheels={})
    desk.work()
    desk.replay()
    assert house.violations() == []
    with house.engine.begin() as connection:
        connection.execute(text("DELETE FROM operator_actions"))
    assert [it.split()[0] for it in house.violations()] == ["I12", "I12"]


def test_one_that_cannot_be_accepted_stays_parked_and_the_others_go_on(
    house: House, desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent = draws(house.accounts(3), 20)
    desk.park_by_worker(*[draw.encode() for draw in sent], wheels={})
    values = records.request_values

    def mistaken(request: DrawRequest, *others: str) -> Any:
        if request.request_key == sent[13].request_key:
            raise TypeError("a mistake of ours")
        return values(request, *others)

    monkeypatch.setattr(accepting, "request_values", mistaken)
    desk.work()
    ended = desk.replay()
    assert (ended.status, ended.selected, ended.settled, ended.refused) == (replay.DONE, 20, 19, 1)
    assert [it.request_key for it in desk.letters(*OPEN_STATES)] == [sent[13].request_key]
    assert "stays parked" in caplog.text
    monkeypatch.undo()
    assert desk.replay().settled == 1
    assert_books(house.engine)


def test_a_celery_shop_is_told_of_the_dead_and_of_their_replay(house: House, desk: Desk) -> None:
    mine, _ = sent = draws(house.accounts(1), 2)
    Entry(house.engine, relay_after_s=60).accept([Submission(mine)])
    forged = DrawRequest(account_id=7, request_key=sent[1].request_key, lottery_session_id="theirs")
    Entry(house.engine, relay_after_s=60).accept([Submission(forged)])
    desk.park_by_worker(*[draw.encode() for draw in sent], wheels={})
    celery = Celery("shop", backend=house.env["TOMBOLA_RESULT_URL"], set_as_current=False)
    dead = celery.AsyncResult(mine.lottery_session_id)
    with pytest.raises(DrawDead, match="dead letter"):
        dead.get(timeout=10)
    # What was forged under the key of another request tells nothing of that one, nor of a session that nobody has.
    assert [celery.AsyncResult(it).status for it in (sent[1].lottery_session_id, "theirs")] == ["PENDING", "PENDING"]
    with pytest.raises(DrawDead) as told:
        ResultStore.from_settings(house.settings, engine=house.engine).get(mine.lottery_session_id)
    assert told.value.reason == "PARKED"
    desk.work()
    assert desk.replay(Selection(request_key=mine.request_key)).settled == 1
    assert celery.AsyncResult(mine.lottery_session_id).get(timeout=10)["status"] == "completed"
