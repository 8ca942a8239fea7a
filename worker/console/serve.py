"""Serving the console: one process, as its forecasts and replays live in it."""

from __future__ import annotations

from typing import Final

import uvicorn

from producers.logs import set_up_logging
from producers.settings import Settings
from worker.console.app import create_app

GRACE_S: Final = 10


def configured(settings: Settings, host: str, port: int) -> uvicorn.Config:
    """How uvicorn serves the console."""
    return uvicorn.Config(
        create_app(settings),
        host=host,
        port=port,
        access_log=False,
        log_config=None,
        log_level="info",
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        proxy_headers=False,  # whose address it is decides a rate limit: no header may say so
    )


def serve(settings: Settings, host: str, port: int) -> None:
    """Serve until told to stop: SIGTERM ends what is under way, and stops replays that run here."""
    set_up_logging(settings.log_format)
    uvicorn.Server(configured(settings, host, port)).run()
