"""Which rows a draw gets in its transaction: one for each webhook and event, and none without webhooks."""

from __future__ import annotations

import logging
import time

import pytest
from sqlalchemy import Engine, event

from tests.books import table
from tests.fulfilments.books import BY, CAMPAIGN, add_webhook, grant, grants, known, settle
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import InvalidRequest, ServiceUnavailable
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.transactions import transaction
from tombola.worker.fulfilments import fulfilments, subscriptions, webhooks
from tombola.worker.fulfilments.events import UNNAMED, checked_events
from tombola.worker.fulfilments.fulfilments import Selection
from tombola.worker.fulfilments.subscriptions import REFRESH_S, Row, Subscriptions, has_notice

URL = "https://shop.example/hook"
DRAW = DrawRequest(account_id=7, request_key="k", lottery_session_id="s", campaign=CAMPAIGN)
GRANTS = [
    grant(7, "k", "consume"),
    grant(7, "k", "reward"),
    grant(7, "k", "item_2", "ITEM.PHONE"),
    grant(7, "k", "coupon_3", "COUPON.10", code="C-1"),
    grant(7, "k", "notice_3", notify="coupon-won"),
]


def events(rows: list[Row]) -> set[tuple[str, str, str]]:
    assert len(set(rows)) == len(rows)
    assert {(it.campaign, it.account_id, it.lottery_session_id) for it in rows} <= {(CAMPAIGN, 7, "s")}
    return {(it.webhook, it.event, it.idempotency_key) for it in rows}


def test_each_webhook_gets_what_it_subscribes_to(engine: Engine) -> None:
    add_webhook(engine, "settled", URL, "draw.settled")
    add_webhook(engine, "prizes", URL, "*")
    add_webhook(engine, "coupons", URL, "coupon-won", "grant.coupon")
    add_webhook(engine, "mine", URL, "draw.settled", "grant.item", campaign="default")
    found = known(engine).rows(DRAW, Status.COMPLETED, GRANTS)
    item, coupon, notice = "k:item_2", "k:coupon_3", "k:notice_3"
    assert events(found) == {
        ("settled", "draw.settled", "k"),
        ("prizes", "grant.item", item),
        ("prizes", "grant.coupon", coupon),
        ("prizes", "coupon-won", notice),
        ("coupons", "grant.coupon", coupon),
        ("coupons", "coupon-won", notice),
    }
    default = DrawRequest(account_id=7, request_key="k", lottery_session_id="s")
    assert {(it.webhook, it.event) for it in known(engine).rows(default, Status.REJECTED, [])} == {
        ("settled", "draw.settled"),
        ("mine", "draw.settled"),
    }


def test_without_a_webhook_only_a_notification_is_kept(engine: Engine) -> None:
    nothing = known(engine)
    assert nothing.is_empty
    assert events(nothing.rows(DRAW, Status.COMPLETED, GRANTS)) == {("", "coupon-won", "k:notice_3")}
    assert nothing.rows(DRAW, Status.COMPLETED, GRANTS[:4]) == []
    assert (has_notice(GRANTS), has_notice(GRANTS[:4])) == (True, False)
    add_webhook(engine, "settled", URL, "draw.settled")
    assert not known(engine).is_empty
    assert ("", "coupon-won", "k:notice_3") in events(known(engine).rows(DRAW, Status.COMPLETED, GRANTS))


def test_a_notification_that_its_notes_do_not_name_is_not_lost(engine: Engine) -> None:
    add_webhook(engine, "prizes", URL, "*")
    for notes in ("", "odds=x prize=y pull=1", "notify=", "notify=with.dot"):
        row = grant(7, "k", "notice")._replace(notes=notes)
        assert events(known(engine).rows(DRAW, Status.COMPLETED, [row])) == {("prizes", UNNAMED, "k:notice")}


def test_nothing_is_sent_to_the_database_without_rows(engine: Engine, account: int) -> None:
    found = known(engine)
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *it: statements.append(it[2]))
    with transaction(engine) as open_transaction:
        assert found.is_empty
        rows = found.rows(DrawRequest(account_id=account), Status.COMPLETED, [])
        subscriptions.insert(open_transaction, rows, utc_now())
    assert statements == []
    assert table(engine, "fulfilments") == []


