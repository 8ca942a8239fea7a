"""What a log line is about, as its fields. Apart from how lines are written: that is up to each process."""

from __future__ import annotations

from typing import Protocol


class Named(Protocol):
    """What a log line can be about: a draw request."""

    @property
    def request_key(self) -> str: ...
    @property
    def lottery_session_id(self) -> str: ...


def about(request: Named) -> dict[str, str]:
    """The fields of a log line about one draw: `log.info(…, extra=about(request))`."""
    return {"request_key": request.request_key, "lottery_session_id": request.lottery_session_id}
