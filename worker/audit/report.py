"""The audit's report: the invariants, how each stands, and what violates them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal

INVARIANTS: Final = {
    "I1": "one charge per completed request, none for the others",
    "I2": "a reward if and only if the draw says so",
    "I3": "every balance is what the ledger adds up to",
    "I4": "every chain of balances is without a gap",
    "I5": "no balance is negative",
    "I7": "stock is never negative; of each prize, as many units are granted as are gone",
    "I10": "one key, one answer, byte for byte",
    "I11": "all rows of a draw, or none",
    "I12": "every operator action is on record",
    "I14": "every movement's rows are what its request says",
}
VIOLATIONS_KEPT_MAX: Final = 1000  # of each invariant; all are counted, but a broken ledger must not fill the memory

State = Literal["holds", "violated", "not looked at"]


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

    `violations` are the first VIOLATIONS_KEPT_MAX of each invariant; `counts` counts all of them. The invariants in
    `completed` were examined to the end; for each other invariant, `obstacles` says why not.
    """

    requests: int = 0
    rows: int = 0
    accounts: int = 0
    violations: list[Violation] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(INVARIANTS, 0))
    completed: set[str] = field(default_factory=set)
    obstacles: dict[str, str] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Whether every invariant was examined, and holds."""
        return all(state == "holds" for state in self.states.values())

    @property
    def states(self) -> dict[str, State]:
        """How each invariant stands."""
        return {it: self._state(it) for it in INVARIANTS}

    @property
    def is_cut(self) -> bool:
        """Whether more violations were counted than are kept."""
        return sum(self.counts.values()) > len(self.violations)

    def add(self, violation: Violation) -> None:
        """Count a violation; keep it if there is room."""
        self.counts[violation.invariant] += 1
        if self.counts[violation.invariant] <= VIOLATIONS_KEPT_MAX:
            self.violations.append(violation)

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
        }

    def _state(self, invariant: str) -> State:
        if self.counts[invariant]:
            return "violated"
        return "holds" if invariant in self.completed else "not looked at"
