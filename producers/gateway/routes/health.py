"""Health checks: is the process alive, and can it accept draws?"""

from __future__ import annotations

from typing import Any, Final

from litestar import Request, Response, get

from tombola.producers.gateway.document import answer
from tombola.producers.gateway.messages import Readiness
from tombola.producers.gateway.service import gateway_of


@get(
    "/healthz",
    operation_id="getHealth",
    summary="Whether this process is alive",
    security=[{}],
    media_type="text/plain",
)
async def healthz() -> str:
    return "ok"


@get(
    "/readyz",
    operation_id="getReadiness",
    summary="Whether this gateway can accept draws, and what is missing",
    security=[{}],
    responses={503: answer(Readiness, "The database is missing.")},
)
async def readyz(request: Request[Any, Any, Any]) -> Response[Readiness]:
    readiness = await gateway_of(request).readiness.readiness()
    return Response(readiness, status_code=200 if readiness.database else 503)


ROUTES: Final = (healthz, readyz)
