"""The pages of webhooks and of what is delivered to them. Operators add, rotate and remove webhooks, and replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette_admin.flash import flash

from tombola.producers.domain.causes import FulfilmentState
from tombola.producers.domain.errors import InvalidRequest
from tombola.worker.console.pages import ALL, Page, act, integer, page, url_of
from tombola.worker.console.security.roles import must_act, operator_of
from tombola.worker.fulfilments import fulfilments, webhooks
from tombola.worker.fulfilments.fulfilments import Counts, Fulfilment, Selection
from tombola.worker.fulfilments.webhooks import Wanted, Webhook

ROWS_MAX: Final = 100
FILTERS: Final = ("state", "webhook", "event", "session")


class WebhooksPage(Page):
    """Webhooks. A secret is shown in the answer to the form that made it, and on no other page."""

    path = "/webhooks"
    menu_label = "Webhooks"
    icon = "fa-solid fa-satellite-dish"

    @page("")
    async def index(self, request: Request) -> Response:
        return await self._page(request)

    @page("/add", methods=("POST",))
    async def add(self, request: Request) -> Response:
        form = request.state.form
        events = tuple(form.get("events", "").replace(",", " ").split())
        wanted = Wanted(
            form.get("name", "").strip(), form.get("url", "").strip(), events, form.get("campaign", "").strip()
        )
        is_private_allowed = self.services.settings.webhook_private
        return await self._make_secret(
            request, wanted.name, webhooks.add, wanted, is_private_allowed=is_private_allowed
        )

    @page("/{name}/rotate", methods=("POST",))
    async def rotate(self, request: Request) -> Response:
        name = request.path_params["name"]
        return await self._make_secret(request, name, webhooks.rotate, name)

    @page("/{name}/remove", methods=("POST",))
    async def remove(self, request: Request) -> Response:
        name = request.path_params["name"]
        return await act(
            request,
            webhooks.remove,
            self.services.engine,
            name,
            reason=request.state.form.get("reason", ""),
            message=lambda _: f"{name} is removed. What was pending for it becomes dead.",
            back=self.path,
        )

    async def _make_secret(
        self, request: Request, name: str, function: Callable[..., str], *args: Any, **kwargs: Any
    ) -> Response:
        """Call `function` for an operator, and show the secret that it returns: never in a redirect or a cookie."""
        operator = must_act(request)
        reason = request.state.form.get("reason", "")
        try:
            secret = await run_in_threadpool(
                function, self.services.engine, *args, operator=operator.name, reason=reason, **kwargs
            )
        except InvalidRequest as error:
            flash(request, f"Nothing was changed: {error}", "error")
            return RedirectResponse(self.path, 303)
        return await self._page(request, secret=secret, made_for=name)

    async def _page(self, request: Request, **context: Any) -> Response:
        found = await self.read(webhooks.list_all)
        can_act = operator_of(request).can_act
        # The path of a URL may hold a token of the receiver's.
        shown = [it if can_act else it._replace(url=_without_path(it.url)) for it in found]
        return self.show(
            request,
            "webhooks.html",
            "Webhooks",
            live=[it for it in shown if it.removed_at is None],
            removed=[it for it in shown if it.removed_at is not None],
            live_max=webhooks.LIVE_MAX,
            **context,
        )


class FulfilmentsPage(Page):
    """What is delivered to webhooks, filtered by the URL's query."""

    path = "/fulfilments"
    menu_label = "Fulfilments"
    icon = "fa-solid fa-truck-fast"

    @page("")
    async def index(self, request: Request) -> Response:
        query = request.query_params
        fields = {name: query[name].strip() for name in FILTERS if query.get(name, "").strip()}
        before = integer(query, "before")
        rows, counts, hooks = await self.read(_list, _selection(fields), before)
        return self.show(
            request,
            "fulfilments.html",
            "Fulfilments",
            rows=rows[:ROWS_MAX],
            fields=fields,
            query=url_of("", fields),
            states=(ALL, *FulfilmentState),
            webhooks=[it.name for it in hooks],
            counts=counts,
            numbers={
                FulfilmentState.PENDING: counts.pending + counts.without_webhook,
                FulfilmentState.DEAD: counts.dead,
            },
            next=url_of(self.path, fields, before=rows[ROWS_MAX - 1].id) if len(rows) > ROWS_MAX else None,
            is_first=before is None,
        )

    @page("/replay", methods=("POST",))
    async def replay(self, request: Request) -> Response:
        form = request.state.form
        fields = {name: form[name].strip() for name in FILTERS if form.get(name, "").strip()}
        id = integer(form, "id")
        selection = _selection(fields)._replace(state=FulfilmentState.DEAD)
        if id is not None:
            selection = Selection(ids=(id,))
        return await act(
            request,
            fulfilments.replay,
            self.services.engine,
            selection,
            reason=form.get("reason", ""),
            message=lambda count: f"{count:,} fulfilments are pending again: a relay delivers them.",
            back=url_of(self.path, fields),
        )


def _selection(fields: dict[str, str]) -> Selection:
    """The selection in these fields. Raises InvalidRequest for a state that there is not."""
    state = fields.get("state", ALL)
    if state != ALL and state not in tuple(FulfilmentState):
        raise InvalidRequest(f"state: one of {', '.join((ALL, *FulfilmentState))}, not {state!r:.80}")
    return Selection(
        state=None if state == ALL else FulfilmentState(state),
        webhook=fields.get("webhook"),
        event=fields.get("event"),
        lottery_session_id=fields.get("session"),
    )


def _list(
    connection: Connection, selection: Selection, before_id: int | None
) -> tuple[list[Fulfilment], Counts, list[Webhook]]:
    """A page of rows and one more, the numbers of what is not delivered, and the webhooks."""
    rows = fulfilments.some(connection, selection, rows_max=ROWS_MAX + 1, before_id=before_id)
    return rows, fulfilments.counts(connection), webhooks.list_all(connection)


def _without_path(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}/…"
