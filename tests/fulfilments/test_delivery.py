"""Delivery: at least once, under the same key and with the same bytes, whatever the receiver does; nothing is lost."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from sqlalchemy import Engine, delete, update
from typer.testing import CliRunner

from tests import processes, servers
from tests.books import table
from tests.fulfilments.books import (
    BY,
    add_webhook,
    coupons,
    grant,
    grants,
    pass_time,
    rows_of,
    settings_for,
    settle,
    states,
)
from tests.kept_results import keep_results, results_of
from tests.receivers import Answer, Received, Receiver, breaks_off, hangs, pours, redirects, trickles
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import InvalidRequest, ServiceUnavailable
from tombola.producers.storage import clock
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import api_idempotency_requests, asset_transactions, fulfilments
from tombola.worker.cli import app
from tombola.worker.fulfilments import fulfilments as domain
from tombola.worker.fulfilments import webhooks
from tombola.worker.fulfilments.addresses import checked_url
from tombola.worker.fulfilments.fulfilments import Attempt, Selection
from tombola.worker.fulfilments.signatures import signature
from tombola.worker.operators import actions
from tombola.worker.relay import fulfilling
from tombola.worker.relay.fulfilling import CALLS_AT_ONCE, DELAY_S_MAX, Fulfilling, delay_after
from tombola.worker.relay.retention import forget_fulfilments

pytestmark = pytest.mark.slow

WITHIN_S = 30.0


@contextmanager
def relay(engine: Engine, **settings: str) -> Iterator[Fulfilling]:
    relay = Fulfilling(engine, settings_for(engine, **settings))
    try:
        yield relay
    finally:
        relay._database.shutdown(wait=False)
        relay._resolver.shutdown(wait=False)


def deliver(engine: Engine, **settings: str) -> int:
    with relay(engine, **settings) as one:
        return one.run_once()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


def in_turn(*answers: Answer) -> Callable[[Received], Answer]:
    """Each answer once, then 204."""
    left = itertools.chain(answers, itertools.repeat(204))
    return lambda _: next(left)


def assert_same_each_time(receiver: Receiver) -> None:
    """Whatever came more than once came with the same id and bytes, under another timestamp perhaps."""
    seen: dict[str, tuple[str, bytes]] = {}
    for it in receiver.received:
        assert seen.setdefault(it.key, (it.headers["webhook-id"], it.body)) == (it.headers["webhook-id"], it.body)
        assert it.event["idempotency_key"] == it.key


# ---- what is sent ----------------------------------------------------------------------------------------------------


def test_a_coupon_with_its_code(engine: Engine, account: int, receiver: Receiver) -> None:
    secret = add_webhook(engine, "shop", receiver.url, "*")
    grants(
        engine,
        grant(account, "k", "coupon_3", "COUPON.10", pull=3, code="WINTER-0001", prize="coupon"),
        grant(account, "n", "notice", notify="coupon-won"),
    )
    assert deliver(engine) == 2
    coupon, notice = sorted(receiver.received, key=lambda it: it.key)
    row = next(it for it in table(engine, "asset_transactions") if it["idempotency_key"] == "k:coupon_3")
    at = str(row["created_at"]).replace(" ", "T")
    assert coupon.event == {
        "event": "grant.coupon",
        "campaign": "winter",
        "account_id": account,
        "request_key": "k",
        "lottery_session_id": "k",
        "idempotency_key": "k:coupon_3",
        "at": (at if "." in at else f"{at}.000000") + "Z",
        "asset_code": "COUPON.10",
        "amount": "1.00",
        "prize": "coupon",
        "pull": 3,
        "code": "WINTER-0001",
    }
    said = {name: notice.event[name] for name in ("event", "idempotency_key", "asset_code", "amount", "code")}
    assert said == {
        "event": "coupon-won", "idempotency_key": "n:notice", "asset_code": "", "amount": "0.00", "code": "",
    }  # fmt: skip
    assert coupon.path == "/hook?x=1"
    assert coupon.headers["host"] == f"{servers.HOST}:{receiver.port}"
    assert coupon.headers["content-type"] == "application/json"
    assert coupon.headers["idempotency-key"] == "k:coupon_3"
    id, stamp = coupon.headers["webhook-id"], int(coupon.headers["webhook-timestamp"])
    assert "." not in id
    assert abs(stamp - time.time()) < 30
    assert coupon.headers["webhook-signature"] == signature(secret, id, stamp, coupon.body)
    assert states(engine) == {"k:coupon_3": "delivered", "n:notice": "delivered"}
    assert all(it["ended_at"] is not None and it["error"] is None for it in rows_of(engine))


def test_a_settled_draw_with_its_result(engine: Engine, account: int, receiver: Receiver) -> None:
    add_webhook(engine, "shop", receiver.url, "draw.settled")
    settle(engine, DrawRequest(account_id=account, request_key="a"), DrawRequest(account_id=2**62, request_key="b"))
    assert deliver(engine) == 2
    by_key = {it.key: it for it in receiver.received}
    results = results_of(engine)
    for key, status in (("a", "completed"), ("b", "rejected")):
        sent = by_key[key]
        assert sent.body.endswith(b'"result":%b}' % (results[key] or b""))  # to the byte
        assert (sent.event["event"], sent.event["result"]["status"]) == ("draw.settled", status)
    # It has the same body again, also with the text that an older release kept.
    keep_results(engine, "a")
    with engine.begin() as connection:
        connection.execute(update(fulfilments).values(state="pending"))
    pass_time(engine)
    assert deliver(engine) == 2
    assert_same_each_time(receiver)
    assert Counter(receiver.keys) == {"a": 2, "b": 2}


def test_two_signatures_while_a_secret_is_rotated(engine: Engine, account: int, receiver: Receiver) -> None:
    old = add_webhook(engine, "shop", receiver.url, "*")
    new = webhooks.rotate(engine, "shop", **BY)
    coupons(engine, account, 1)
    assert deliver(engine) == 1
    (sent,) = receiver.received
    id, stamp = sent.headers["webhook-id"], int(sent.headers["webhook-timestamp"])
    assert sent.headers["webhook-signature"].split(" ") == [signature(it, id, stamp, sent.body) for it in (new, old)]


# ---- what receivers do -----------------------------------------------------------------------------------------------


def test_a_receiver_that_is_down_and_comes_back(engine: Engine, account: int) -> None:
    with Receiver() as receiver:
        url, port = receiver.url, receiver.port
    add_webhook(engine, "shop", url, "*")
    keys = coupons(engine, account, 30)
    for attempt in range(1, 4):
        pass_time(engine)
        assert deliver(engine) == 0
        assert {(it["state"], it["attempts"]) for it in rows_of(engine)} == {("pending", attempt)}
    assert all("ConnectError" in it["error"] for it in rows_of(engine))
    with Receiver(port=port) as receiver:
        assert deliver(engine) == 0  # not before its time
        pass_time(engine)
        assert deliver(engine) == 30
        assert sorted(receiver.keys) == keys
    assert set(states(engine).values()) == {"delivered"}


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (500, "answered 500"),
        (429, "answered 429"),
        (404, "answered 404"),
        (301, "answered 301 (redirects are not followed)"),
        (hangs(2), "no answer within 0.5 s"),
        (trickles, "no answer within 0.5 s"),
        (breaks_off, "RemoteProtocolError: Server disconnected without sending a response."),
        (pours(503, 10 * 1024 * 1024), "answered 503: " + "y" * 120),
    ],
    ids=["500", "429", "404", "301", "hangs", "trickles", "acted, then broke off", "pours"],
)
def test_a_failure_is_tried_again_with_the_same_key_and_bytes(
    engine: Engine, account: int, receiver: Receiver, answer: Answer, error: str
) -> None:
    receiver.answer = in_turn(answer, answer)
    add_webhook(engine, "shop", receiver.url, "*")
    (key,) = coupons(engine, account, 1)
    for attempt in (1, 2):
        before = utc_now()
        assert deliver(engine, webhook_timeout_s="0.5") == 0
        (row,) = rows_of(engine)
        assert (row["state"], row["attempts"], row["error"], row["ended_at"]) == ("pending", attempt, error, None)
        with engine.connect() as connection:
            (one,) = domain.some(connection, Selection(), rows_max=1)
        wait_s = (one.next_at - before).total_seconds()
        assert 4 * 2 ** (attempt - 1) <= wait_s <= 6 * 2 ** (attempt - 1) + 5
        pass_time(engine)
    assert deliver(engine) == 1
    assert receiver.keys == [key] * 3
    assert_same_each_time(receiver)
    assert states(engine) == {key: "delivered"}


def test_a_success_is_one_whatever_becomes_of_its_body(engine: Engine, account: int, receiver: Receiver) -> None:
    def hang_in_the_body(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "1000")
        handler.end_headers()
        handler.wfile.write(b"half")
        hangs(3)(handler)

    receiver.answer = in_turn(hang_in_the_body, pours(200, 10 * 1024 * 1024))
    add_webhook(engine, "shop", receiver.url, "*")
    coupons(engine, account, 2)
    assert deliver(engine) == 2
    assert len(receiver.received) == 2


def test_no_redirect_is_followed(engine: Engine, account: int, receiver: Receiver) -> None:
    with Receiver() as elsewhere:
        receiver.answer = lambda _: redirects(elsewhere.url)
        add_webhook(engine, "shop", receiver.url, "*")
        coupons(engine, account, 1)
        assert deliver(engine) == 0
        assert (len(receiver.received), elsewhere.received) == (1, [])
    assert rows_of(engine)[0]["error"] == "answered 307 (redirects are not followed)"


def test_gone_is_dead_at_once(engine: Engine, account: int, receiver: Receiver) -> None:
    receiver.answer = lambda _: 410
    add_webhook(engine, "shop", receiver.url, "*")
    coupons(engine, account, 1)
    assert deliver(engine) == 0
    (row,) = rows_of(engine)
    assert (row["state"], row["attempts"], row["error"]) == ("dead", 1, "answered 410")
    assert row["ended_at"] is not None


def test_too_many_attempts_are_dead(engine: Engine, account: int, receiver: Receiver) -> None:
    receiver.answer = lambda _: 500
    add_webhook(engine, "shop", receiver.url, "*")
    (key,) = coupons(engine, account, 1)
    for _ in range(5):
        deliver(engine, webhook_tries_max="3")
        pass_time(engine)
    assert receiver.keys == [key] * 3
    assert states(engine) == {key: "dead"}


def test_the_default_attempts_take_about_three_days() -> None:
    tries_max = settings_for(open_engine("sqlite:////nowhere")).webhook_tries_max
    days = [
        sum((delay_after(attempt) for attempt in range(1, tries_max)), timedelta(0)) / timedelta(days=1)
        for _ in range(100)
    ]
    assert 2.5 < min(days) < max(days) < 3.5
    assert delay_after(10**6) <= timedelta(seconds=1.2 * DELAY_S_MAX)
    # A receiver that is down for ten minutes is asked some eight times meanwhile.
    assert sum((delay_after(attempt) for attempt in range(1, 8)), timedelta(0)) > timedelta(minutes=8)


def test_an_answer_is_shown_as_one_line_of_printable_text(engine: Engine, account: int, receiver: Receiver) -> None:
    def answer(handler: Any) -> None:
        body = b"line one\r\n\x1b[31mred\x00\xff" + b"z" * 500
        handler.send_response(400)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    receiver.answer = lambda _: answer
    add_webhook(engine, "shop", receiver.url, "*")
    coupons(engine, account, 1)
    deliver(engine)
    error = rows_of(engine)[0]["error"]
    assert error.startswith("answered 400: line one [31mred \ufffdz")
    assert error.isprintable()
    assert len(error) <= 200


# ---- where it leads --------------------------------------------------------------------------------------------------


def test_a_private_address_is_not_called(engine: Engine, account: int, receiver: Receiver) -> None:
    """One that was allowed once, and is no longer."""
    add_webhook(engine, "shop", receiver.url, "*")
    coupons(engine, account, 2)
    assert deliver(engine, webhook_private="false") == 0
    assert receiver.received == []
    assert all(it["error"].startswith("a webhook's URL begins with https://") for it in rows_of(engine))


def test_a_name_that_leads_inside_is_not_called(
    engine: Engine, account: int, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = webhooks.Wanted("shop", f"https://shop.example:{receiver.port}/", ("*",))
    webhooks.add(engine, wanted, is_private_allowed=False, **BY)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, *_, **__: [(2, 1, 6, "", (servers.HOST, port))])
    coupons(engine, account, 1)
    assert deliver(engine, webhook_private="false") == 0
    assert rows_of(engine)[0]["error"] == f"shop.example resolves to {servers.HOST}, which is not a public address"
    assert receiver.received == []


def test_a_host_is_resolved_once_and_the_checked_address_is_called(
    engine: Engine, account: int, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second look at the name would lead elsewhere: DNS rebinding."""
    asked: list[str] = []

    def getaddrinfo(host: Any, port: Any, *_arguments: Any, **_options: Any) -> list[Any]:
        name = host.decode() if isinstance(host, bytes) else str(host)
        asked.append(name)
        address = servers.HOST if name != "shop.example" or asked.count("shop.example") == 1 else "203.0.113.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    add_webhook(engine, "shop", f"http://shop.example:{receiver.port}/hook", "*")
    coupons(engine, account, CALLS_AT_ONCE + 1)
    assert deliver(engine) == CALLS_AT_ONCE + 1
    assert asked.count("shop.example") == 1
    assert {it.headers["host"] for it in receiver.received} == {f"shop.example:{receiver.port}"}


