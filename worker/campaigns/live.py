"""What the latest pulls of a campaign came to: a look at the newest ledger rows, at most ROWS_MAX of them.

The notes of every consume row begin with the odds, the seed and the prizes of its pulls (record, in
producers.domain.campaigns). A row whose notes do not, or name other odds or pulls that these do not sell, is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
_WORDS: Final = 3  # of the notes: odds, seed, prizes. What follows differs from account to account


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

    def add(self, more: Pulls) -> None:
        """Add other pulls to these."""
        self.count += more.count
        self.spent += more.spent
        self.value += more.value
        self.expected_value += more.expected_value
        self.prizes.update(more.prizes)

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


class Drawn(NamedTuple):
    """`draws` draws with the same prizes, one of each pull."""

    prizes: tuple[str, ...]
    is_recent: bool
    draws: int


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
    rows: Counter[tuple[str, bool]] = Counter()
    for notes, is_recent in connection.execute(_charges(list(texts), begin, newest, window_begin)):
        rows[" ".join(notes.split(" ", _WORDS)[:_WORDS]), bool(is_recent)] += 1
    whole, of_version = Pulls(), Pulls()
    recent = 0
    for odds_hash, drawn in _by_version(rows).items():
        odds = live if odds_hash == live.odds_hash else manifest.restore(texts[odds_hash].encode())
        pulls, recent_pulls = _summed(odds, drawn)
        recent += recent_pulls
        whole.add(pulls)
        if odds is live:
            of_version = pulls
    minutes = (now - window_begin) / timedelta(minutes=1)
    return Live(whole, of_version, recent / minutes if minutes > 0 else 0.0, min(newest, rows_max), since)


def _versions(connection: Connection, campaign: str) -> dict[str, str]:
    """The canonical forms of the campaign's newest versions, by hash."""
    rows = connection.execute(
        select(versions.c.odds_hash, versions.c.manifest)
        .where(versions.c.campaign == campaign)
        .order_by(versions.c.version.desc())
        .limit(VERSIONS_MAX)
    )
    return {row.odds_hash: row.manifest for row in rows}


def _charges(hashes: Sequence[str], begin: int, end: int, recent_from: datetime) -> Select[Any]:
    """The charges in this range of rows by versions with these hashes: their notes, and whether they are recent.

    Nothing else is read: a page waits for 100,000 of them.
    """
    return select(transactions.c.notes, transactions.c.created_at >= recent_from).where(
        transactions.c.transaction_id > begin,
        transactions.c.transaction_id <= end,
        transactions.c.business_type == CONSUME,
        func.substr(transactions.c.notes, _HASH_AT, _HASH_LENGTH).in_(hashes),
    )


def _by_version(rows: Mapping[tuple[str, bool], int]) -> dict[str, list[Drawn]]:
    """What the notes say, by odds hash."""
    found: dict[str, list[Drawn]] = {}
    for (text, is_recent), count in rows.items():
        try:
            notes = read_draw_notes(text)
        except InvalidRequest:
            continue
        found.setdefault(notes.odds_hash, []).append(Drawn(notes.prizes, is_recent, count))
    return found


def _summed(odds: Odds, drawn: Iterable[Drawn]) -> tuple[Pulls, int]:
    """What these draws by `odds` came to, and how many of the pulls are recent. The price is that of the odds."""
    pulls, recent = Pulls(), 0
    for prizes, is_recent, draws in drawn:
        if len(prizes) not in odds.cost:
            continue
        pulls.count += draws * len(prizes)
        pulls.spent += draws * odds.cost[len(prizes)]
        recent += draws * len(prizes) * is_recent
        for code in prizes:
            pulls.prizes[code] += draws
    worth = {prize.code: prize.value for prize in odds.prizes}
    pulls.value = sum((worth.get(code, Decimal(0)) * count for code, count in pulls.prizes.items()), Decimal("0.00"))
    chances = figures.effective_chances(odds)
    pulls.expected_value = pulls.count * sum(chance * float(worth[code]) for code, chance in chances.items())
    return pulls, recent
