"""I7: of each prize with stock, as many units were handed out as are gone; each code was handed out once.

    published + restocked - left = granted

Granted are the stocked prizes in the notes of charges (`granted_by`), which the audit counts as it examines them. A
pool of codes is stock as well: as many codes are taken as units, and as many are free as units are left.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, func, select

from tombola.producers.domain.campaigns.pulls import CONSUME
from tombola.producers.domain.campaigns.record import read_draw_notes, read_grant_notes
from tombola.producers.domain.campaigns.scene import Versions
from tombola.producers.domain.causes import Status
from tombola.producers.domain.errors import DrawError
from tombola.producers.storage.chunks import IN_LIST_MAX, chunks
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


class HandedOut(NamedTuple):
    """A code in the notes of a ledger row."""

    ledger_key: str
    campaign: str
    code: str


def granted_by(versions: Versions | None, campaign: str, notes: str | None) -> Counter[PrizeName]:
    """The stocked prizes in the notes of a charge; none for notes that cannot be read, which violates I2."""
    try:
        said = read_draw_notes(notes or "")
        odds = None if versions is None else versions.version(said.odds_hash)
    except (DrawError, ValueError):  # or a manifest, which check_manifests says
        return Counter()
    prizes = {} if odds is None else odds.by_code
    return Counter((campaign, it) for it in said.prizes if it in prizes and prizes[it].is_stocked)


def granted_after(
    connection: Connection, after_id: int, built_in: Collection[str], versions: Versions
) -> Counter[PrizeName]:
    """The stocked prizes of completed draws above that ledger row, without those of the built-in campaigns."""
    rows = connection.execute(
        select(requests.c.campaign, transactions.c.notes)
        .join(requests, requests.c.lottery_session_id == transactions.c.lottery_session_id)
        .where(
            transactions.c.transaction_id > after_id,
            transactions.c.business_type == CONSUME,
            transactions.c.notes.contains("prizes="),  # the notes of built-in campaigns have none: no look-up for them
            requests.c.status == Status.COMPLETED,
            requests.c.campaign.not_in(sorted(built_in)),
        )
    )
    granted: Counter[PrizeName] = Counter()
    for campaign, notes in rows:
        granted += granted_by(versions, campaign, notes)
    return granted


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


# ---- each code -------------------------------------------------------------------------------------------------------


def code_in(notes: str | None) -> str:
    """The code in the notes of a grant's row; empty if there is none."""
    try:
        return read_grant_notes(notes or "").code
    except DrawError:
        return ""


def check_handed_out(connection: Connection, handed_out: Sequence[HandedOut]) -> Iterator[Violation]:
    """Each code in the ledger is of a prize of that campaign, and taken by the charge of that very draw."""
    for some in chunks(handed_out):
        codes = campaign_codes.c
        query = select(codes.code, codes.campaign, codes.taken_by).where(codes.code.in_({it.code for it in some}))
        known = {code: (campaign, taken_by) for code, campaign, taken_by in connection.execute(query)}
        for key, campaign, code in some:
            owner, taken_by = known.get(code, (None, None))
            if owner != campaign:
                yield Violation("I7", f"code {code}", f"{key} handed it out, and campaign {campaign} has no such code")
            elif _draw_of(taken_by) != _draw_of(key):
                yield Violation("I7", f"code {code}", f"{key} handed it out, it was taken by {taken_by}")


def next_taken(connection: Connection, after: str) -> list[tuple[str, str]]:
    """The next codes that were handed out, with the keys of the charges that took them."""
    codes = campaign_codes.c
    rows = connection.execute(
        select(codes.code, codes.taken_by)
        .where(codes.code > after, codes.taken_by.is_not(None))
        .order_by(codes.code)
        .limit(IN_LIST_MAX)
    )
    return [(code, taken_by) for code, taken_by in rows]


def check_taken(connection: Connection, taken: Sequence[tuple[str, str]]) -> Iterator[Violation]:
    """Each code that was handed out stands in the notes of a ledger row of the draw that took it."""
    charges = transactions.alias()
    query = (
        select(transactions.c.idempotency_key, transactions.c.notes)
        .join(charges, charges.c.lottery_session_id == transactions.c.lottery_session_id)
        .where(charges.c.idempotency_key.in_({it for _, it in taken}))
    )
    told = {(_draw_of(key), code_in(notes)) for key, notes in connection.execute(query)}
    for code, taken_by in taken:
        if (_draw_of(taken_by), code) not in told:
            yield Violation("I7", f"code {code}", f"is taken by {taken_by}, and no row of that draw handed it out")


def _draw_of(key: str | None) -> str:
    return (key or "").partition(":")[0]


# ---- manifests -------------------------------------------------------------------------------------------------------


def check_manifests(connection: Connection) -> Iterator[Violation]:
    """I2: the manifest of each version is the one that its hash names."""
    versions = campaign_versions.c
    for campaign, version, odds_hash, text in connection.execute(
        select(versions.campaign, versions.version, versions.odds_hash, versions.manifest)
    ):
        if hashlib.sha256(str(text).encode()).hexdigest() != odds_hash:
            subject = f"version {version} of {campaign}"
            yield Violation("I2", subject, f"its manifest is not the one with the hash {odds_hash}")
