"""Campaigns and odds over HTTP: for everybody, exact, made once; and what the door refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import httpx
import pytest

from tests import servers
from tests.domain.test_manifest import WINTER
from tests.gateway.campaigns import BY, GARDEN, SEEN_WITHIN_S, published
from tests.gateway.test_http_api import problem
from tests.gateways import OPEN_TO_ALL, Gateway, gateway
from tests.processes import House, wait_for
from tombola.producers.domain.campaigns import figures
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN
from tombola.producers.storage.campaigns import CampaignState
from tombola.worker.campaigns import versions
from tombola.worker.campaigns.desk import Desk
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.rules import Rules

pytestmark = pytest.mark.process

OPEN, PAUSED, CLOSED = CampaignState.OPEN, CampaignState.PAUSED, CampaignState.CLOSED
SHOP = "https://shop.example"
# Far from the edges of its window, whenever this runs.
LATER = WINTER.replace("2026-12-01", "2126-12-01").replace("2027-01-01", "2127-01-01")


def variant(name: str) -> str:
    return GARDEN.replace('name = "garden"', f'name = "{name}"')


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("campaigns")
    with (
        servers.redis(private=True) as server,
        House(f"sqlite:///{folder}/ledger.db", server.url, server.url) as house,
    ):
        yield house


@pytest.fixture(scope="module")
def garden(house: House) -> Odds:
    return published(house.engine, GARDEN, OPEN)


@pytest.fixture(scope="module")
def later(house: House) -> Odds:
    return published(house.engine, LATER, OPEN)


@pytest.fixture(scope="module")
def account(house: House) -> int:
    return house.accounts(1, balance=100_000)[0]


@pytest.fixture(scope="module")
def open_gateway(house: House, garden: Odds, later: Odds, account: int) -> Iterator[Gateway]:
    with gateway(house, **OPEN_TO_ALL, TOMBOLA_CORS_ORIGINS=SHOP) as started:
        yield started


def seen(gateway: Gateway, name: str, state: CampaignState) -> None:
    """Wait until the gateway has heard of a campaign's state."""

    def state_told() -> Any:
        return gateway.client.get(f"/v1/campaigns/{name}").json().get("state")

    wait_for(lambda: state_told() == state, within_s=SEEN_WITHIN_S, what=lambda: f"{name} is {state_told()}")


# ---- what a player sees ----------------------------------------------------------------------------------------------


def test_the_list_has_what_is_open_or_paused(house: House, open_gateway: Gateway) -> None:
    published(house.engine, variant("draft"))
    published(house.engine, variant("paused"), OPEN, PAUSED)
    published(house.engine, variant("over"), OPEN, CLOSED)
    seen(open_gateway, "paused", PAUSED)
    seen(open_gateway, "over", CLOSED)

    answer = open_gateway.client.get("/v1/campaigns")
    listed = answer.json()["campaigns"]
    assert answer.headers["content-type"] == "application/json"
    assert listed[0] == {
        "name": "default",
        "title": "",
        "state": "open",
        "asset_code": "POINT",
        "prices": [{"pulls": 1, "cost": "1.00"}],
        "opens": None,
        "closes": None,
        "odds_hash": DEFAULT_CAMPAIGN.odds_hash,
    }
    states = {it["name"]: it["state"] for it in listed}
    assert states.items() >= {"garden": "open", "winter-2026": "open", "paused": "paused"}.items()
    assert not {"draft", "over"} & states.keys()
    problem(open_gateway.client.get("/v1/campaigns/draft"), 404, "campaign-not-found")


