"""The fields of log lines. How lines are written is set up by each process (producers.telemetry.logs)."""

from __future__ import annotations

from typing import Protocol


class Named(Protocol):
    """A request, as the subject of a log line."""

    @property
    def request_key(self) -> str: ...
    @property
    def lottery_session_id(self) -> str: ...


def about(request: Named) -> dict[str, str]:
    """The fields of a log line about one request: `log.info(…, extra=about(request))`."""
    return {"request_key": request.request_key, "lottery_session_id": request.lottery_session_id}
