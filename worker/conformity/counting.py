"""Counting: sealed blocks are added up, so that a report reads sums and not the ledger.

    find the next part ─► add up its charges ─► insert counts ─► insert the part's row ─► commit

A part is some whole blocks behind the last part's. Of two processes that count at once, one is refused by the part's
primary key, its first block, and counts nothing. Nothing of this is on a draw's path, or on sealing's: the sealer
counts the blocks of past days in steps of its own, the nightly report and `tombola campaign conformity` count the rest.

The built-in campaign's charges all have the same notes: what was won is its reward row, so the server groups both kinds
of rows. The charges of other campaigns say all of it, each in other words, and are read here.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Engine, Select, func, insert, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain import draw
from tombola.producers.domain.campaigns.built_in import odds_of_built_in
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.campaigns.pulls import BUSINESS_TYPES, CONSUME
from tombola.producers.domain.campaigns.record import read_draw_notes
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage import books, clock
from tombola.producers.storage.books import Sealed
from tombola.producers.storage.campaigns import Campaigns
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import Fault, explain, fault_of
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import conformity_accounts, conformity_counts, conformity_parts
from tombola.producers.storage.transactions import time_text
from tombola.worker.conformity.chances import Pull, State
from tombola.worker.conformity.tally import Tally

log = logging.getLogger(__name__)

ROWS_MAX: Final = 50_000  # ledger rows of a part, and the rest of its last block
SQLITE_ROWS_MAX: Final = 4096  # one writer at a time: while a part is counted, draws wait
BLOCKS_AT_ONCE: Final = 100
REWARD: Final = BUSINESS_TYPES["reward"]
_HASH_AT: Final = len(draw.NOTES_PREFIX) + 1  # in the notes, as SQL counts
_HASH_LENGTH: Final = 64
_HOUR_LENGTH: Final = len("2026-11-27 16")


class Part(NamedTuple):
    """Blocks that are counted together, from number `first_block` to `block`, and their ledger rows."""

    first_block: int
    block: int
    first_id: int
    last_id: int


class Counted(NamedTuple):
    """What one step counted: charges, and those among them that say no draw by known odds."""

    draws: int
    unreadable: int


class Versions:
    """Odds by their hashes, of the built-in campaign as well."""

    def __init__(self, engine: Engine) -> None:
        self._campaigns = Campaigns(engine)
        self._built_in = {it.odds_hash: odds_of_built_in(it) for it in draw.CAMPAIGNS.values()}

    def find(self, odds_hash: str) -> Odds | None:
        """The odds with this hash; None for unknown ones. Raises as Campaigns.version does."""
        return self._built_in.get(odds_hash) or self._campaigns.version(odds_hash)

    @property
    def built_in(self) -> dict[str, Odds]:
        """The odds of the campaigns that are built in, by their hashes."""
        return self._built_in


def count(engine: Engine) -> int:
    """Count all sealed blocks that are not counted yet, or that no other process counts; return how many charges.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    versions, charges = Versions(engine), 0
    while (counted := count_once(engine, versions)) is not None:
        charges += counted.draws
    return charges


def count_once(engine: Engine, versions: Versions, *, past_days: bool = False) -> Counted | None:
    """Count the next part, with `past_days` only of blocks that were sealed before today; None if there is none.

    Also None where another process counts it. Raises ServiceUnavailable or ConfigurationError when the database cannot
    be used.
    """
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            if next_part(connection, past_days=past_days) is None:
                return None
        with engine.begin() as connection:
            part = next_part(connection, past_days=past_days)
            return None if part is None else _count(connection, part, versions)
    except SQLAlchemyError as error:
        if fault_of(error) is Fault.CONFLICT:  # another process was faster
            return None
        raise explain(error) from error


def last_counted(connection: Connection) -> int:
    """The number of the last block that is counted; 0 for none."""
    query = select(conformity_parts.c.block).order_by(conformity_parts.c.first_block.desc()).limit(1)
    return connection.execute(query).scalar() or 0


def next_part(connection: Connection, *, past_days: bool = False) -> Part | None:
    """The next blocks to count; None if all are counted."""
    some = books.sealed_from(connection, last_counted(connection) + 1, rows_max=BLOCKS_AT_ONCE)
    if past_days:
        midnight: datetime = clock.now(connection).replace(hour=0, minute=0, second=0, microsecond=0)
        some = [it for it in some if it.sealed_at < midnight]
    rows_max = min(ROWS_MAX, SQLITE_ROWS_MAX) if connection.dialect.name == "sqlite" else ROWS_MAX
    taken: list[Sealed] = []
    while some and sum(it.block.row_count for it in taken) < rows_max:
        taken.append(some.pop(0))
    if not taken:
        return None
    first, last_block = taken[0].block, taken[-1].block
    return Part(first.number, last_block.number, first.first_id, last_block.last_id)


def _count(connection: Connection, part: Part, versions: Versions) -> Counted:
    tallies: dict[str, Tally] = {}
    draws = sum(_add_built_in(connection, part, odds, tallies) for odds in versions.built_in.values())
    more, unreadable = _add_others(connection, part, versions, tallies)
    for odds_hash, tally in tallies.items():
        _write(connection, part, odds_hash, tally)
    counted = Counted(draws + more, unreadable)
    told = {"first_block": part.first_block, "block": part.block, "counted_at": clock.now(connection)}
    connection.execute(insert(conformity_parts).values(told | counted._asdict()))
    return counted


