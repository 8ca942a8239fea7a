"""I3, I4, I5: the chain of ledger rows behind the balance of each account.

Chains walk the ledger in the order of its ids, which within one account is the order given under its lock. They hold
where the chain of each account stands, in arrays of BAND_SIZE accounts: 42 bytes an account, whatever its history.
worker.audit.marks keeps them from one audit to the next; worker.audit.accounts compares them with the balances.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, select

from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.worker.audit.lines import (
    ACCOUNT_ID,
    AFTER,
    ASSET,
    BEFORE,
    DELTA,
    KEY,
    NOTES,
    TRANSACTION_ID,
    Line,
    cents,
    read_odd,
)
from tombola.worker.audit.report import Violation
from tombola.worker.audit.stored import Unreadable, cents_of, shown
from tombola.worker.ledger.old_rows import OldRows, old_accounts_until

BAND_SIZE: Final = 256
_BITS: Final = BAND_SIZE.bit_length() - 1
_MASK: Final = BAND_SIZE - 1


class Standing(NamedTuple):
    """Where the chain of one account stands: how many rows it has, the last one's id, the sum of their amounts in
    hundredths, and their asset, empty before the first row. `sum` None: a row could not be read."""

    rows: int
    last_id: int
    sum: int | None
    asset: str


NOTHING: Final = Standing(0, 0, 0, "")


class Band:
    """The chains of accounts whose ids are near each other. Account `id` stands at `id % BAND_SIZE` in each array."""

    __slots__ = ("afters", "assets", "counts", "last_ids", "sums")

    def __init__(self) -> None:
        zeros = bytes(8 * BAND_SIZE)
        self.counts = array("q", zeros)
        self.last_ids = array("q", zeros)
        self.sums = array("q", zeros)
        self.afters = array("q", zeros)  # the balance after the last row: differs from the sum where a chain is broken
        self.assets = array("h", bytes(2 * BAND_SIZE))  # a number from 1 of Chains.assets

    def copy(self) -> Band:
        made = Band.__new__(Band)
        for name in Band.__slots__:
            setattr(made, name, getattr(self, name)[:])
        return made

    def encoded(self) -> bytes:
        """The band as it is kept; sums and last balances are the same in books that balance."""
        parts = [self.counts, self.last_ids, self.sums, self.assets]
        return b"".join(_little(part).tobytes() for part in parts)

    @classmethod
    def decoded(cls, state: bytes) -> Band:
        """The band of these bytes; raises ValueError for bytes that are none."""
        if len(state) != 26 * BAND_SIZE:
            raise ValueError("not the state of a band of accounts")
        made, size = cls.__new__(cls), 8 * BAND_SIZE
        numbers = [array("q", state[at : at + size]) for at in (0, size, 2 * size)]
        made.counts, made.last_ids, made.sums = map(_little, numbers)
        made.afters = made.sums[:]
        made.assets = _little(array("h", state[3 * size :]))
        return made


def _little(numbers: array[int]) -> array[int]:
    if sys.byteorder == "big":
        numbers = numbers[:]
        numbers.byteswap()
    return numbers


def begins_at_zero(_account_id: int) -> bool:
    """No account may begin with a balance."""
    return False


class Chains:
    """Where the chain of every account stands.

    Rows of old code are taken as they are (`tombola legacy inspect` examines them): a chain begins anew at each of
    these rows. `begins_anywhere` says whether an account is one that old code opened with any balance.
    """

    def __init__(
        self,
        bands: dict[int, Band] | None = None,
        assets: Sequence[str] = (),
        *,
        old: OldRows = OldRows.NONE,
        begins_anywhere: Callable[[int], bool] = begins_at_zero,
    ) -> None:
        self.bands = {} if bands is None else bands
        self.assets = list(assets)
        self.touched: set[int] = set()  # the bands that changed
        self._asset_numbers = {asset: number for number, asset in enumerate(self.assets, 1)}
        self._old = old
        self.begins_anywhere = begins_anywhere
        self._unreadable: set[int] = set()  # accounts with a row that cannot be read
        self._unknown: set[int] = set()  # of these, the accounts whose next row may begin anywhere

    def copy_of(self, accounts: range) -> Chains:
        """The chains of the accounts in this range of ids, which may walk on by themselves."""
        wanted = range(accounts.start >> _BITS, ((accounts.stop - 1) >> _BITS) + 1)
        copies = {number: self.bands[number].copy() for number in wanted if number in self.bands}
        made = Chains(copies, self.assets, old=self._old, begins_anywhere=self.begins_anywhere)
        made._unreadable, made._unknown = set(self._unreadable), set(self._unknown)
        return made

    def copy(self) -> Chains:
        """The chains as they stand, for a mark."""
        bands = {number: band.copy() for number, band in self.bands.items()}
        made = Chains(bands, self.assets, old=self._old, begins_anywhere=self.begins_anywhere)
        made.touched = set(self.touched)
        return made

    def afresh(self) -> Chains:
        """Chains without any row."""
        return Chains(old=self._old, begins_anywhere=self.begins_anywhere)

    def of(self, account_id: int) -> Standing:
        """Where the chain of this account stands."""
        band = self.bands.get(account_id >> _BITS)
        if band is None:
            return NOTHING
        at = account_id & _MASK
        asset = self.assets[band.assets[at] - 1] if band.assets[at] else ""
        sum_ = None if account_id in self._unreadable else band.sums[at]
        return Standing(band.counts[at], band.last_ids[at], sum_, asset)

    def next_account(self, from_id: int) -> int | None:
        """The lowest account with rows whose id is at least `from_id`, or lower within its band; None: none."""
        numbers = [number for number in self.bands if number >= from_id >> _BITS]
        return max(from_id, min(numbers) << _BITS) if numbers else None

    def accounts_in(self, accounts: range) -> Iterator[int]:
        """The accounts with rows in this range of ids."""
        for number in range(accounts.start >> _BITS, ((accounts.stop - 1) >> _BITS) + 1):
            band = self.bands.get(number)
            if band is not None:
                for at in range(BAND_SIZE):
                    account_id = (number << _BITS) + at
                    if band.counts[at] and account_id in accounts:
                        yield account_id

    def walk(self, connection: Connection, lines: Iterable[Line], odd: Mapping[int, Any]) -> Iterator[Violation]:
        """Walk on over these rows, which are the next ones of their accounts. `odd` are the odd rows among them."""
        bands, is_old_ledger = self.bands, self._old is not OldRows.NONE
        for line in lines:
            if len(line) == 1:
                yield from self._walk_odd(connection, odd[int(line[0])])
                continue
            account_id = int(line[ACCOUNT_ID])
            band = bands.get(account_id >> _BITS) or self._open(account_id >> _BITS)
            at = account_id & _MASK
            transaction_id = int(line[TRANSACTION_ID])
            try:
                delta, before, after = cents(line[DELTA]), cents(line[BEFORE]), cents(line[AFTER])
            except ValueError:  # a column of another scale
                yield from self._walk_odd(connection, read_odd(connection, [[line[TRANSACTION_ID]]])[transaction_id])
                continue
            if is_old_ledger and self._old.wrote(transaction_id, line[KEY], line[NOTES]):
                band.sums[at] = after - delta
            elif (
                before != band.afters[at]
                or before + delta != after
                or before < 0
                or after < 0
                or self._asset_numbers.get(line[ASSET]) != band.assets[at]
                or self._unknown
            ):
                yield from self._doubt(account_id, transaction_id, line[ASSET], (delta, before, after))
            band.counts[at] += 1
            band.last_ids[at] = transaction_id
            band.sums[at] += delta
            band.afters[at] = after
            self.touched.add(account_id >> _BITS)

    def _open(self, number: int) -> Band:
        band = self.bands[number] = Band()
        return band

    def _doubt(
        self, account_id: int, transaction_id: int, asset: str, amounts: tuple[int, int, int]
    ) -> Iterator[Violation]:
        """What is wrong with the next row of a chain, if anything; the row may be the first one of its account."""
        band, at = self.bands[account_id >> _BITS], account_id & _MASK
        delta, before, after = amounts
        subject = f"account {account_id}, transaction {transaction_id}"
        is_first = not band.counts[at]
        if before + delta != after:
            yield Violation("I4", subject, f"{shown(before)} {shown(delta):+} is not {shown(after)}")
        if account_id in self._unknown:
            self._unknown.discard(account_id)
        elif is_first and before and self.begins_anywhere(account_id):
            band.sums[at] = before
        elif before != band.afters[at]:
            what = "and is its account's first row" if is_first else f"the one before ended at {shown(band.afters[at])}"
            yield Violation("I4", subject, f"begins at {shown(before)}, {what}")
        if before < 0 or after < 0:
            yield Violation("I5", subject, f"goes from {shown(before)} to {shown(after)}")
        number = self._asset_numbers.get(asset)
        if number is None:
            self.assets.append(asset)
            number = self._asset_numbers[asset] = len(self.assets)
        if not band.assets[at]:
            band.assets[at] = number
        elif band.assets[at] != number:
            was = self.assets[band.assets[at] - 1]
            yield Violation("I4", subject, f"is of {asset}, the rows before it are of {was}")

    def _walk_odd(self, connection: Connection, row: Any) -> Iterator[Violation]:
        """Walk on over a row that makes no line."""
        account_id, transaction_id = row.account_id, row.transaction_id
        if not isinstance(account_id, int):
            yield Violation("I4", f"transaction {transaction_id}", f"is of no account: {account_id!r:.60}")
            return
        band, at = self.bands.get(account_id >> _BITS) or self._open(account_id >> _BITS), account_id & _MASK
        self.touched.add(account_id >> _BITS)
        band.counts[at] += 1
        band.last_ids[at] = transaction_id
        try:
            delta, before, after = (
                cents_of(connection, it) for it in (row.delta_amount, row.balance_before, row.balance_after)
            )
        except Unreadable as error:
            self._unreadable.add(account_id)
            self._unknown.add(account_id)
            for invariant in ("I4", "I5"):
                subject = f"account {account_id}, transaction {transaction_id}"
                yield Violation(invariant, subject, f"cannot be read: {error}")
            return
        if self._old.wrote(transaction_id, row.idempotency_key, row.notes):
            band.sums[at] = after
        else:
            band.counts[at] -= 1  # whether it is the first one
            yield from self._doubt(account_id, transaction_id, str(row.asset_code), (delta, before, after))
            band.counts[at] += 1
            band.sums[at] += delta
        band.afters[at] = after


def old_accounts(connection: Connection) -> Callable[[int], bool]:
    """Whether an account is one of a legacy ledger that old code may have opened, with any balance."""
    until = old_accounts_until(connection)
    query = select(accounts.c.id)
    found = set(connection.execute(query if until is None else query.where(accounts.c.created_at < until)).scalars())
    return found.__contains__
