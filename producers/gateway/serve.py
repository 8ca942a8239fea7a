"""Serving the gateway: uvicorn, and the settings from the environment in every process it starts."""

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

# Threads take turns this often. By default a thread that has read a row waits up to 5 ms for the event loop to let go.
SWITCH_INTERVAL_S: Final = 0.0002
PROTOCOL: Final = "tombola.producers.web.protocol:Protocol"


def app() -> Front:
    """The application from TOMBOLA_*, for any ASGI server: `uvicorn --factory producers.gateway.serve:app`."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    settings = Settings.from_env()
    set_up_logging(settings.log_format)
    tracing.set_up("gateway")
    made = create_app(settings)
    # What was made by now stays: without this the collector walks all of it, again and again, while everybody waits.
    gc.collect()
    gc.freeze()
    return made


def serve(*, host: str, port: int, processes: int) -> None:
    """Serve until told to stop: SIGTERM finishes what is under way.

    This process serves the metrics of all of them, in a thread, where TOMBOLA_METRICS_PORT says so.
    """
    settings = Settings.from_env()
    set_up_logging(settings.log_format)  # this process watches over the others, and says so
    if processes > 1 and metrics.MULTIPROCESS_VARIABLE not in os.environ:
        # The processes write their metrics there, so that this one can tell them all.
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
