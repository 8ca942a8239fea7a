"""The gateway as an ASGI application: wires the service, the routes and what stands in front of them.

POST /v1/draws                          202 and a ticket; a repeat gets the same ticket
POST /v1/draws/batch                    up to 100 draws, an answer for each
GET  /v1/draws/{session}                200 and the result, 202 before it settles, or 404; ?wait=S long polls
GET  /v1/draws/{session}/events         the same as server-sent events
GET  /v1/draws/{session}/transactions   the session's ledger rows
GET  /v1/draws/{session}/receipt        the signed receipt of the draw
GET  /v1/draws/{session}/proof          the proof of the draw; /verify checks it in a browser
POST /v1/draws/{session}/refund         a movement: 202 and a ticket, 200 and the result for a settled repeat
POST /v1/accounts/{id}/recharges  /adjustments  /holds  /v1/transfers  /v1/holds/{key}/post  /void   the same
POST /v1/accounts                       open an account
GET  /v1/movements/{key}  /v1/holds/{key}  a movement by its key; a hold
GET  /v1/accounts/{id}                  an account
GET  /v1/campaigns  /v1/campaigns/{name}  campaigns and their odds, without an API key
GET  /v1/odds/{hash}                    a version's canonical bytes, without an API key
GET  /v1/checkpoints/latest             the signed head of the sealed books, without an API key
GET  /v1/seeds                          seed epochs: commitments, revealed secrets, without an API key
GET  /.well-known/tombola-keys.json     the public keys of receipts, without an API key
GET  /healthz /readyz /docs /docs/errors /openapi.json
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

from litestar import Litestar
from litestar.middleware import DefineMiddleware

from tombola.producers.domain.contract import BODY_BYTES_MAX
from tombola.producers.gateway.admission import AdmissionMiddleware
from tombola.producers.gateway.document import document
from tombola.producers.gateway.front import Front
from tombola.producers.gateway.problems import problem_handlers
from tombola.producers.gateway.routes import (
    accounts,
    campaigns,
    checkpoints,
    documents,
    draws,
    health,
    holds,
    movements,
    page,
    proofs,
    receipts,
    seeds,
)
from tombola.producers.gateway.service import Gateway
from tombola.producers.settings import Settings

_PLAIN: Final = (
    *accounts.ROUTES,
    *campaigns.ROUTES,
    *checkpoints.ROUTES,
    *seeds.ROUTES,
    *receipts.ROUTES,
    *health.ROUTES,
)
ROUTES: Final = (*draws.ROUTES, *proofs.ROUTES, *movements.ROUTES, *holds.ROUTES, *_PLAIN)
DESCRIBED: Final = (*draws.DESCRIBED, *proofs.DESCRIBED, *movements.DESCRIBED, *holds.DESCRIBED, *_PLAIN)


def create_app(settings: Settings) -> Front:
    """The ASGI application for `settings`; raises ConfigurationError when a setting that it needs is missing."""
    gateway = Gateway(settings)
    settings.need("broker_url"), settings.need("result_url")
    openapi_document = document(DESCRIBED, needs_key=settings.gateway_auth == "api-key")
    app = Litestar(
        [*ROUTES, *documents.document_routes(openapi_document), *(page.ROUTES if settings.gateway_page else ())],
        lifespan=[gateway.running],
        middleware=[DefineMiddleware(AdmissionMiddleware, admission=gateway.admission)],
        exception_handlers=problem_handlers(),
        request_max_body_size=BODY_BYTES_MAX,
        logging_config=None,  # the framework would replace our log handlers
        openapi_config=None,
    )
    app.state.gateway = gateway
    app.state.file_turns = asyncio.Lock()
    return Front(app, settings, gateway.admission, partial(draws.make_draw, gateway))
