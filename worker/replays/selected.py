"""The dead letters of a replay and of its forecast, in the order of their ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from sqlalchemy import Connection, select

from tombola.producers.domain.causes import LetterState
from tombola.producers.domain.contract import Request
from tombola.producers.storage import clock
from tombola.producers.storage.schema import dead_letters as table
from tombola.worker.dead_letters.letters import Selection, request_in


class Letter(NamedTuple):
    """The columns of a dead letter that a replay needs: without traceback, a hundred thousand are read sooner."""

    id: int
    state: str
    body: bytes
    body_bytes: int
    request_key: str | None
    account_id: int | None
    edited_from: int | None
    headers: str | None

    def request(self) -> Request:
        """The request in the body; raises InvalidRequest if it cannot be read, or was not kept whole."""
        return request_in(self.body, self.body_bytes)


_LETTER: Final = [table.c[name] for name in Letter._fields]


def selected_ids(connection: Connection, selection: Selection, limit: int | None) -> list[int]:
    """The ids of the dead letters that a replay takes, ascending; the first `limit` of them."""
    query = select(table.c.id).where(selection.condition(clock.now(connection))).order_by(table.c.id)
    return list(connection.execute(query if limit is None else query.limit(limit)).scalars())


def letters_of(connection: Connection, ids: Sequence[int]) -> list[Letter]:
    """These dead letters, in the order of their ids."""
    return [
        Letter(*row) for row in connection.execute(select(*_LETTER).where(table.c.id.in_(ids)).order_by(table.c.id))
    ]


def originals_settled(connection: Connection, letters: Sequence[Letter]) -> set[int]:
    """The ids of originals that have settled, among the originals of these edited copies: such a copy is too late."""
    originals = sorted({it.edited_from for it in letters if it.edited_from is not None})
    if not originals:
        return set()
    return set(
        connection.execute(
            select(table.c.id).where(table.c.id.in_(originals), table.c.state == LetterState.SETTLED)
        ).scalars()
    )
