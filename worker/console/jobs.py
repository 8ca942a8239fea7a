"""Work that takes longer than a page: forecasts and replays, in threads.

A forecast exists in this process only, for FORECASTS_KEPT_S: it changes nothing, and can be made again. A replay is a
row in the database: any process can show it, and it outlives this one.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from cachetools import TTLCache
from sqlalchemy import Engine

from tombola.producers.brokers.registry import Broker, broker_of
from tombola.producers.domain.errors import DrawError, ServiceUnavailable
from tombola.producers.settings import Settings
from tombola.producers.storage.clock import utc_now
from tombola.worker.dead_letters.letters import Selection
from tombola.worker.replays.forecast import Forecast, forecast
from tombola.worker.replays.replayer import Replayer
from tombola.worker.replays.vouching import NOTHING_ASKED, Vouching

log = logging.getLogger(__name__)

FORECASTS_KEPT_MAX: Final = 8  # a forecast of 100,000 messages takes about 30 MB
FORECASTS_KEPT_S: Final = 900
FORECASTS_AT_ONCE: Final = 1
STOP_TIMEOUT_S: Final = 8.0


@dataclass
class ForecastJob:
    """A forecast under way or done; when it is done it has a `forecast` or an `error`."""

    id: str
    selection: Selection
    limit: int | None
    asked_at: datetime
    done: int = 0
    forecast: Forecast | None = None
    error: str = ""

    @property
    def is_over(self) -> bool:
        return self.forecast is not None or bool(self.error)


class ForecastRunner:
    """Makes forecasts one after the other, in the order of the requests."""

    def __init__(self, engine: Engine, vouching: Vouching = NOTHING_ASKED) -> None:
        self._engine = engine
        self._vouching = vouching
        self._jobs: TTLCache[str, ForecastJob] = TTLCache(FORECASTS_KEPT_MAX, FORECASTS_KEPT_S)
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(FORECASTS_AT_ONCE, "forecast")

    def ask(self, selection: Selection, limit: int | None) -> ForecastJob:
        """Begin a forecast, or return the same one if it is under way. Raises ServiceUnavailable if too many are."""
        with self._lock:
            under_way = [job for job in self._jobs.values() if not job.is_over]
            for job in under_way:
                if (job.selection, job.limit) == (selection, limit):
                    return job
            if len(under_way) >= FORECASTS_KEPT_MAX:
                raise ServiceUnavailable("too many forecasts are under way: try again in a minute")
            job = ForecastJob(secrets.token_hex(8), selection, limit, utc_now())
            self._jobs[job.id] = job
        self._threads.submit(self._run, job)
        return job

    def find(self, job_id: str) -> ForecastJob | None:
        """A snapshot of the forecast with this id, as a page reads it more than once; None once it is forgotten."""
        with self._lock:
            job = self._jobs.get(job_id)
        return None if job is None else replace(job)

    def close(self) -> None:
        """Begin no more forecasts; do not wait for the one under way."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: ForecastJob) -> None:
        def on_progress(done: int) -> None:
            job.done = done

        try:
            job.forecast = forecast(
                self._engine, job.selection, limit=job.limit, vouching=self._vouching, on_progress=on_progress
            )
        except DrawError as error:
            job.error = str(error)
        except Exception as error:
            log.exception("a forecast failed")
            job.error = f"the forecast failed: {type(error).__name__}; the console's log says more"


class ReplayRunner:
    """Runs replays that are on record already."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self._settings = settings
        self._engine = engine
        self._running: dict[int, tuple[Replayer, threading.Thread]] = {}
        self._lock = threading.Lock()

    def run(self, replay_id: int) -> None:
        """Run the replay in a thread of its own. Raises ConfigurationError if no broker is set."""
        broker = broker_of(self._settings)
        replayer = Replayer(self._engine, broker, self._settings)
        thread = threading.Thread(
            target=self._run, args=(replay_id, replayer, broker), name=f"replay-{replay_id}", daemon=True
        )
        with self._lock:
            self._running[replay_id] = replayer, thread
        thread.start()

    def close(self) -> None:
        """Stop the replays that run in this process; messages that were not sent stay parked."""
        with self._lock:
            running = list(self._running.values())
        for replayer, _ in running:
            replayer.stop()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for _, thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self, replay_id: int, replayer: Replayer, broker: Broker) -> None:
        try:
            ended = replayer.run(replay_id)
            log.info("replay %d %s: %s", replay_id, ended.status, ended.stopped_because or "nothing left to send")
        except DrawError as error:
            log.error("replay %d: %s", replay_id, error)
        except Exception:
            log.exception("replay %d failed", replay_id)
        finally:
            with self._lock:
                self._running.pop(replay_id, None)
            broker.close()
