"""The signed head of the sealed books, for everybody who keeps one to compare the books with later."""

from __future__ import annotations

from typing import Any, Final

from litestar import Request, Response, get

from tombola.producers.domain.errors import CheckpointNotFound
from tombola.producers.gateway.document import OPEN_PROBLEMS, answer
from tombola.producers.gateway.service import gateway_of

NOTE_TYPE: Final = "text/plain"


@get(
    "/v1/checkpoints/latest",
    operation_id="getCheckpoint",
    summary="The signed head of the sealed books, as a C2SP checkpoint",
    description="Origin, number of blocks, Merkle root; then the signature. Keep it: whoever rewrites the books later "
    "cannot make them fit it.",
    security=[{}],
    responses={200: answer(str, "A signed note.", media_type=NOTE_TYPE)}
    | {status: spec for status, spec in OPEN_PROBLEMS.items() if status != 400},
)
async def show_checkpoint(request: Request[Any, Any, Any]) -> Response[str]:
    note = await gateway_of(request).checkpoint()
    if note is None:
        raise CheckpointNotFound
    return Response(note, media_type=NOTE_TYPE, headers={"Cache-Control": "no-cache"})


ROUTES: Final = (show_checkpoint,)
