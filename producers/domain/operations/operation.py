"""What an operation is: its fields on the wire and four pure functions; and the types that these functions use.

| function | says | used by |
| --- | --- | --- |
| `needs` | which accounts a request may touch, known before any lock | the batch, to lock everything in one order |
| `decide` | the ledger rows to write, or the rejection | the batch; the forecast, on unlocked reads |
| `result` | the answer's bytes, from request and ledger rows alone | the batch; the rebuild of a lost result |
| `check` | what is wrong with what was written | the audit |
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar

from tombola.producers.domain.campaigns.pulls import Pulled
from tombola.producers.domain.campaigns.scene import Scene, Versions
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import Request, Row
from tombola.producers.domain.draw import NO_SEEDS, Seed, Seeds, Wheels


class LockedAccount(NamedTuple):
    """An account as read under its lock."""

    asset_code: str
    balance: Decimal


class Needs(NamedTuple):
    """What a request may touch: the ids of one or more accounts, which may not exist.

    `campaign` is the campaign of an operator that the request draws by, empty for none: its prizes may go to further
    accounts of the same user. `rows_of` are ledger keys without their type: the request reads the ledger rows under
    them, and may touch their accounts. `earned_until` (UTC, as the ledger has it) asks for the account's Lifetime.
    """

    accounts: tuple[int, ...]
    campaign: str = ""
    rows_of: tuple[str, ...] = ()
    earned_until: str = ""


class Lifetime(NamedTuple):
    """What an account has earned until some moment, and all that was ever taken from it, without what was returned."""

    earned: Decimal
    taken: Decimal


class Locked(NamedTuple):
    """The input of a decision: the existing accounts, as earlier requests of the batch left them, and the wheels.

    `scene` is what draws by campaigns need; None where the batch has no such draw. `rows` are the ledger rows that
    requests asked for in `Needs.rows_of`, by ledger key; `lifetimes` are by account and `Needs.earned_until`.
    `versions` are the versions of operators' campaigns, None where they are not known; `now` is the moment of the
    transaction, the same for the whole batch. `seeds` are what its draws are drawn under.
    """

    accounts: Mapping[int, LockedAccount]
    wheels: Wheels
    scene: Scene | None = None
    rows: Mapping[str, Sequence[Row]] = MappingProxyType({})
    lifetimes: Mapping[tuple[int, str], Lifetime] = MappingProxyType({})
    versions: Versions | None = None
    now: datetime = datetime.min
    seeds: Seeds = NO_SEEDS


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


class HoldState(enum.StrEnum):
    """The states of a hold. An open hold ends once, by a post or a void."""

    OPEN = "open"
    POSTED = "posted"
    VOIDED = "voided"


class HoldChange(NamedTuple):
    """What a request does to a hold: opens it until `expires_at`, or ends it (then only key and state are set)."""

    hold_key: str
    state: HoldState
    account_id: int = 0
    asset_code: str = ""
    amount: Decimal = Decimal(0)
    expires_at: datetime | None = None


class UnitsBack(NamedTuple):
    """A refunded draw gives units of a stocked prize back; `draw` is the draw's request key."""

    campaign: str
    prize: str
    units: int
    draw: str


Change = HoldChange | UnitsBack


class Moves(NamedTuple):
    """Movements, and what they change beside balances."""

    movements: Sequence[Movement]
    changes: tuple[Change, ...] = ()


class Rejection(NamedTuple):
    """A final outcome without a charge. `balance` is the account's balance in the answer."""

    reason: str
    balance: Decimal | None


class Refusal(NamedTuple):
    """No outcome: this worker cannot settle the request, which becomes a dead letter."""

    cause: Cause
    error: str


Decision = Sequence[Movement] | Play | Moves | Rejection | Refusal
Outcome = Sequence[Row] | Rejection


def _no_rows(_ledger_key: str) -> Sequence[Row]:
    return ()


class Written(NamedTuple):
    """What one request has written: its status, and all rows of its session in their order.

    `versions` are the versions of operators' campaigns, None where they are not known. `rows_of` reads the ledger rows
    under a ledger key, in their order. `seed` is what the notes of a draw's charge name, None for the wheels' own; a
    draw whose seed is not known yet cannot be proven (`is_provable`).

    An attribute of a row raises where the stored value cannot be read.
    """

    status: str
    rows: Sequence[Row]
    wheels: Wheels
    versions: Versions | None = None
    rows_of: Callable[[str], Sequence[Row]] = _no_rows
    seed: Seed | None = None

    @property
    def is_completed(self) -> bool:
        return self.status == "completed"

    @property
    def is_provable(self) -> bool:
        return self.seed is None or self.seed.is_known


# Violations by invariant. The audit runs each iterator by itself, and each may raise any exception.
Findings = Mapping[str, Iterator[str]]

R = TypeVar("R", bound=Request, contravariant=True)


class Operation(Protocol[R]):
    """One kind of request. A module can be one.

    `TYPES` maps the entry types in the derived keys of its ledger rows to their business types. Each completed request
    has a row of the first type on its own account: the proof that the request has completed. `HOUSE` maps its business
    types to the house account that is the other side of such a row, with `{campaign}` and `{channel}` to be filled in;
    an empty text stands for no house account: another user's account is the other side, or the row moves nothing.
    `FIELDS` is the class of its requests.
    """

    @property
    def TYPES(self) -> Mapping[str, str]: ...
    @property
    def HOUSE(self) -> Mapping[str, str]: ...
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
