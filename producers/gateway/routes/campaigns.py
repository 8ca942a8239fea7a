"""Campaigns and their odds, for players and their frontends: no API key is needed to see odds before paying."""

from __future__ import annotations

from typing import Annotated, Any, Final

from litestar import Request, Response, get
from litestar.datastructures import ResponseHeader
from litestar.params import PathParameter

from tombola.producers.gateway.campaign_answers import Answer
from tombola.producers.gateway.document import OPEN_PROBLEMS, answer
from tombola.producers.gateway.messages import CampaignList, CampaignView
from tombola.producers.gateway.service import gateway_of

ASK_AGAIN: Final = "no-cache"  # a copy may be kept, and is asked about with its ETag
FOR_EVER: Final = "public, max-age=31536000, immutable"

Name = Annotated[str, PathParameter(description="The campaign's name.")]
OddsHash = Annotated[str, PathParameter(description="64 hex digits, in lower case.")]

UNCHANGED: Final = answer(None, "`If-None-Match` names the body that you have.")
RESPONSES: Final = OPEN_PROBLEMS | {304: UNCHANGED}
HEADERS: Final = [
    ResponseHeader(name="ETag", description="Names these bytes: send it as `If-None-Match`.", documentation_only=True),
    ResponseHeader(name="Cache-Control", description="How long a copy is good.", documentation_only=True),
]


@get(
    "/v1/campaigns",
    operation_id="listCampaigns",
    summary="The campaigns that are open or paused",
    security=[{}],
    responses={status: spec for status, spec in RESPONSES.items() if status != 404},
    response_headers=HEADERS,
)
async def list_campaigns(request: Request[Any, Any, Any]) -> Response[CampaignList]:
    return _respond(request, await gateway_of(request).campaigns.listed(), ASK_AGAIN)


@get(
    "/v1/campaigns/{name:str}",
    operation_id="getCampaign",
    summary="A campaign: prices, window, limits, exact odds, guarantees",
    security=[{}],
    responses=RESPONSES,
    response_headers=HEADERS,
)
async def show_campaign(request: Request[Any, Any, Any], name: Name) -> Response[CampaignView]:
    return _respond(request, await gateway_of(request).campaigns.shown(name), ASK_AGAIN)


@get(
    "/v1/odds/{odds_hash:str}",
    operation_id="getOdds",
    summary="The bytes whose SHA-256 is the odds hash",
    description="JSON with sorted keys and no blanks; for the campaign `default` a line of `text/plain`.",
    security=[{}],
    responses=RESPONSES,
    response_headers=HEADERS,
)
async def show_odds(request: Request[Any, Any, Any], odds_hash: OddsHash) -> Response[dict[str, Any]]:
    return _respond(request, await gateway_of(request).campaigns.version(odds_hash), FOR_EVER)


def _respond(request: Request[Any, Any, Any], answer: Answer, cache_control: str) -> Response[Any]:
    headers = {"ETag": answer.etag, "Cache-Control": cache_control}
    if _is_known(request.headers.get("if-none-match", ""), answer.etag):
        return Response(None, status_code=304, headers=headers)
    return Response(answer.body, media_type=answer.media_type, headers=headers)


def _is_known(given: str, etag: str) -> bool:
    """Whether `If-None-Match` names the ETag. Proxies that compress a body make its ETag a weak one."""
    return any(it.strip().removeprefix("W/") in (etag, "*") for it in given.split(","))


ROUTES: Final = (list_campaigns, show_campaign, show_odds)
