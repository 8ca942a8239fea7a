"""Faster connections to MySQL and MariaDB.

Without TLS options the driver encrypts where the server can, and checks no certificate. For each connection it loads
the system's certificates all the same: 40 to 70 ms of CPU, nearly all that a new connection costs.
"""

from __future__ import annotations

import functools
import ssl
from typing import TYPE_CHECKING, Any

from pymysql import OperationalError
from pymysql.connections import Connection
from pymysql.constants import CR
from sqlalchemy import Engine

if TYPE_CHECKING:
    Driver = Connection[Any]  # generic in its stubs alone
else:
    Driver = Connection


class SoonOpened(Driver):
    """pymysql's connection; connections without TLS options share one SSL context."""

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


def connect_by(engine: Engine) -> None:
    """Let `engine` connect this way. A login that needs a missing package raises OperationalError, as others do.

    The driver raises RuntimeError, which `faults` would take for a mistake of tombola's: MySQL's caching_sha2_password
    without TLS needs `cryptography`, MariaDB's ed25519 `pynacl`.
    """

    def connect(*arguments: Any, **keywords: Any) -> Any:
        try:
            return SoonOpened(*arguments, **keywords)
        except RuntimeError as error:
            raise OperationalError(CR.CR_AUTH_PLUGIN_CANNOT_LOAD, str(error)) from error

    engine.dialect.connect = connect  # type: ignore[method-assign]
