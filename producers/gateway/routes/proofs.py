"""Proofs of draws, and the programs that verify them. The verifier never runs here: a server does not check itself."""

from __future__ import annotations

from typing import Any, Final

from litestar import Request, Response, get
from litestar.datastructures import State
from litestar.exceptions import NotFoundException
from litestar.response import Stream

from tombola.producers.domain.proofs import Proof
from tombola.producers.gateway import verify_page
from tombola.producers.gateway.admission import needs
from tombola.producers.gateway.document import READ_PROBLEMS, answer
from tombola.producers.gateway.files import HEADERS, MEDIA_TYPES, serve_content
from tombola.producers.gateway.routes.draws import SessionId
from tombola.producers.gateway.service import gateway_of, holder_of

PAGE: Final = "verify.html"


@get(
    "/v1/draws/{session_id:str}/proof",
    opt=needs("read"),
    operation_id="getProof",
    summary="The proof of a draw, for a verifier",
    description="All that a stranger needs to verify the draw offline, with /verify or one of its programs.",
    responses={200: answer(Proof, "The proof, as the draw stands.")} | READ_PROBLEMS,
)
async def show_proof(request: Request[Any, Any, Any], session_id: SessionId) -> Response[Proof]:
    gateway = gateway_of(request)
    state = await gateway.state(session_id, holder_of(request))
    proof = await gateway.read(gateway.proofs.of, state)
    return Response(proof.encode(), media_type="application/json")


@get("/verify", include_in_schema=False)
async def show_page(state: State) -> Response[bytes] | Stream:
    policy = f"{verify_page.policy()}; frame-ancestors 'none'"
    headers = HEADERS | {"Content-Security-Policy": policy}
    return serve_content(verify_page.page(), MEDIA_TYPES[".html"], headers, state.file_turns)


@get("/verify/{name:str}", include_in_schema=False)
async def save_program(name: str, state: State) -> Response[bytes] | Stream:
    headers = HEADERS | {"Content-Disposition": f'attachment; filename="{name}"'}
    if name == PAGE:
        return serve_content(verify_page.page(), MEDIA_TYPES[".html"], headers, state.file_turns)
    if name not in verify_page.PROGRAMS:
        raise NotFoundException("no such file")
    media_type = verify_page.PROGRAMS[name]
    return serve_content(verify_page.program(name), media_type, headers, state.file_turns)


ROUTES: Final = (show_proof, show_page, save_program)
DESCRIBED: Final = (show_proof,)
