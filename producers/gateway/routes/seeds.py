"""Seed epochs, for everybody who verifies draws: commitments before, secrets after. No API key is needed."""

from __future__ import annotations

from typing import Annotated, Any, Final

from litestar import Request, Response, get
from litestar.params import QueryParameter

from tombola.producers.gateway.document import OPEN_PROBLEMS
from tombola.producers.gateway.seed_answers import SeedsView
from tombola.producers.gateway.service import gateway_of

After = Annotated[
    str,
    QueryParameter(
        required=False, description="The page behind this epoch, such as `1.17`; absent: around the open one."
    ),
]


@get(
    "/v1/seeds",
    operation_id="listSeeds",
    summary="Seed epochs: anchors, commitments, and the secrets of epochs that are over",
    description="Keep the anchors: each secret that is revealed later hashes down to the anchor of its chain.",
    security=[{}],
    responses={status: spec for status, spec in OPEN_PROBLEMS.items() if status != 404},
)
async def list_seeds(request: Request[Any, Any, Any], after: After = "") -> Response[SeedsView]:
    return Response(await gateway_of(request).seeds.page(after), headers={"Cache-Control": "no-cache"})


ROUTES: Final = (list_seeds,)
