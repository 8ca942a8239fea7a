"""Results as the database has them: rebuilt, since no text is stored; and the texts that older releases stored."""

from collections.abc import Iterator

from sqlalchemy import Connection, Engine, select, update

from tombola.producers.domain.causes import Status
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.requests import states_of_sessions
from tombola.producers.storage.schema import api_idempotency_requests as table

SETTLED = (Status.COMPLETED, Status.REJECTED)


def results_of(engine: Engine) -> dict[str, bytes | None]:
    """The first result of every request by request key, None of those that are not settled."""
    with engine.connect().execution_options(read_only=True) as connection:
        keys = connection.execute(select(table.c.request_key)).scalars().all()
        return dict.fromkeys(keys) | dict(_results(connection))


def keep_results(engine: Engine, *request_keys: str) -> None:
    """Let the rows of settled requests have the texts that older releases stored: of these requests, or of all.

    Not of archived ones.
    """
    with engine.begin() as connection:
        for key, result in list(_results(connection)):
            if result is not None and (not request_keys or key in request_keys):
                connection.execute(
                    update(table)
                    .where(table.c.request_key == key, table.c.status.in_(SETTLED), table.c.publish_at.is_not(None))
                    .values(result=result.decode(), balance_told=None)
                )


def _results(connection: Connection) -> Iterator[tuple[str, bytes | None]]:
    sessions = select(table.c.lottery_session_id).where(table.c.status.in_(SETTLED))
    for some in chunks(connection.execute(sessions).scalars().all()):
        for state in states_of_sessions(connection, some).values():
            yield state.request.request_key, state.result
