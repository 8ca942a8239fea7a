"""Draws with fulfilments for tests: ledger rows and fulfilments as the batch writes them, in one transaction."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from sqlalchemy import Engine, update

from tests.books import table
from tombola.producers.domain.campaigns.record import GrantNotes
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import wheels
from tombola.producers.settings import Settings
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.ledger import Posting
from tombola.producers.storage.schema import fulfilments
from tombola.producers.storage.transactions import transaction
from tombola.worker.fulfilments import subscriptions, webhooks
from tombola.worker.fulfilments.subscriptions import Row, Subscriptions
from tombola.worker.fulfilments.webhooks import Wanted
from tombola.worker.ledger import post as ledger
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.rules import Rules

SEED = bytes(range(32))
BY = {"operator": "ann", "reason": "for the shop"}
ODDS_HASH = "ab" * 32
CAMPAIGN = "winter"


def add_webhook(engine: Engine, name: str, url: str, *events: str, campaign: str = "") -> str:
    """The webhook's secret."""
    return webhooks.add(engine, Wanted(name, url, events, campaign), is_private_allowed=True, **BY)


def settings_for(engine: Engine, **more: str) -> Settings:
    """Settings that allow receivers on this machine."""
    values = {"webhook_private": "true", "webhook_timeout_s": "10", **more}
    env = {f"TOMBOLA_{name.upper()}": value for name, value in values.items()}
    url = engine.url.render_as_string(hide_password=False)
    return Settings.from_env({"TOMBOLA_DATABASE_URL": url, **env})


def known(engine: Engine) -> Subscriptions:
    """The subscriptions as they are now."""
    found = Subscriptions(engine)
    found.refresh()
    return found


def settle(engine: Engine, *draws: DrawRequest) -> list[Row]:
    """Settle draws of the built-in campaign; their fulfilments follow, as the batch would write them."""
    subscribed = known(engine)
    rows: list[Row] = []
    for answer in tries.settle(engine, draws, Rules(wheels(SEED))):
        assert isinstance(answer, Settled)
        status = Status.REJECTED if answer.is_rejected else Status.COMPLETED
        rows += subscribed.rows(answer.request, status, [])
    with transaction(engine) as open_transaction:
        subscriptions.insert(open_transaction, rows, utc_now())
    return rows


def grant(account_id: int, key: str, kind: str, asset: str = "POINT", **notes: Any) -> Posting:
    """The ledger row of a grant: `kind` as in its derived key, such as coupon_3."""
    business_type = f"lottery_{kind.partition('_')[0]}"
    amount = Decimal("0.00") if business_type == "lottery_notice" else Decimal("1.00")
    text = GrantNotes(ODDS_HASH, "prize", 1)._replace(**notes).written()
    zero = Decimal("0.00")
    return Posting(account_id, key, f"{key}:{kind}", business_type, asset, amount, zero, zero + amount, text)


def grants(engine: Engine, *postings: Posting, campaign: str = CAMPAIGN) -> list[Row]:
    """Write these ledger rows and their fulfilments in one transaction, each a draw of its own."""
    subscribed, rows = known(engine), []
    for it in postings:
        draw = DrawRequest(account_id=it.account_id, request_key=it.ledger_key, campaign=campaign)
        rows += subscribed.rows(draw, Status.COMPLETED, [it])
    now = utc_now()
    with transaction(engine) as open_transaction:
        ledger.post(open_transaction, postings, now)
        subscriptions.insert(open_transaction, rows, now)
    return rows


def coupons(engine: Engine, account_id: int, count: int, prefix: str = "draw") -> list[str]:
    """So many coupons with codes; the keys of their rows."""
    made = [
        grant(account_id, f"{prefix}_{number:04d}", "coupon", "COUPON.10", code=f"C-{number}")
        for number in range(count)
    ]
    grants(engine, *made)
    return [it.idempotency_key for it in made]


def states(engine: Engine) -> dict[str, str]:
    """The state of each fulfilment by its key."""
    return {row["idempotency_key"]: row["state"] for row in table(engine, "fulfilments")}


def pass_time(engine: Engine) -> None:
    """Whatever is pending is due now."""
    with engine.begin() as connection:
        connection.execute(
            update(fulfilments).where(fulfilments.c.state == "pending").values(next_at=utc_now().replace(year=2020))
        )


def rows_of(engine: Engine) -> Sequence[dict[str, Any]]:
    return sorted(table(engine, "fulfilments"), key=lambda row: row["id"])
