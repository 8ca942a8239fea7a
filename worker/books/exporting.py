"""The sealed books for other programs: a journal of one entry per day and asset, as beancount or CSV.

A day is that of the block's sealing, in UTC: rows are sealed about a minute after they were written. In an entry, each
house account has what it moved that day, and all users together have the other side, so it adds up to zero.

Beancount counts what the operator owns as positive and what it owes as negative: users' balances are liabilities.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Final, NamedTuple

from sqlalchemy import Connection, Engine, select
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain.books.house import HouseAccount
from tombola.producers.storage.faults import explain
from tombola.producers.storage.schema import books_blocks, books_house

USERS: Final = "users"
ROWS_AT_ONCE: Final = 5000
ZERO: Final = Decimal("0.00")

# The beancount type of a house account, by its last word, else by its second one.
_KINDS: Final = {
    "sales": "Income",
    "prizes": "Expenses",
    "issued": "Assets",
    "purchases": "Income",
    "breakage": "Income",
    "holds": "Liabilities",
    "adjustments": "Equity",
}


class Entry(NamedTuple):
    """What moved on a day in an asset: by house account, `users` among them; it adds up to zero.

    `first_block` and `last_block` are the blocks of that day in which the asset moved.
    """

    day: date
    asset_code: str
    first_block: int
    last_block: int
    moved: Mapping[str, Decimal]


def entries(engine: Engine, *, since: date | None = None, until: date | None = None) -> Iterator[Entry]:
    """The entries from `since` to `until`, both included, by day and asset.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be read.
    """
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            yield from _by_day(_moved(connection, since, until))
    except SQLAlchemyError as error:
        raise explain(error) from error


class _Moved(NamedTuple):
    day: date
    block: int
    account: str
    asset_code: str
    delta: Decimal


def _moved(connection: Connection, since: date | None, until: date | None) -> Iterator[_Moved]:
    query = (
        select(books_blocks.c.sealed_at, books_house)
        .join(books_house, books_house.c.block == books_blocks.c.number)
        .order_by(books_blocks.c.number)
    )
    if since is not None:
        query = query.where(books_blocks.c.sealed_at >= _begin(since))
    if until is not None:
        query = query.where(books_blocks.c.sealed_at < _begin(until + timedelta(days=1)))
    for row in connection.execution_options(yield_per=ROWS_AT_ONCE).execute(query):
        yield _Moved(row.sealed_at.date(), row.block, row.account, row.asset_code, row.delta)


def _begin(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


def _by_day(rows: Iterable[_Moved]) -> Iterator[Entry]:
    day: date | None = None
    moved: dict[str, dict[str, Decimal]] = {}
    blocks: dict[str, tuple[int, int]] = {}

    def ended() -> Iterator[Entry]:
        for asset_code, by_account in sorted(moved.items()):
            house = {name: delta for name, delta in sorted(by_account.items()) if delta}
            if house:
                yield Entry(
                    day or date.min, asset_code, *blocks[asset_code], house | {USERS: -sum(house.values(), ZERO)}
                )

    for row in rows:
        if row.day != day:
            yield from ended()
            day, moved, blocks = row.day, {}, {}
        by_account = moved.setdefault(row.asset_code, {})
        by_account[row.account] = by_account.get(row.account, ZERO) + row.delta
        blocks[row.asset_code] = (blocks.get(row.asset_code, (row.block, 0))[0], row.block)
    yield from ended()


def opening(engine: Engine, before: date) -> dict[HouseAccount, Decimal]:
    """What each house account stood at before that day, by account and asset. Raises as `entries` does."""
    try:
        balances: dict[HouseAccount, Decimal] = {}
        with engine.connect().execution_options(read_only=True) as connection:
            for row in _moved(connection, None, before - timedelta(days=1)):
                key = row.account, row.asset_code
                balances[key] = balances.get(key, ZERO) + row.delta
        return {key: balance for key, balance in sorted(balances.items()) if balance}
    except SQLAlchemyError as error:
        raise explain(error) from error


# ---- CSV -------------------------------------------------------------------------------------------------------------


def as_csv(found: Iterable[Entry]) -> Iterator[str]:
    """The entries as CSV, a line per account, with a header."""
    yield _line("date", "asset", "account", "amount", "first_block", "last_block")
    for it in found:
        for account, amount in it.moved.items():
            yield _line(it.day.isoformat(), it.asset_code, account, f"{amount:.2f}", it.first_block, it.last_block)


def _line(*values: object) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(values)
    return file.getvalue()


# ---- beancount -------------------------------------------------------------------------------------------------------


def as_beancount(found: Iterable[Entry], balances: Mapping[HouseAccount, Decimal], since: date | None) -> Iterator[str]:
    """The entries as a beancount ledger: accounts opened, entries, and the balances at the end.

    `balances` is what the house's accounts stood at before `since`: the first entry.
    """
    whole = [*_opening(balances, since), *found]
    if not whole:
        return
    first, last = whole[0].day, whole[-1].day
    accounts = _names({name for it in whole for name in it.moved}, _account, joined=":")
    commodities = _names({it.asset_code for it in whole}, _commodity, joined="")
    yield 'option "title" "tombola"\n\n'
    for asset_code, commodity in sorted(commodities.items()):
        yield f'{first} commodity {commodity}\n  name: "{asset_code}"\n'
    yield "\n"
    for name, account in sorted(accounts.items(), key=lambda it: it[1]):
        yield f'{first} open {account}\n  name: "{name}"\n'
    standing: dict[tuple[str, str], Decimal] = {}
    for it in whole:
        blocks = f"blocks {it.first_block} to {it.last_block}" if it.last_block else "balances brought forward"
        yield f'\n{it.day} * "tombola" "{it.asset_code}: {blocks}"\n'
        for name, amount in it.moved.items():
            key = accounts[name], commodities[it.asset_code]
            standing[key] = standing.get(key, ZERO) - amount
            yield f"  {key[0]:<60} {-amount:>16.2f} {key[1]}\n"
    yield "\n"
    for (account, commodity), amount in sorted(standing.items()):
        yield f"{last + timedelta(days=1)} balance {account:<52} {amount:>16.2f} {commodity}\n"


def _opening(balances: Mapping[HouseAccount, Decimal], since: date | None) -> Iterator[Entry]:
    by_asset: dict[str, dict[str, Decimal]] = {}
    for (account, asset_code), balance in balances.items():
        by_asset.setdefault(asset_code, {})[account] = balance
    for asset_code, house in sorted(by_asset.items()):
        assert since is not None
        yield Entry(since, asset_code, 0, 0, house | {USERS: -sum(house.values(), ZERO)})


def _account(name: str) -> str:
    """`house/spring-2026/sales` as Income:House:Spring-2026:Sales."""
    if name == USERS:
        return "Liabilities:Users"
    words = name.split("/")
    kind = _KINDS.get(words[-1]) or _KINDS.get(words[1], "Equity")
    return ":".join((kind, *map(_component, words)))


def _component(word: str) -> str:
    """A word of an account's name: it begins with a capital or a digit; then letters, digits and dashes."""
    plain = re.sub(r"[^A-Za-z0-9-]", "-", word)
    return plain[:1].upper() + plain[1:] if plain[:1].isalnum() else f"X{plain}"


def _commodity(asset_code: str) -> str:
    """A commodity: 2 to 24 capitals, digits and `'._-`, beginning with a capital and ending with a capital or digit."""
    plain = re.sub(r"[^A-Z0-9._-]", "-", asset_code.upper())
    plain = plain if plain[:1].isalpha() else f"X{plain}"
    plain = plain[:24].rstrip("._-")
    return plain if len(plain) > 1 else f"{plain}X"


def _names(words: Iterable[str], named: Callable[[str], str], *, joined: str) -> dict[str, str]:
    """A name for each word. Words that would share a name get the beginning of their hash as well."""
    found: dict[str, str] = {}
    for word in sorted(words):
        name = named(word)
        if name in found.values():
            mark = hashlib.sha256(word.encode()).hexdigest()[:6].upper()
            name = f"{name}{joined}{mark}" if joined else f"{name[:16]}-X{mark}"
        found[word] = name
    return found
