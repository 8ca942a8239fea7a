"""The first page: what happens now, drawn from the pulse in Redis and from the database. It refreshes itself."""

from __future__ import annotations

import threading
import time
from datetime import datetime
from typing import Any, Final

import redis
from sqlalchemy import Connection, func, select
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tombola.producers.brokers.streams import open_broker
from tombola.producers.domain.causes import OPEN_STATES, Status
from tombola.producers.domain.errors import ConfigurationError, DrawError
from tombola.producers.storage import clock, requests
from tombola.producers.storage.database import utc_now
from tombola.producers.storage.schema import api_idempotency_requests as table
from tombola.producers.telemetry import pulse
from tombola.worker.audit import audits
from tombola.worker.console import shown
from tombola.worker.console.pages import Desk, Page, page
from tombola.worker.console.threads import in_thread
from tombola.worker.dead_letters import letters as dead_letters
from tombola.worker.host import housekeeping

MINUTES: Final = 60
SNAPSHOT_KEPT_S: Final = 1.0  # however many pages are open
OLDEST_LOOKED_AT_MAX: Final = 10_000
# A broker that is away is asked for in a thread of its own, and not by each page again.
BROKER_ASKED_EVERY_S: Final = 2.0

SERIES: Final = ("accepted", "settled", "rejected", "parked")


class Overview(Page):
    """Charts and numbers; the numbers come by /live.json."""

    path = "/"
    route_name = "index"
    menu_label = "Overview"
    icon = "fa-solid fa-gauge-high"

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk)
        self._live = Live(desk)

    @page("")
    async def index(self, request: Request) -> Response:
        return self.show(request, "overview.html", "Overview")

    @page("/live.json")
    async def live(self, request: Request) -> Response:
        return JSONResponse(await in_thread(self._live.now))


class Live:
    """What is going on, looked up once for all who ask within a second."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._lock = threading.Lock()
        self._kept: dict[str, Any] = {}
        self._kept_until = 0.0
        self._broker = BrokerWatch(desk)
        # `tombola up` runs without it, and audits when it starts.
        self._has_beat = desk.engine.dialect.name != "sqlite"

    def now(self) -> dict[str, Any]:
        with self._lock:
            if time.monotonic() >= self._kept_until:
                self._kept = self._look()
                self._kept_until = time.monotonic() + SNAPSHOT_KEPT_S
            return self._kept

    def _look(self) -> dict[str, Any]:
        said: dict[str, Any] = {"at": shown.utc(utc_now()), "words": []}
        said |= self._from_database(said["words"])
        said |= self._from_redis(said["words"])
        said["broker_backlog"], word = self._broker.backlog()
        if word:
            said["words"].append(word)
        return said

    def _from_database(self, words: list[str]) -> dict[str, Any]:
        most = self._desk.settings.backlog_max
        try:
            backlog = self._desk.read(requests.count_accepted, count_max=most + 1)
            oldest = self._desk.read(_oldest_accepted)
            counts = self._desk.read(dead_letters.counts)
            audited = self._desk.read(audits.last)
            now = self._desk.read(clock.now)
        except DrawError as error:
            words.append(str(error))
            return {"backlog": None, "oldest": None, "open": None, "causes": [], "audit": None}
        lapse = housekeeping.of_audit(audited, now)
        if lapse and (self._has_beat or (audited and not audited.is_clean)):
            words.append(_word(lapse))
        open_by_cause: dict[str, int] = {}
        for (state, cause), count in counts.items():
            if state in OPEN_STATES:
                open_by_cause[cause] = open_by_cause.get(cause, 0) + count
        return {
            "backlog": f"more than {most:,}" if backlog > most else f"{backlog:,}",
            "oldest": shown.duration(now - oldest) if oldest else None,
            "open": sum(open_by_cause.values()),
            "causes": sorted(open_by_cause.items(), key=lambda it: -it[1]),
            "audit": f"{shown.ago(audited.at)}: {audited}" if audited else "none is on record",
        }

    def _from_redis(self, words: list[str]) -> dict[str, Any]:
        nothing: dict[str, Any] = {"minutes": None, "members": None}
        if self._desk.redis is None:
            words.append("There are no live figures: TOMBOLA_RESULT_URL names no Redis.")
            return nothing
        try:
            minutes = pulse.minutes(self._desk.redis, MINUTES)
            members = pulse.members(self._desk.redis)
        except (redis.RedisError, DrawError) as error:
            words.append(f"There are no live figures, Redis does not answer: {error}")
            return nothing
        roles = {it.role for it in members}
        lapses = [housekeeping.of_relay(roles), housekeeping.of_beat(roles) if self._has_beat else None]
        words += [_word(lapse) for lapse in lapses if lapse]
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
    """How much is queued, asked now and then by a thread of its own: a broker that is away must not hold up a page."""

    def __init__(self, desk: Desk) -> None:
        self._settings = desk.settings
        self._lock = threading.Lock()
        self._asking = False
        self._asked_at = -BROKER_ASKED_EVERY_S
        self._answer: tuple[int | None, str] = (None, "The broker is being asked.")

    def backlog(self) -> tuple[int | None, str]:
        """What is known, and a word if that is nothing."""
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
        except Exception as error:  # whatever it is, the page says so and goes on
            answer = (None, f"The broker does not answer: {type(error).__name__}")
        with self._lock:
            self._answer, self._asking, self._asked_at = answer, False, time.monotonic()


def _word(lapse: housekeeping.Lapse) -> str:
    text = f"{lapse.what}: {lapse.cure}."
    return text[0].upper() + text[1:]


def _oldest_accepted(connection: Connection) -> datetime | None:
    """When the oldest of those under way was accepted, of those that the relay looks at first."""
    some = (
        select(table.c.accepted_at)
        .where(table.c.status == Status.ACCEPTED)
        .order_by(table.c.publish_at)
        .limit(OLDEST_LOOKED_AT_MAX)
        .subquery()
    )
    oldest: datetime | None = connection.execute(select(func.min(some.c.accepted_at))).scalar()
    return oldest