def test_a_host_that_cannot_be_resolved_in_time_holds_up_no_other(
    engine: Engine, account: int, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **options: Any) -> Any:
        if host == "slow.example":
            time.sleep(2)
        if host in ("slow.example", "none.example"):
            raise socket.gaierror(-2, "Name or service not known")
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for name in ("slow", "none"):
        add_webhook(engine, name, f"http://{name}.example/", "*")
    add_webhook(engine, "quick", receiver.url, "*")
    coupons(engine, account, 1)
    assert deliver(engine, webhook_timeout_s="0.5") == 1
    errors = {it["webhook"]: it["error"] for it in rows_of(engine)}
    assert errors == {
        "slow": "the host was not resolved within 0.5 s",
        "none": "the host cannot be resolved: Name or service not known",
        "quick": None,
    }


def test_a_certificate_must_fit_the_name(engine: Engine, account: int, receiver: Receiver) -> None:
    """Nothing there speaks TLS: what it answers is no handshake."""
    add_webhook(engine, "shop", receiver.url.replace("http://", "https://"), "*")
    coupons(engine, account, 1)
    assert deliver(engine) == 0
    assert "SSL" in rows_of(engine)[0]["error"]
    assert checked_url("https://shop.example./", is_private_allowed=False).host == "shop.example."


