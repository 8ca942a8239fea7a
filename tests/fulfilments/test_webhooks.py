"""What operators do to webhooks: add, rotate, remove, test; each on record, and no secret is shown again."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import Engine, update
from typer.testing import CliRunner, Result

from tests.books import table
from tests.fulfilments.books import BY, add_webhook
from tests.receivers import Receiver
from tombola.producers.domain.errors import DrawError, InvalidRequest, ServiceUnavailable
from tombola.producers.storage import clock
from tombola.producers.storage.schema import webhooks as schema
from tombola.worker.cli import app
from tombola.worker.fulfilments import webhooks
from tombola.worker.fulfilments.signatures import signature
from tombola.worker.fulfilments.webhooks import FORMER_SECRET_TIME, LIVE_MAX, Wanted
from tombola.worker.operators import actions

URL = "https://shop.example/hook"
Tombola = Callable[..., Result]


@pytest.fixture
def tombola(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Tombola:
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", engine.url.render_as_string(hide_password=False))
    return lambda *words: CliRunner().invoke(app, list(words))


def recorded(engine: Engine) -> list[actions.Action]:
    with engine.connect() as connection:
        return list(reversed(actions.recent(connection, rows_max=100)))


def secrets_of(engine: Engine, name: str) -> tuple[str, ...]:
    with engine.connect() as connection:
        return webhooks.find_live(connection, name).secrets


def test_a_webhook_from_a_shell(engine: Engine, tombola: Tombola) -> None:
    said = tombola("webhook", "add", "shop", URL, "--event", "grant.item", "--event", "*", "--reason", "it ships")
    assert said.exit_code == 0, said.output
    secret = said.output.strip()
    assert secrets_of(engine, "shop") == (secret,)
    listed = tombola("webhook", "list", "--json").output
    (it,) = json.loads(listed)
    assert (it["name"], it["url"], it["events"], it["campaign"]) == ("shop", URL, ["*", "grant.item"], None)
    rotated = tombola("webhook", "rotate", "shop", "--reason", "a laptop was lost").output.strip()
    assert secrets_of(engine, "shop") == (rotated, secret)
    assert tombola("webhook", "remove", "shop", "--reason", "moved", "--yes").exit_code == 0
    everything = listed + tombola("webhook", "list").output + str(recorded(engine)) + repr(webhooks.live)
    assert secret not in everything
    assert rotated not in everything
    assert [(it.action, it.reason) for it in recorded(engine)] == [
        ("webhook add", "it ships"),
        ("webhook rotate", "a laptop was lost"),
        ("webhook remove", "moved"),
    ]
    assert all(it.operator.startswith("shell:") and it.details["webhook"] == "shop" for it in recorded(engine))
    # A removed one keeps no secret, and can be added again.
    assert [row["secret"] for row in table(engine, "webhooks")] == [""]
    assert add_webhook(engine, "shop", URL, "draw.settled") not in (secret, rotated)


def test_no_secret_is_in_a_repr(engine: Engine) -> None:
    secret = add_webhook(engine, "shop", URL, "*")
    with engine.connect() as connection:
        assert secret not in repr(webhooks.live(connection))
        assert webhooks.live(connection)[0].secrets == (secret,)


def test_a_former_secret_signs_for_a_day(engine: Engine) -> None:
    first = add_webhook(engine, "shop", URL, "*")
    second = webhooks.rotate(engine, "shop", **BY)
    third = webhooks.rotate(engine, "shop", **BY)
    assert secrets_of(engine, "shop") == (third, second)
    assert first not in str(table(engine, "webhooks"))
    with engine.begin() as connection:
        before = clock.now(connection) - timedelta(seconds=1)
        ends = connection.execute(schema.select().with_only_columns(schema.c.former_until)).scalar_one()
        assert timedelta(0) <= ends - before <= FORMER_SECRET_TIME + timedelta(seconds=10)
        connection.execute(update(schema).values(former_until=before))
    assert secrets_of(engine, "shop") == (third,)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (Wanted("shop", URL, ("*",)), "there is a webhook shop already"),
        (Wanted("", URL, ("*",)), "a webhook's name is"),
        (Wanted("a/b", URL, ("*",)), "a webhook's name is"),
        (Wanted("é", URL, ("*",)), "a webhook's name is"),
        (Wanted("x" * 65, URL, ("*",)), "a webhook's name is"),
        (Wanted("new", "http://shop.example/", ("*",)), "begins with https://"),
        (Wanted("new", "https://10.0.0.1/", ("*",)), "not a public address"),
        (Wanted("new", URL, ()), "name an event"),
        (Wanted("new", URL, ("draw.lost",)), "no event is called"),
        (Wanted("new", URL, tuple(f"event-{number:030}" for number in range(9))), "add a second one"),
        (Wanted("new", URL, ("*",), "nowhere"), "there is no campaign 'nowhere'"),
        (Wanted("new", URL, ("*",), "é"), "there is no campaign 'é'"),
    ],
)
def test_what_cannot_be_added_changes_nothing(engine: Engine, wanted: Wanted, why: str) -> None:
    add_webhook(engine, "shop", URL, "*")
    before = table(engine, "webhooks")
    with pytest.raises(InvalidRequest, match=why):
        webhooks.add(engine, wanted, is_private_allowed=False, **BY)
    assert table(engine, "webhooks") == before
    assert [it.action for it in recorded(engine)] == ["webhook add"]


def test_there_is_an_end_to_their_number(engine: Engine) -> None:
    for number in range(LIVE_MAX):
        add_webhook(engine, f"w{number}", URL, "*")
    with pytest.raises(InvalidRequest, match="may be no more"):
        add_webhook(engine, "more", URL, "*")
    webhooks.remove(engine, "w0", **BY)
    add_webhook(engine, "more", URL, "*")


def test_a_reason_and_a_webhook_are_needed(engine: Engine) -> None:
    add_webhook(engine, "shop", URL, "*")
    for act in (webhooks.rotate, webhooks.remove):
        with pytest.raises(InvalidRequest, match="say why"):
            act(engine, "shop", operator="ann", reason=" ")
        for name in ("none", "", "é", "x" * 1000):
            with pytest.raises(InvalidRequest, match="there is no webhook"):
                act(engine, name, **BY)
    webhooks.remove(engine, "shop", **BY)
    for act in (webhooks.rotate, webhooks.remove):
        with pytest.raises(InvalidRequest, match="there is no webhook"):
            act(engine, "shop", **BY)


def test_a_trial_is_signed_and_says_what_came_back(
    engine: Engine, tombola: Tombola, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Receiver() as receiver:
        secret = add_webhook(engine, "shop", receiver.url, "draw.settled")
        refused = tombola("webhook", "test", "shop")
        assert isinstance(refused.exception, ServiceUnavailable)
        assert "begins with https://" in str(refused.exception)
        assert receiver.received == []
        monkeypatch.setenv("TOMBOLA_WEBHOOK_PRIVATE", "true")
        said = tombola("webhook", "test", "shop")
        assert (said.exit_code, said.output) == (0, f"{receiver.url} took it: 204\n")
        (sent,) = receiver.received
        assert sent.event["event"] == "webhook.test"
        stamp = int(sent.headers["webhook-timestamp"])
        assert sent.headers["webhook-signature"] == signature(secret, sent.headers["webhook-id"], stamp, sent.body)
        receiver.answer = lambda _: 503
        failed = tombola("webhook", "test", "shop")
        assert isinstance(failed.exception, DrawError)
        assert str(failed.exception) == f"{receiver.url}: answered 503"
    assert isinstance(tombola("webhook", "test", "none").exception, InvalidRequest)
