"""The audit's report: the invariants, how each stands, and what violates them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:  # what an audit leaves to the next one; worker.audit.marks keeps it
    from tombola.worker.audit.marks import Reached

INVARIANTS: Final = {
    "I1": "one charge per completed request, none for the others",
    "I2": "a reward if and only if the draw says so",
    "I3": "every balance is what the ledger adds up to",
    "I4": "every chain of balances is without a gap",
    "I5": "no balance is negative",
    "I6": "the result store says what the ledger says",
    "I7": "stock is never negative; of each prize, as many units are granted as are gone",
    "I8": "nothing accepted waits beyond its time",
    "I9": "sealed ledger rows are what was sealed",
    "I10": "one key, one answer, byte for byte",
    "I11": "all rows of a draw, or none",
    "I12": "every operator action is on record",
    "I13": "every ledger row has a known other side",
    "I14": "every movement's rows are what its request says",
}
VIOLATIONS_KEPT_MAX: Final = 1000  # of each invariant; all are counted, but a broken ledger must not fill the memory

State = Literal["holds", "violated", "not looked at", "not provable yet"]


@dataclass(frozen=True, slots=True)
class Violation:
    """One fact that breaks an invariant: its subject, and what is wrong."""

    invariant: str
    subject: str
    what: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.subject}: {self.what}"


@dataclass(slots=True)
class Report:
    """What an audit has examined, and what is wrong.

    The ledger rows above `after_id` up to `up_to_id` were examined: all of them if `after_id` is 0, otherwise those
    since the clean audit that began at `since`. All accounts are examined in any case. `results` of requests were
    compared with the result store, and `blocks` of sealed rows with their rows. `longest_part_s` is how long the
    longest snapshot was open.

    `unproven` draws are of epochs whose secrets are not known here: they can be proven once these are revealed.

    `violations` are the first VIOLATIONS_KEPT_MAX of each invariant; `counts` counts all of them. The invariants in
    `completed` were examined to the end; for each other invariant, `obstacles` says why not.
    """

    requests: int = 0
    rows: int = 0
    accounts: int = 0
    results: int = 0
    blocks: int = 0
    unproven: int = 0
    after_id: int = 0
    up_to_id: int = 0
    since: datetime | None = None
    longest_part_s: float = 0.0
    violations: list[Violation] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(INVARIANTS, 0))
    completed: set[str] = field(default_factory=set)
    obstacles: dict[str, str] = field(default_factory=dict)
    reached: Reached | None = None
    _known: set[Violation] = field(default_factory=set)

    @property
    def is_of_everything(self) -> bool:
        """Whether the audit has begun at the first ledger row."""
        return self.since is None

    @property
    def range(self) -> str:
        """Which ledger rows were examined."""
        if self.since is None:
            return f"everything, up to transaction {self.up_to_id:,}"
        rows = f"transactions {self.after_id + 1:,} to {self.up_to_id:,}" if self.rows else "no new transactions"
        return f"{rows}, since the clean audit of {self.since:%Y-%m-%d %H:%M} UTC"

    @property
    def is_clean(self) -> bool:
        """Whether every invariant was examined, and holds, as far as it can be proven yet."""
        return all(state in ("holds", "not provable yet") for state in self.states.values())

    @property
    def states(self) -> dict[str, State]:
        """How each invariant stands."""
        return {it: self._state(it) for it in INVARIANTS}

    @property
    def is_cut(self) -> bool:
        """Whether more violations were counted than are kept."""
        return sum(self.counts.values()) > len(self.violations)

    def add(self, violation: Violation) -> None:
        """Count a violation, once; keep it if there is room."""
        if violation in self._known:
            return
        self.counts[violation.invariant] += 1
        if self.counts[violation.invariant] <= VIOLATIONS_KEPT_MAX:
            self.violations.append(violation)
            self._known.add(violation)

    def as_json(self) -> dict[str, Any]:
        """The report without its violations, for machines: as JSON, and as the nightly task's result."""
        return {
            "is_clean": self.is_clean,
            "states": self.states,
            "violated": self.counts,
            "not_looked_at": self.obstacles,
            "requests": self.requests,
            "rows": self.rows,
            "accounts": self.accounts,
            "results": self.results,
            "blocks": self.blocks,
            "not_provable_yet": self.unproven,
            "everything": self.is_of_everything,
            "after_transaction": self.after_id,
            "up_to_transaction": self.up_to_id,
            "since": None if self.since is None else self.since.isoformat(timespec="seconds"),
        }

    def _state(self, invariant: str) -> State:
        if self.counts[invariant]:
            return "violated"
        if invariant not in self.completed or invariant in self.obstacles:
            return "not looked at"
        return "not provable yet" if invariant == "I2" and self.unproven else "holds"