# ---- several at once -------------------------------------------------------------------------------------------------


def test_a_receiver_that_hangs_holds_up_no_other(engine: Engine, account: int, receiver: Receiver) -> None:
    released = threading.Event()

    def hangs_until_released(handler: BaseHTTPRequestHandler) -> None:
        released.wait(WITHIN_S)
        breaks_off(handler)

    with Receiver(lambda _: hangs_until_released) as stuck:
        add_webhook(engine, "stuck", stuck.url, "*")
        add_webhook(engine, "quick", receiver.url, "*")
        keys = coupons(engine, account, 3 * CALLS_AT_ONCE)
        with relay(engine, webhook_timeout_s=str(WITHIN_S)) as one:
            stopping = threading.Event()
            thread = threading.Thread(target=one.run, args=(stopping,))
            thread.start()
            try:
                processes.wait_for(
                    lambda: len(receiver.received) == len(keys), within_s=WITHIN_S, what=lambda: str(receiver.keys)
                )
                # And what comes meanwhile goes on.
                coupons(engine, account, 1, prefix="later")
                processes.wait_for(
                    lambda: "later_0000:coupon" in receiver.keys, within_s=WITHIN_S, what=lambda: str(receiver.keys)
                )
                assert stuck.busy_max > 0
                assert not released.is_set()
            finally:
                released.set()
                stopping.set()
                thread.join(2 * WITHIN_S)
        assert not thread.is_alive()
        assert 0 < stuck.busy_max <= CALLS_AT_ONCE
    assert receiver.busy_max <= CALLS_AT_ONCE
    assert Counter(receiver.keys) == Counter([*keys, "later_0000:coupon"])


