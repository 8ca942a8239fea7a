"""The pages of conformity: what the last nightly reports said, and the report of one campaign with its charts."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec
from cachetools import TTLCache
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response

from tombola.producers.domain.errors import InvalidRequest
from tombola.worker.conformity import nightly, reading, revealed
from tombola.worker.conformity.report import Period, Report
from tombola.worker.conformity.tails import more_wins
from tombola.worker.console.pages import Page, Services, page
from tombola.worker.console.threads import in_thread

REPORTS_KEPT_MAX: Final = 32
REPORTS_KEPT_S: Final = 60.0
TICKET_ROWS_MAX: Final = 20_000  # a page waits for them; the command and the nightly reports read more


class ConformityPage(Page):
    """Reports from what is counted, each made once for all who look within REPORTS_KEPT_S."""

    path = "/conformity"
    menu_label = "Conformity"
    icon = "fa-solid fa-chart-column"

    def __init__(self, services: Services) -> None:
        super().__init__(services)
        self._lock = threading.Lock()
        self._kept: TTLCache[tuple[str, Period], Report] = TTLCache(REPORTS_KEPT_MAX, REPORTS_KEPT_S)

    @page("")
    async def index(self, request: Request) -> Response:
        campaigns, last = await self.read(_campaigns)
        return self.show(request, "conformity_list.html", "Conformity", campaigns=campaigns, last=last)

    @page("/{name}")
    async def one(self, request: Request) -> Response:
        found = await self._report(request)
        return self.show(
            request,
            "conformity.html",
            f"{found.campaign}, conformity",
            found=found,
            more_wins=more_wins,
            # Both days as they were given: the last one is part of the period.
            since=_day(found.period.since),
            until=_day(found.period.until and found.period.until - timedelta(days=1)),
            query=str(request.url.query),
        )

    @page("/{name}/report.json")
    async def told(self, request: Request) -> Response:
        found = await self._report(request)
        return Response(msgspec.json.encode(found.told()), media_type="application/json")

    async def _report(self, request: Request) -> Report:
        name = request.path_params["name"]
        since, until = (_asked(request, field) for field in ("since", "until"))
        period = Period(since, None if until is None else until + timedelta(days=1))
        return await in_thread(lambda: self._made(name, period))

    def _made(self, name: str, period: Period) -> Report:
        with self._lock:
            known: Report | None = self._kept.get((name, period))
        if known is None:
            services = self.services
            known = reading.report_on(
                services.engine,
                name,
                period=period,
                key_of=revealed.key_of(services.settings),
                ticket_rows_max=TICKET_ROWS_MAX,
            )
            with self._lock:
                self._kept[name, period] = known
        return known


def _asked(request: Request, field: str) -> datetime | None:
    """The day in a field of the address, None for none. Raises InvalidRequest for what is no day."""
    text = request.query_params.get(field, "")
    if not text:
        return None
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise InvalidRequest(f"{field} is a day, as 2026-11-27, not {text!r:.40}") from None


def _day(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d}"


def _campaigns(connection: Connection) -> tuple[list[str], nightly.Examined | None]:
    return reading.campaigns_of(connection), nightly.last(connection)
