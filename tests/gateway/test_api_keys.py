"""Who may call the gateway, how often, and that a caller sees nothing of another's."""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, text
from typer.testing import CliRunner

from tests import servers
from tests.books import table
from tests.gateway.test_http_api import problem
from tests.gateways import Gateway, gateway, settle
from tests.processes import House, draws, wait_for
from tombola.producers.domain import keys
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import IdempotencyKeyReused, InvalidRequest
from tombola.producers.entry import Entry
from tombola.producers.gateway import callers
from tombola.producers.gateway.admission import is_for_callers
from tombola.producers.gateway.app import DESCRIBED, ROUTES
from tombola.producers.gateway.readers import Readers
from tombola.producers.storage import api_keys
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.requests import Submission
from tombola.worker.cli import app
from tombola.worker.ledger.accounts import open_account

pytestmark = pytest.mark.process

RATE_MAX = 30
BACKLOG_MAX = 50
REVOKED_WITHIN_S = 15

V1 = [
    ("POST", "/v1/draws"),
    ("POST", "/v1/draws/batch"),
    ("GET", "/v1/draws/x"),
    ("GET", "/v1/draws/x/events"),
    ("GET", "/v1/draws/x/transactions"),
    ("GET", "/v1/accounts?user_id=1"),
    ("GET", "/v1/accounts/1"),
    ("GET", "/v1/accounts/1/transactions"),
    ("GET", "/v1/accounts/1/statement?from=2026-11-01"),
]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("api-keys")
    with (
        servers.redis(private=True) as server,
        House(f"sqlite:///{folder}/ledger.db", server.url, server.url) as house,
    ):
        yield house


@pytest.fixture(scope="module")
def account(house: House) -> int:
    return house.accounts(1)[0]


@pytest.fixture(scope="module")
def closed_gateway(house: House, account: int) -> Iterator[Gateway]:
    """As strict as it gets."""
    with gateway(
        house,
        TOMBOLA_GATEWAY_RATE_MAX=str(RATE_MAX),
        TOMBOLA_BACKLOG_MAX=str(BACKLOG_MAX),
        TOMBOLA_IDEMPOTENCY_KEY_REQUIRED="1",
    ) as started:
        yield started


def bearer(house: House, caller: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_keys.add(house.engine, caller)}"}


def caller_of(engine: Engine, api_key: str) -> str | None:
    with engine.connect().execution_options(read_only=True) as connection:
        holder = api_keys.holder_of(connection, api_key)
        return None if holder is None else holder.caller