def test_two_relays_send_nothing_twice(engine: Engine, account: int, receiver: Receiver) -> None:
    def slowly(_: Received) -> Answer:
        time.sleep(0.005)
        return 204

    receiver.answer = slowly
    add_webhook(engine, "shop", receiver.url, "*")
    keys = coupons(engine, account, 120)
    with ThreadPoolExecutor(3) as pool:
        delivered = list(pool.map(lambda _: deliver(engine), range(3)))
    assert sum(delivered) == 120
    assert sorted(receiver.keys) == keys
    assert set(states(engine).values()) == {"delivered"}


def test_what_a_dead_relay_had_leased_comes_again(engine: Engine, account: int, receiver: Receiver) -> None:
    add_webhook(engine, "shop", receiver.url, "*")
    keys = coupons(engine, account, 5)
    with relay(engine) as died, engine.begin() as connection:
        assert len(died._lease(connection, "shop")) == 5
    assert deliver(engine) == 0  # not while the lease lasts
    with engine.connect() as connection:
        found = domain.some(connection, Selection(), rows_max=9)
        left_s = min((it.next_at - clock.now(connection)).total_seconds() for it in found)
    assert 20 < left_s < 60
    pass_time(engine)
    assert deliver(engine) == 5
    assert sorted(receiver.keys) == keys
    assert {it["attempts"] for it in rows_of(engine)} == {2}


