"""The pages of replays: the list, a new replay with its forecast, and one replay with its progress."""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette_admin.flash import flash

from tombola.producers.domain.causes import OPEN_STATES
from tombola.producers.domain.errors import DrawError, InvalidRequest
from tombola.worker.console import shown
from tombola.worker.console.jobs import ForecastJob
from tombola.worker.console.pages import AGES, OPEN, Page, act, fields_of, integer, page, selection_of, url_of
from tombola.worker.console.security.roles import must_act
from tombola.worker.dead_letters import letters as dead_letters
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.operators import actions
from tombola.worker.replays import forecast, replay
from tombola.worker.replays.replay import Options, Replay

ROWS_MAX: Final = 100
LINES_MAX: Final = 100
ACTIONS_MAX: Final = 50


class ReplaysPage(Page):
    """Replays, and the forecast before a replay."""

    path = "/replays"
    menu_label = "Replays"
    icon = "fa-solid fa-rotate-right"

    @page("")
    async def index(self, request: Request) -> Response:
        found = await self.read(replay.recent, ROWS_MAX)
        return self.show(request, "replays.html", "Replays", replays=found)

    @page("/new")
    async def new(self, request: Request) -> Response:
        """The selection, and the forecast of its replay. The forecast is a job, named in the URL."""
        query = request.query_params
        fields = fields_of(query)
        selection, limit = _only_open(selection_of(fields)), integer(query, "limit")
        job = self.services.forecasts.find(query.get("job", ""))
        if job is None or (job.selection, job.limit) != (selection, limit):
            job = self.services.forecasts.ask(selection, limit)
            return RedirectResponse(url_of(f"{self.path}/new", fields, limit=limit, job=job.id), 303)
        count = await self.read(dead_letters.count, selection)
        is_hopeless = _is_hopeless(job)
        return self.show(
            request,
            "replay_new.html",
            "Replay dead letters",
            fields=fields,
            described=_described(fields),
            list_address=url_of("/dead-letters", fields),
            count=count,
            limit=limit,
            job=job,
            total=min(count, limit or count),
            outcomes=forecast.OUTCOMES,
            refusals=forecast.REFUSALS,
            form=dict(query),
            canary=query.get("canary", str(replay.CANARY) if is_hopeless else ""),
            is_asked_again=is_hopeless and "again" in query,
            **_lines(job, query.get("outcome"), integer(query, "page") or 1),
        )

    @page("/forecast.json")
    async def forecast(self, request: Request) -> Response:
        job = self.services.forecasts.find(request.query_params.get("job", ""))
        if job is None:
            return JSONResponse({"detail": "this forecast is not kept any more"}, 404)
        return JSONResponse({"done": job.done, "is_over": job.is_over})

    @page("", methods=("POST",))
    async def begin(self, request: Request) -> Response:
        operator, form = must_act(request), request.state.form
        fields = fields_of(form)
        kept = {name: form[name] for name in ("rate", "canary", "limit", "job", "reason") if name in form}
        if _is_hopeless(self.services.forecasts.find(form.get("job", ""))) and form.get("anyway") != "yes":
            return RedirectResponse(url_of(f"{self.path}/new", fields, **kept, again=1), 303)
        try:
            selection = _only_open(selection_of(fields))
            options = Options(rate=_rate(form), limit=integer(form, "limit"), canary=integer(form, "canary"))
            self.services.settings.need("broker_url")  # before the replay has a row, which nothing would run
            replay_id = await run_in_threadpool(
                replay.begin,
                self.services.engine,
                selection,
                options,
                operator=operator.name,
                reason=form.get("reason", ""),
            )
            self.services.replays.run(replay_id)
        except DrawError as error:
            flash(request, f"Not started: {error}", "error")
            return RedirectResponse(url_of(f"{self.path}/new", fields, **kept), 303)
        return RedirectResponse(f"{self.path}/{replay_id}", 303)

    @page("/{id:int}")
    async def one(self, request: Request) -> Response:
        found, done = await self.read(_one, request.path_params["id"])
        return self.show(
            request,
            "replay.html",
            f"Replay {found.id}",
            replay=found,
            live=_live(found),
            described=_described_selection(found.selection),
            options=msgspec.json.decode(found.options),
            actions=done,
            again=url_of(f"{self.path}/new", _query_of(found.selection)),
        )

    @page("/{id:int}/live.json")
    async def live(self, request: Request) -> Response:
        return JSONResponse(_live(await self.read(replay.find, request.path_params["id"])))

    @page("/{id:int}/stop", methods=("POST",))
    async def stop(self, request: Request) -> Response:
        id = request.path_params["id"]
        return await act(
            request,
            replay.ask_to_stop,
            self.services.engine,
            id,
            message=lambda _: "Stopping: messages that were sent settle, the others stay parked.",
            back=f"{self.path}/{id}",
        )


