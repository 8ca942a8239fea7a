"""Serving the gateway: uvicorn, and the settings from the environment in every process it starts."""

from __future__ import annotations

import gc
import os
import resource
import sys
import tempfile
from contextlib import suppress
from typing import Final

import uvicorn
from litestar import Litestar

from producers import tracing
from producers.gateway.app import create_app
from producers.logs import set_up_logging
from producers.metrics import MULTIPROCESS_VARIABLE
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
    settings = Settings.from_env()
    set_up_logging(settings.log_format)
    tracing.set_up("gateway")
    made = create_app(settings)
    # What was made by now stays: without this the collector walks all of it, again and again, while everybody waits.
    gc.collect()
    gc.freeze()
    return made


def serve(*, host: str, port: int, processes: int) -> None:
    """Serve until told to stop: SIGTERM finishes what is under way."""
    set_up_logging(Settings.from_env().log_format)  # this process watches over the others, and says so
    if processes > 1 and MULTIPROCESS_VARIABLE not in os.environ:
        # The processes write their metrics there, so that whichever is asked can tell them all.
        os.environ[MULTIPROCESS_VARIABLE] = tempfile.mkdtemp(prefix="tombola-metrics-")
    uvicorn.run(
        "producers.gateway.serve:app",
        factory=True,
        host=host,
        port=port,
        workers=processes,
        access_log=False,
        log_config=None,
        log_level="info",
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        proxy_headers=False,  # whose address it is decides a rate limit: no header may say so
    )
