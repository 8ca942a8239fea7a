"""A proxy between a shop's pages and tombola's gateway: a WSGI application that needs the standard library alone.

    proxy = DrawProxy("http://127.0.0.1:8000", os.environ["GATEWAY_API_KEY"], account_of=account_of_session)

Mount it where the shop's server has read its session, for instance under /tombola. The page then draws with
`draw(account, { base: '/tombola' })` of draw.js. `account_of(environ)` returns the account of the member who is logged
in, or None. The proxy spends that account's points, whatever account the browser names, and the API key never leaves
the server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlencode
from urllib.request import Request, urlopen

BODY_BYTES_MAX = 16 * 1024
WAIT_S_MAX = 10.0
TIMEOUT_S = 15.0  # longer than a wait
PASSED_ON = ("content-type", "retry-after", "idempotency-key", "idempotency-replayed", "tombola-receipt")

is_key = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch
session_in = re.compile(r"/v1/draws/([A-Za-z0-9._-]{1,100})").fullmatch


class Refused(Exception):
    """The proxy answers this itself: a status and what to say."""


class DrawProxy:
    """The WSGI application."""

    def __init__(self, gateway_url: str, api_key: str, account_of: Callable[[dict[str, Any]], int | None]) -> None:
        self._gateway_url = gateway_url.rstrip("/")
        self._api_key = api_key
        self._account_of = account_of

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        try:
            account_id = self._account_of(environ)
            if account_id is None:
                raise Refused(401, "Log in first.")
            status, headers, body = self._answer(environ, account_id)
        except Refused as refused:
            status, detail = refused.args
            problem = {"title": HTTPStatus(status).phrase, "status": status, "detail": detail}
            body, headers = json.dumps(problem).encode(), {"content-type": "application/problem+json"}
        headers |= {"content-length": str(len(body)), "cache-control": "no-store"}
        start_response(f"{status} {HTTPStatus(status).phrase}", list(headers.items()))
        return [body]

    def _answer(self, environ: dict[str, Any], account_id: int) -> tuple[int, dict[str, str], bytes]:
        method, path = environ["REQUEST_METHOD"], environ.get("PATH_INFO", "")
        if method == "POST" and path == "/v1/draws":
            return self._draw(environ, account_id)
        if method == "GET" and (found := session_in(path)):
            return self._show(environ, account_id, found[1])
        raise Refused(404, "There is nothing at this path.")

    def _draw(self, environ: dict[str, Any], account_id: int) -> tuple[int, dict[str, str], bytes]:
        # A page of another site can send a form along with the member's cookie, but no JSON without being asked.
        if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(400, "Send the body as application/json.")
        key = environ.get("HTTP_IDEMPOTENCY_KEY", "")
        if not is_key(key):  # a key made here would be a new one, and a new charge, in every repeat
            raise Refused(400, "The header Idempotency-Key is missing or not valid.")
        length = environ.get("CONTENT_LENGTH") or "0"
        if not length.isdecimal() or int(length) > BODY_BYTES_MAX:
            raise Refused(413, "The body is larger than it may be.")
        try:
            asked = json.loads(environ["wsgi.input"].read(int(length)))
        except ValueError:
            asked = None
        if not isinstance(asked, dict):
            raise Refused(400, "The body is not a JSON object.")
        # The session says who pays: an `account_id` of the browser's is not even read.
        draw = {"account_id": account_id, "campaign": asked.get("campaign") or "default"}
        # The nonce is the browser's: one made here would be another request in every repeat.
        draw |= {name: asked[name] for name in ("pulls", "client_nonce") if asked.get(name) is not None}
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        return self._ask(Request(f"{self._gateway_url}/v1/draws", json.dumps(draw).encode(), headers))

    def _show(self, environ: dict[str, Any], account_id: int, session_id: str) -> tuple[int, dict[str, str], bytes]:
        wait = parse_qs(environ.get("QUERY_STRING", "")).get("wait", ["0"])[0]
        wait_s = min(float(wait), WAIT_S_MAX) if re.fullmatch(r"\d{1,4}(\.\d{1,3})?", wait) else 0.0
        url = f"{self._gateway_url}/v1/draws/{session_id}?{urlencode({'wait': wait_s})}"
        status, headers, body = self._ask(Request(url))
        # The API key may see every account's draws, the member only those of one.
        if status == 200 and json.loads(body).get("account_id") != account_id:
            raise Refused(404, "There is no such lottery session.")
        return status, headers, body

    def _ask(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        request.add_header("Authorization", f"Bearer {self._api_key}")
        try:
            with urlopen(request, timeout=TIMEOUT_S) as answer:
                status, headers, body = answer.status, answer.headers, answer.read()
        except HTTPError as error:  # an answer as well: the gateway's problem+json
            status, headers, body = error.code, error.headers, error.read()
        except OSError:
            raise Refused(503, "The gateway does not answer. Send the same request again.") from None
        return status, {name: headers[name] for name in PASSED_ON if name in headers}, body
