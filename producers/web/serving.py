"""uvicorn's options, the same for the gateway and the console."""

from __future__ import annotations

import resource
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Final

GRACE_S: Final = 10
# Longer than proxies and balancers keep a connection, usually 60 s: else one might send a request while we close.
KEEP_ALIVE_S: Final = 75
# Each waiting client holds a socket; shells and service managers often limit a process to 1,024 open files at first.
FILES_MAX: Final = 65_536
FILES_KEPT: Final = 200  # for servers, logs and libraries


def options(*, protocol: str, connections_max: int) -> dict[str, Any]:
    """Arguments for uvicorn. `protocol` is the import string of a producers.web.protocol.Protocol."""
    return {
        # The protocol needs httptools, which only CPython has; uvicorn's h11 has bounds of its own.
        "http": protocol if find_spec("httptools") else "auto",
        "ws": "none",
        "limit_concurrency": min(connections_max, _allow_files() - FILES_KEPT),
        "timeout_keep_alive": KEEP_ALIVE_S,
        "timeout_graceful_shutdown": GRACE_S,
        "access_log": False,
        "log_config": None,
        "log_level": "info",
        "server_header": False,
        "proxy_headers": False,  # producers.web.proxies reads them, from trusted proxies only
    }


def _allow_files() -> int:
    """Raise the limit of open files, for child processes too, to FILES_MAX or the hard limit; return the new limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard < 0 else min(hard, FILES_MAX)
    if 0 <= soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FILES_MAX if soft < 0 else soft
