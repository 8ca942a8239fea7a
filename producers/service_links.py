"""Variables that Kubernetes puts into every container's environment, and that are not settings.

For each Service of the namespace Kubernetes sets variables that begin with its name, as old Docker links did. For
Services called `tombola`, `tombola-gateway` or `tombola-metrics` they begin like settings, and one may have the name of
a setting: TOMBOLA_METRICS_PORT=tcp://10.0.0.11:9090. So the shape of the value decides, not the name alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final

_PROTOCOLS: Final = "tcp|udp|sctp"
_is_url = re.compile(rf"(?:{_PROTOCOLS})://(?P<host>[^\s/]+):[0-9]{{1,5}}").fullmatch
_is_port = re.compile(r"[0-9]{1,5}").fullmatch
_is_protocol = re.compile(_PROTOCOLS).fullmatch


def _is_address(value: str) -> bool:
    try:
        ip_address(value)
    except ValueError:
        return False
    return True


def _is_link(value: str) -> bool:
    found = _is_url(value)
    return found is not None and _is_address(found["host"].removeprefix("[").removesuffix("]"))


# The end of a variable's name after the Service's name, and the shape of its value.
_EACH_PORT: Final = rf"_PORT_[0-9]+_(?:{_PROTOCOLS.upper()})"
_SHAPES: Final[tuple[tuple[str, Callable[[str], object]], ...]] = (
    (r"_SERVICE_HOST", _is_address),
    (r"_SERVICE_PORT(?:_[A-Z0-9_]+)?", _is_port),
    (r"_PORT", _is_link),
    (_EACH_PORT, _is_link),
    (f"{_EACH_PORT}_PROTO", _is_protocol),
    (f"{_EACH_PORT}_PORT", _is_port),
    (f"{_EACH_PORT}_ADDR", _is_address),
)
_shapes: Final = [(re.compile(f"[A-Z0-9_]+?{ending}").fullmatch, fits) for ending, fits in _SHAPES]


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes has set this variable for a Service."""
    return any(is_name(name) and fits(value) for is_name, fits in _shapes)
