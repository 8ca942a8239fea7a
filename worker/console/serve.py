"""Serving the console, in one process: forecasts and running replays live in its memory."""

from __future__ import annotations

from typing import Final

import uvicorn

from tombola.producers.settings import Settings
from tombola.producers.telemetry.logs import set_up_logging
from tombola.producers.web import serving
from tombola.producers.web.protocol import Protocol
from tombola.worker.console.app import create_app
from tombola.worker.console.security.forms import FORM_BYTES_MAX

CONNECTIONS_MAX: Final = 500


class Connection(Protocol):
    """A connection of a browser or a proxy."""

    body_bytes_max = FORM_BYTES_MAX
    request_s_max = 30.0


def configured(settings: Settings, host: str, port: int) -> uvicorn.Config:
    """uvicorn's configuration for the console."""
    return uvicorn.Config(
        create_app(settings),
        host=host,
        port=port,
        **serving.options(protocol="tombola.worker.console.serve:Connection", connections_max=CONNECTIONS_MAX),
    )


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT, which stop the replays that run in this process."""
    set_up_logging(settings.log_format)
    uvicorn.Server(configured(settings, host, port)).run()
