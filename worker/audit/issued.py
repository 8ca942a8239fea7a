"""I7: of each prize with stock, as many units were handed out as are gone; none went to another user.

    published + restocked - left = granted

Granted are the stocked prizes in the notes of charges, which check_sessions counts. A pool of codes is stock as well:
as many codes are taken as units, and as many are free as units are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from sqlalchemy import Connection, Table, and_, func, select

from tombola.producers.domain.campaigns.pulls import BUSINESS_TYPES
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import (
    campaign_codes,
    campaign_stock,
    campaign_stock_changes,
    campaign_versions,
)
from tombola.worker.audit.report import Violation

PrizeName = tuple[str, str]  # campaign and code


def check_issued(connection: Connection, granted: Counter[PrizeName]) -> Iterator[Violation]:
    """Check the stock of every prize. `granted` are the stocked prizes of all completed draws."""
    published = _sums(connection, campaign_stock_changes)
    left = _sums(connection, campaign_stock)
    for campaign, code in sorted(published.keys() | left.keys()):
        name = (campaign, code)
        gone = published.get(name, 0) - left.get(name, 0)
        if gone != granted[name]:
            yield Violation(
                "I7",
                f"prize {code} of {campaign}",
                f"{gone:,} units are gone from stock, {granted[name]:,} were granted",
            )
    rows = connection.execute(
        select(campaign_stock.c.stock_key, campaign_stock.c.units).where(campaign_stock.c.units < 0)
    )
    for key, units in rows:
        yield Violation("I7", f"stock {key}", f"holds {units:,} units")
    yield from _codes(connection, left, granted)
    if connection.execute(select(campaign_versions.c.version).limit(1)).first() is not None:
        yield from _strangers(connection)


def _sums(connection: Connection, table: Table) -> dict[PrizeName, int]:
    rows = connection.execute(
        select(table.c.campaign, table.c.prize, func.sum(table.c.units)).group_by(table.c.campaign, table.c.prize)
    )
    return {(campaign, prize): int(units) for campaign, prize, units in rows}


def _codes(connection: Connection, left: Mapping[PrizeName, int], granted: Counter[PrizeName]) -> Iterator[Violation]:
    codes = campaign_codes.c
    rows: Any = connection.execute(
        select(codes.campaign, codes.prize, func.count(), func.count(codes.taken_by)).group_by(
            codes.campaign, codes.prize
        )
    )
    for campaign, prize, count, taken in rows:
        name = (campaign, prize)
        if taken != granted[name]:
            yield Violation(
                "I7", f"codes of {prize} of {campaign}", f"{taken:,} are taken, {granted[name]:,} were granted"
            )
        if count - taken != left.get(name, 0):
            yield Violation(
                "I7",
                f"codes of {prize} of {campaign}",
                f"{count - taken:,} are free, {left.get(name, 0):,} units are left",
            )


def _strangers(connection: Connection) -> Iterator[Violation]:
    """Prizes on the account of another user than the one who paid (I11)."""
    payer, receiver = accounts.alias("payer"), accounts.alias("receiver")
    rows = connection.execute(
        select(requests.c.request_key, transactions.c.account_id)
        .join(transactions, transactions.c.lottery_session_id == requests.c.lottery_session_id)
        .join(payer, payer.c.id == requests.c.account_id)
        .join(receiver, receiver.c.id == transactions.c.account_id)
        .where(
            and_(
                transactions.c.business_type.in_(sorted(BUSINESS_TYPES.values())),
                transactions.c.account_id != requests.c.account_id,
                payer.c.user_id != receiver.c.user_id,
            )
        )
    )
    for request_key, account_id in rows:
        yield Violation("I11", f"request {request_key}", f"its prize went to account {account_id} of another user")