def test_a_campaign_says_all_that_a_player_must_know(open_gateway: Gateway, later: Odds) -> None:
    answer = open_gateway.client.get("/v1/campaigns/winter-2026")
    told = answer.json()
    prizes, tiers, guarantees = (told.pop(name) for name in ("prizes", "tiers", "guarantees"))
    assert told == {
        "name": "winter-2026",
        "title": "",
        "state": "open",
        "asset_code": "POINT",
        "prices": [{"pulls": 1, "cost": "10.00"}, {"pulls": 10, "cost": "90.00"}],
        "opens": "2126-11-30T16:00:00Z",
        "closes": "2126-12-31T16:00:00Z",
        "odds_hash": later.odds_hash,
        "limits": {"per_day": 20, "per_account": 200, "day": "Asia/Shanghai"},
        "eligibility": {"has_allow_list": False, "has_deny_list": True},
        "draw_version": "tombola-draw-2",
    }
    assert b"blacklist" not in answer.content  # the names of lists are the operator's

    base, effective = figures.base_chances(later), figures.effective_chances(later)
    for prize in prizes:
        chance = prize["chance"]
        assert Fraction(chance["numerator"], chance["denominator"]) == base[prize["code"]]
        assert float(chance["percent"]) == pytest.approx(100 * base[prize["code"]], rel=1e-5)
        assert float(prize["effective_percent"]) == pytest.approx(100 * effective[prize["code"]], rel=1e-5)
    phone, coupon, five, nothing = prizes
    assert (phone["code"], phone["chance"]) == ("phone", {"numerator": 1, "denominator": 10_000, "percent": "0.01"})
    assert (phone["is_limited"], phone["per_account"], phone["instead"]) == (True, 1, "five")
    assert (coupon["is_limited"], coupon["per_account"], coupon["instead"]) == (True, None, "nothing")
    assert coupon["grants"] == [
        {"asset_code": "COUPON.10", "amount": "1.00", "notify": "", "has_code": True},
        {"asset_code": "", "amount": "0.00", "notify": "coupon-won", "has_code": False},
    ]
    assert (five["is_limited"], five["instead"]) == (False, None)
    assert (nothing["grants"], "stock" in nothing) == ([], False)
    (vip,) = tiers
    assert (vip["name"], vip["spent_from"]) == ("vip", "1000.00")
    in_tier = figures.base_chances(later, "vip")
    assert [Fraction(it["chance"]["numerator"], it["chance"]["denominator"]) for it in vip["chances"]] == list(
        in_tier.values()
    )
    assert guarantees == [
        {
            "name": "ssr",
            "prizes": ["phone", "five"],
            "hard_at": 90,
            "soft_from": 75,
            "soft_step": 300,
            "words": "One of phone, 5.00 POINT at the latest at every 90th pull. "
            "From the 75th pull after the last time on, each miss makes it likelier.",
        }
    ]


def test_a_guarantee_shows_in_the_effective_chances(open_gateway: Gateway, garden: Odds) -> None:
    phone, five, nothing = open_gateway.client.get("/v1/campaigns/garden").json()["prizes"]
    for prize in (phone, five):
        assert float(prize["effective_percent"]) > 1.01 * float(prize["chance"]["percent"])
    assert float(nothing["effective_percent"]) < 0.99 * float(nothing["chance"]["percent"])
    assert sum(float(it["effective_percent"]) for it in (phone, five, nothing)) == pytest.approx(100, abs=1e-3)
    assert float(five["effective_percent"]) == pytest.approx(100 * figures.effective_chances(garden)["five"], rel=1e-5)


def test_the_built_in_campaign_is_one_of_them(open_gateway: Gateway) -> None:
    told = open_gateway.client.get("/v1/campaigns/default").json()
    assert (told["draw_version"], told["odds_hash"]) == ("tombola-draw-1", DEFAULT_CAMPAIGN.odds_hash)
    assert [(it["code"], it["chance"]["percent"], it["effective_percent"]) for it in told["prizes"]] == [
        ("5.00", "30", "30"),
        ("0.00", "70", "70"),
    ]
    assert [[grant["amount"] for grant in it["grants"]] for it in told["prizes"]] == [["5.00"], []]

    answer = open_gateway.client.get(f"/v1/odds/{DEFAULT_CAMPAIGN.odds_hash}")
    assert answer.content == b"default,POINT,1.00,30x5.00,70x0.00"
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


# ---- the bytes of a version ------------------------------------------------------------------------------------------


def test_the_bytes_of_every_version_stay(house: House, open_gateway: Gateway) -> None:
    first = published(house.engine, variant("changing"), OPEN)
    second = published(house.engine, variant("changing").replace("weight = 7000", "weight = 6000"))
    assert first.odds_hash != second.odds_hash
    for odds in (first, second):
        answer = open_gateway.client.get(f"/v1/odds/{odds.odds_hash}")
        assert answer.content == odds.canonical
        assert hashlib.sha256(answer.content).hexdigest() == odds.odds_hash
        assert answer.headers["content-type"] == "application/json"
        assert "immutable" in answer.headers["cache-control"]
    wait_for(
        lambda: open_gateway.client.get("/v1/campaigns/changing").json().get("odds_hash") == second.odds_hash,
        within_s=SEEN_WITHIN_S,
        what=lambda: "the version before is shown",
    )


@pytest.mark.parametrize("path", ["campaigns/nowhere", "campaigns/a b", "campaigns/%00", "campaigns/default%0A"])
def test_an_unknown_name_is_a_404(open_gateway: Gateway, path: str) -> None:
    answer = open_gateway.client.get(f"/v1/{path}")
    if answer.status_code != 400:  # the framework's, for NUL
        problem(answer, 404, "campaign-not-found")


@pytest.mark.parametrize("odds_hash", ["0" * 64, "x", "F" * 64, f"{'0' * 63}'", "0" * 10_000])
def test_an_unknown_hash_is_a_404(open_gateway: Gateway, odds_hash: str) -> None:
    told = problem(open_gateway.client.get(f"/v1/odds/{odds_hash}"), 404, "campaign-not-found")
    assert len(told) < 200


