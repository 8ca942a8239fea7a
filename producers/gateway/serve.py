"""Serving the gateway with uvicorn, in one process or several; each reads its settings from the environment."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from typing import Final

import uvicorn

from tombola.producers.gateway.app import create_app
from tombola.producers.gateway.front import Front
from tombola.producers.settings import Settings
from tombola.producers.telemetry import metrics, tracing
from tombola.producers.telemetry.logs import set_up_logging
from tombola.producers.web import serving

# How often threads take turns. At Python's default, a thread that has read a row waits up to 5 ms for the event loop.
SWITCH_INTERVAL_S: Final = 0.0002
PROTOCOL: Final = "tombola.producers.web.protocol:Protocol"


def app() -> Front:
    """The application from TOMBOLA_*, for any ASGI server: `uvicorn --factory tombola.producers.gateway.serve:app`."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    settings = Settings.from_env()
    set_up_logging(settings.log_format)
    tracing.set_up("gateway")
    made = create_app(settings)
    # Objects made until now stay: without this the garbage collector would walk them repeatedly, and delay requests.
    gc.collect()
    gc.freeze()
    return made


def serve(*, host: str, port: int, processes: int) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are finished first.

    With TOMBOLA_METRICS_PORT, this process serves the metrics of all processes, in a thread.
    """
    settings = Settings.from_env()
    set_up_logging(settings.log_format)  # this process supervises the others, and logs that
    if processes > 1 and metrics.MULTIPROCESS_VARIABLE not in os.environ:
        # The processes write their metrics there; this process adds them up.
        os.environ[metrics.MULTIPROCESS_VARIABLE] = tempfile.mkdtemp(prefix="tombola-metrics-")
    metrics.serve(settings)
    uvicorn.run(
        "tombola.producers.gateway.serve:app",
        factory=True,
        host=host,
        port=port,
        workers=processes,
        **serving.options(protocol=PROTOCOL, connections_max=settings.gateway_connections_max),
    )