# ---- reading charges -------------------------------------------------------------------------------------------------


_HOUR: Final[ColumnElement[str]] = func.substr(transactions.c.created_at, 1, _HOUR_LENGTH)


def _charges(part: Part) -> Select[Any]:
    """Account, hour and caller of the ledger rows of a part."""
    table = transactions.c
    return (
        select(table.account_id, _HOUR, func.coalesce(requests.c.caller, ""))
        .select_from(transactions.outerjoin(requests, requests.c.lottery_session_id == table.lottery_session_id))
        .where(table.transaction_id.between(part.first_id, part.last_id))
    )


def _add_built_in(connection: Connection, part: Part, odds: Odds, tallies: dict[str, Tally]) -> int:
    """Add the draws of a campaign that is built in; return how many. A reward row's amount is its prize's code."""
    table, state = transactions.c, State("", ())
    query = (
        _charges(part)
        .add_columns(table.business_type, table.delta_amount, func.count())
        .where(
            table.business_type.in_((CONSUME, REWARD)),
            table.notes.like(f"{draw.NOTES_PREFIX}{odds.odds_hash} %"),
        )
        .group_by(table.account_id, _HOUR, requests.c.caller, table.business_type, table.delta_amount)
    )
    lost = next((prize.code for prize in odds.prizes if not prize.grants), None)
    charges: dict[tuple[int, str, str], int] = {}
    tally, draws = Tally.of(odds), 0
    for account_id, hour, caller, business_type, delta, times in connection.execute(query):
        left = times if business_type == CONSUME else -times
        charges[account_id, hour, caller] = charges.get((account_id, hour, caller), 0) + left
        draws += times if business_type == CONSUME else 0
        if business_type == REWARD and str(delta) in odds.by_code:
            tally.add(account_id, _moment(hour), caller, Pull(state, str(delta)), times)
    for (account_id, hour, caller), times in charges.items():
        if times > 0 and lost is not None:
            tally.add(account_id, _moment(hour), caller, Pull(state, lost), times)
    if tally.cells:
        tallies[odds.odds_hash] = tally
    return draws


def _add_others(connection: Connection, part: Part, versions: Versions, tallies: dict[str, Tally]) -> tuple[int, int]:
    """Add the draws of operators' campaigns; return how many charges, and how many say no draw by known odds."""
    table = transactions.c
    query = (
        _charges(part)
        .add_columns(table.notes)
        .where(
            table.business_type == CONSUME,
            table.notes.like(f"{draw.NOTES_PREFIX}%"),  # old code's notes are its own
            func.substr(table.notes, _HASH_AT, _HASH_LENGTH).not_in(list(versions.built_in)),
        )
    )
    draws = unreadable = 0

    @lru_cache(maxsize=4096)
    def read(notes: str) -> tuple[Tally, list[Pull]] | None:
        said = read_draw_notes(notes)
        tally = tallies.get(said.odds_hash)
        if tally is None:
            odds = versions.find(said.odds_hash)
            if odds is None:
                return None
            tally = tallies[said.odds_hash] = Tally.of(odds)
        return tally, tally.compared.pulls_of(said)

    for account_id, hour, caller, notes in connection.execute(query):
        draws += 1
        try:
            found = read(notes)
        except InvalidRequest:  # the audit says more
            found = None
        if found is None:
            unreadable += 1
            continue
        tally, pulls = found
        at = _moment(hour)
        for pull in pulls:
            tally.add(account_id, at, caller, pull)
    return draws, unreadable


@lru_cache(maxsize=64)
def _moment(hour: str) -> datetime:
    return datetime.strptime(hour.replace("T", " "), "%Y-%m-%d %H").replace(tzinfo=UTC)


# ---- writing counts --------------------------------------------------------------------------------------------------


def written_counters(since_hit: tuple[int, ...]) -> str:
    """The counters of a state as they are stored."""
    return ",".join(map(str, since_hit))


def _write(connection: Connection, part: Part, odds_hash: str, tally: Tally) -> None:
    in_part: dict[str, Any] = {"odds_hash": odds_hash, "block": part.block}
    counts = [
        in_part
        | {
            "hour": it.hour,
            "caller": it.caller,
            "tier": it.pull.state.tier,
            "since_hit": written_counters(it.pull.state.since_hit),
            "drawn": it.pull.drawn,
            "pulls": pulls,
        }
        for it, pulls in tally.cells.items()
    ]
    counts.sort(key=lambda it: it["hour"])  # the order of the primary key
    for some in chunks(counts):
        connection.execute(insert(conformity_counts), some)
    # A row for nearly every draw: literals, which are numbers. Bound as parameters, they double the time of counting.
    begin, columns = f"('{odds_hash}','", ",".join(it.name for it in conformity_accounts.columns)
    rows = [
        f"{begin}{time_text(day)}',{account_id},{part.block},{luck.pulls},{luck.wins},{luck.expected!r},{luck.variance!r},"
        f"{','.join(map(repr, luck.capital))})"
        for (day, account_id), luck in sorted(tally.accounts.items(), key=itemgetter(0))
    ]
    for texts in chunks(rows):
        connection.exec_driver_sql(f"INSERT INTO {conformity_accounts.name} ({columns}) VALUES {','.join(texts)}")
