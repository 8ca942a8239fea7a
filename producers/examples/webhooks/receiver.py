"""A receiver of tombola's webhooks: a WSGI application that needs the standard library alone.

    receiver = WebhookReceiver(os.environ["WEBHOOK_SECRETS"].split(), Once("received.db", ship))

It takes what is signed with one of the secrets (`whsec_…`; two while a secret is rotated) and not older than five
minutes, and acts once for each idempotency key, however often a message comes. It answers 204 when the act is done and
kept; for any other answer tombola sends the same message again, later.

The signature is that of the Standard Webhooks specification: their libraries check it as well.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from http import HTTPStatus
from typing import Any

BODY_BYTES_MAX = 256 * 1024
AGE_S_MAX = 300  # of a message, in either direction: a message that was overheard is of no use later

Event = dict[str, Any]
is_number = re.compile(r"[0-9]{1,12}").fullmatch


class Refused(Exception):
    """The receiver does not take this message: a status, and what to say."""


class WebhookReceiver:
    """The WSGI application. `once(key, event)` acts on an event unless it has acted under that key."""

    def __init__(self, secrets: Sequence[str], once: Callable[[str, Event], None]) -> None:
        self._keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets]
        self._once = once

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        try:
            event = self._checked(environ)
            self._once(event["idempotency_key"], event)
            status, body = 204, b""
        except Refused as refused:
            status, body = refused.args[0], refused.args[1].encode()
        start_response(f"{status} {HTTPStatus(status).phrase}", [("content-length", str(len(body)))] if body else [])
        return [body] if body else []

    def _checked(self, environ: dict[str, Any]) -> Event:
        if environ["REQUEST_METHOD"] != "POST":
            raise Refused(405, "Send a POST.")
        length = environ.get("CONTENT_LENGTH") or "0"
        if not is_number(length) or int(length) > BODY_BYTES_MAX:
            raise Refused(413, "The body is larger than it may be.")
        # The bytes as they came: the same JSON written anew has another signature.
        body: bytes = environ["wsgi.input"].read(int(length))
        id, timestamp = environ.get("HTTP_WEBHOOK_ID", ""), environ.get("HTTP_WEBHOOK_TIMESTAMP", "")
        if not is_number(timestamp) or not id:
            raise Refused(400, "Webhook-Id or Webhook-Timestamp is missing.")
        if not self._is_signed(f"{id}.{timestamp}.".encode() + body, environ.get("HTTP_WEBHOOK_SIGNATURE", "")):
            raise Refused(401, "The signature is not right.")
        if abs(time.time() - int(timestamp)) > AGE_S_MAX:
            raise Refused(401, "The timestamp is too far from this server's clock.")
        event: Event = json.loads(body)  # signed, so it is tombola's
        return event

    def _is_signed(self, message: bytes, header: str) -> bool:
        sent = [it.removeprefix("v1,").encode() for it in header.split() if it.startswith("v1,")]
        ours = [base64.b64encode(hmac.digest(key, message, "sha256")) for key in self._keys]
        return any(hmac.compare_digest(it, own) for it in sent for own in ours)


class Once:
    """Acts once for each key, in one transaction with the key: `act(connection, event)`.

    In a shop the table is one of the shop's own database, and `act` writes there too: then either both are kept or
    neither is. What an act does elsewhere (a parcel, an e-mail) it hands on under the same key.
    """

    def __init__(self, path: str, act: Callable[[sqlite3.Connection, Event], None]) -> None:
        self._path = path
        self._act = act
        with closing(self._connect()) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS received (idempotency_key TEXT PRIMARY KEY)")

    def __call__(self, key: str, event: Event) -> None:
        with closing(self._connect()) as connection:
            connection.execute("BEGIN IMMEDIATE")
            new = connection.execute("INSERT INTO received VALUES (?) ON CONFLICT DO NOTHING", (key,)).rowcount
            if new:
                self._act(connection, event)
            connection.execute("COMMIT")

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, isolation_level=None, timeout=10)
