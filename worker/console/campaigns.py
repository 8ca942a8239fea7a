"""The pages of campaigns: the list, one campaign with what operators do to it, and its versions side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette_admin.flash import flash

from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN
from tombola.producers.storage.campaigns import CampaignState
from tombola.worker.campaigns import history, lists, stock, versions
from tombola.worker.campaigns.differences import differences
from tombola.worker.campaigns.history import Standing, Version
from tombola.worker.campaigns.outlook import STREAK
from tombola.worker.console.campaign_figures import CampaignFigures, live_shown
from tombola.worker.console.pages import Page, Services, act, integer, page
from tombola.worker.console.security.roles import must_act
from tombola.worker.console.threads import in_thread
from tombola.worker.operators.actions import Action


class CampaignsPage(Page):
    """The campaigns. Viewers see all of it; operators open, pause, close and restock."""

    path = "/campaigns"
    menu_label = "Campaigns"
    icon = "fa-solid fa-dice"

    def __init__(self, services: Services) -> None:
        super().__init__(services)
        self._figures = CampaignFigures(services)

    @page("")
    async def index(self, request: Request) -> Response:
        rows = await self.read(_rows)
        return self.show(request, "campaigns.html", "Campaigns", rows=rows, builtin=DEFAULT_CAMPAIGN)

    @page("/{name}")
    async def one(self, request: Request) -> Response:
        found = await self.read(_one, request.path_params["name"])
        outlook = live = None
        if (odds := found.odds) is not None:
            outlook = await in_thread(lambda: self._figures.outlook(odds))
            live = live_shown(outlook, await in_thread(lambda: self._figures.live(odds)), found.left, found.issued)
        return self.show(
            request,
            "campaign.html",
            found.standing.name,
            it=found.standing,
            found=found,
            outlook=outlook,
            live=live,
            moves=versions.MOVES[found.standing.state],
            streak=STREAK,
        )

    @page("/{name}/live.json")
    async def live(self, request: Request) -> Response:
        odds, left, issued = await self.read(_stock, request.path_params["name"])
        if odds is None:
            return JSONResponse({"detail": "no version is published"}, 404)
        outlook = await in_thread(lambda: self._figures.outlook(odds))
        live = await in_thread(lambda: self._figures.live(odds))
        return JSONResponse(live_shown(outlook, live, left, issued))

    @page("/{name}/versions")
    async def compare(self, request: Request) -> Response:
        """Two versions side by side, `a` and `b`; the newest two by default."""
        name, query = request.path_params["name"], request.query_params
        standing = await self.read(history.standing, name)
        known = await self.read(history.versions_of, name)
        newest = known[0].version if known else 1
        two = (integer(query, "a") or max(1, newest - 1), integer(query, "b") or newest)
        odds = [await self.read(history.version_of, name, number) for number in two]
        lines = await in_thread(lambda: list(differences(*odds)))
        return self.show(
            request,
            "campaign_versions.html",
            f"{name}, versions",
            name=standing.name,
            versions=known,
            sides=list(zip(two, odds, strict=True)),
            chosen=dict(zip("ab", two, strict=True)),
            differences=lines,
        )

    # ---- what operators do -------------------------------------------------------------------------------------------

    @page("/{name}/open", methods=("POST",))
    async def open(self, request: Request) -> Response:
        return await self._move(request, CampaignState.OPEN)

    @page("/{name}/pause", methods=("POST",))
    async def pause(self, request: Request) -> Response:
        return await self._move(request, CampaignState.PAUSED)

    @page("/{name}/close", methods=("POST",))
    async def close(self, request: Request) -> Response:
        must_act(request)
        if request.state.form.get("sure") != "yes":
            flash(request, "Not closed: a closed campaign is never opened again, so say that you are sure.", "error")
            return RedirectResponse(self._address(request), 303)
        return await self._move(request, CampaignState.CLOSED)

    @page("/{name}/restock", methods=("POST",))
    async def restock(self, request: Request) -> Response:
        form = request.state.form
        code = form.get("prize", "")
        units = integer(form, "units", least=-(2**62)) or 0
        return await act(
            request,
            versions.restock,
            self.services.engine,
            request.path_params["name"],
            code,
            units,
            reason=form.get("reason", ""),
            message=lambda left: f"{code}: {left:,} units left.",
            back=self._address(request),
        )

    async def _move(self, request: Request, state: CampaignState) -> Response:
        name = request.path_params["name"]
        return await act(
            request,
            versions.move,
            self.services.engine,
            name,
            state,
            reason=request.state.form.get("reason", ""),
            message=lambda _: f"{name} is {state}.",
            back=self._address(request),
        )

    def _address(self, request: Request) -> str:
        return f"{self.path}/{request.path_params['name']}"


# ---- reading ---------------------------------------------------------------------------------------------------------


def _rows(connection: Connection) -> list[tuple[Standing, Odds | None]]:
    return [
        (it, None if it.version is None else history.version_of(connection, it.name, it.version))
        for it in history.standings(connection)
    ]


@dataclass(frozen=True, slots=True)
class Found:
    """All that is on record about one campaign.

    `issued` are the units that were ever published, restocked or loaded as codes, and not withdrawn; `left` what is
    left of them; `sizes` the numbers of accounts on the lists that it names.
    """

    standing: Standing
    odds: Odds | None
    versions: Sequence[Version]
    left: Mapping[str, int]
    issued: Mapping[str, int]
    sizes: Mapping[str, int]
    acts: Sequence[Action]


def _stock(connection: Connection, name: str) -> tuple[Odds | None, Mapping[str, int], Mapping[str, int]]:
    """The live version of a campaign; the units of its prizes that are left, and that were issued."""
    standing = history.standing(connection, name)
    odds = None if standing.version is None else history.version_of(connection, name, standing.version)
    return odds, stock.left(connection, name), stock.published(connection, name)


def _one(connection: Connection, name: str) -> Found:
    standing = history.standing(connection, name)
    odds, left, issued = _stock(connection, name)
    return Found(
        standing=standing,
        odds=odds,
        versions=history.versions_of(connection, name),
        left=left,
        issued=issued,
        sizes={} if odds is None else {it: lists.size(connection, it) for it in (odds.deny, odds.allow) if it},
        acts=history.acts_on(connection, name),
    )