# ---- caches, keys, origins -------------------------------------------------------------------------------------------


def paths(odds: Odds) -> list[str]:
    return ["/v1/campaigns", f"/v1/campaigns/{odds.name}", "/v1/campaigns/default", f"/v1/odds/{odds.odds_hash}"]


def test_who_has_it_already_gets_no_body(open_gateway: Gateway, later: Odds) -> None:
    for path in paths(later):
        whole = open_gateway.client.get(path)
        etag = whole.headers["etag"]
        for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
            answer = open_gateway.client.get(path, headers={"If-None-Match": known})
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
            assert answer.headers["cache-control"] == whole.headers["cache-control"]
        assert open_gateway.client.get(path, headers={"If-None-Match": '"other"'}).content == whole.content
        head = open_gateway.client.head(path)
        assert (head.headers["etag"], head.headers["content-length"]) == (etag, str(len(whole.content)))


def test_another_state_is_another_body(house: House, open_gateway: Gateway) -> None:
    odds = published(house.engine, variant("moving"), OPEN)
    seen(open_gateway, odds.name, OPEN)
    before = open_gateway.client.get("/v1/campaigns/moving")
    versions.move(house.engine, odds.name, PAUSED, **BY)
    seen(open_gateway, odds.name, PAUSED)
    after = open_gateway.client.get("/v1/campaigns/moving", headers={"If-None-Match": before.headers["etag"]})
    assert (after.status_code, after.json()) == (200, before.json() | {"state": "paused"})


def test_no_key_is_needed_and_a_wrong_one_does_no_harm(house: House, later: Odds, account: int) -> None:
    with gateway(house) as closed:
        wrong = {"Authorization": "Bearer tmb_0000000000000000_" + "x" * 43}
        for path in paths(later):
            assert closed.client.get(path).status_code == 200
            assert closed.client.get(path, headers=wrong).status_code == 200
            problem(closed.client.post(path, json={}), 405)
        problem(closed.client.get("/v1/campaigns/nowhere"), 404)
        problem(closed.client.get("/v1/campaignsandmore"), 404)
        problem(closed.client.get(f"/v1/accounts/{account}"), 401)
        problem(closed.draw({"account_id": account, "campaign": "garden", "pulls": 10}), 401)
        described = closed.client.get("/openapi.json").json()
        assert described["security"] == [{"api-key": []}]
        for path in ("/v1/campaigns", "/v1/campaigns/{name}", "/v1/odds/{odds_hash}"):
            assert described["paths"][path]["get"]["security"] == [{}]


