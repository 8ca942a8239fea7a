"""The last resort of embedded mode, a fakeredis server: `python -m tombola.worker.embedded.fake_redis PORT`.

The server is slow, and forgets at exit. fakeredis closes a connection when a reply does not fit the socket's buffer at
once, and after every error reply (a group that exists already, a script not loaded yet). Both are normal, and mended
here.
"""

from __future__ import annotations

import io
import select
import socket
import sys
from typing import Any

from fakeredis import TcpFakeServer
from redis import ResponseError


class _PatientWriter(io.RawIOBase):
    """Writes to a non-blocking socket until all data is written."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data)
        while view:
            try:
                view = view[self._connection.send(view) :]
            except BlockingIOError:
                select.select([], [self._connection], [])
        return len(data)


def main(port: int) -> None:
    """Serve on the loopback interface until killed."""
    server = TcpFakeServer(("127.0.0.1", port), server_type="valkey")
    handler = server.RequestHandlerClass
    plain_setup = handler.setup

    def setup(self: Any) -> None:
        plain_setup(self)
        self.wfile = _PatientWriter(self.connection)
        self.writer.writer = self.wfile
        read_response = self.current_client.read_response

        def read_response_or_error() -> Any:
            try:
                return read_response()
            except ResponseError as error:
                return error

        self.current_client.read_response = read_response_or_error

    handler.setup = setup
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
