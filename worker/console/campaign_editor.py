"""The page where an operator writes a manifest: check it, simulate it, see what it would change, publish it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette_admin.flash import flash

from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.errors import CampaignNotFound, InvalidManifest, InvalidRequest, ServiceUnavailable
from tombola.worker.campaigns import history, versions
from tombola.worker.campaigns.differences import differences
from tombola.worker.campaigns.outlook import STREAK, Outlook
from tombola.worker.campaigns.written import written
from tombola.worker.console.pages import Page, integer, page
from tombola.worker.console.security.roles import must_act, operator_of
from tombola.worker.console.simulations import PULLS_MAX, SimulationJob
from tombola.worker.console.threads import in_thread

EXAMPLE: Final = """\
name = "my-campaign"
title = "My campaign"
asset = "POINT"
cost = { 1 = "10.00", 10 = "90.00" }

[[prize]]
code = "five"
weight = 3000
grants = [{ asset = "POINT", amount = "5.00" }]

[[prize]]
code = "nothing"
weight = 7000
"""
_line_number = re.compile(r"line (\d+): ").match


@dataclass(frozen=True, slots=True)
class Mistake:
    """What is wrong with a manifest; the line that it names, and that line's text, where it names one."""

    message: str
    line: int | None
    text: str

    @classmethod
    def of(cls, error: InvalidManifest, text: str) -> Mistake:
        """The mistake that `error` says of the manifest `text`."""
        found = _line_number(str(error))
        number = int(found[1]) if found else None
        lines = text.split("\n")
        return cls(str(error), number, lines[number - 1] if number is not None and number <= len(lines) else "")


class EditorPage(Page):
    """A new campaign, or a new version of one: `?from=NAME`. Only operators check, simulate and publish here."""

    path = "/campaigns/new"
    add_to_menu = False

    @page("")
    async def index(self, request: Request) -> Response:
        query = request.query_params
        job = self.services.simulations.find(query.get("job", "")) if operator_of(request).can_act else None
        if job is not None:
            outlook = await in_thread(lambda: Outlook.of(job.odds))
            return self._page(request, job.text, outlook=outlook, job=job)
        if "job" in query:
            flash(request, "This simulation is not kept any more: run it again.", "warning")
            return RedirectResponse(self.path, 303)
        origin = query.get("from", "")
        text = EXAMPLE if not origin else written(await self.read(_live_of, origin))
        return self._page(request, text)

    @page("/simulation.json")
    async def progress(self, request: Request) -> Response:
        job = self.services.simulations.find(request.query_params.get("job", ""))
        if job is None:
            return JSONResponse({"detail": "this simulation is not kept any more"}, 404)
        return JSONResponse({"done": job.done, "is_over": job.is_over})

    @page("", methods=("POST",))
    async def submit(self, request: Request) -> Response:
        must_act(request)
        form = request.state.form
        text = form.get("manifest", "").replace("\r\n", "\n")  # browsers send CR LF
        try:
            odds = await in_thread(lambda: manifest.parse(text))
        except InvalidManifest as error:
            return self._page(request, text, mistake=Mistake.of(error, text))
        step = form.get("step", "check")
        if step == "simulate":
            return await self._simulate(request, text, odds)
        if step in ("publish", "confirm"):
            return await self._publish(request, text, odds, is_confirmed=step == "confirm")
        return self._page(request, text, outlook=await in_thread(lambda: Outlook.of(odds)))

    async def _simulate(self, request: Request, text: str, odds: Odds) -> Response:
        form = request.state.form
        try:
            pulls = integer(form, "pulls") or next(iter(odds.cost))
            draws = integer(form, "draws") or PULLS_MAX // pulls
            job = self.services.simulations.ask(text, odds, draws=draws, pulls=pulls)
        except (InvalidRequest, ServiceUnavailable) as error:
            outlook = await in_thread(lambda: Outlook.of(odds))
            return self._page(request, text, outlook=outlook, refusal=str(error))
        return RedirectResponse(f"{self.path}?job={job.id}", 303)

    async def _publish(self, request: Request, text: str, odds: Odds, *, is_confirmed: bool) -> Response:
        """Show what publishing would change and ask; publish what was confirmed, if it is what was shown."""
        form = request.state.form
        live = await self.read(_live_or_none, odds.name)
        live_hash = "" if live is None else live.odds_hash
        refusal = await in_thread(lambda: versions.why_not(odds, versions.Bounds()))
        is_as_shown = (form.get("odds_hash"), form.get("live_hash")) == (odds.odds_hash, live_hash)
        if is_confirmed and is_as_shown and refusal is None:
            try:
                done = await run_in_threadpool(
                    versions.publish,
                    self.services.engine,
                    odds,
                    bounds=versions.Bounds(),
                    operator=operator_of(request).name,
                    reason=form.get("reason", ""),
                )
            except (InvalidRequest, ServiceUnavailable) as error:  # the text must not be lost
                refusal = str(error)
            else:
                flash(request, f"Version {done.version} of {odds.name} is live.", "success")
                return RedirectResponse(f"/campaigns/{odds.name}", 303)
        lines = await in_thread(lambda: list(differences(live, odds)))
        return self._page(
            request,
            text,
            outlook=await in_thread(lambda: Outlook.of(odds)),
            refusal=refusal or "",
            changes=lines,
            live_hash=live_hash,
            is_stale=is_confirmed and not is_as_shown,
        )

    def _page(
        self,
        request: Request,
        text: str,
        *,
        mistake: Mistake | None = None,
        outlook: Outlook | None = None,
        job: SimulationJob | None = None,
        **asked: Any,
    ) -> Response:
        """The page with the manifest `text`. `asked` belongs to publishing: refusal, changes, live_hash, is_stale."""
        changes: Sequence[str] | None = asked.get("changes")
        return self.show(
            request,
            "campaign_new.html",
            "New version" if asked.get("live_hash") or request.query_params.get("from") else "New campaign",
            **{"refusal": "", "live_hash": "", "is_stale": False, **asked, "changes": changes},
            text=text,
            mistake=mistake,
            outlook=outlook,
            job=job,
            found=None if job is None else job.found,
            pulls_max=PULLS_MAX,
            streak=STREAK,
            reason=request.state.form.get("reason", ""),
        )


def _live_of(connection: Connection, name: str) -> Odds:
    """The live version of a campaign. Raises CampaignNotFound."""
    standing = history.standing(connection, name)
    if standing.version is None:
        raise CampaignNotFound(f"campaign {name!r:.80} has no version")
    return history.version_of(connection, name, standing.version)


def _live_or_none(connection: Connection, name: str) -> Odds | None:
    try:
        return _live_of(connection, name)
    except CampaignNotFound:
        return None
