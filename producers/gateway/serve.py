"""Serving the gateway: uvicorn, and the settings from the environment in every process it starts."""

from __future__ import annotations

import gc
import logging
import os
import resource
import sys
import tempfile
from contextlib import suppress
from typing import Final

import uvicorn
from litestar import Litestar

from producers.gateway.app import METRICS_VARIABLE, create_app
from producers.settings import Settings

# Threads take turns this often. By default a thread that has read a row waits up to 5 ms for the event loop to let go.
SWITCH_INTERVAL_S: Final = 0.0002
GRACE_S: Final = 10
# Whoever waits holds a socket; a shell or a service manager often allows a process only 1,024 of them at first.
FILES_MAX: Final = 65_536


def app() -> Litestar:
    """The application from TOMBOLA_*, for any ASGI server: `uvicorn --factory producers.gateway.serve:app`."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES_MAX if hard < 0 else min(hard, FILES_MAX), hard))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    made = create_app(Settings.from_env())
    # What was made by now stays: without this the collector walks all of it, again and again, while everybody waits.
    gc.collect()
    gc.freeze()
    return made


def serve(*, host: str, port: int, processes: int) -> None:
    """Serve until told to stop: SIGTERM finishes what is under way."""
    if processes > 1 and METRICS_VARIABLE not in os.environ:
        # The processes write their metrics there, so that whichever is asked can tell them all.
        os.environ[METRICS_VARIABLE] = tempfile.mkdtemp(prefix="tombola-metrics-")
    uvicorn.run(
        "producers.gateway.serve:app",
        factory=True,
        host=host,
        port=port,
        workers=processes,
        access_log=False,
        log_level="info",
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        proxy_headers=False,  # whose address it is decides a rate limit: no header may say so
    )
