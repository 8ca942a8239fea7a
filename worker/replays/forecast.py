"""The forecast of a replay: what it would do, per message and in sums, without writing.

The answers come from the transaction's own book, read without locks and never posted (worker.settle.rehearsal); so the
forecast says what settling would do now. Draws and recharges that settle before the replay change its outcome.

What a draw would win is not known to anybody before it settles, and so not to a forecast either: it never has the seed.
It says what each draw costs, and shows a rejection where a prize would pay for the next charge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, NamedTuple

from sqlalchemy import Engine

from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import Request, parse_result_head
from tombola.producers.domain.draw import blind_wheels
from tombola.producers.domain.errors import DrawError, InvalidRequest
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import Fault, explain, fault_of
from tombola.producers.storage.requests import look_up
from tombola.producers.storage.transactions import transaction
from tombola.worker.campaigns.desk import Desk
from tombola.worker.dead_letters.groups import normalised
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.dead_letters.states import ROWS_MAX
from tombola.worker.ledger.old_rows import OldDraws
from tombola.worker.replays.selected import Letter, letters_of, originals_settled, selected_ids
from tombola.worker.replays.vouching import NOTHING_ASKED, Vouching
from tombola.worker.settle.answers import Answer, Refused, Repeat, Settled
from tombola.worker.settle.rehearsal import Rehearsal
from tombola.worker.settle.rules import Rules

ALREADY_SETTLED: Final = "already settled"
WOULD_CHARGE: Final = "would charge"
WOULD_BE_REJECTED: Final = "would be rejected"
CONFLICT: Final = "conflict"
CANNOT_BE_PARSED: Final = "cannot be parsed"
UNVOUCHED: Final = "not vouched for"
UNKNOWN_CAMPAIGN: Final = "unknown campaign"
OUTCOMES: Final = (
    ALREADY_SETTLED, WOULD_CHARGE, WOULD_BE_REJECTED, CONFLICT, CANNOT_BE_PARSED, UNVOUCHED, UNKNOWN_CAMPAIGN,
)  # fmt: skip
# Outcomes that a replay leaves parked.
REFUSALS: Final = (CONFLICT, CANNOT_BE_PARSED, UNVOUCHED)
# Outcomes that are parked still, or again, after a replay.
HOPELESS: Final = (*REFUSALS, UNKNOWN_CAMPAIGN)

LINES_MAX: Final = 200_000


class Line(NamedTuple):
    """The outcome that a replay of one dead letter would have; `why` is empty where the outcome says it."""

    id: int
    request_key: str | None
    account_id: int | None
    outcome: str
    why: str = ""


@dataclass(slots=True)
class _Alike:
    """Lines whose reasons differ only in quoted words and numbers; `example` is the first line's reason."""

    outcome: str
    example: str
    count: int = 0
    is_same_text: bool = True

    def __str__(self) -> str:
        return f"{self.outcome}{':' if self.is_same_text else ', such as:'} {self.example}"


@dataclass
class Forecast:
    """Sums, and lines for the first LINES_MAX dead letters. `charged` is by asset code; prizes are in no balance."""

    counts: Counter[str] = field(default_factory=Counter)
    charged: dict[str, Decimal] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    _alike: dict[tuple[str, str], _Alike] = field(default_factory=dict)

    @property
    def reasons(self) -> Counter[str]:
        """Counts by `outcome: reason`, or by `outcome, such as: reason` where like reasons differ in details."""
        return Counter({str(it): it.count for it in self._alike.values()})

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def hopeless(self) -> int:
        """The number of dead letters that would stay parked, or be parked again."""
        return sum(self.counts[it] for it in HOPELESS)

    @property
    def is_hopeless(self) -> bool:
        """Whether more than half are hopeless: then a replay must be confirmed twice, and begins with a few."""
        return 2 * self.hopeless > self.total

    def add(self, line: Line) -> None:
        """Count a line; keep it if there is room."""
        self.counts[line.outcome] += 1
        if line.why:
            alike = self._alike.setdefault((line.outcome, normalised(line.why)), _Alike(line.outcome, line.why))
            alike.count += 1
            alike.is_same_text = alike.is_same_text and line.why == alike.example
        if len(self.lines) < LINES_MAX:
            self.lines.append(line)


