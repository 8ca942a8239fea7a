"""Connections to MySQL and MariaDB that are opened soon.

Without TLS options the driver encrypts where the server can, and checks no certificate. It loads the system's
certificates for that all the same, for every connection: 40 to 70 ms of processor time, of all that opening one takes.
"""

from __future__ import annotations

import functools
import ssl
from typing import TYPE_CHECKING, Any

from pymysql.connections import Connection
from sqlalchemy import Engine, event

if TYPE_CHECKING:
    Driver = Connection[Any]  # generic in its stubs alone
else:
    Driver = Connection


class SoonOpened(Driver):
    """pymysql's connection; those without TLS options share what they would each have made."""

    def _create_ssl_ctx(self, options: Any) -> ssl.SSLContext:
        if options:
            return super()._create_ssl_ctx(options)  # type: ignore[misc,no-any-return]
        return _unchecked()


@functools.cache
def _unchecked() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def open_soon(engine: Engine) -> None:
    """Let `engine` connect this way. Listeners of `do_connect` that come later must be put before: `insert=True`."""

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, arguments: list[Any], keywords: dict[str, Any]) -> SoonOpened:
        return SoonOpened(*arguments, **keywords)
