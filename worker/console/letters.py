"""The pages of dead letters: the list, the groups, one dead letter, and what operators do with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Connection, select
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette_admin.flash import flash

from tombola.producers.domain.causes import OPEN_STATES, Cause, LetterState
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage import clock
from tombola.producers.storage.schema import dead_letters as table
from tombola.worker.console import shown
from tombola.worker.console.pages import AGES, ALL, OPEN, Page, act, fields_of, integer, page, selection_of, url_of
from tombola.worker.console.security.roles import must_act, operator_of
from tombola.worker.dead_letters import letters as dead_letters
from tombola.worker.dead_letters.letters import Selection

ROWS_MAX: Final = 100
# The columns that lists show; not bodies and tracebacks, which are megabytes per page.
LISTED: Final = [
    table.c[name]
    for name in (
        *("id", "state", "cause", "error", "error_type", "group_id", "request_key", "account_id", "deliveries"),
        *("times_parked", "first_parked_at", "last_parked_at", "replay_id", "edited_from", "body_bytes"),
    )
]


class LettersPage(Page):
    """Dead letters, filtered by the URL's query, so that every list can be shared as a link."""

    path = "/dead-letters"
    menu_label = "Dead letters"
    icon = "fa-solid fa-inbox"

    @page("")
    async def index(self, request: Request) -> Response:
        query = request.query_params
        fields = fields_of(query)
        selection = selection_of(fields)
        rows, count, counts = await self.read(_list, selection, integer(query, "before"))
        by_state = _by_state(counts)
        state = fields.get("state", OPEN)
        return self.show(
            request,
            "letters.html",
            "Dead letters",
            rows=_for(request, rows[:ROWS_MAX]),
            count=count,
            by_state=by_state,
            can_replay=state in (ALL, OPEN, *OPEN_STATES),
            # How many the button "discard all" or "restore all" would move; 0 hides it.
            movable=count if state in (OPEN, LetterState.DISCARDED, *OPEN_STATES) else 0,
            next=url_of(self.path, fields, before=rows[ROWS_MAX - 1].id) if len(rows) > ROWS_MAX else None,
            is_first=not query.get("before"),
            **_filters(fields),
        )

    @page("/groups")
    async def groups(self, request: Request) -> Response:
        fields = fields_of(request.query_params)
        selection = selection_of(fields)
        found = await self.read(dead_letters.groups, selection)
        total = sum(group.count for group in found)
        groups = _for(request, found)
        return self.show(
            request, "groups.html", "Dead letters by group", groups=groups, count=total, **_filters(fields)
        )

    @page("/{id:int}")
    async def one(self, request: Request) -> Response:
        found, copies, alike = await self.read(_one, request.path_params["id"])
        (letter,) = _for(request, [found])
        text, is_text = shown.body(letter.body)
        return self.show(
            request,
            "letter.html",
            f"Dead letter {letter.id}",
            letter=letter,
            text=text,
            is_text=is_text,
            pretty=shown.pretty(text) if is_text else "",
            copies=copies,
            alike=alike,
            is_open=letter.state in OPEN_STATES,
        )

    @page("/{id:int}/discard", methods=("POST",))
    async def discard(self, request: Request) -> Response:
        return await self._move(request, dead_letters.discard, "discarded")

    @page("/{id:int}/restore", methods=("POST",))
    async def restore(self, request: Request) -> Response:
        return await self._move(request, dead_letters.restore, "parked again")

    @page("/discard", methods=("POST",))
    async def discard_all(self, request: Request) -> Response:
        return await self._move_all(request, dead_letters.discard, "discarded")

    @page("/restore", methods=("POST",))
    async def restore_all(self, request: Request) -> Response:
        return await self._move_all(request, dead_letters.restore, "parked again")

    @page("/{id:int}/edit", methods=("POST",))
    async def edit(self, request: Request) -> Response:
        operator, form, id = must_act(request), request.state.form, request.path_params["id"]
        # Browsers send a text field's line ends as CR LF.
        body = form.get("body", "").replace("\r\n", "\n").strip().encode()
        try:
            copy_id = await run_in_threadpool(
                dead_letters.edit, self.services.engine, id, body, operator=operator.name, reason=form.get("reason", "")
            )
        except InvalidRequest as error:
            flash(request, f"Not edited: {error}", "error")
            return RedirectResponse(f"{self.path}/{id}", 303)
        flash(request, f"This is the edited copy. The original, {id}, is unchanged.", "success")
        return RedirectResponse(f"{self.path}/{copy_id}", 303)

    async def _move(self, request: Request, function: Any, done: str) -> Response:
        id = request.path_params["id"]
        return await act(
            request,
            function,
            self.services.engine,
            Selection(ids=(id,), states=tuple(LetterState)),
            reason=request.state.form.get("reason", ""),
            message=lambda count: (
                f"{id} was {done}." if count else f"{id} is unchanged: its state has changed meanwhile."
            ),
            back=f"{self.path}/{id}",
        )

    async def _move_all(self, request: Request, function: Any, done: str) -> Response:
        fields = fields_of(request.state.form)
        return await act(
            request,
            function,
            self.services.engine,
            selection_of(fields),
            reason=request.state.form.get("reason", ""),
            message=lambda count: f"{count:,} dead letters were {done}.",
            back=url_of(self.path, fields),
        )


