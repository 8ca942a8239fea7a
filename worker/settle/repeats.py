"""Repeats: what a request that settled before is answered, equal to the byte of its first result.

A batch finds out under its locks that a request has settled, and no more. Its result is built here, after the commit
and without a lock, and only where it is wanted: a worker first asks the result store, which nearly always has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Engine

from tombola.producers.domain import operations
from tombola.producers.domain.causes import Cause, Status
from tombola.producers.domain.operations.operation import Outcome, Rejection
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import explain
from tombola.producers.storage.transactions import Transaction, transaction
from tombola.worker.ledger import post as ledger
from tombola.worker.ledger.old_rows import OldDraws
from tombola.worker.settle.answers import Answer, Refused, Repeat, Settled
from tombola.worker.settle.rules import Rules

Told = Settled | Refused


def tell(engine: Engine, answers: Sequence[Answer | Repeat], rules: Rules) -> list[Answer]:
    """`answers` with the results of the repeats among them, read in a transaction of its own.

    Raises ServiceUnavailable, ConfigurationError or InternalError when the database cannot be read; it is safe to
    repeat.
    """
    repeats = [it for it in answers if isinstance(it, Repeat)]
    told: list[Told] = []
    try:
        for some in chunks(repeats):
            with transaction(engine, read_only=True) as reading:
                told += _told(reading, some, rules)
    except Exception as error:
        raise explain(error) from error
    return _merged(answers, told)


def tell_in(open_transaction: Transaction, answers: Sequence[Answer | Repeat], rules: Rules) -> list[Answer]:
    """As `tell`, inside a transaction that is open. Raises the driver's errors."""
    return _merged(answers, _told(open_transaction, [it for it in answers if isinstance(it, Repeat)], rules))


def _merged(answers: Sequence[Answer | Repeat], told: Sequence[Told]) -> list[Answer]:
    of_repeats = iter(told)
    return [next(of_repeats) if isinstance(it, Repeat) else it for it in answers]


def _told(open_transaction: Transaction, repeats: Sequence[Repeat], rules: Rules) -> list[Told]:
    completed = [it.request for it in repeats if it.known.status == Status.COMPLETED]
    charged = ledger.completed(open_transaction, completed)
    of_old_code = [it for it in completed if it.request_key not in charged]
    if rules.old_draws is not None and of_old_code:
        charged |= OldDraws(adopts=False).meet(open_transaction, of_old_code).charged
    return [_answer(it, charged.get(it.request.request_key)) for it in repeats]


def _answer(repeat: Repeat, charged: ledger.Charged | None) -> Told:
    request, known = repeat.request, repeat.known
    outcome: Outcome
    if known.status == Status.REJECTED:
        outcome = Rejection(known.reason or "", known.balance_told)
    elif charged is not None:
        outcome = charged.rows
    else:
        return Refused(request, Cause.FAILED_ALONE, "this request is completed, and the ledger has no rows of it")
    assert known.settled_at is not None
    try:
        body = operations.operation_of(request).result(request, outcome)
    except Exception as error:  # somebody changed its rows, which must not stop the other requests
        why = f"this request is settled, and its result cannot be rebuilt: {type(error).__name__}: {error}"
        return Refused(request, Cause.FAILED_ALONE, why, error)
    return Settled(request, body, known.settled_at, is_repeat=True)
