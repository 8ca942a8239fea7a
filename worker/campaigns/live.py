"""What the latest pulls of a campaign came to: a look at the newest ledger rows, at most ROWS_MAX of them.

Every consume row notes the odds and the prizes of its pulls (producers.domain.campaigns.record). A row whose notes
cannot be read, or name another campaign's odds, is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Select, func, select

from tombola.producers.domain.campaigns import figures, manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.campaigns.pulls import CONSUME
from tombola.producers.domain.campaigns.record import read_draw_notes
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage import clock
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import campaign_versions as versions

ROWS_MAX: Final = 100_000  # ledger rows of any kind
VERSIONS_MAX: Final = 100  # of the campaign, the newest
RATE_WINDOW: Final = timedelta(minutes=5)
_HASH_AT: Final = len("odds=") + 1  # in the notes, as SQL counts
_HASH_LENGTH: Final = 64


@dataclass(slots=True)
class Pulls:
    """What some pulls came to. `prizes` is how often each was won, by code; amounts are in the campaign's asset.

    `expected_value` is the value that the same number of pulls has on average, by the versions that they were drawn by.
    """

    count: int = 0
    spent: Decimal = Decimal("0.00")
    value: Decimal = Decimal("0.00")
    expected_value: float = 0.0
    prizes: Counter[str] = field(default_factory=Counter)

    @property
    def return_to_player(self) -> float:
        """The value that came back per unit paid."""
        return float(self.value / self.spent) if self.spent else 0.0

    @property
    def return_expected(self) -> float:
        """The value that was to be expected per unit paid."""
        return self.expected_value / float(self.spent) if self.spent else 0.0

    def share(self, code: str) -> float:
        """The share of the pulls that won this prize."""
        return self.prizes[code] / self.count if self.count else 0.0

    def told(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "pulls": self.count,
            "spent": str(self.spent),
            "value": str(self.value),
            "return_to_player": self.return_to_player,
            "return_expected": self.return_expected,
            "prizes": dict(self.prizes),
        }


class Live(NamedTuple):
    """The latest pulls of a campaign, over all of its versions, and those by its live version alone.

    `rows` is how many ledger rows were looked at, by their ids; `since` is when the first of them was written, None if
    there is no row.
    """

    campaign: Pulls
    version: Pulls
    pulls_per_minute: float
    rows: int
    since: datetime | None

    def told(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "campaign": self.campaign.told(),
            "version": self.version.told(),
            "pulls_per_minute": self.pulls_per_minute,
            "rows": self.rows,
            "since": self.since,
        }


def look(connection: Connection, live: Odds, *, rows_max: int = ROWS_MAX) -> Live:
    """Look at the newest `rows_max` ledger rows for pulls of the campaign whose live version is `live`."""
    newest = connection.execute(select(func.max(transactions.c.transaction_id))).scalar() or 0
    begin = newest - rows_max
    since = connection.execute(
        select(transactions.c.created_at)
        .where(transactions.c.transaction_id > begin)
        .order_by(transactions.c.transaction_id)
        .limit(1)
    ).scalar()
    now = clock.now(connection)
    window_begin = now - RATE_WINDOW if since is None else max(since, now - RATE_WINDOW)
    texts = _versions(connection, live.name)
    by_version: dict[str, Pulls] = {}
    in_window = 0
    for row in connection.execute(_draws(list(texts), begin, newest)):
        try:
            notes = read_draw_notes(row.notes)
        except InvalidRequest:
            continue
        pulls = by_version.setdefault(notes.odds_hash, Pulls())
        pulls.count += len(notes.prizes)
        pulls.spent -= row.delta_amount
        pulls.prizes.update(notes.prizes)
        in_window += len(notes.prizes) if row.created_at >= window_begin else 0
    whole = Pulls()
    for odds_hash, pulls in by_version.items():
        _value(pulls, live if odds_hash == live.odds_hash else manifest.restore(texts[odds_hash].encode()))
        _add(whole, pulls)
    minutes = (now - window_begin) / timedelta(minutes=1)
    of_version = by_version.get(live.odds_hash, Pulls())
    return Live(whole, of_version, in_window / minutes if minutes > 0 else 0.0, min(newest, rows_max), since)


def _versions(connection: Connection, campaign: str) -> dict[str, str]:
    """The canonical forms of the campaign's newest versions, by hash."""
    rows = connection.execute(
        select(versions.c.odds_hash, versions.c.manifest)
        .where(versions.c.campaign == campaign)
        .order_by(versions.c.version.desc())
        .limit(VERSIONS_MAX)
    )
    return {row.odds_hash: row.manifest for row in rows}


def _draws(hashes: Sequence[str], begin: int, end: int) -> Select[Any]:
    """The charges in this range of rows by a version with one of these hashes."""
    return select(transactions.c.delta_amount, transactions.c.notes, transactions.c.created_at).where(
        transactions.c.transaction_id > begin,
        transactions.c.transaction_id <= end,
        transactions.c.business_type == CONSUME,
        func.substr(transactions.c.notes, _HASH_AT, _HASH_LENGTH).in_(hashes),
    )


def _value(pulls: Pulls, odds: Odds) -> None:
    """Say what these pulls by `odds` were worth, and what they would be worth on average."""
    worth = {prize.code: prize.value for prize in odds.prizes}
    pulls.value = sum((worth.get(code, Decimal(0)) * count for code, count in pulls.prizes.items()), Decimal("0.00"))
    chances = figures.effective_chances(odds)
    pulls.expected_value = pulls.count * sum(chance * float(worth[code]) for code, chance in chances.items())


def _add(whole: Pulls, pulls: Pulls) -> None:
    whole.count += pulls.count
    whole.spent += pulls.spent
    whole.value += pulls.value
    whole.expected_value += pulls.expected_value
    whole.prizes.update(pulls.prizes)
