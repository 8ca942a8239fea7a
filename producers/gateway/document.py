"""The OpenAPI document: made once, before anybody asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import msgspec
from litestar import Litestar
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme

from tombola.producers.web.problems import KINDS_PATH


def document(routes: Sequence[Any], *, needs_key: bool) -> bytes:
    """What these routes take and answer, as JSON."""
    config = OpenAPIConfig(
        title="tombola",
        version=version("tombola"),
        description="The draw queue that never charges twice. Errors are `application/problem+json` (RFC 9457); "
        f"`code` says which error it is, and {KINDS_PATH} lists all of them.",
        components=Components(security_schemes={"api-key": SecurityScheme(type="http", scheme="bearer")}),
        security=[{"api-key": []}] if needs_key else None,
    )
    described = Litestar(routes, openapi_config=config, logging_config=None)
    return msgspec.json.encode(described.openapi_schema.to_schema())
