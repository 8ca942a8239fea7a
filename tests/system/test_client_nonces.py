"""A client nonce, from the door to the audit: part of the request, and of what is drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timedelta

import pytest
from msgspec import structs
from sqlalchemy import select, update

from tests.campaigns.shops import Shop, open_shop
from tombola.producers.domain import operations
from tombola.producers.domain.causes import Cause, Status
from tombola.producers.domain.contract import DrawRequest, DrawResult, PullsResult, Request
from tombola.producers.storage import requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import api_idempotency_requests as table
from tombola.worker.settle.answers import Answer, Refused, Settled

pytestmark = pytest.mark.slow

# Half of the pulls want the cup: it is stocked in the one campaign, and guaranteed in the other, which keeps counters.
RAFFLE = """
name = "raffle"
asset = "POINT"
cost = { 1 = "1.00", 5 = "5.00" }

[[prize]]
code = "cup"
weight = 1
stock = 100000
instead = "nothing"
grants = [{ asset = "ITEM.CUP", amount = "1" }]

[[prize]]
code = "nothing"
weight = 1
"""
STARS = (
    RAFFLE.replace('"raffle"', '"stars"').replace('stock = 100000\ninstead = "nothing"\n', "")
    + '[[guarantee]]\nname = "cup"\nprizes = ["cup"]\nhard_at = 4\n'
)
DRAWS = 40
# Each kind of draw: the campaign, and the number of pulls.
KINDS = [("default", None), ("raffle", None), ("raffle", 1), ("raffle", 5), ("stars", None), ("stars", 5)]


def nonce(number: int) -> str:
    return f"nonce-{number:010}"


@pytest.fixture
def shop(database_url: str) -> Iterator[Shop]:
    with open_shop(database_url) as made:
        made.publish(RAFFLE)
        made.publish(STARS)
        yield made


def draws_of(shop: Shop, campaign: str, pulls: int | None, *, count: int = DRAWS) -> list[DrawRequest]:
    """Draws with a nonce each, by an account of their own."""
    payer = shop.account(user=len(campaign) * 100 + (pulls or 0))
    return [
        DrawRequest(
            account_id=payer,
            request_key=f"{campaign}-{pulls}-{number:02}",
            campaign=campaign,
            pulls=pulls,
            client_nonce=nonce(number),
        )
        for number in range(count)
    ]


def of_every_kind(shop: Shop, *, count: int = 4) -> list[DrawRequest]:
    return [draw for kind in KINDS for draw in draws_of(shop, *kind, count=count)]


def causes(answers: Sequence[Answer]) -> list[Cause | None]:
    """Why each was refused; None for one that has settled."""
    assert all(isinstance(it, Settled | Refused) for it in answers), answers
    return [it.cause if isinstance(it, Refused) else None for it in answers]


def bytes_of(answers: Sequence[Answer]) -> dict[str, bytes]:
    return {it.request.request_key: it.result for it in answers if isinstance(it, Settled)}


def test_a_draw_with_a_nonce_settles_and_proves_right(shop: Shop) -> None:
    draws = of_every_kind(shop)
    results = shop.draw(*draws)
    assert {it.status for it in results} == {"completed"}
    # Without `pulls` the result is of version 1, as it is without a nonce.
    assert [type(it) for it in results] == [DrawResult if it.pulls is None else PullsResult for it in draws]
    assert shop.violations() == []


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[3]], ids=["default", "single", "pulls"])
def test_the_same_key_with_another_nonce_is_another_request(shop: Shop, kind: tuple[str, int | None]) -> None:
    with_nonce, plain = draws_of(shop, *kind, count=2)
    plain = structs.replace(plain, client_nonce="")
    shop.accept(with_nonce, plain)
    others = [structs.replace(with_nonce, client_nonce=it) for it in (nonce(7), "")]
    others.append(structs.replace(plain, client_nonce=nonce(7)))
    for _ in ("before it settles", "after"):
        answers = shop.entry.accept_each([Submission(it) for it in others])
        assert [getattr(it, "is_conflict", it) for it in answers] == [True] * 3
        assert causes(shop.settle(*others)) == [Cause.FINGERPRINT_MISMATCH] * 3
        assert causes(shop.settle(with_nonce, plain)) == [None, None]
    assert [it.is_new for it in shop.accept(with_nonce, plain)] == [False, False]  # a repeat, and no conflict


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_another_nonce_in_the_same_batch_does_not_change_what_is_drawn(
    shop: Shop, kind: tuple[str, int | None]
) -> None:
    """Of 40 draws the other nonce would win or lose otherwise in half: the audit of the shop finds each."""
    draws = draws_of(shop, *kind)
    shop.accept(*draws)
    others = [structs.replace(it, client_nonce=nonce(number + DRAWS)) for number, it in enumerate(draws)]
    assert causes(shop.settle(*draws, *others)) == [None] * DRAWS + [Cause.FINGERPRINT_MISMATCH] * DRAWS
    assert shop.violations() == []


def test_another_campaign_in_the_same_batch_does_not_change_what_is_drawn(shop: Shop) -> None:
    """Past the door, where no row says which of the two was first: the first one in the batch counts."""
    draws = draws_of(shop, "raffle", 5)
    others = [structs.replace(it, campaign="stars") for it in draws]
    assert causes(shop.settle(*draws, *others)) == [None] * DRAWS + [Cause.FINGERPRINT_MISMATCH] * DRAWS
    assert shop.violations() == []


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_audit_draws_by_the_nonce(database_url: str, kind: tuple[str, int | None]) -> None:
    """Rows that name other nonces, fingerprints included, are not what was drawn."""
    with open_shop(database_url, balances=False) as shop:
        shop.publish(RAFFLE)
        shop.publish(STARS)
        draws = draws_of(shop, *kind)
        shop.draw(*draws)
        assert shop.violations() == []
        with shop.engine.begin() as connection:
            for number, draw in enumerate(draws):
                forged = structs.replace(draw, client_nonce=nonce(number + DRAWS))
                connection.execute(
                    update(table)
                    .where(table.c.request_key == draw.request_key)
                    .values(terms=forged.terms, fingerprint=forged.fingerprint())
                )
        assert sum(it.startswith("I2") for it in shop.violations()) > DRAWS // 10


def test_a_repeat_gets_the_first_bytes_also_from_the_ledger_alone(shop: Shop) -> None:
    draws = of_every_kind(shop)
    shop.accept(*draws)
    first = bytes_of(shop.settle(*draws))
    assert bytes_of(shop.settle(*draws)) == first
    for draw in draws:
        state = shop.entry.state_of(draw.lottery_session_id)
        assert state is not None
        assert (state.request, state.result) == (draw, first[draw.request_key])
    with shop.engine.begin() as connection:  # the ledger's keys never expire
        connection.execute(table.delete())
    assert bytes_of(shop.settle(*draws)) == first


def test_the_relay_publishes_the_same_bytes_again(shop: Shop) -> None:
    draws = of_every_kind(shop, count=2)
    plain = [structs.replace(it, request_key=f"plain-{it.request_key}", client_nonce="") for it in draws]
    plain = [structs.replace(it, lottery_session_id=it.request_key) for it in plain]
    shop.accept(*draws, *plain)
    with shop.engine.begin() as connection:
        connection.execute(update(table).values(publish_at=utc_now() - timedelta(seconds=1)))
        leased = requests.lease(
            connection,
            utc_now(),
            rows_max=100,
            tries_max=5,
            delay_after=lambda _attempts: timedelta(seconds=30),
            published_before=None,
        )
    published = {it.request_key: it.encode() for it in leased.due}
    assert published == {it.request_key: it.encode() for it in (*draws, *plain)}
    bodies = [json.loads(published[it.request_key]) for it in draws]
    assert [it["client_nonce"] for it in bodies] == [it.client_nonce for it in draws]
    # What comes back from the broker is the request that was accepted.
    again: list[Request] = [operations.parse_request(it) for it in published.values()]
    assert causes(shop.settle(*again)) == [None] * len(published)


def test_a_draw_without_a_nonce_has_the_row_that_it_had(shop: Shop) -> None:
    payer = shop.account(user=7)
    draws = [
        DrawRequest(account_id=payer, request_key="v1"),
        DrawRequest(account_id=payer, request_key="v2", campaign="raffle", pulls=5),
    ]
    shop.accept(*draws, draws_of(shop, "default", None, count=1)[0])  # in one INSERT with a draw that has a nonce
    with shop.engine.connect().execution_options(read_only=True) as connection:
        rows = {
            row.request_key: (row.kind, row.terms, row.fingerprint, row.status)
            for row in connection.execute(select(table))
        }
    assert rows["v1"] == (None, None, draws[0].fingerprint(), Status.ACCEPTED)
    assert rows["v2"] == ("draw", '["raffle",5]', draws[1].fingerprint(), Status.ACCEPTED)
    assert rows["default-None-00"][:2] == ("draw", f'["default",null,"{nonce(0)}"]')
    assert causes(shop.settle(*draws)) == [None, None]
