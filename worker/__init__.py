"""Everything after the broker: consume, settle, answer. tombola.worker.celery has the Celery app."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """The app, for `celery -A worker` in a checkout, where Python finds this folder under its own name as well."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tombola.worker.celery import app

    return app