def test_a_relay_that_was_frozen_past_its_lease_undoes_nothing(
    engine: Engine, account: int, receiver: Receiver
) -> None:
    add_webhook(engine, "shop", receiver.url, "*")
    coupons(engine, account, 2)
    with relay(engine) as frozen, engine.begin() as connection:
        leased = frozen._lease(connection, "shop")
    pass_time(engine)
    assert deliver(engine) == 2
    before = rows_of(engine)
    with engine.begin() as connection:
        domain.finish(connection, [Attempt(it, "no answer", None) for it in leased], utc_now())
        domain.finish(connection, [Attempt(it) for it in leased], utc_now())
    assert rows_of(engine) == before


def test_an_outage_of_the_database_ends_and_delivery_goes_on(
    engine: Engine, account: int, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_webhook(engine, "shop", receiver.url, "*")
    coupons(engine, account, 3)
    monkeypatch.setattr(fulfilling, "BACKOFF_S_MAX", 0.05)
    away = threading.Event()
    away.set()
    finish = domain.finish

    def fails(*arguments: Any) -> None:
        if away.is_set():
            raise ServiceUnavailable("the database does not answer")
        finish(*arguments)

    monkeypatch.setattr(domain, "finish", fails)
    with relay(engine) as one:
        stopping = threading.Event()
        thread = threading.Thread(target=one.run, args=(stopping,))
        thread.start()
        processes.wait_for(lambda: len(receiver.received) >= 3, within_s=10, what=lambda: str(receiver.keys))
        away.clear()
        pass_time(engine)
        processes.wait_for(
            lambda: set(states(engine).values()) == {"delivered"}, within_s=10, what=lambda: str(rows_of(engine))
        )
        stopping.set()
        thread.join(20)
    assert_same_each_time(receiver)  # sent again, as it was not known that they had been taken


# ---- notifications, removal, replay ----------------------------------------------------------------------------------


def test_a_notification_waits_for_a_webhook(engine: Engine, account: int, receiver: Receiver) -> None:
    grants(
        engine,
        grant(account, "a", "notice", notify="coupon-won"),
        grant(account, "b", "notice", notify="phone-won"),
    )
    assert deliver(engine) == 0
    assert {(it["webhook"], it["state"]) for it in rows_of(engine)} == {("", "pending")}
    add_webhook(engine, "other", receiver.url, "draw.settled", "*", campaign="default")
    assert deliver(engine) == 0
    add_webhook(engine, "shop", receiver.url, "coupon-won", campaign="")
    assert deliver(engine) == 1
    assert receiver.keys == ["a:notice"]
    add_webhook(engine, "all", receiver.url, "*")
    assert deliver(engine) == 1
    assert sorted(receiver.keys) == ["a:notice", "b:notice"]
    assert {it["idempotency_key"]: it["webhook"] for it in rows_of(engine)} == {"a:notice": "shop", "b:notice": "all"}


def test_what_is_pending_for_a_removed_webhook_is_dead_and_can_be_replayed(
    engine: Engine, account: int, receiver: Receiver
) -> None:
    add_webhook(engine, "shop", receiver.url, "*")
    keys = coupons(engine, account, 3)
    webhooks.remove(engine, "shop", **BY)
    assert deliver(engine) == 0
    assert set(states(engine).values()) == {"dead"}
    assert {it["error"] for it in rows_of(engine)} == {"its webhook was removed"}
    with pytest.raises(InvalidRequest, match="webhook shop was removed: add it again"):
        domain.replay(engine, Selection(), **BY)
    add_webhook(engine, "shop", receiver.url, "*")
    assert domain.replay(engine, Selection(), **BY) == 3
    assert deliver(engine) == 3
    assert sorted(receiver.keys) == keys


def test_a_replay_from_a_shell(
    engine: Engine, account: int, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", engine.url.render_as_string(hide_password=False))
    receiver.answer = lambda _: 410
    add_webhook(engine, "shop", receiver.url, "*")
    coupons(engine, account, 3)
    deliver(engine)

    def tombola(*words: str) -> Any:
        return CliRunner().invoke(app, ["fulfilment", *words])

    listed = [json.loads(line) for line in tombola("list", "--state", "dead", "--json").output.splitlines()]
    assert [(it["state"], it["error"], it["attempts"]) for it in listed] == [("dead", "answered 410", 1)] * 3
    assert "answered 410" in tombola("list").output
    assert tombola("list", "--state", "pending", "--json").output == ""
    assert isinstance(tombola("replay", "--reason", "x").exception, InvalidRequest)
    assert isinstance(tombola("replay", "99", "--reason", "x").exception, InvalidRequest)
    assert isinstance(tombola("replay", "--all", "--reason", " ").exception, InvalidRequest)
    assert set(states(engine).values()) == {"dead"}
    said = tombola("replay", str(listed[0]["id"]), "--reason", "the shop is back")
    assert said.output == "1 fulfilments are pending again: a relay delivers them\n"
    receiver.answer = lambda _: 204
    assert deliver(engine) == 1
    assert tombola("replay", "--all", "--reason", "all of it").exit_code == 0
    assert deliver(engine) == 2
    assert Counter(receiver.keys) == dict.fromkeys(states(engine), 2)
    assert_same_each_time(receiver)
    with engine.connect() as connection:
        record = [it for it in actions.recent(connection, rows_max=9) if it.action == "fulfilment replay"]
    assert [(it.reason, it.count) for it in record] == [("all of it", 2), ("the shop is back", 1)]
    assert record[1].details["fulfilments"] == [listed[0]["id"]]


def test_what_the_ledger_does_not_have_is_not_made_up(engine: Engine, account: int, receiver: Receiver) -> None:
    add_webhook(engine, "shop", receiver.url, "*", "draw.settled")
    settle(engine, DrawRequest(account_id=account, request_key="gone"))
    coupons(engine, account, 1)
    with engine.begin() as connection:
        connection.execute(delete(asset_transactions).where(asset_transactions.c.idempotency_key == "draw_0000:coupon"))
        connection.execute(delete(api_idempotency_requests))
    assert deliver(engine) == 0
    assert receiver.received == []
    errors = {it["error"] for it in rows_of(engine)}
    assert errors == {"This fulfilment has no body: the ledger does not have what it is about."}


def test_old_delivered_ones_are_deleted_and_nothing_else(engine: Engine, account: int, receiver: Receiver) -> None:
    receiver.answer = in_turn(410)
    add_webhook(engine, "shop", receiver.url, "*")
    coupons(engine, account, 1)
    deliver(engine)
    coupons(engine, account, 20, prefix="old")
    assert deliver(engine) == 20
    old = utc_now() - timedelta(days=100)
    with engine.begin() as connection:
        connection.execute(update(fulfilments).values(created_at=old))
        connection.execute(update(fulfilments).where(fulfilments.c.ended_at.is_not(None)).values(ended_at=old))
    coupons(engine, account, 3, prefix="new")
    assert deliver(engine) == 3
    forget_fulfilments(engine, older_than_s=90 * 86_400, steps_max=200, rows_max=7)
    left = states(engine)
    assert left == {"draw_0000:coupon": "dead", **{f"new_{number:04d}:coupon": "delivered" for number in range(3)}}
