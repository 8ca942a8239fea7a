"""Simulations of manifests that are not published yet: bounded, one after the other, in a thread of this process.

A simulation changes nothing and can be run again, so it is kept in memory only, for KEPT_S.
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from cachetools import TTLCache

from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.errors import DrawError, InvalidRequest, ServiceUnavailable
from tombola.producers.storage.clock import utc_now
from tombola.worker.campaigns.simulation import Simulation, simulate

log = logging.getLogger(__name__)

PULLS_MAX: Final = 200_000  # of one simulation: some seconds of CPU, which the console's pages share
ACCOUNTS_MAX: Final = 20_000
REQUESTS_OF_ACCOUNT: Final = 100  # or what the limit per account allows, so that what comes back says something
KEPT_MAX: Final = 8
KEPT_S: Final = 900


@dataclass
class SimulationJob:
    """A simulation under way or done; when it is done it has `found` or an `error`. `text` is the manifest."""

    id: str
    text: str
    odds: Odds
    draws: int
    pulls: int
    asked_at: datetime
    done: int = 0
    found: Simulation | None = None
    error: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.found is not None or bool(self.error)


class _Stopping(Exception):
    """The console ends: what is under way is dropped."""


class SimulationRunner:
    """Runs simulations one after the other, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._jobs: TTLCache[str, SimulationJob] = TTLCache(KEPT_MAX, KEPT_S)
        self._lock = threading.Lock()
        self._stopping = False
        self._threads = ThreadPoolExecutor(1, "simulation")

    def ask(self, text: str, odds: Odds, *, draws: int, pulls: int) -> SimulationJob:
        """Begin to draw `draws` requests of `pulls` pulls by `odds`.

        Raises InvalidRequest for more than PULLS_MAX pulls, and for pulls that are not sold; ServiceUnavailable if too
        many simulations are under way.
        """
        if pulls not in odds.cost:
            raise InvalidRequest(f"{odds.name} sells {', '.join(map(str, odds.cost))} pulls at once, not {pulls}")
        if draws * pulls > PULLS_MAX:
            raise InvalidRequest(
                f"at most {PULLS_MAX:,} pulls here, not {draws * pulls:,}: `tombola campaign simulate` draws more"
            )
        with self._lock:
            if sum(not job.is_over for job in self._jobs.values()) >= KEPT_MAX:
                raise ServiceUnavailable("too many simulations are under way: try again in a minute")
            job = SimulationJob(secrets.token_hex(8), text, odds, draws, pulls, utc_now())
            self._jobs[job.id] = job
        self._threads.submit(self._run, job)
        return job

    def find(self, job_id: str) -> SimulationJob | None:
        """A snapshot of the simulation with this id, as a page reads it more than once; None once it is forgotten."""
        with self._lock:
            job = self._jobs.get(job_id)
        return None if job is None else replace(job)

    def close(self) -> None:
        """Begin no more simulations, and drop the one under way."""
        self._stopping = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: SimulationJob) -> None:
        def on_progress(more: int) -> None:
            if self._stopping:
                raise _Stopping
            job.done += more

        try:
            job.found = simulate(
                job.odds, draws=job.draws, accounts=_accounts(job), pulls=job.pulls, on_progress=on_progress
            )
        except _Stopping:
            job.error = "the console is ending"
        except DrawError as error:
            job.error = str(error)
        except Exception as error:
            log.exception("a simulation failed")
            job.error = f"the simulation failed: {type(error).__name__}; the console's log says more"


def _accounts(job: SimulationJob) -> int:
    """How many accounts draw: so many that none is over the limit per account, as far as ACCOUNTS_MAX."""
    allowed = REQUESTS_OF_ACCOUNT if job.odds.per_account is None else job.odds.per_account // job.pulls
    return min(ACCOUNTS_MAX, math.ceil(job.draws / max(1, min(REQUESTS_OF_ACCOUNT, allowed))))