def _for(request: Request, rows: Sequence[Any]) -> list[Any]:
    """Dead letters, or groups, as the request's operator or viewer can see them."""
    return [it if operator_of(request).can_act else shown.as_viewer(it) for it in rows]


def _list(
    connection: Connection, selection: Selection, before_id: int | None
) -> tuple[list[Any], int, dict[tuple[str, str], int]]:
    """A page of rows and one more, the number selected, and the numbers of all by state and cause."""
    ids = (
        select(table.c.id)
        .where(selection.condition(clock.now(connection)))
        .order_by(table.c.id.desc())
        .limit(ROWS_MAX + 1)
    )
    if before_id is not None:
        ids = ids.where(table.c.id < before_id)
    if _is_by_index(selection):
        # The index has all columns of the condition. Without the hint MariaDB reads row by row from the end.
        ids = ids.with_hint(table, "FORCE INDEX (idx_state_group)", "mysql")
    found = list(connection.execute(ids).scalars())
    query = select(*LISTED).where(table.c.id.in_(found)).order_by(table.c.id.desc())
    counts = dead_letters.counts(connection)
    if selection == Selection(states=selection.states, cause=selection.cause):
        # `counts` has the sum's parts already.
        count = sum(
            number
            for (state, cause), number in counts.items()
            if state in selection.states and selection.cause in (None, cause)
        )
    else:
        count = dead_letters.count(connection, selection)
    return list(connection.execute(query)), count, counts


def _is_by_index(selection: Selection) -> bool:
    """Whether the index by state and group is the best one for the selection."""
    within = (selection.cause, selection.group_id, selection.older_than_s, selection.newer_than_s)
    has_its_own = (*selection.ids, selection.account_id, selection.request_key)
    return any(it is not None for it in within) and all(it is None for it in has_its_own)


def _one(connection: Connection, id: int) -> tuple[dead_letters.DeadLetter, list[int], int]:
    letter = dead_letters.get(connection, id)
    alike = dead_letters.count(connection, Selection(group_id=letter.group_id)) if letter.group_id else 0
    return letter, dead_letters.copies(connection, id), alike


def _by_state(counts: dict[tuple[str, str], int]) -> dict[str, int]:
    sums: dict[str, int] = dict.fromkeys((OPEN, ALL), 0)
    for (state, _), number in counts.items():
        for name in (state, ALL, *((OPEN,) if state in OPEN_STATES else ())):
            sums[name] = sums.get(name, 0) + number
    return sums


def _filters(fields: dict[str, str]) -> dict[str, Any]:
    """The template variables of the filters' form."""
    return {
        "fields": fields,
        "query": url_of("", fields),
        "states": (OPEN, ALL, *LetterState),
        "causes": tuple(Cause),
        "ages": tuple(AGES),
    }