def count(house: House) -> int:
    return len(table(house.engine, "api_idempotency_requests"))


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_kept_only_as_its_hash(house: House) -> None:
    api_key = api_keys.add(house.engine, "hashed")
    _, key_id, secret = api_key.split("_", 2)
    (row,) = [row for row in table(house.engine, "api_keys") if row["caller"] == "hashed"]
    assert row["key_id"] == key_id
    assert row["secret_sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert secret not in str(row)
    assert caller_of(house.engine, api_key) == "hashed"


def test_nothing_but_the_key_itself_is_one(house: House) -> None:
    api_key = api_keys.add(house.engine, "exact")
    _, key_id, secret = api_key.split("_", 2)
    _, other_id, _ = api_keys.add(house.engine, "other").split("_", 2)
    wrong = ["", "tmb", key_id, f"tmb_{key_id}", f"tmb_{key_id}_", f"tmb_{key_id}_{secret[:-1]}", f"{api_key}x"]
    wrong += [api_key.swapcase(), f" {api_key}", f"{api_key}\n", f"tmb_{other_id}_{secret}", f"tmb_{'0' * 16}_{secret}"]
    row = next(row for row in table(house.engine, "api_keys") if row["key_id"] == key_id)
    wrong += [f"tmb_{key_id}_{row['secret_sha256']}", f"tmb_{key_id}_{row['secret_sha256'][:43]}"]
    for it in wrong:
        assert caller_of(house.engine, it) is None, it


def test_a_caller_may_change_keys_and_stays_the_same(house: House) -> None:
    first, second = api_keys.add(house.engine, "twice"), api_keys.add(house.engine, "twice")
    assert first != second
    api_keys.revoke(house.engine, first)
    api_keys.revoke(house.engine, first)
    assert caller_of(house.engine, first) is None
    assert caller_of(house.engine, second) == "twice"
    revoked = {key.key_id: key.revoked_at for key in api_keys.list_all(house.engine) if key.caller == "twice"}
    assert [revoked[key.split("_")[1]] is None for key in (first, second)] == [False, True]


@pytest.mark.parametrize("caller", ["", "a b", "a:b", "ü", "c" * 65, "a\n"])
def test_a_callers_name_is_a_plain_one(house: House, caller: str) -> None:
    with pytest.raises(InvalidRequest, match="a caller's name is"):
        api_keys.add(house.engine, caller)


def test_the_command_shows_a_key_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in house.env.items():
        monkeypatch.setenv(name, value)
    run = CliRunner().invoke
    made = run(app, ["api-key", "add", "shop"])
    assert made.exit_code == 0
    api_key = made.output.strip()
    assert caller_of(house.engine, api_key) == "shop"
    _, key_id, secret = api_key.split("_", 2)
    for options in ([], ["--json"]):
        listed = run(app, ["api-key", "list", *options]).output
        assert key_id in listed
        assert secret not in listed
    assert {"key_id": key_id, "caller": "shop", "revoked_at": None}.items() <= next(
        key for key in json.loads(listed) if key["key_id"] == key_id
    ).items()
    revoked = run(app, ["api-key", "revoke", api_key])  # the whole key, as it is at hand
    assert (revoked.exit_code, secret in revoked.output) == (0, False)
    assert caller_of(house.engine, api_key) is None
    with pytest.raises(InvalidRequest, match="there is no API key 0000"):
        run(app, ["api-key", "revoke", "0000"], catch_exceptions=False)


# ---- the door --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*V1, ("GET", "//v1/draws/x"), ("GET", "/v1//draws/x"), ("GET", "/%76%31/draws/x")])
def test_without_a_key_nobody_comes_in(closed_gateway: Gateway, path: tuple[str, str]) -> None:
    method, target = path
    given = ["", "Bearer", "Basic dG1iOng=", "tmb_0123456789abcdef_" + "x" * 43]
    for authorization in given:
        url = httpx.URL(closed_gateway.url).copy_with(raw_path=target.encode())
        headers = {"Authorization": authorization} if authorization else {}
        refused = closed_gateway.client.request(method, url, headers=headers)
        problem(refused, 401)
        assert refused.headers["www-authenticate"] == "Bearer"
        assert authorization not in refused.text or len(authorization) < 10


def test_what_needs_no_key_tells_no_secret(closed_gateway: Gateway) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
        assert closed_gateway.client.get(path).status_code == 200
    document = closed_gateway.client.get("/openapi.json").json()
    assert document["security"] == [{"api-key": []}]


def test_guessing_keys_is_slowed_down(closed_gateway: Gateway, house: House) -> None:
    """Every guess costs a query. Whoever holds a key that is known is let in all the same."""
    mine = bearer(house, "beside")
    closed_gateway.show("x", headers=mine)
    guesses = [{"Authorization": f"Bearer tmb_{number:016x}_{'x' * 43}"} for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        told = [answer.status_code for answer in pool.map(lambda it: closed_gateway.show("x", headers=it), guesses)]
    assert set(told) == {401, 429}
    problem(closed_gateway.show("x", headers=mine), 404)
    wait_for(
        lambda: closed_gateway.show("x", headers=guesses[0]).status_code == 401, within_s=10, what=lambda: "still 429"
    )


def test_a_revoked_key_stops_within_seconds(closed_gateway: Gateway, house: House) -> None:
    mine = bearer(house, "revoked")
    problem(closed_gateway.show("x", headers=mine), 404)
    api_keys.revoke(house.engine, mine["Authorization"].removeprefix("Bearer "))
    wait_for(
        lambda: closed_gateway.show("x", headers=mine).status_code == 401,
        within_s=REVOKED_WITHIN_S,
        what=lambda: "a revoked key still gets in",
    )


def test_a_caller_sees_nothing_of_anothers(closed_gateway: Gateway, house: House, account: int) -> None:
    mine, theirs = bearer(house, "mine"), bearer(house, "theirs")
    assert closed_gateway.draw({"account_id": account}, "o-1", **mine).status_code == 202
    settled = DrawRequest(account_id=account, request_key="o-1")
    for is_settled in (False, True):
        if is_settled:
            settle(house, settled)
            assert closed_gateway.show("o-1", headers=mine).status_code == 200
        for path in ("/v1/draws/o-1", "/v1/draws/o-1/events", "/v1/draws/o-1/transactions", "/v1/draws/o-1?wait=1"):
            hidden = closed_gateway.client.get(path, headers=theirs)
            unknown = closed_gateway.client.get(path.replace("o-1", "o-9"), headers=theirs)
            problem(hidden, 404)
            assert (hidden.content, hidden.headers.keys()) == (unknown.content, unknown.headers.keys())
    # With another key of the same caller all is as before.
    again = closed_gateway.draw({"account_id": account}, "o-1", **bearer(house, "mine"))
    assert again.headers["idempotency-replayed"] == "true"
    used = [
        closed_gateway.draw({"account_id": account + 1}, "o-1", **mine),
        closed_gateway.draw({"account_id": account, "lottery_session_id": "o-1"}, "o-2", **mine),
    ]
    assert len({problem(it, 422) for it in used}) == 1


def test_a_name_that_another_caller_holds_keeps_nobody_from_drawing(
    closed_gateway: Gateway, house: House, account: int
) -> None:
    """Key and session of an order are easily guessed."""
    honest, squatter = bearer(house, "honest"), bearer(house, "squatter")
    draw = {"account_id": account}
    taken = [
        closed_gateway.draw(draw, "order-1", **squatter),
        closed_gateway.draw(draw | {"lottery_session_id": "order-2"}, "elsewhere", **squatter),
        closed_gateway.draw(draw | {"lottery_session_id": "visit-3"}, "elsewhere-3", **squatter),
    ]
    assert {it.status_code for it in taken} == {202}
    asked: list[tuple[dict[str, Any], str]] = [
        (draw, "order-1"), (draw, "order-2"), (draw | {"lottery_session_id": "visit-3"}, "order-3")
    ]  # fmt: skip
    tickets = []
    for body, key in asked:
        first, again = (closed_gateway.draw(body, key, **honest) for _ in range(2))
        assert (first.status_code, again.status_code) == (202, 202)
        assert ("idempotency-replayed" in first.headers, "idempotency-replayed" in again.headers) == (False, True)
        assert first.json() == again.json()
        assert first.headers["idempotency-key"] == again.headers["idempotency-key"] == key
        assert first.headers["location"] == f"/v1/draws/{first.json()['lottery_session_id']}"
        tickets.append(first.json())
        # His own, with other content.
        problem(closed_gateway.draw(body | {"account_id": account + 1}, key, **honest), 422)
        # The other one's is the other one's as before.
        assert closed_gateway.show(first.json()["lottery_session_id"], headers=squatter).status_code == 404
    alias = r"alias_[0-9a-f]{40}"
    names = [(it["request_key"], it["lottery_session_id"]) for it in tickets]
    assert re.fullmatch(alias, names[0][0])
    assert names[0][0] == names[0][1]
    assert names[1][0] == "order-2"
    assert re.fullmatch(alias, names[1][1])
    assert names[2][0] == "order-3"
    assert re.fullmatch(alias, names[2][1])
    rows = {row["request_key"]: row for row in table(house.engine, "api_idempotency_requests")}
    assert [rows[key]["caller"] for key, _ in names] == ["honest"] * 3
    # What the ticket says can be sent as well: it is the same draw; and nobody else can take it, before or after.
    assert closed_gateway.draw(draw, names[0][0], **honest).json() == tickets[0]
    foreign = keys.alias("somebody", "order-9")
    stolen: list[tuple[str, dict[str, Any]]] = [(names[0][0], draw), (foreign, draw)]
    for key, body in [*stolen, ("free", draw | {"lottery_session_id": foreign})]:
        told = problem(closed_gateway.draw(body, key, **squatter), 400)
        assert "cannot be chosen" in told
    results = settle(house, *[asked_in(rows[key]) for key, _ in names])
    for (_, session), result in zip(names, results, strict=True):
        assert closed_gateway.show(session, headers=honest).content == result
    batch = {"draws": [{"account_id": account, "request_key": "order-1"}]}
    (answer,) = closed_gateway.client.post("/v1/draws/batch", json=batch, headers=honest).json()["answers"]
    assert (answer["ticket"], answer["replayed"]) == (tickets[0], True)


# ---- what a key is for -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bounds_house(house: House, account: int) -> dict[str, int]:
    """Accounts by the id of their user."""
    users = {"421": 421, "4299": 4299, "7": 7}
    return {name: open_account(house.engine, user_id=user, balance=Decimal(100)) for name, user in users.items()}


@pytest.mark.parametrize("of_users", [False, True], ids=["accounts", "users"])
def test_a_key_is_for_its_accounts_alone(
    closed_gateway: Gateway, house: House, bounds_house: dict[str, int], of_users: bool
) -> None:
    first, second, other = bounds_house.values()
    bounds = api_keys.Bounds.parse("", "42") if of_users else api_keys.Bounds.parse(f"{first}-{second}", "")
    name = f"bound-{'users' if of_users else 'accounts'}"
    bound = {"Authorization": f"Bearer {api_keys.add(house.engine, name, bounds)}"}
    free = bearer(house, name)
    for number, account_id in enumerate((first, second)):
        assert closed_gateway.draw({"account_id": account_id}, f"{name}-{number}", **bound).status_code == 202
        assert closed_gateway.show(f"{name}-{number}", headers=bound).status_code == 202
        transactions = closed_gateway.client.get(f"/v1/draws/{name}-{number}/transactions", headers=bound)
        assert transactions.status_code == 200
        assert closed_gateway.client.get(f"/v1/accounts/{account_id}", headers=bound).status_code == 200
    assert closed_gateway.draw({"account_id": other}, f"{name}-9", **free).status_code == 202
    before = count(house)
    nowhere = 4711_4711
    refused = [closed_gateway.draw({"account_id": it}, f"{name}-new", **bound) for it in (other, nowhere)]
    refused += [closed_gateway.draw({"account_id": other}, f"{name}-9", **bound)]  # a repeat, with the wrong key
    refused += [closed_gateway.client.get(f"/v1/accounts/{it}", headers=bound) for it in (other, nowhere)]
    for path in ("", "/events", "/transactions", "?wait=1"):
        refused += [closed_gateway.client.get(f"/v1/draws/{name}-9{path}", headers=bound)]
    assert len({problem(it, 403) for it in refused}) == 1
    body = {"draws": [{"account_id": it} for it in (first, other, second, nowhere)]}
    answers = closed_gateway.client.post("/v1/draws/batch", json=body, headers=bound).json()["answers"]
    assert [it["status"] for it in answers] == [202, 403, 202, 403]
    assert count(house) == before + 2
    # Another caller's session says nothing, whatever the key is for.
    theirs = bearer(house, f"{name}-theirs")
    problem(closed_gateway.show(f"{name}-0", headers=theirs), 404)


def test_bounds_are_what_they_say() -> None:
    parse = api_keys.Bounds.parse
    bounds = parse("7, 6,100-199,6", "42")
    assert (bounds.accounts_text, str(bounds)) == ("6,7,100-199", "6,7,100-199 and of users 42…")
    assert [bounds.hold_account(it) for it in (5, 6, 7, 8, 99, 100, 150, 199, 200)] == [
        False, True, True, False, False, True, True, True, False,
    ]  # fmt: skip
    assert [bounds.hold_user(it) for it in (4, 42, 420, 142, -42)] == [False, True, True, False, False]
    assert parse("", "") == parse(None, None) == api_keys.NO_BOUNDS
    assert api_keys.NO_BOUNDS.hold_account(1)
    assert parse(str(2**63 - 1), "").hold_account(2**63 - 1)
    assert not parse("6", "").hold_user(6)
    for accounts in ("0", "-1", "7-6", "six", "6;7", "6,", ",", "1-2-3", str(2**63), "٣", "6 7"):
        with pytest.raises(InvalidRequest, match="accounts are ids"):
            parse(accounts, "")
    for prefix in ("0", "-4", "4 2", "x", "4" * 20, "٣", "42%"):
        with pytest.raises(InvalidRequest, match="a prefix of user ids"):
            parse("", prefix)
    with pytest.raises(InvalidRequest, match="at most 2,000 characters"):
        parse(",".join(str(it) for it in range(10_000, 11_000, 2)), "")


def test_the_command_says_what_a_key_is_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in house.env.items():
        monkeypatch.setenv(name, value)
    run = CliRunner().invoke
    made = run(app, ["api-key", "add", "tenant", "--accounts", "6,100-199", "--user-prefix", "42"])
    assert made.exit_code == 0, made.output
    with house.engine.connect() as connection:
        holder = api_keys.holder_of(connection, made.output.strip())
    assert holder == api_keys.Holder("tenant", api_keys.Bounds.parse("6,100-199", "42"))
    assert "6,100-199 and of users 42…" in run(app, ["api-key", "list"], env={"COLUMNS": "200"}).output
    (listed,) = (it for it in json.loads(run(app, ["api-key", "list", "--json"]).output) if it["caller"] == "tenant")
    assert (listed["accounts"], listed["user_prefix"]) == ("6,100-199", "42")
    (action,) = (it for it in table(house.engine, "operator_actions") if '"tenant"' in it["details"])
    assert json.loads(action["details"])["for"] == "6,100-199 and of users 42…"
    with pytest.raises(InvalidRequest, match="accounts are ids"):
        run(app, ["api-key", "add", "tenant", "--accounts", "all"], catch_exceptions=False)


# ---- what a key may do -----------------------------------------------------------------------------------------------


def test_every_route_for_callers_names_a_scope() -> None:
    for route in DESCRIBED + ROUTES:
        for path in route.paths:
            if is_for_callers(path):
                assert route.opt["needs"] in api_keys.KEY_SCOPES, path
            else:
                assert "needs" not in route.opt, path


def test_a_key_does_what_its_scopes_name(closed_gateway: Gateway, house: House, account: int) -> None:
    def key(*scopes: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {api_keys.add(house.engine, 'scoped', scopes=scopes)}"}

    draws, reads, money, both = key("draw"), key("read"), key("money"), key()
    batch = {"draws": [{"account_id": account, "request_key": "scope-2"}]}

    def posts(headers: dict[str, str], number: int) -> list[httpx.Response]:
        again = batch | {"draws": [batch["draws"][0] | {"request_key": f"scope-batch-{number}"}]}
        return [
            closed_gateway.draw({"account_id": account}, f"scope-{number}", **headers),
            closed_gateway.client.post("/v1/draws/batch", json=again, headers=headers),
        ]

    def gets(headers: dict[str, str]) -> list[httpx.Response]:
        paths = [path for method, path in V1 if method == "GET"]
        paths = [path.replace("/x", "/scope-0").replace("accounts/1", f"accounts/{account}") for path in paths]
        return [closed_gateway.client.get(path, headers=headers) for path in paths if "events" not in path]

    assert [it.status_code for it in posts(draws, 0)] == [202, 207]
    assert {it.status_code for it in gets(reads)} <= {200, 202}
    assert [it.status_code for it in posts(both, 1)] == [202, 207]
    assert {it.status_code for it in gets(both)} <= {200, 202}
    before = count(house)
    for refused, needed in (
        (posts(reads, 2), "draw"), (posts(money, 3), "draw"), (gets(draws), "read"), (gets(money), "read")
    ):  # fmt: skip
        for it in refused:
            assert f"the scope {needed}" in problem(it, 403, "missing-scope")
    assert count(house) == before
    # A path that there is not, and a method, are told as before.
    problem(closed_gateway.client.get("/v1/nothing", headers=money), 404)
    assert closed_gateway.client.post(f"/v1/accounts/{account}", json={}, headers=reads).status_code == 405


def test_the_document_says_which_scope_a_route_needs(closed_gateway: Gateway) -> None:
    paths = closed_gateway.client.get("/openapi.json").json()["paths"]
    assert paths["/v1/draws"]["post"]["security"] == [{"api-key": ["draw"]}]
    assert paths["/v1/draws/{session_id}"]["get"]["security"] == [{"api-key": ["read"]}]
    assert paths["/v1/accounts/{account_id}/statement"]["get"]["security"] == [{"api-key": ["read"]}]
    assert paths["/v1/campaigns"]["get"]["security"] == [{}]
    kinds = paths["/v1/accounts/{account_id}/statement"]["get"]["responses"]["200"]["content"]
    assert kinds.keys() == {"application/json", "text/csv"}
    assert "missing-scope" in paths["/v1/draws"]["post"]["responses"]["403"]["description"]


def test_keys_from_before_may_draw_and_read(house: House) -> None:
    api_key = api_keys.add(house.engine, "elder")
    with house.engine.begin() as connection:
        connection.execute(text("UPDATE api_keys SET scopes = NULL WHERE caller = 'elder'"))
    with house.engine.connect() as connection:
        holder = api_keys.holder_of(connection, api_key)
    assert holder is not None
    assert holder.scopes == {"draw", "read"}
    (listed,) = [it for it in api_keys.list_all(house.engine) if it.caller == "elder"]
    assert listed.scopes == "draw,read"


def test_an_expired_key_is_refused_from_that_moment_on(closed_gateway: Gateway, house: House) -> None:
    """Also where it is remembered: a revoked key may come in for some seconds, an expired one may not."""
    end = utc_now() + timedelta(seconds=2.5)
    api_key = api_keys.add(house.engine, "mortal", expires_at=end)
    mine = {"Authorization": f"Bearer {api_key}"}
    told: list[tuple[datetime, int]] = []
    while not told or told[-1][0] < end + timedelta(seconds=1):
        asked = utc_now()
        told.append((asked, closed_gateway.show("x", headers=mine).status_code))
        time.sleep(0.15)
    assert {status for asked, status in told if asked < end - timedelta(seconds=0.5)} == {404}
    assert {status for asked, status in told if asked >= end} == {401}
    assert caller_of(house.engine, api_key) is None
    with pytest.raises(InvalidRequest, match="expire in the past"):
        api_keys.add(house.engine, "mortal", expires_at=utc_now() - timedelta(seconds=1))


def test_a_found_key_is_remembered_no_longer_than_it_is_valid(house: House) -> None:
    for left_s, remembered_s in ((1.5, 1.5), (3600.0, callers.REMEMBERED_S)):
        end = utc_now() + timedelta(seconds=left_s)
        api_key = api_keys.add(house.engine, "remembered", expires_at=end)
        known = callers.Callers(house.engine, Readers())._find((api_key,))[api_key]
        assert known.until - time.monotonic() == pytest.approx(remembered_s, abs=0.4)
        assert known.until - time.monotonic() <= remembered_s


def test_the_command_gives_scopes_and_an_end_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in house.env.items():
        monkeypatch.setenv(name, value)
    run = CliRunner().invoke
    asked = ["api-key", "add", "payer", "--scope", "money", "--scope", "draw", "--expires", "2100-01-31"]
    asked += ["--key", "k-1"]
    made, again = run(app, asked), run(app, asked)
    assert (made.exit_code, again.exit_code) == (0, 0)
    with house.engine.connect() as connection:
        holder = api_keys.holder_of(connection, made.output.strip())
    end = datetime(2100, 1, 31, tzinfo=UTC)
    assert holder == api_keys.Holder("payer", scopes=frozenset({"draw", "money"}), expires_at=end)
    key_id = made.output.split("_")[1]
    assert f"tmb_{key_id}_… was made before under this key" in " ".join(again.output.split())
    (listed,) = (it for it in json.loads(run(app, ["api-key", "list", "--json"]).output) if it["caller"] == "payer")
    assert (listed["scopes"], listed["expires_at"]) == ("draw,money", "2100-01-31T00:00:00Z")
    (action,) = (it for it in table(house.engine, "operator_actions") if '"payer"' in it["details"])
    assert action["act_key"] == "k-1"
    assert json.loads(action["details"]) == {
        "caller": "payer", "scopes": "draw,money", "expires_at": "2100-01-31T00:00:00+00:00", "key_id": key_id
    }  # fmt: skip
    with pytest.raises(IdempotencyKeyReused, match="k-1"):
        run(app, [*asked, "--accounts", "6"], catch_exceptions=False)
    for wrong in (["--scope", "all"], ["--expires", "soon"], ["--expires", "2100-01-31T00:00:00"], ["--key", "a b"]):
        with pytest.raises(InvalidRequest):
            run(app, ["api-key", "add", "payer", *wrong], catch_exceptions=False)
    revoked = [run(app, ["api-key", "revoke", key_id, "--key", "k-2"]) for _ in range(2)]
    assert {it.exit_code for it in revoked} == {0}
    assert [it["act_key"] for it in table(house.engine, "operator_actions") if key_id in it["details"]] == [
        "k-1",
        "k-2",
    ]


# ---- how much --------------------------------------------------------------------------------------------------------


def test_a_key_can_be_required(closed_gateway: Gateway, house: House, account: int) -> None:
    told = problem(closed_gateway.draw({"account_id": account}, **bearer(house, "keyless")), 400)
    assert "Idempotency-Key is required" in told


def test_a_caller_has_a_rate_of_his_own(closed_gateway: Gateway, house: House, account: int) -> None:
    greedy, modest = bearer(house, "greedy"), bearer(house, "modest")
    closed_gateway.show("x", headers=greedy)
    before = count(house)

    def ask(number: int) -> httpx.Response:
        return closed_gateway.draw({"account_id": account}, f"rate-{number}", **greedy)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(4 * RATE_MAX)))
    assert {answer.status_code for answer in answers} == {202, 429}
    assert count(house) - before == [answer.status_code for answer in answers].count(202)
    limited = next(answer for answer in answers if answer.status_code == 429)
    problem(limited, 429)
    assert int(limited.headers["retry-after"]) >= 1
    problem(closed_gateway.show("x", headers=modest), 404)
    settle(house, *[asked_in(row) for row in table(house.engine, "api_idempotency_requests") if is_open(row)])


def test_a_full_backlog_lets_nothing_in_until_it_drains(closed_gateway: Gateway, house: House, account: int) -> None:
    mine = bearer(house, "queueing")

    def status() -> int:
        return closed_gateway.draw({"account_id": account}, "q-known", **mine).status_code

    wait_for(lambda: status() == 202, within_s=20, what=lambda: "what other tests left is still under way")
    waiting = draws([account], BACKLOG_MAX + 1, prefix="backlog")
    Entry(house.engine, relay_after_s=60).accept([Submission(it) for it in waiting])
    wait_for(lambda: status() == 429, within_s=20, what=lambda: "still let in")
    before = count(house)
    refused = closed_gateway.draw({"account_id": account}, "q-new", **mine)
    problem(refused, 429)
    assert int(refused.headers["retry-after"]) >= 1
    batch: dict[str, Any] = {"draws": [{"account_id": account}]}
    problem(closed_gateway.client.post("/v1/draws/batch", json=batch, headers=mine), 429)
    assert count(house) == before
    assert closed_gateway.show("q-known", headers=mine).status_code == 202  # results are handed out all the same
    settle(house, *waiting)
    wait_for(lambda: status() == 202, within_s=20, what=lambda: "still kept out")


def is_open(row: dict[str, Any]) -> bool:
    return bool(row["status"] == "accepted")


def asked_in(row: dict[str, Any]) -> DrawRequest:
    fields = ("account_id", "request_key", "lottery_session_id", "campaign")
    return DrawRequest(**{name: row[name] for name in fields})


def test_no_key_is_in_the_log(closed_gateway: Gateway, house: House) -> None:
    """After all that the others asked."""
    mine = bearer(house, "logged")
    closed_gateway.show("x", headers=mine)
    assert re.search(r"tmb_[0-9a-f]{16}_", closed_gateway.process.log()) is None
