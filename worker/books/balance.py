"""The trial balance: per asset, what users hold and what the house's accounts stand at add up to zero.

Users' side: the balances of all accounts as they are now. The house's side: what it stood at after the last block, and
what the rows after it say. Both are read in one snapshot, and neither is made from the other: a balance that was raised
by hand, or a ledger row that went with its request, is a difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Final, NamedTuple

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain import operations
from tombola.producers.domain.books import house as house_side
from tombola.producers.domain.books.house import UNKNOWN, HouseAccount, Rules
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN
from tombola.producers.storage import books
from tombola.producers.storage.campaigns import Campaigns
from tombola.producers.storage.faults import explain
from tombola.producers.storage.ledger_leaves import Range
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import campaign_stock_changes, campaign_versions
from tombola.worker.books import rows
from tombola.worker.books.sealing import FIRST_ID
from tombola.worker.ledger.old_rows import OldRows

ZERO: Final = Decimal("0.00")
LAST_ID: Final = 2**63 - 1
ISSUED: Final = "house/issued"
ADJUSTMENTS: Final = "house/adjustments"
BREAKAGE: Final = "house/breakage"
PRIZES: Final = "/prizes"
SALES: Final = "/sales"


class Line(NamedTuple):
    """An account of the house: what it stands at by sealed rows, and by rows that are not sealed yet."""

    account: str
    sealed: Decimal
    unsealed: Decimal

    @property
    def balance(self) -> Decimal:
        return self.sealed + self.unsealed


class AssetBalance(NamedTuple):
    """The trial balance of an asset. `users` is the sum of the balances of `accounts` accounts."""

    asset_code: str
    accounts: int
    users: Decimal
    house: Sequence[Line]

    @property
    def difference(self) -> Decimal:
        """Users and house together: 0 where the books balance."""
        return self.users + sum((it.balance for it in self.house), ZERO)

    @property
    def issued(self) -> Decimal:
        """What was paid in: recharges."""
        return -self._sum(lambda name: name == ISSUED or name.startswith(f"{ISSUED}/"))

    @property
    def sold(self) -> Decimal:
        """What users paid for draws, less what was refunded."""
        return self._sum(lambda name: name.endswith(SALES))

    @property
    def paid_out(self) -> Decimal:
        """What users won, less what refunds took back."""
        return -self._sum(lambda name: name.endswith(PRIZES))

    @property
    def breakage(self) -> Decimal:
        """What expired."""
        return self._sum(lambda name: name == BREAKAGE)

    def _sum(self, belongs: Callable[[str], bool]) -> Decimal:
        return sum((it.balance for it in self.house if belongs(it.account)), ZERO)


class Liability(NamedTuple):
    """What prizes of a campaign have issued of an asset, beside the most that its published stock can issue.

    `published` is None where a prize without stock grants the asset: then there is no most.
    """

    campaign: str
    asset_code: str
    issued: Decimal
    published: Decimal | None

    @property
    def is_exceeded(self) -> bool:
        return self.published is not None and self.issued > self.published


class TrialBalance(NamedTuple):
    """The trial balance of all assets.

    `blocks` is the number of the last block, `unsealed_rows` how many rows came after it. In a ledger that `is_legacy`
    old code may have opened accounts with balances that no row explains: there a difference proves nothing.
    """

    assets: Sequence[AssetBalance]
    liabilities: Sequence[Liability]
    blocks: int
    unsealed_rows: int
    is_legacy: bool

    @property
    def wrong(self) -> list[str]:
        """What does not add up, in sentences; empty where the books balance."""
        found = [
            f"{it.asset_code}: users and house together are {it.difference:,.2f}, not 0.00"
            for it in self.assets
            if it.difference and not self.is_legacy
        ]
        found += [
            f"{it.asset_code}: {UNKNOWN} stands at {line.balance:,.2f}: rows of a business type that nothing writes"
            for it in self.assets
            for line in it.house
            if line.account == UNKNOWN
        ]
        return found + [
            f"campaign {it.campaign}: prizes issued {it.issued:,.2f} {it.asset_code}, stock allows {it.published:,.2f}"
            for it in self.liabilities
            if it.is_exceeded
        ]


def trial_balance(engine: Engine, rules: Rules | None = None) -> TrialBalance:
    """The trial balance as of now. Raises ServiceUnavailable or ConfigurationError when the database cannot be read."""
    rules = operations.house_accounts() if rules is None else rules
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            if engine.dialect.name != "sqlite":
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            old = OldRows.of(connection)
            users = _users(connection)
            last = books.last_sealed(connection)
            sealed = books.house_balances(connection)
            after = Range(FIRST_ID if last is None else last.block.last_id + 1, LAST_ID)
            groups = rows.read_groups(connection, after, rules, old)
            units = _published_units(connection)
            versions = _versions(connection)
    except SQLAlchemyError as error:
        raise explain(error) from error
    unsealed = house_side.sums(groups, rules, DEFAULT_CAMPAIGN.name)
    assets = list(_assets(users, sealed, unsealed))
    return TrialBalance(
        assets,
        list(_liabilities(assets, _published(Campaigns(engine), versions, units))),
        blocks=0 if last is None else last.block.number,
        unsealed_rows=sum(it.rows for it in groups),
        is_legacy=old is not OldRows.NONE,
    )


def _users(connection: Connection) -> dict[str, tuple[int, Decimal]]:
    query = select(accounts.c.asset_code, func.count(), func.sum(accounts.c.balance)).group_by(accounts.c.asset_code)
    return {asset_code: (count, total) for asset_code, count, total in connection.execute(query)}


def _assets(
    users: Mapping[str, tuple[int, Decimal]],
    sealed: Mapping[HouseAccount, Decimal],
    unsealed: Mapping[HouseAccount, Decimal],
) -> Iterator[AssetBalance]:
    keys = sealed.keys() | unsealed.keys()
    for asset_code in sorted(users.keys() | {asset for _, asset in keys}):
        lines = [
            Line(account, sealed.get((account, asset), ZERO), unsealed.get((account, asset), ZERO))
            for account, asset in sorted(keys)
            if asset == asset_code
        ]
        count, total = users.get(asset_code, (0, ZERO))
        yield AssetBalance(asset_code, count, total, [it for it in lines if it.sealed or it.unsealed])


# ---- liability -------------------------------------------------------------------------------------------------------


def _published_units(connection: Connection) -> Counter[tuple[str, str]]:
    """The units of each prize that were ever there to be won, by campaign and prize."""
    table = campaign_stock_changes.c
    query = select(table.campaign, table.prize, func.sum(table.units)).group_by(table.campaign, table.prize)
    return Counter({(campaign, prize): int(units) for campaign, prize, units in connection.execute(query)})


def _versions(connection: Connection) -> list[str]:
    return list(connection.execute(select(campaign_versions.c.odds_hash)).scalars())


def _published(
    campaigns: Campaigns, versions: Sequence[str], units: Mapping[tuple[str, str], int]
) -> dict[tuple[str, str], Decimal | None]:
    """The most that prizes can issue, by campaign and asset: a prize is counted by the version that grants most."""
    most: dict[tuple[str, str], dict[str, Decimal]] = {}
    unlimited: set[tuple[str, str]] = set()
    for odds in filter(None, map(campaigns.version, versions)):
        for prize in odds.prizes:
            for asset_code in {it.asset_code for it in prize.grants if it.amount}:
                key = odds.name, asset_code
                amount = sum((it.amount for it in prize.grants if it.asset_code == asset_code), ZERO)
                amounts = most.setdefault(key, {})
                amounts[prize.code] = max(amount, amounts.get(prize.code, ZERO))
                if not prize.is_stocked:
                    unlimited.add(key)
    return {
        key: None if key in unlimited else sum((units.get((key[0], it), 0) * amounts[it] for it in amounts), ZERO)
        for key, amounts in most.items()
    }


def _liabilities(
    assets: Sequence[AssetBalance], published: Mapping[tuple[str, str], Decimal | None]
) -> Iterator[Liability]:
    issued = {
        (line.account.split("/")[1], it.asset_code): -line.balance
        for it in assets
        for line in it.house
        if line.account.endswith(PRIZES)
    }
    for campaign, asset_code in sorted(published.keys() | issued.keys()):
        key = campaign, asset_code
        yield Liability(campaign, asset_code, issued.get(key, ZERO), published.get(key))
