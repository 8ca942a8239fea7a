"""The first page: live figures from the pulse in Redis and from the database. The page refreshes itself."""

from __future__ import annotations

import threading
import time
from datetime import datetime
from typing import Any, Final

import redis
from sqlalchemy import Connection, func, select
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tombola.producers.brokers.registry import open_broker
from tombola.producers.domain.causes import OPEN_STATES, Status
from tombola.producers.domain.errors import ConfigurationError, DrawError
from tombola.producers.storage import clock, requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.schema import api_idempotency_requests as table
from tombola.producers.telemetry import pulse
from tombola.worker.audit import audits
from tombola.worker.conformity import nightly
from tombola.worker.console import shown
from tombola.worker.console.pages import Page, Services, page
from tombola.worker.console.threads import in_thread
from tombola.worker.dead_letters import letters as dead_letters
from tombola.worker.host import housekeeping

MINUTES: Final = 60
SNAPSHOT_KEPT_S: Final = 1.0  # shared by all open pages
OLDEST_READ_MAX: Final = 10_000
BROKER_ASKED_EVERY_S: Final = 2.0

SERIES: Final = ("accepted", "settled", "rejected", "parked")


class OverviewPage(Page):
    """Charts and numbers; /live.json has the numbers."""

    path = "/"
    route_name = "index"
    menu_label = "Overview"
    icon = "fa-solid fa-gauge-high"

    def __init__(self, services: Services) -> None:
        super().__init__(services)
        self._live = Live(services)

    @page("")
    async def index(self, request: Request) -> Response:
        return self.show(request, "overview.html", "Overview")

    @page("/live.json")
    async def live(self, request: Request) -> Response:
        return JSONResponse(await in_thread(self._live.now))


class Live:
    """The live figures, read once for all pages that ask within SNAPSHOT_KEPT_S."""

    def __init__(self, services: Services) -> None:
        self._desk = services
        self._lock = threading.Lock()
        self._kept: dict[str, Any] = {}
        self._kept_until = 0.0
        self._broker = BrokerWatch(services)
        # `tombola up`, on SQLite, runs no beat; it audits when it starts.
        self._has_beat = services.engine.dialect.name != "sqlite"

    def now(self) -> dict[str, Any]:
        with self._lock:
            if time.monotonic() >= self._kept_until:
                self._kept = self._look()
                self._kept_until = time.monotonic() + SNAPSHOT_KEPT_S
            return self._kept

    def _look(self) -> dict[str, Any]:
        warnings: list[str] = []
        figures: dict[str, Any] = {"at": shown.utc(utc_now()), "warnings": warnings}
        figures |= self._from_database(warnings)
        figures |= self._from_redis(warnings)
        figures["broker_backlog"], warning = self._broker.backlog()
        if warning:
            warnings.append(warning)
        return figures

    def _from_database(self, warnings: list[str]) -> dict[str, Any]:
        most = self._desk.settings.backlog_max
        try:
            backlog = self._desk.read(requests.count_accepted, count_max=most + 1)
            oldest = self._desk.read(_oldest_accepted)
            counts = self._desk.read(dead_letters.counts)
            audited = self._desk.read(audits.last)
            examined = self._desk.read(nightly.last)
            now = self._desk.read(clock.now)
        except DrawError as error:
            warnings.append(str(error))
            return {"backlog": None, "oldest": None, "open": None, "causes": [], "audit": None, "conformity": None}
        lapse = housekeeping.of_audit(audited, now)
        if lapse and (self._has_beat or (audited and not audited.is_clean)):
            warnings.append(_warning(lapse))
        lapse = housekeeping.of_conformity(examined, now)
        if lapse and (self._has_beat or (examined and examined.deviations)):
            warnings.append(_warning(lapse))
        open_by_cause: dict[str, int] = {}
        for (state, cause), count in counts.items():
            if state in OPEN_STATES:
                open_by_cause[cause] = open_by_cause.get(cause, 0) + count
        return {
            "backlog": f"more than {most:,}" if backlog > most else f"{backlog:,}",
            "oldest": shown.duration(now - oldest) if oldest else None,
            "open": sum(open_by_cause.values()),
            "causes": sorted(open_by_cause.items(), key=lambda it: -it[1]),
            "audit": f"{shown.ago(audited.at)}: {audited}" if audited else "none on record",
            "conformity": f"{shown.ago(examined.at)}: {examined}" if examined else "none on record",
        }

    def _from_redis(self, warnings: list[str]) -> dict[str, Any]:
        nothing: dict[str, Any] = {"minutes": None, "members": None}
        if self._desk.redis is None:
            warnings.append("No live figures: TOMBOLA_RESULT_URL is not set.")
            return nothing
        try:
            minutes = pulse.minutes(self._desk.redis, MINUTES)
            members = pulse.members(self._desk.redis)
        except (redis.RedisError, DrawError) as error:
            warnings.append(f"No live figures: Redis does not answer: {error}")
            return nothing
        roles = {it.role for it in members}
        lapses = [housekeeping.of_relay(roles), housekeeping.of_beat(roles) if self._has_beat else None]
        warnings += [_warning(lapse) for lapse in lapses if lapse]
        return {
            "minutes": {
                "labels": [shown.utc(it.at)[11:16] for it in minutes],
                **{name: [getattr(it, name) for it in minutes] for name in SERIES},
            },
            "members": [
                {
                    "role": it.role,
                    "name": it.name,
                    "version": it.version,
                    "up": shown.duration(utc_now() - it.started_at),
                    "seen": shown.ago(it.at),
                    "clock": f"{it.clock_offset_ms:+.0f} ms",
                }
                for it in members
            ],
        }


class BrokerWatch:
    """The broker's backlog, read in a thread of its own every BROKER_ASKED_EVERY_S: an outage must not delay a page."""

    def __init__(self, services: Services) -> None:
        self._settings = services.settings
        self._lock = threading.Lock()
        self._asking = False
        self._asked_at = -BROKER_ASKED_EVERY_S
        self._answer: tuple[int | None, str] = (None, "The broker is being asked.")

    def backlog(self) -> tuple[int | None, str]:
        """The number of queued messages, or None and a warning."""
        with self._lock:
            if not self._asking and time.monotonic() - self._asked_at >= BROKER_ASKED_EVERY_S:
                self._asking = True
                threading.Thread(target=self._ask, name="broker-backlog", daemon=True).start()
            return self._answer

    def _ask(self) -> None:
        try:
            broker = open_broker(self._settings.need("broker_url"), publish_timeout_s=5)
            try:
                answer: tuple[int | None, str] = (broker.backlog(), "")
            finally:
                broker.close()
        except ConfigurationError as error:
            answer = (None, str(error))
        except DrawError as error:
            answer = (None, f"The broker does not answer: {error}")
        except Exception as error:  # the page shows any error as a warning
            answer = (None, f"The broker does not answer: {type(error).__name__}")
        with self._lock:
            self._answer, self._asking, self._asked_at = answer, False, time.monotonic()


def _warning(lapse: housekeeping.Lapse) -> str:
    text = f"{lapse.what}: {lapse.cure}."
    return text[0].upper() + text[1:]


def _oldest_accepted(connection: Connection) -> datetime | None:
    """The earliest accept of the requests under way, among the OLDEST_READ_MAX that the relay publishes next."""
    some = (
        select(table.c.accepted_at)
        .where(table.c.status == Status.ACCEPTED)
        .order_by(table.c.publish_at)
        .limit(OLDEST_READ_MAX)
        .subquery()
    )
    oldest: datetime | None = connection.execute(select(func.min(some.c.accepted_at))).scalar()
    return oldest