def test_rows_are_written_once_with_their_draw(engine: Engine, account: int) -> None:
    add_webhook(engine, "shop", URL, "draw.settled", "*")
    settle(engine, DrawRequest(account_id=account, request_key="a"), DrawRequest(account_id=2**62, request_key="b"))
    grants(engine, grant(account, "c", "coupon", "COUPON.10", code="C-1"))
    rows = sorted(table(engine, "fulfilments"), key=lambda row: row["id"])
    assert [(row["idempotency_key"], row["event"], row["campaign"]) for row in rows] == [
        ("a", "draw.settled", "default"),
        ("b", "draw.settled", "default"),
        ("c", "draw.settled", CAMPAIGN),
        ("c:coupon", "grant.coupon", CAMPAIGN),
    ]
    for row in rows:
        assert (row["webhook"], row["state"], row["attempts"], row["error"]) == ("shop", "pending", 0, None)
        assert row["next_at"] == row["created_at"]


def known_events(found: Subscriptions) -> set[tuple[str, str, str]]:
    return events(found.rows(DRAW, Status.COMPLETED, GRANTS[2:3]))


def test_a_change_is_known_within_a_second_and_a_look_is_made_at_most_once_in_that_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *it: looks.append(it[2]))
    found = Subscriptions(engine)
    passed_s = 0.0
    began = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: began + passed_s)
    for _ in range(100):
        found.refresh()
        assert found.is_empty
    assert len([it for it in looks if "webhooks" in it]) == 1
    add_webhook(engine, "shop", URL, "*")
    found.refresh()
    assert known_events(found) == set()
    passed_s += REFRESH_S
    found.refresh()
    assert known_events(found) == {("shop", "grant.item", "k:item_2")}
    webhooks.remove(engine, "shop", **BY)
    passed_s += REFRESH_S
    found.refresh()
    assert known_events(found) == set()


def test_in_an_outage_it_keeps_what_it_knows(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    add_webhook(engine, "shop", URL, "draw.settled")
    found = known(engine)
    found._engine = open_engine("mysql+pymysql://nobody@127.0.0.1:1/none")
    found._looked_at = None
    with caplog.at_level(logging.WARNING):
        found.refresh()
    assert "the webhooks are as they were at the last look" in caplog.text
    assert len(found.rows(DRAW, Status.COMPLETED, [])) == 1
    # What has never known anything does not take that for "no webhook".
    blind = Subscriptions(found._engine)
    for _ in range(2):
        with pytest.raises(ServiceUnavailable):
            blind.refresh()


@pytest.mark.parametrize("name", ["draw.lost", "grant.reward", "", "with blank", "é", "x" * 65, "-x", "a.b"])
def test_a_name_that_no_event_has_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="no event is called"):
        checked_events(["draw.settled", name])


def test_events_are_kept_sorted_and_once() -> None:
    assert checked_events(["coupon-won", "*", "draw.settled", "*"]) == ("*", "coupon-won", "draw.settled")
    with pytest.raises(InvalidRequest, match="name an event"):
        checked_events([])


def test_what_is_selected_can_be_looked_up(engine: Engine, account: int) -> None:
    add_webhook(engine, "shop", URL, "draw.settled")
    settle(engine, *[DrawRequest(account_id=account, request_key=f"k{number}") for number in range(5)])
    with engine.connect() as connection:
        assert [it.idempotency_key for it in fulfilments.some(connection, Selection(), rows_max=2)] == ["k4", "k3"]
        (one,) = fulfilments.some(connection, Selection(lottery_session_id="k2"), rows_max=9)
        assert one.idempotency_key == "k2"
        assert fulfilments.some(connection, Selection(ids=(one.id,)), rows_max=9) == [one]
        assert fulfilments.some(connection, Selection(webhook="none"), rows_max=9) == []
        assert [it.id for it in fulfilments.some(connection, Selection(), rows_max=9, before_id=one.id)] == [2, 1]
        for wrong in (Selection(event="é"), Selection(ids=tuple(range(5000)))):
            with pytest.raises(InvalidRequest):
                fulfilments.some(connection, wrong, rows_max=1)