def _one(connection: Connection, id: int) -> tuple[Replay, list[actions.Action]]:
    return replay.find(connection, id), actions.recent(connection, rows_max=ACTIONS_MAX, replay_id=id)


def _live(it: Replay) -> dict[str, Any]:
    """A replay's numbers as its page shows them, first in the template and then by script."""
    lasted = (it.ended_at or it.seen_at) - it.started_at
    decided = it.settled + it.parked_again
    seconds = max(lasted.total_seconds(), 0.001)
    rate = decided / seconds
    left = it.selected - it.refused - decided
    return {
        "status": it.status,
        "is_running": it.is_running,
        "has_died": it.has_died,
        "stopping": it.is_running and it.stop_asked_at is not None,
        "selected": f"{it.selected:,}",
        "sent": f"{it.sent:,}",
        "settled": f"{it.settled:,}",
        "parked_again": f"{it.parked_again:,}",
        "refused": f"{it.refused:,}",
        "under_way": f"{it.under_way:,}",
        "rate": f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}",
        "lasted": shown.duration(lasted),
        "left": shown.duration(left / rate) if it.is_running and rate > 0 and left > 0 else "",
        "shares": [round(100 * part / max(it.selected, 1), 2) for part in (it.settled, it.parked_again, it.refused)],
        "because": it.stopped_because or "",
    }


def _only_open(selection: Selection) -> Selection:
    """The part of a selection in states that can be replayed. Raises InvalidRequest if it has no such state."""
    states = tuple(state for state in selection.states if state in OPEN_STATES)
    if not states:
        raise InvalidRequest(
            f"{selection.states[0]} dead letters cannot be replayed; discarded ones can be restored first"
        )
    return msgspec.structs.replace(selection, states=states)


def _is_hopeless(job: ForecastJob | None) -> bool:
    return job is not None and job.forecast is not None and job.forecast.is_hopeless


def _lines(job: ForecastJob, outcome: str | None, number: int) -> dict[str, Any]:
    """A page of the forecast's lines, as template variables."""
    lines = [] if job.forecast is None else job.forecast.lines
    if outcome in forecast.OUTCOMES:
        lines = [line for line in lines if line.outcome == outcome]
    pages = max(1, math.ceil(len(lines) / LINES_MAX))
    number = min(number, pages)
    return {
        "lines": lines[(number - 1) * LINES_MAX : number * LINES_MAX],
        "number": number,
        "pages": pages,
        "outcome": outcome,
    }


def _rate(form: dict[str, str]) -> float | None:
    text = form.get("rate", "").strip()
    try:
        rate = float(text) if text else None
    except ValueError:
        rate = math.nan
    if rate is not None and not math.isfinite(rate):
        raise InvalidRequest(f"rate: a number, not {text!r:.80}")
    return rate


def _described(fields: dict[str, str]) -> str:
    """A selection in words."""
    state = fields.get("state", OPEN)
    words = ["all parked" if state in (OPEN, "all") else f"all {state}"]
    if ids := fields.get("ids"):
        words = [f"dead letter {ids}" if ids.isdecimal() else f"the dead letters {shown.shortened(ids)}"]
    for name, what in (("cause", "cause"), ("group", "group"), ("account", "account"), ("key", "request key")):
        if name in fields:
            words.append(f"{what} {fields[name]}")
    if "newer" in fields:
        words.append(f"parked within the last {fields['newer']}")
    if "older" in fields:
        words.append(f"parked longer than {fields['older']} ago")
    return ", ".join(words)


def _described_selection(selection: str) -> str:
    return _described(_query_of(selection))


def _query_of(selection: str) -> dict[str, str]:
    """The URL fields of a recorded selection; ages that are not in AGES are left out."""
    known = msgspec.json.decode(selection, type=Selection)
    ages = {seconds: name for name, seconds in AGES.items()}
    fields: dict[str, Any] = {
        "ids": " ".join(map(str, known.ids)) or None,
        "state": known.states[0] if len(known.states) == 1 else None,
        "cause": known.cause,
        "group": known.group_id,
        "account": known.account_id,
        "key": known.request_key,
        "newer": ages.get(known.newer_than_s or 0),
        "older": ages.get(known.older_than_s or 0),
    }
    return {name: str(value) for name, value in fields.items() if value is not None}
