"""What an operation is: its fields on the wire and four pure functions; and the types that these functions use.

| function | says | used by |
| --- | --- | --- |
| `needs` | which accounts a request may touch, known before any lock | the batch, to lock everything in one order |
| `decide` | the ledger rows to write, or the rejection | the batch; the forecast, on unlocked reads |
| `result` | the answer's bytes, from request and ledger rows alone | the batch; the rebuild of a lost result |
| `check` | what is wrong with what was written | the audit |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar

from tombola.producers.domain.campaigns.pulls import Pulled
from tombola.producers.domain.campaigns.scene import Scene, Versions
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import Request, Row
from tombola.producers.domain.draw import Wheels


class LockedAccount(NamedTuple):
    """An account as read under its lock."""

    asset_code: str
    balance: Decimal


class Needs(NamedTuple):
    """What a request may touch: the ids of one or more accounts, which may not exist.

    `campaign` is the campaign of an operator that the request draws by, empty for none: its prizes may go to further
    accounts of the same user.
    """

    accounts: tuple[int, ...]
    campaign: str = ""


class Locked(NamedTuple):
    """The input of a decision: the existing accounts, as earlier requests of the batch left them, and the wheels.

    `scene` is what draws by campaigns need; None where the batch has no such draw.
    """

    accounts: Mapping[int, LockedAccount]
    wheels: Wheels
    scene: Scene | None = None


class Movement(NamedTuple):
    """A ledger row to write: `delta` in the asset of the account. `entry_type` derives the key of the row."""

    account_id: int
    entry_type: str
    business_type: str
    delta: Decimal
    notes: str


class Play(NamedTuple):
    """A draw by a campaign: its movements, and what it changes beside balances.

    `pulled` says the units taken and the account's counters, None in a forecast without prizes; `codes` are the ledger
    keys by the codes that are handed out; with `has_counters` the account's counters are kept.
    """

    movements: Sequence[Movement]
    campaign: str
    pulled: Pulled | None = None
    codes: Mapping[str, str] = MappingProxyType({})
    has_counters: bool = False


class Rejection(NamedTuple):
    """A final outcome without a charge. `balance` is the account's balance in the answer."""

    reason: str
    balance: Decimal | None


class Refusal(NamedTuple):
    """No outcome: this worker cannot settle the request, which becomes a dead letter."""

    cause: Cause
    error: str


Decision = Sequence[Movement] | Play | Rejection | Refusal
Outcome = Sequence[Row] | Rejection


class Written(NamedTuple):
    """What one request has written: its status, and all rows of its session in their order.

    `versions` are the versions of operators' campaigns, None where they are not known.

    An attribute of a row raises where the stored value cannot be read.
    """

    status: str
    rows: Sequence[Row]
    wheels: Wheels
    versions: Versions | None = None

    @property
    def is_completed(self) -> bool:
        return self.status == "completed"


# Violations by invariant. The audit runs each iterator by itself, and each may raise any exception.
Findings = Mapping[str, Iterator[str]]

R = TypeVar("R", bound=Request, contravariant=True)


class Operation(Protocol[R]):
    """One kind of request. A module can be one.

    `TYPES` maps the entry types in the derived keys of its ledger rows to their business types. Each completed request
    has a row of the first type on its own account: the proof that the request has completed. `FIELDS` is the class of
    its requests.
    """

    @property
    def TYPES(self) -> Mapping[str, str]: ...
    @property
    def FIELDS(self) -> type[Request]: ...

    def needs(self, request: R, wheels: Wheels, /) -> Needs:
        """The accounts that the request may touch, whatever `decide` returns."""

    def decide(self, request: R, locked: Locked, /) -> Decision:
        """What to write. A movement is on an account of `needs`, and leaves no balance below zero."""

    def result(self, request: R, outcome: Outcome, /) -> bytes:
        """The answer's bytes: equal from rows about to be written and from the same rows read later."""

    def check(self, request: R, written: Written, /) -> Findings:
        """The violations in what was written."""
