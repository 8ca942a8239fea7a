"""The audit: prove the invariants (ARCHITECTURE, Invariants) from the database.

    I1, I2, I10, I11, I14   worker.audit.sessions    each request beside the ledger rows of its session
    I7                 worker.audit.issued      the stock of each prize beside what draws handed out
    I3, I4, I5         worker.audit.chains      the balance of each account beside its chain of ledger rows
    I12                worker.audit.on_record   what operators did beside the record of their actions

Each check yields what violates its invariants. Rows are streamed, so memory does not grow with the ledger. A row that
cannot be read violates the invariants that needed it, and the audit goes on with the next row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tombola.producers.domain.draw import Wheels
from tombola.producers.storage.campaigns import Campaigns
from tombola.producers.storage.faults import explain
from tombola.worker.audit.chains import check_chains
from tombola.worker.audit.issued import PrizeName, check_issued
from tombola.worker.audit.on_record import check_record
from tombola.worker.audit.report import Report, Violation
from tombola.worker.audit.sessions import Drawings, check_sessions
from tombola.worker.ledger.old_rows import OldRows


def audit(engine: Engine, wheels: Wheels) -> Report:
    """Check every invariant. `wheels` are the campaigns under the seed.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be read. When a single table cannot be
    read, for example for lack of a privilege, its invariants are "not looked at" in the report.
    """
    report = Report()
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            if engine.dialect.name != "sqlite":
                # One moment for all checks, while the workers go on.
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            old = OldRows.of(connection)
            granted: Counter[PrizeName] = Counter()
            sessions = check_sessions(connection, report, Drawings(wheels, Campaigns(engine), granted), old)
            errors = [
                _examine(report, ("I3", "I4", "I5"), check_chains(connection, report, old)),
                _examine(report, ("I1", "I2", "I10", "I11", "I14"), sessions),
                _examine(report, ("I12",), check_record(connection)),
            ]
            if errors[1] is None:
                _examine(report, ("I7",), check_issued(connection, granted))
            else:
                report.obstacles["I7"] = report.obstacles["I1"]
            if errors[0] is not None and not report.completed:
                raise errors[0]
    except SQLAlchemyError as error:
        raise explain(error) from error
    return report


def _examine(report: Report, invariants: tuple[str, ...], found: Iterator[Violation]) -> DBAPIError | None:
    """Report the violations that are `found`; return the error that ended the check, if one did.

    Raises an error that has ended the connection.
    """
    try:
        for violation in found:
            report.add(violation)
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        report.obstacles |= dict.fromkeys(invariants, str(explain(error)))
        return error
    report.completed.update(invariants)
    return None
