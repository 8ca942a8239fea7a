"""The OpenAPI document, and what the routes say in it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
from litestar import Litestar, MediaType
from litestar.openapi import OpenAPIConfig, ResponseSpec
from litestar.openapi.spec import Components, SecurityScheme

from tombola.producers.gateway.problems import codes_of
from tombola.producers.web.problems import KINDS_PATH, PROBLEM_TYPE, Problem


def answer(body: type[Any] | None, description: str, *, media_type: str = MediaType.JSON) -> ResponseSpec:
    """One more answer of a route, for its `responses`. Without made-up examples: they need polyfactory, which the locks
    leave out."""
    return ResponseSpec(body, description=description, media_type=media_type, generate_examples=False)


_PROBLEMS: Final = {
    status: answer(Problem, codes_of(status), media_type=PROBLEM_TYPE)
    for status in (400, 401, 403, 404, 409, 413, 422, 429, 500, 503)
}
READ_PROBLEMS: Final = {status: _PROBLEMS[status] for status in (400, 401, 403, 404, 429, 503)}
OPEN_PROBLEMS: Final = {status: _PROBLEMS[status] for status in (400, 404, 429, 503)}
WRITE_PROBLEMS: Final = {status: _PROBLEMS[status] for status in (400, 401, 403, 409, 413, 422, 429, 500, 503)}
MOVEMENT_PROBLEMS: Final = WRITE_PROBLEMS | {404: _PROBLEMS[404]}


def document(routes: Sequence[Any], *, needs_key: bool) -> bytes:
    """The OpenAPI document of these routes, as JSON."""
    config = OpenAPIConfig(
        title="tombola",
        version=version("tombola"),
        description="The draw queue that never charges twice. Errors are `application/problem+json` (RFC 9457); "
        f"`code` says which error it is, and {KINDS_PATH} lists all of them.",
        components=Components(security_schemes={"api-key": SecurityScheme(type="http", scheme="bearer")}),
        security=[{"api-key": []}] if needs_key else None,
    )
    described = Litestar(routes, openapi_config=config, logging_config=None).openapi_schema.to_schema()
    if needs_key:
        scopes = {route.operation_id: route.opt["needs"] for route in routes if "needs" in route.opt}
        for operation in (it for path in described["paths"].values() for it in path.values()):
            if operation["operationId"] in scopes:
                operation["security"] = [{"api-key": [scopes[operation["operationId"]]]}]
    return msgspec.json.encode(described)
