"""What was counted of a campaign in a period, as its report needs it; and the charges that tickets are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Engine, and_, case, func, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.campaigns.pulls import CONSUME
from tombola.producers.domain.draw import CAMPAIGNS, NOTES_PREFIX
from tombola.producers.domain.errors import CampaignNotFound
from tombola.producers.domain.operations.draw import CONSUME_TYPE
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import account_asset_balances as balances
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import books_blocks, campaign_versions
from tombola.producers.storage.schema import conformity_accounts as accounts
from tombola.producers.storage.schema import conformity_counts as counts
from tombola.producers.storage.schema import conformity_parts as parts
from tombola.worker.conformity.chances import Compared, Pull, State
from tombola.worker.conformity.counting import Versions, last_counted
from tombola.worker.conformity.questions import LUCKIEST, Account, Drawn
from tombola.worker.conformity.report import ALPHA, ALWAYS, Counted, Period, Report, report
from tombola.worker.conformity.tails import Sums
from tombola.worker.conformity.tally import Cell, Luck
from tombola.worker.conformity.tickets import Charge, KeyOf, Tickets, tickets_of

TICKET_ROWS_MAX: Final = 200_000  # ledger rows that are read for tickets, the newest of the period
CANDIDATES_MAX: Final = 100  # the best by their largest capital: by the mean of all three the order may differ a little
_CAPITALS: Final = (accounts.c.capital_low, accounts.c.capital_middle, accounts.c.capital_high)
_MONTH_LENGTH: Final = len("2026-11")


def report_on(
    engine: Engine,
    campaign: str,
    *,
    period: Period = ALWAYS,
    alpha: float = ALPHA,
    key_of: KeyOf | None = None,
    ticket_rows_max: int = TICKET_ROWS_MAX,
) -> Report:
    """The report of a campaign, from what is counted. Without `key_of` nothing is said of tickets.

    Raises CampaignNotFound for a campaign without a version; ServiceUnavailable or ConfigurationError when the database
    cannot be used.
    """
    versions = Versions(engine)
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            found = []
            for number, odds_hash in versions_of(connection, campaign):
                odds = versions.find(odds_hash)
                if odds is None or not (cells := _cells(connection, odds, period)):
                    continue
                tickets = None
                if key_of is not None:
                    charges = _charges(connection, odds, period, rows_max=ticket_rows_max)
                    tickets = tickets_of(charges, odds, key_of)
                found.append(Counted(odds_hash, number, _drawn(connection, odds, period, cells, tickets)))
            unreadable = connection.execute(select(func.sum(parts.c.unreadable))).scalar() or 0
            block = last_counted(connection)
    except SQLAlchemyError as error:
        raise explain(error) from error
    return report(campaign, found, alpha=alpha, period=period, block=block, unreadable=int(unreadable))


def campaigns_of(connection: Connection) -> list[str]:
    """Every campaign with a version, those that are built in first."""
    names = connection.execute(select(campaign_versions.c.campaign).distinct()).scalars()
    return [*CAMPAIGNS, *sorted(names)]


def versions_of(connection: Connection, campaign: str) -> list[tuple[int, str]]:
    """Number and odds hash of the campaign's versions; number 0 for one that is built in. Raises CampaignNotFound."""
    if campaign in CAMPAIGNS:
        return [(0, CAMPAIGNS[campaign].odds_hash)]
    query = (
        select(campaign_versions.c.version, campaign_versions.c.odds_hash)
        .where(campaign_versions.c.campaign == campaign)
        .order_by(campaign_versions.c.version)
    )
    if not (found := [(number, odds_hash) for number, odds_hash in connection.execute(query)]):
        raise CampaignNotFound(f"there is no published campaign {campaign!r}")
    return found


# ---- counts ----------------------------------------------------------------------------------------------------------


def _within(column: ColumnElement[datetime], period: Period) -> ColumnElement[bool]:
    bounds = [] if period.since is None else [column >= period.since]
    return and_(True, *bounds, *([] if period.until is None else [column < period.until]))


