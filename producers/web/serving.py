"""How uvicorn serves what is ours: the same for the gateway and the console."""

from __future__ import annotations

import resource
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Final

GRACE_S: Final = 10
# Longer than a proxy or a balancer keeps a connection (60 s is usual): it would send a request as we close.
KEEP_ALIVE_S: Final = 75
# Whoever waits holds a socket; a shell or a service manager often allows a process only 1,024 of them at first.
FILES_MAX: Final = 65_536
FILES_KEPT: Final = 200  # for servers, logs and libraries


def options(*, protocol: str, connections_max: int) -> dict[str, Any]:
    """What to give uvicorn. `protocol` is the import string of a producers.web.protocol.Protocol."""
    return {
        # It needs httptools, which only CPython has; uvicorn's h11 has bounds of its own.
        "http": protocol if find_spec("httptools") else "auto",
        "ws": "none",
        "limit_concurrency": min(connections_max, _allow_files() - FILES_KEPT),
        "timeout_keep_alive": KEEP_ALIVE_S,
        "timeout_graceful_shutdown": GRACE_S,
        "access_log": False,
        "log_config": None,
        "log_level": "info",
        "server_header": False,
        "proxy_headers": False,  # producers.web.proxies reads them, and believes only proxies that are trusted
    }


def _allow_files() -> int:
    """How many files this process, and those that it starts, may have open: FILES_MAX, or as many as there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_MAX if hard < 0 else min(hard, FILES_MAX)
    if 0 <= soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FILES_MAX if soft < 0 else soft
