"""Forms: their bounds, and the token that proves that the console's own page sent them (CSRF).

The token is an HMAC under the session's token: pages of other sites cannot compute it, a form of another session does
not fit, and several processes need no shared secret. What browsers say about a form's origin (Origin, Sec-Fetch-Site)
is checked as well.
"""

from __future__ import annotations

import hmac
from typing import Final
from urllib.parse import parse_qs, urlsplit

import anyio
from starlette.requests import Request
from starlette.types import Message, Receive

TOKEN_FIELD: Final = "csrftoken"
FORM_TYPE: Final = "application/x-www-form-urlencoded"
FORM_BYTES_MAX: Final = 512 * 1024  # the body of a dead letter, up to 64 kB, percent-encoded
FIELDS_MAX: Final = 100


class Refused(Exception):
    """A request that the console refuses with `status`; the message says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def form_token(session_token: str) -> str:
    """The token of this session's forms; it does not reveal the session's token."""
    return hmac.digest(session_token.encode(), b"tombola console form", "sha256").hex() if session_token else ""


async def read_form(request: Request) -> bytes:
    """The request's body; its fields are in `request.state.form` then. Raises Refused for anything but a form."""
    if request.method != "POST":
        raise Refused(405, "the console answers GET and POST only")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM_TYPE:
        raise Refused(415, f"send forms as {FORM_TYPE}")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > FORM_BYTES_MAX:
            raise Refused(413, f"a form has at most {FORM_BYTES_MAX:,} bytes")
    try:
        fields = parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=FIELDS_MAX, errors="strict")
    except ValueError:
        raise Refused(400, "this is not a form") from None
    request.state.form = {name: values[-1] for name, values in fields.items()}
    return body


def refuse_forged(request: Request, form: dict[str, str], session_token: str) -> None:
    """Raise Refused for a form that a page of the console did not send in this session."""
    site = request.headers.get("sec-fetch-site", "same-origin")
    if site != "same-origin":
        raise Refused(403, "this form was sent by another site: nothing was done")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower():
        raise Refused(403, "this form was sent by another origin: nothing was done")
    sent, expected = form.get(TOKEN_FIELD, ""), form_token(session_token)
    if not expected or not hmac.compare_digest(sent.encode(), expected.encode()):
        raise Refused(403, "this form does not belong to your session: nothing was done. Load its page again.")


def receive_again(body: bytes) -> Receive:
    """ASGI `receive` for a body that was read already."""
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await anyio.sleep_forever()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