def _cells(connection: Connection, odds: Odds, period: Period) -> dict[Cell, int]:
    by = (counts.c.hour, counts.c.caller, counts.c.tier, counts.c.since_hit, counts.c.drawn)
    query = (
        select(*by, func.sum(counts.c.pulls))
        .where(counts.c.odds_hash == odds.odds_hash, _within(counts.c.hour, period))
        .group_by(*by)
    )
    found: Counter[Cell] = Counter()
    for hour, caller, tier, since_hit, drawn, pulls in connection.execute(query):
        state = State(tier, tuple(map(int, since_hit.split(","))) if since_hit else ())
        found[Cell(hour, caller, Pull(state, drawn))] += int(pulls)
    return found


def _drawn(
    connection: Connection, odds: Odds, period: Period, cells: dict[Cell, int], tickets: Tickets | None
) -> Drawn:
    of_version = and_(accounts.c.odds_hash == odds.odds_hash, _within(accounts.c.day, period))
    count = connection.execute(select(func.count(accounts.c.account_id.distinct())).where(of_version)).scalar_one()
    ranked = sorted(_candidates(connection, of_version), key=lambda it: (it.luck.bound, it.id))
    return Drawn(Compared(odds), cells, count, ranked[:LUCKIEST], _cohorts(connection, of_version), tickets)


def _candidates(connection: Connection, of_version: ColumnElement[bool]) -> Iterator[Account]:
    """The accounts whose largest capital is the largest."""
    first, *others = (func.sum(it) for it in _CAPITALS)
    largest: ColumnElement[Any] = first
    for it in others:
        largest = case((it > largest, it), else_=largest)
    sums = [func.sum(accounts.c[name]) for name in ("pulls", "wins", "expected", "variance")]
    query = (
        select(accounts.c.account_id, *sums, *(func.sum(it) for it in _CAPITALS))
        .where(of_version)
        .group_by(accounts.c.account_id)
        .order_by(largest.desc(), accounts.c.account_id)
        .limit(CANDIDATES_MAX)
    )
    for account_id, pulls, wins, expected, variance, *capital in connection.execute(query):
        yield Account(
            account_id, Luck(int(pulls), int(wins), float(expected), float(variance), list(map(float, capital)))
        )


def _cohorts(connection: Connection, of_version: ColumnElement[bool]) -> dict[str, Sums]:
    """Wins by the month in which the account was opened, as 2026-11."""
    month = func.substr(balances.c.created_at, 1, _MONTH_LENGTH)
    sums = [func.sum(accounts.c[name]) for name in ("pulls", "wins", "expected", "variance")]
    query = (
        select(month, *sums)
        .select_from(accounts.join(balances, balances.c.id == accounts.c.account_id))
        .where(of_version)
        .group_by(month)
    )
    return {
        key: Sums(int(pulls), int(wins), float(expected), float(variance))
        for key, pulls, wins, expected, variance in connection.execute(query)
    }


# ---- charges, for tickets --------------------------------------------------------------------------------------------


def _charges(connection: Connection, odds: Odds, period: Period, *, rows_max: int) -> Iterator[Charge]:
    """The charges by these odds among the newest counted ledger rows of the period, at most `rows_max` rows."""
    in_period = and_(_within(books_blocks.c.sealed_at, period), books_blocks.c.number <= last_counted(connection))
    last: int = connection.execute(select(func.max(books_blocks.c.last_id)).where(in_period)).scalar() or 0
    table = transactions.c
    query = (
        select(table.account_id, table.idempotency_key, table.notes, requests.c.terms)
        .select_from(transactions.outerjoin(requests, requests.c.lottery_session_id == table.lottery_session_id))
        .where(
            table.transaction_id > last - rows_max,
            table.transaction_id <= last,
            table.business_type == CONSUME,
            table.notes.like(f"{NOTES_PREFIX}{odds.odds_hash} %"),
            _within(table.created_at, period),
        )
        .order_by(table.transaction_id)
    )
    for account_id, key, notes, terms in connection.execute(query):
        yield Charge(account_id, key.removesuffix(f":{CONSUME_TYPE}"), notes, terms)


def day(moment: datetime) -> datetime:
    """The beginning of a day that was given without its zone: UTC."""
    return moment.replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=UTC)