def forecast(
    engine: Engine,
    selection: Selection,
    *,
    limit: int | None = None,
    vouching: Vouching = NOTHING_ASKED,
    on_progress: Callable[[int], None] = lambda _done: None,
) -> Forecast:
    """What a replay of `selection`, up to `limit` dead letters in the order of their ids, would do now.

    `vouching` says which messages need vouching, by the settings. `on_progress` is called with the number of dead
    letters that are done.
    Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    said = Forecast()
    try:
        rules = Rules(blind_wheels(), old_draws=OldDraws.of(engine, adopts=False), desk=Desk(engine, None))
        rehearsal = Rehearsal(rules)
        for letters in _in_order(engine, selection, limit):
            for line in _lines(engine, rehearsal, letters, vouching):
                said.add(line)
                if line.outcome == WOULD_CHARGE:
                    for asset_code, amount in rehearsal.charged(line.request_key).items():
                        said.charged[asset_code] = said.charged.get(asset_code, Decimal(0)) + amount
            on_progress(said.total)
    except DrawError:
        raise
    except Exception as error:
        if fault_of(error) is Fault.REFUSED:
            raise
        raise explain(error) from error
    return said


def _in_order(engine: Engine, selection: Selection, limit: int | None) -> Iterator[list[Letter]]:
    with engine.connect().execution_options(read_only=True) as connection:
        ids = selected_ids(connection, selection, limit)
    for some in chunks(ids, ROWS_MAX):
        with engine.connect().execution_options(read_only=True) as connection:
            yield letters_of(connection, some)


def _lines(engine: Engine, rehearsal: Rehearsal, letters: Sequence[Letter], vouching: Vouching) -> Iterator[Line]:
    with engine.connect().execution_options(read_only=True) as connection:
        too_late = originals_settled(connection, letters)
    asked: list[Request | None] = []
    whys: list[str] = []
    for it in letters:
        why, request = "", None
        try:
            request = it.request()
            why = vouching.why_not(request, it.headers)
        except InvalidRequest as error:
            why = str(error)
        asked.append(request)
        whys.append(why)
    with transaction(engine, read_only=True) as open_transaction:
        doubtful = [it.request_key for it, why in zip(asked, whys, strict=True) if it is not None and why]
        on_record = look_up(open_transaction, doubtful) if doubtful else {}
        unvouched = [
            it is not None and why != "" and it.request_key not in on_record
            for it, why in zip(asked, whys, strict=True)
        ]
        draws = [it for it, is_out in zip(asked, unvouched, strict=True) if it is not None and not is_out]
        answers = iter(rehearsal.answers(open_transaction, draws))
    for letter, request, why, is_out in zip(letters, asked, whys, unvouched, strict=True):
        if request is None:
            outcome = CANNOT_BE_PARSED
        elif is_out:
            outcome = UNVOUCHED
        else:
            outcome, why = _outcome(next(answers))
            if letter.edited_from in too_late and outcome != ALREADY_SETTLED:
                outcome, why = CONFLICT, "its original has settled"
        key, account_id = (
            (letter.request_key, letter.account_id) if request is None else (request.request_key, request.account_id)
        )
        yield Line(letter.id, key, account_id, outcome, why)


def _outcome(answer: Answer | Repeat) -> tuple[str, str]:
    match answer:
        case Settled(is_repeat=True) | Repeat():
            return ALREADY_SETTLED, ""
        case Settled():
            if not answer.is_rejected:
                return WOULD_CHARGE, ""
            return WOULD_BE_REJECTED, parse_result_head(answer.result).reason or ""
        case Refused(cause=Cause.UNKNOWN_CAMPAIGN):
            return UNKNOWN_CAMPAIGN, answer.error
        case _:
            return CONFLICT, answer.error