def test_a_page_of_an_allowed_origin_reads_them(open_gateway: Gateway, later: Odds) -> None:
    for path in paths(later):
        answer = open_gateway.client.get(path, headers={"Origin": SHOP})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, SHOP)
        assert "Origin" in answer.headers["vary"]
        other = open_gateway.client.get(path, headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


# ---- draws -----------------------------------------------------------------------------------------------------------


def settle(house: House, *asked: DrawRequest) -> list[bytes]:
    """What a worker does with them; results are rebuilt from the database."""
    rules = Rules(house.wheels, tries_max=1, desk=Desk(house.engine, house.settings.seed_bytes))
    answers = tries.settle(house.engine, asked, rules)
    assert all(isinstance(it, Settled) for it in answers), answers
    return [it.result for it in answers if isinstance(it, Settled)]


@pytest.mark.parametrize("pulls", [1, 10])
def test_pulls_are_one_charge_and_an_outcome_each(
    house: House, open_gateway: Gateway, garden: Odds, account: int, pulls: int
) -> None:
    key, asked = f"pulls-{pulls}", {"account_id": account, "campaign": "garden", "pulls": pulls}
    assert open_gateway.draw(asked, key).status_code == 202
    repeat = open_gateway.draw(asked, key)
    assert (repeat.status_code, repeat.headers["idempotency-replayed"]) == (202, "true")
    problem(open_gateway.draw(asked | {"pulls": 11 - pulls}, key), 422, "idempotency-key-reused")
    request = DrawRequest(account_id=account, request_key=key, campaign="garden", pulls=pulls)
    (result,) = settle(house, request)

    found = open_gateway.show(key)
    assert (found.status_code, found.content) == (200, result)
    told = found.json()
    assert (told["v"], told["odds_hash"], told["status"]) == (2, garden.odds_hash, "completed")
    assert [it["pull"] for it in told["prizes"]] == list(range(1, pulls + 1))
    assert told["transactions"][0]["delta_amount"] == f"-{garden.cost[pulls]}"
    rows = open_gateway.client.get(f"/v1/draws/{key}/transactions").json()
    assert [row["idempotency_key"] for row in rows] == [row["idempotency_key"] for row in told["transactions"]]


def test_pulls_in_a_batch_have_answers_of_their_own(house: House, open_gateway: Gateway, account: int) -> None:
    draw = {"account_id": account, "campaign": "garden"}
    asked = [
        draw | {"request_key": "in-batch-1", "pulls": 10},
        draw | {"request_key": "in-batch-2", "pulls": 7},
        draw | {"request_key": "in-batch-3"},
        {"account_id": account, "request_key": "in-batch-4", "pulls": 1},
        {"account_id": account, "request_key": "in-batch-5"},
        draw | {"request_key": "in-batch-6", "campaign": "winter-2026", "pulls": 10},
    ]
    told = open_gateway.client.post("/v1/draws/batch", json={"draws": asked}).json()["answers"]
    assert [it["status"] for it in told] == [202, 422, 202, 422, 202, 409]
    assert [it["problem"] and it["problem"]["code"] for it in told] == [
        *(None, "pulls-not-sold", None),
        *("pulls-not-sold", None, "campaign-not-open"),
    ]


@pytest.mark.parametrize("pulls", ["0", "-1", "101", "1.0", "true", '"10"', "[1]", "1e1"])
def test_a_number_of_pulls_that_cannot_be_one_is_a_400(open_gateway: Gateway, account: int, pulls: str) -> None:
    headers = {"Content-Type": "application/json"}
    body = '{"account_id":%d,"campaign":"garden","pulls":%s}' % (account, pulls)  # noqa: UP031
    for path, sent in (("/v1/draws", body), ("/v1/draws/batch", f'{{"draws":[{body}]}}')):
        problem(open_gateway.client.post(path, content=sent, headers=headers), 400, "invalid-request")


def test_what_the_door_refuses_has_a_type_of_its_own(house: House, open_gateway: Gateway, account: int) -> None:
    published(house.engine, variant("pausing"), OPEN, PAUSED)
    published(house.engine, variant("closing"), OPEN, CLOSED)
    published(house.engine, variant("unready"))
    past = GARDEN.replace('day = "Asia', 'closes = 2020-01-01T00:00:00Z\nday = "Asia')
    published(house.engine, past.replace('"garden"', '"past"'), OPEN)
    for name, state in (("pausing", PAUSED), ("closing", CLOSED), ("past", OPEN)):
        seen(open_gateway, name, state)

    def refused(campaign: str, status: int, code: str, pulls: int = 10) -> str:
        def ask() -> httpx.Response:
            return open_gateway.draw({"account_id": account, "campaign": campaign, "pulls": pulls}, f"no-{campaign}")

        # The door itself looks once a second.
        wait_for(lambda: ask().json().get("code") == code, within_s=SEEN_WITHIN_S, what=lambda: ask().text)
        return problem(ask(), status, code)

    assert "paused" in refused("pausing", 409, "campaign-paused")
    assert "ended" in refused("closing", 409, "campaign-closed")
    assert "ended" in refused("past", 409, "campaign-closed")
    assert "2126-11-30" in refused("winter-2026", 409, "campaign-not-open")
    assert "1, 10" in refused("garden", 422, "pulls-not-sold", pulls=3)
    assert "without `pulls`" in refused("default", 422, "pulls-not-sold", pulls=1)
    known = refused("spring", 422, "unknown-campaign")
    assert "default" in known
    assert "garden" in known
    assert "unready" not in known  # a draft
    assert "closing" not in known
    for name in ("pausing", "closing", "past", "winter-2026", "garden", "default", "spring"):
        problem(open_gateway.show(f"no-{name}"), 404, "session-not-found")  # nothing was written


def test_an_accepted_draw_stays_accepted_when_its_campaign_is_paused(
    house: House, open_gateway: Gateway, account: int
) -> None:
    published(house.engine, variant("accepting"), OPEN)
    seen(open_gateway, "accepting", OPEN)
    asked = {"account_id": account, "campaign": "accepting", "pulls": 1}
    first = open_gateway.draw(asked, "before-the-pause")
    assert first.status_code == 202
    versions.move(house.engine, "accepting", PAUSED, **BY)
    seen(open_gateway, "accepting", PAUSED)
    problem(open_gateway.draw(asked, "after-the-pause"), 409, "campaign-paused")
    repeat = open_gateway.draw(asked, "before-the-pause")
    assert (repeat.status_code, repeat.content) == (202, first.content)


def test_the_document_describes_results_of_both_versions(open_gateway: Gateway) -> None:
    described = open_gateway.client.get("/openapi.json").json()
    text = json.dumps(described["paths"]["/v1/draws/{session_id}"]["get"]["responses"]["200"])
    assert "DrawResult" in text
    assert "PullsResult" in text
    assert "pulls" in described["components"]["schemas"]["NewDraw"]["properties"]
