"""What a replay would do, before it is done: per message and summed. It writes nothing.

The answer comes from the transaction's own book (worker.settle.batch), read without locks and never posted; so a
forecast cannot say anything else than what settling would do now. Draws and recharges that happen in between change it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, NamedTuple

from sqlalchemy import Connection, Engine, select

from tombola.producers.domain.causes import Cause, LetterState
from tombola.producers.domain.contract import Request, parse_result_head
from tombola.producers.domain.draw import Wheels, blind_wheels
from tombola.producers.domain.errors import DrawError, InvalidRequest
from tombola.producers.storage import clock
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import Fault, explain, fault_of
from tombola.producers.storage.requests import look_up
from tombola.producers.storage.schema import dead_letters as table
from tombola.producers.storage.transactions import transaction
from tombola.worker.dead_letters.letters import Selection, request_in
from tombola.worker.dead_letters.parking import ROWS_MAX, normalised
from tombola.worker.ledger.old_rows import OldDraws
from tombola.worker.replays.vouching import NOTHING_ASKED, Vouching
from tombola.worker.settle.batch import Answer, Refused, Rehearsal, Settled

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
# What a replay leaves parked.
REFUSALS: Final = (CONFLICT, CANNOT_BE_PARSED, UNVOUCHED)
# What is parked still, or again, after a replay.
HOPELESS: Final = (*REFUSALS, UNKNOWN_CAMPAIGN)

LINES_MAX: Final = 200_000


class Line(NamedTuple):
    """What would become of one dead letter, and why if that is not plain."""

    id: int
    request_key: str | None
    account_id: int | None
    outcome: str
    why: str = ""


@dataclass(slots=True)
class _Alike:
    """Lines whose reasons differ in quoted words and numbers only, and the first one's reason."""

    outcome: str
    example: str
    count: int = 0
    is_same_text: bool = True

    def __str__(self) -> str:
        return f"{self.outcome}{':' if self.is_same_text else ', such as:'} {self.example}"


@dataclass
class Forecast:
    """Sums, and a line for each of the first LINES_MAX. `charged` is by asset code.

    It is exact if the prizes could be drawn: without the seed, what would be won is left out, and a charge that a prize
    would pay for shows as a rejection.
    """

    counts: Counter[str] = field(default_factory=Counter)
    charged: dict[str, Decimal] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    is_exact: bool = True
    _alike: dict[tuple[str, str], _Alike] = field(default_factory=dict)

    @property
    def reasons(self) -> Counter[str]:
        """Why, where that is not plain: `outcome: reason`, or `outcome, such as: reason` where like ones differ."""
        return Counter({str(it): it.count for it in self._alike.values()})

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def hopeless(self) -> int:
        """How many would be left parked, or be parked again."""
        return sum(self.counts[it] for it in HOPELESS)

    @property
    def is_hopeless(self) -> bool:
        """Whether that is most of them: then a replay is asked for twice, and begins with a few."""
        return 2 * self.hopeless > self.total

    def add(self, line: Line) -> None:
        """Count a line, and keep it if there is room."""
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
    wheels: Wheels | None,
    *,
    limit: int | None = None,
    vouching: Vouching = NOTHING_ASKED,
    tell: Callable[[int], None] = lambda _done: None,
) -> Forecast:
    """What a replay of `selection`, up to `limit` of them in the order of their ids, would do now.

    `wheels` are the campaigns under the seed, None where that is not known; `vouching` is what the settings say that
    has to be vouched for. `tell` hears how many are done.
    Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    book = blind_wheels() if wheels is None else wheels
    said = Forecast(is_exact=wheels is not None)
    try:
        rehearsal = Rehearsal(book, old_draws=OldDraws.of(engine, adopts=False))
        for letters in _in_order(engine, selection, limit):
            for line in _lines(engine, rehearsal, letters, vouching):
                said.add(line)
                if line.outcome == WOULD_CHARGE:
                    for asset_code, amount in rehearsal.charged(line.request_key).items():
                        said.charged[asset_code] = said.charged.get(asset_code, Decimal(0)) + amount
            tell(said.total)
    except DrawError:
        raise
    except Exception as error:
        if fault_of(error) is Fault.REFUSED:
            raise
        raise explain(error) from error
    return said


def selected_ids(connection: Connection, selection: Selection, limit: int | None) -> list[int]:
    """The ids of those that a replay takes, in its order."""
    query = select(table.c.id).where(selection.condition(clock.now(connection))).order_by(table.c.id)
    return list(connection.execute(query if limit is None else query.limit(limit)).scalars())


class Letter(NamedTuple):
    """What a replay needs of a dead letter: without stack and headers a hundred thousand are sooner read."""

    id: int
    state: str
    body: bytes
    body_bytes: int
    request_key: str | None
    account_id: int | None
    edited_from: int | None
    headers: str | None

    def request(self) -> Request:
        """What it asks for; raises InvalidRequest if that cannot be read, or was not kept."""
        return request_in(self.body, self.body_bytes)


_LETTER: Final = [table.c[name] for name in Letter._fields]


def letters_of(connection: Connection, ids: Sequence[int]) -> list[Letter]:
    """These dead letters, in the order of their ids."""
    return [
        Letter(*row) for row in connection.execute(select(*_LETTER).where(table.c.id.in_(ids)).order_by(table.c.id))
    ]


def originals_settled(connection: Connection, letters: Sequence[Letter]) -> set[int]:
    """Which of these edited copies come too late: the ids of their originals that have settled."""
    originals = sorted({it.edited_from for it in letters if it.edited_from is not None})
    if not originals:
        return set()
    return set(
        connection.execute(
            select(table.c.id).where(table.c.id.in_(originals), table.c.state == LetterState.SETTLED)
        ).scalars()
    )


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
        answers = iter(rehearsal.settle(open_transaction, draws))
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


def _outcome(answer: Answer) -> tuple[str, str]:
    match answer:
        case Settled(is_repeat=True):
            return ALREADY_SETTLED, ""
        case Settled():
            if not answer.is_rejected:
                return WOULD_CHARGE, ""
            return WOULD_BE_REJECTED, parse_result_head(answer.result).reason or ""
        case Refused(cause=Cause.UNKNOWN_CAMPAIGN):
            return UNKNOWN_CAMPAIGN, answer.error
        case _:
            return CONFLICT, answer.error
