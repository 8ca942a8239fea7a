"""What an operation is: its fields on the wire and four pure functions; and the words that they speak in.

| function | says | used by |
| --- | --- | --- |
| `needs` | which accounts a request may touch, known before any lock | the batch, to lock everything in one order |
| `decide` | the ledger rows to write, or the rejection | the batch; the forecast, on unlocked reads |
| `result` | the answer's bytes, from request and ledger rows alone | the batch, and whatever rebuilds a result |
| `check` | what is wrong with what was written | the audit |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple, Protocol, TypeVar

from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import Request, Row
from tombola.producers.domain.draw import Wheels


class LockedAccount(NamedTuple):
    """An account as it stands under its lock."""

    asset_code: str
    balance: Decimal


class Needs(NamedTuple):
    """What a request may touch: ids of accounts, existing or not, one at least."""

    accounts: tuple[int, ...]


class Locked(NamedTuple):
    """What is known while a request is decided: the existing accounts, as those before it left them; campaigns."""

    accounts: Mapping[int, LockedAccount]
    wheels: Wheels


class Movement(NamedTuple):
    """A ledger row to write: `delta` of an account's own asset. Its key is derived with `entry_type`."""

    account_id: int
    entry_type: str
    business_type: str
    delta: Decimal
    notes: str


class Rejection(NamedTuple):
    """An outcome: the request was told no, and will be told no again. `balance` is what was told of the account."""

    reason: str
    balance: Decimal | None


class Refusal(NamedTuple):
    """No outcome: the request cannot be settled here, and becomes a dead letter."""

    cause: Cause
    error: str


Decision = Sequence[Movement] | Rejection | Refusal
Outcome = Sequence[Row] | Rejection


class Written(NamedTuple):
    """What stands in the books of one request: its state, and all rows of its session in their order.

    Reading a row raises where its stored value cannot be read.
    """

    status: str
    rows: Sequence[Row]
    wheels: Wheels

    @property
    def is_completed(self) -> bool:
        return self.status == "completed"


# What is wrong, by the audit's invariant; each is looked at by itself, and may raise whatever it likes.
Findings = Mapping[str, Iterator[str]]

R = TypeVar("R", bound=Request, contravariant=True)


class Operation(Protocol[R]):
    """One kind of request. A module can be one.

    `TYPES` are the names of its ledger rows in their derived keys, with their business types. Each completed request
    has a row of the first one, of its own account: that row is the proof that it has happened. `FIELDS` are its
    fields on the wire, those that all requests have among them.
    """

    @property
    def TYPES(self) -> Mapping[str, str]: ...
    @property
    def FIELDS(self) -> type[Request]: ...

    def needs(self, request: R, wheels: Wheels, /) -> Needs:
        """Which accounts the request may touch, whatever is decided."""

    def decide(self, request: R, locked: Locked, /) -> Decision:
        """What to write. Only accounts that it needs may be moved, and none below zero."""

    def result(self, request: R, outcome: Outcome, /) -> bytes:
        """The answer's bytes: the same ones from the rows about to be written as from the same rows read later."""

    def check(self, request: R, written: Written, /) -> Findings:
        """What is wrong with what was written."""
