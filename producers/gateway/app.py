"""The gateway's routes: what a web frontend can ask for, and what it is answered.

POST /v1/draws                          202 and a ticket; a repeat gets the same one
POST /v1/draws/batch                    up to 100, an answer each
GET  /v1/draws/{session}                200 the result, 202 not yet, 404; ?wait=S long polls
GET  /v1/draws/{session}/events         the same as server-sent events
GET  /v1/draws/{session}/transactions   its ledger rows
GET  /v1/accounts/{id}                  an account
GET  /healthz /readyz /docs /docs/errors /openapi.json
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Annotated, Any, Final, TypeVar

import msgspec
from cachetools import LRUCache
from litestar import Litestar, Request, Response, asgi, get, post
from litestar.datastructures import ResponseHeader
from litestar.exceptions import ClientException, MethodNotAllowedException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.middleware import DefineMiddleware
from litestar.openapi import ResponseSpec
from litestar.params import HeaderParameter, Parameter, QueryParameter
from litestar.response import ServerSentEvent, ServerSentEventMessage
from litestar.types import Receive, Scope, Send
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.brokers.registry import broker_of
from tombola.producers.domain.causes import Status, dead_because
from tombola.producers.domain.contract import ACCOUNT_ID_MAX, BODY_BYTES_MAX, DrawRequest, DrawResult, shown
from tombola.producers.domain.errors import (
    AccountNotFound,
    DrawError,
    IdempotencyKeyReused,
    InvalidRequest,
    OutOfBounds,
    SessionNotFound,
)
from tombola.producers.domain.keys import make_request_key
from tombola.producers.entry import Entry
from tombola.producers.gateway.document import document
from tombola.producers.gateway.door import Door, Doorkeeper
from tombola.producers.gateway.front import Front
from tombola.producers.gateway.intake import CHECK_TIMEOUT_S, Intake
from tombola.producers.gateway.messages import (
    KEY_PATTERN,
    AccountView,
    BatchAnswer,
    BatchAnswers,
    DeadDraw,
    DrawTicket,
    NewDraw,
    NewDraws,
    Readiness,
    SessionRow,
)
from tombola.producers.gateway.pages import static_routes
from tombola.producers.gateway.problems import codes_of, problem_handlers, problem_of, show_kinds
from tombola.producers.gateway.readers import Readers
from tombola.producers.gateway.results import Results
from tombola.producers.settings import Settings
from tombola.producers.storage import ledger, requests
from tombola.producers.storage.api_keys import Holder
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.engines import SHORT_READ_TIMEOUT_S, open_engine
from tombola.producers.storage.faults import explain
from tombola.producers.storage.requests import Acceptance, SessionState, Submission
from tombola.producers.telemetry import tracing
from tombola.producers.telemetry.pulse import Pulse
from tombola.producers.web.problems import PROBLEM_TYPE, Problem
from tombola.producers.web.whole import Whole, send_in_parts

T = TypeVar("T")

WAIT_S_MAX: Final = 60.0
OWNERS_REMEMBERED_MAX: Final = 50_000
USERS_REMEMBERED_MAX: Final = 50_000
KEEP_ALIVE_S: Final = 15.0
RETRY_AFTER_S: Final = "1"
READINESS_KEPT_S: Final = 0.5

# They would name other paths than their own result's.
SESSIONS_WITHOUT_PATH: Final = frozenset({".", "..", "batch"})


class Gateway:
    """What the routes share: one per process, opened and closed with the application."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        url, lock_wait_s = settings.need("database_url"), settings.lock_wait_s
        self.engine: Engine = open_engine(url, lock_wait_s=lock_wait_s, read_timeout_s=SHORT_READ_TIMEOUT_S)
        self.readers = Readers()
        self.entry = Entry(self.engine, relay_after_s=settings.relay_after_s)
        self.keeper = Doorkeeper(settings, self.engine, self.readers)
        self._owners: LRUCache[str, tuple[str, int]] = LRUCache(OWNERS_REMEMBERED_MAX)  # caller and account
        self._users: LRUCache[int, int] = LRUCache(USERS_REMEMBERED_MAX)  # by account
        self._readiness: Readiness | None = None
        self._looking: asyncio.Task[Readiness] | None = None
        self._looked_at = 0.0

    @asynccontextmanager
    async def running(self, _app: Litestar) -> AsyncIterator[None]:
        """Open for business, until the application ends."""
        settings = self.settings
        pulse = Pulse.open(settings, "gateway")
        self.intake = Intake(self.entry, broker_of(settings), pulse)
        self.results = Results(
            settings.need("result_url"), self.find_states, self.readers.pool, secret=settings.result_secret_bytes
        )
        self.results.start()
        watching = asyncio.create_task(self.keeper.watch_backlog())
        try:
            with _told_to_end(self.results.stop_waiting):
                yield
        finally:
            watching.cancel()
            await self.results.close()
            await asyncio.get_running_loop().run_in_executor(None, self.intake.close)
            if pulse is not None:
                await asyncio.get_running_loop().run_in_executor(None, pulse.stop)
            self.readers.pool.shutdown(wait=False, cancel_futures=True)
            self.entry.close()

    async def read(self, find: Any, *arguments: Any) -> Any:
        """Run `find(connection, *arguments)` in a reading thread; raises ServiceUnavailable or ConfigurationError."""

        def in_thread() -> Any:
            try:
                with self.engine.connect().execution_options(read_only=True) as connection:
                    return find(connection, *arguments)
            except SQLAlchemyError as error:
                raise explain(error) from error

        return await self.readers.run(in_thread)

    async def readiness(self) -> Readiness:
        """What is missing, looked at once for all who ask within READINESS_KEPT_S."""
        if self._looking is None and (self._readiness is None or time.monotonic() > self._looked_at + READINESS_KEPT_S):
            self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(self._looking) if self._looking is not None else self._readiness  # type: ignore

    async def _look(self) -> Readiness:
        try:
            database, broker, results = await asyncio.gather(
                self.has_database(), self.intake.has_broker(), self.results.ping()
            )
            parts = {"database": database, "broker": broker, "results": results}
            self._readiness = Readiness(**parts, missing=[name for name, is_there in parts.items() if not is_there])
            self._looked_at = time.monotonic()
            return self._readiness
        finally:
            self._looking = None

    async def has_database(self) -> bool:
        """Whether the database answers, and within the time that a probe has."""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                await self.read(requests.count_accepted_once)
        except (DrawError, TimeoutError):
            return False
        return True

    def find_states(self, session_ids: Sequence[str]) -> dict[str, SessionState]:
        """How these sessions stand, in a few queries; blocks."""
        found: dict[str, SessionState] = {}
        with self.engine.connect().execution_options(read_only=True) as connection:
            for some in chunks(session_ids):
                found |= requests.states_of_sessions(connection, some)
        return found

    async def outside_bounds(self, holder: Holder, account_ids: Sequence[int]) -> set[int]:
        """Those of these accounts that the holder's key is not for."""
        outside = {it for it in account_ids if not holder.bounds.hold_account(it)}
        if not outside or not holder.bounds.user_prefix:
            return outside
        unknown = outside - self._users.keys()
        found = {it: self._users[it] for it in outside - unknown}
        if unknown:
            found |= await self.read(ledger.users_of, list(unknown))
            self._users.update(found)
        return {it for it in outside if it not in found or not holder.bounds.hold_user(found[it])}

    async def must_be_within_bounds(self, holder: Holder, account_id: int) -> None:
        """Raise OutOfBounds if the holder's key is not for this account."""
        if not holder.bounds.are_none and await self.outside_bounds(holder, [account_id]):
            raise OutOfBounds

    def remember(self, answer: Acceptance, caller: str) -> None:
        """Whose session this is: it never changes, and spares a query when the result is asked for."""
        self._owners[answer.request.lottery_session_id] = caller, answer.request.account_id

    async def state(self, session_id: str, holder: Holder) -> SessionState:
        """How the session stands in the database.

        Raises SessionNotFound for one that is not the caller's, OutOfBounds where his key is not for its account.
        """
        state: SessionState | None = await self.read(requests.state_of_session, session_id)
        if state is None or state.caller != holder.caller:
            raise SessionNotFound
        self._owners[session_id] = state.caller, state.request.account_id
        await self.must_be_within_bounds(holder, state.request.account_id)
        return state

    async def result(self, session_id: str, holder: Holder, wait_s: float) -> tuple[bytes | None, SessionState | None]:
        """The first result's bytes, or how the session stands without one. Raises what `state` raises."""
        state = None
        caller, account_id = self._owners.get(session_id, (None, 0))
        if caller == holder.caller:
            await self.must_be_within_bounds(holder, account_id)
        else:
            state = await self.state(session_id, holder)
            if state.result is not None or state.status == Status.DEAD:
                return state.result, state
        body = await self.results.peek(session_id)
        if body is None and wait_s > 0:
            body = await self.results.wait(session_id, timeout_s=wait_s)
            state = None
        if body is None and state is None:
            # Redis may have forgotten it, or been away: the database knows.
            state = await self.state(session_id, holder)
            body = state.result
        return body, state


@contextmanager
def _told_to_end(tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` in this loop when the process is told to end: the server lets open requests finish first."""
    loop = asyncio.get_running_loop()
    handlers: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        loop.call_soon_threadsafe(tell)
        handlers[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        # The server's own handlers, which were there first; what nobody handles is left alone.
        handlers |= {it: found for it in (signal.SIGINT, signal.SIGTERM) if callable(found := signal.getsignal(it))}
    for number in handlers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _gateway(request: Request[Any, Any, Any]) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _holder(request: Request[Any, Any, Any]) -> Holder:
    holder: Holder = request.scope["holder"]  # type: ignore[typeddict-item]
    return holder


# ---- what the documents say ------------------------------------------------------------------------------------------


_PROBLEMS: Final = {
    status: ResponseSpec(Problem, description=codes_of(status), media_type=PROBLEM_TYPE, generate_examples=False)
    for status in (400, 401, 403, 404, 413, 422, 429, 500, 503)
}
READ_PROBLEMS: Final = {status: _PROBLEMS[status] for status in (400, 401, 403, 404, 429, 503)}
WRITE_PROBLEMS: Final = {status: _PROBLEMS[status] for status in (400, 401, 403, 413, 422, 429, 500, 503)}
NOT_YET: Final = ResponseSpec(DrawTicket, description="Accepted, and not settled yet.", generate_examples=False)

IdempotencyKey = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        required=False,
        description="The request key: 1 to 64 characters of A-Z a-z 0-9 . _ -, bare or quoted. Keep it before you send "
        "it, and send it again when in doubt. Without one it is made here and returned.",
    ),
]
WaitS = Annotated[
    float,
    QueryParameter(name="wait", ge=0, le=WAIT_S_MAX, description="Seconds to wait for the result.", required=False),
]
SessionId = Annotated[str, Parameter(pattern=KEY_PATTERN, min_length=1, max_length=100)]


# ---- draws -----------------------------------------------------------------------------------------------------------


async def make_draw(gateway: Gateway, scope: Any, receive: Any) -> Whole:
    """One draw, in plain ASGI: the framework's way through a request takes twice as long as the rest of it."""
    holder: Holder = scope["holder"]
    given: bytes | None = scope["given"].get(b"idempotency-key")
    data = _strictly(_decode_draw, await _read(receive))
    draw = DrawRequest(
        account_id=data.account_id,
        request_key=_request_key(given, is_required=gateway.settings.idempotency_key_required),
        lottery_session_id=data.lottery_session_id or "",
        campaign=data.campaign,
    )
    asked = _asked(draw, holder.caller)
    await gateway.must_be_within_bounds(holder, draw.account_id)
    with tracing.serving("POST /v1/draws", scope["headers"]):
        answer = await gateway.intake.accept(asked)
    if answer.is_conflict:
        raise IdempotencyKeyReused
    gateway.remember(answer, holder.caller)
    named = answer.request
    body = _encode(DrawTicket(named.request_key, named.lottery_session_id))
    headers = [
        (b"content-type", b"application/json"),
        (b"location", b"/v1/draws/" + named.lottery_session_id.encode()),
        (b"retry-after", RETRY_AFTER_S.encode()),
        (b"idempotency-key", draw.request_key.encode()),
    ]
    if not answer.is_new:
        headers.append((b"idempotency-replayed", b"true"))
    return Whole(202, headers, body)


@asgi("/v1/draws", copy_scope=False)
async def other_than_draws(scope: Scope, receive: Receive, send: Send) -> None:
    """What the front leaves to the framework: other methods, and `//v1/draws/`."""
    if scope["method"] == "POST":  # type: ignore[typeddict-item]
        await send_in_parts(send, await make_draw(scope["litestar_app"].state.gateway, scope, receive))
        return
    if scope["method"] != "OPTIONS":  # type: ignore[typeddict-item]
        raise MethodNotAllowedException(headers={"Allow": "OPTIONS, POST"})
    await send({"type": "http.response.start", "status": 204, "headers": [(b"allow", b"OPTIONS, POST")]})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@post(
    "/v1/draws",
    status_code=202,
    operation_id="makeDraw",
    summary="Make a draw",
    description="Accepted means that it will happen. A repeat of the key gets the same answer, and is never charged.",
    responses=WRITE_PROBLEMS,
    response_headers=[
        ResponseHeader(name="Location", description="Where the result will be.", documentation_only=True),
        ResponseHeader(name="Retry-After", description="Seconds.", documentation_only=True),
        ResponseHeader(name="Idempotency-Key", description="The request key.", documentation_only=True),
        ResponseHeader(name="Idempotency-Replayed", description="`true` for a repeat.", documentation_only=True),
    ],
)
async def make_draw_described(data: NewDraw, idempotency_key: IdempotencyKey = None) -> DrawTicket:
    """What the OpenAPI document says of `make_draw`, which reads and answers by itself; it is never called."""
    raise AssertionError


@post("/v1/draws/batch", status_code=207, include_in_schema=False)
async def make_draws(request: Request[Any, Any, Any]) -> BatchAnswers:
    gateway, holder = _gateway(request), _holder(request)
    data = _strictly(_decode_draws, await request.body())
    gateway.keeper.count_more(request.scope, len(data.draws) - 1)
    asked = [
        _asked(
            DrawRequest(
                account_id=it.account_id,
                request_key=it.request_key or make_request_key(),
                lottery_session_id=it.lottery_session_id or "",
                campaign=it.campaign,
            ),
            holder.caller,
        )
        for it in data.draws
    ]
    outside = await gateway.outside_bounds(holder, [it.request.account_id for it in asked])
    answers = []
    with tracing.serving("POST /v1/draws/batch", request.scope["headers"]):
        accepted = iter(await gateway.intake.accept_many([it for it in asked if it.request.account_id not in outside]))
    for it in asked:
        answer = OutOfBounds() if it.request.account_id in outside else next(accepted)
        if isinstance(answer, DrawError) or answer.is_conflict:
            problem = problem_of(answer if isinstance(answer, DrawError) else IdempotencyKeyReused())
            answers.append(BatchAnswer(problem.status, replayed=False, ticket=None, problem=problem))
        else:
            gateway.remember(answer, holder.caller)
            ticket = DrawTicket(answer.request.request_key, answer.request.lottery_session_id)
            answers.append(BatchAnswer(202, replayed=not answer.is_new, ticket=ticket, problem=None))
    return BatchAnswers(answers)


@post(
    "/v1/draws/batch",
    status_code=207,
    operation_id="makeDraws",
    summary="Make up to 100 draws",
    description="Each for itself, with an answer each: one that is refused does not keep the others from happening.",
    responses={status: spec for status, spec in WRITE_PROBLEMS.items() if status != 422},
)
async def make_draws_described(data: NewDraws) -> BatchAnswers:
    """What the OpenAPI document says of `make_draws`, which is stricter than the framework; it is never called."""
    raise AssertionError


@get(
    "/v1/draws/{session_id:str}",
    operation_id="getDraw",
    summary="The result of a draw",
    responses=READ_PROBLEMS | {202: NOT_YET},
)
async def show_draw(
    request: Request[Any, Any, Any], session_id: SessionId, wait_s: WaitS = 0.0
) -> Response[DrawResult | DeadDraw]:
    gateway = _gateway(request)
    if wait_s:
        gateway.keeper.begin_wait(request.scope)
    body, state = await gateway.result(session_id, _holder(request), wait_s)
    if body is not None:
        return Response(body, media_type="application/json")  # type: ignore[arg-type]
    assert state is not None
    if state.status == Status.DEAD:
        return Response(_dead(state))
    ticket = DrawTicket(state.request.request_key, session_id)
    return Response(ticket, status_code=202, headers={"Retry-After": RETRY_AFTER_S})  # type: ignore[arg-type]


@get(
    "/v1/draws/{session_id:str}/events",
    operation_id="watchDraw",
    summary="The result of a draw, as server-sent events",
    description="`accepted` at once if it has not settled, then `result` (or `dead`), then the stream ends.",
    responses=READ_PROBLEMS,
    media_type="text/event-stream",
)
async def watch_draw(request: Request[Any, Any, Any], session_id: SessionId) -> ServerSentEvent:
    gateway, holder = _gateway(request), _holder(request)
    gateway.keeper.begin_wait(request.scope)
    body, state = await gateway.result(session_id, holder, 0.0)  # a 404 comes before the stream

    async def events() -> AsyncIterator[ServerSentEventMessage]:
        nonlocal body, state
        is_first = True
        while body is None and state is not None and state.status != Status.DEAD:
            if is_first:
                ticket = DrawTicket(state.request.request_key, session_id)
                yield ServerSentEventMessage(event="accepted", data=msgspec.json.encode(ticket).decode())
                is_first = False
            else:
                yield ServerSentEventMessage(comment="still waiting")
            body, state = await gateway.result(session_id, holder, KEEP_ALIVE_S)
            if body is None and gateway.results.is_stopping:
                return  # a client comes again, to a process that stays
        if body is not None:
            yield ServerSentEventMessage(event="result", data=body.decode())
        elif state is not None:
            yield ServerSentEventMessage(event="dead", data=msgspec.json.encode(_dead(state)).decode())

    return ServerSentEvent(events())


@get(
    "/v1/draws/{session_id:str}/transactions",
    operation_id="listTransactions",
    summary="The ledger rows of a draw",
    responses=READ_PROBLEMS,
)
async def list_transactions(request: Request[Any, Any, Any], session_id: SessionId) -> list[SessionRow]:
    gateway = _gateway(request)
    await gateway.state(session_id, _holder(request))
    rows = await gateway.read(ledger.session_rows, session_id)
    return [
        SessionRow(
            **msgspec.structs.asdict(shown(ledger.posting_of(row))),
            transaction_id=row["transaction_id"],
            account_id=row["account_id"],
            created_at=row["created_at"].isoformat(),
        )
        for row in rows
    ]


@get("/v1/accounts/{account_id:str}", operation_id="getAccount", summary="An account", responses=READ_PROBLEMS)
async def show_account(
    request: Request[Any, Any, Any], account_id: Annotated[str, Parameter(pattern="^[1-9][0-9]{0,18}$")]
) -> AccountView:
    number = int(account_id)
    await _gateway(request).must_be_within_bounds(_holder(request), number)
    found = await _gateway(request).read(ledger.find_account, number) if number <= ACCOUNT_ID_MAX else None
    if found is None:
        raise AccountNotFound(f"there is no account {account_id}")
    return AccountView(found.account_id, found.user_id, found.asset_code, f"{found.balance:.2f}")


_encode: Final = msgspec.json.Encoder().encode
_decode_draw: Final = msgspec.json.Decoder(NewDraw).decode
_decode_draws: Final = msgspec.json.Decoder(NewDraws).decode


def _strictly(decode: Callable[[bytes], T], body: bytes) -> T:
    """The body, with types as they are: the framework would take "7" for a number."""
    try:
        return decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(str(error)) from None


async def _read(receive: Callable[[], Awaitable[Any]]) -> bytes:
    """The body; raises RequestEntityTooLarge before more than BODY_BYTES_MAX are held."""
    body: bytes = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientException("the client has gone away")
        body += message.get("body", b"")
        if len(body) > BODY_BYTES_MAX:
            raise RequestEntityTooLarge(f"a body has at most {BODY_BYTES_MAX:,} bytes")
        if not message.get("more_body", False):
            return body


def _request_key(given: bytes | None, *, is_required: bool) -> str:
    """The request key in the header, bare or as a quoted string (the Idempotency-Key draft); made if there is none."""
    if given is None:
        if is_required:
            raise InvalidRequest("the header Idempotency-Key is required here")
        return make_request_key()
    key = given.decode("latin-1").strip()
    if len(key) >= 2 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not key:
        raise InvalidRequest("the header Idempotency-Key is empty")
    return key


def _asked(draw: DrawRequest, caller: str) -> Submission:
    if draw.lottery_session_id in SESSIONS_WITHOUT_PATH:
        raise InvalidRequest(f"{draw.lottery_session_id!r} cannot be a lottery session here: it is no part of a path")
    return Submission(draw, caller)


def _dead(state: SessionState) -> DeadDraw:
    it = state.request
    detail = dead_because(state.reason)
    return DeadDraw(it.request_key, it.lottery_session_id, it.account_id, it.terms, "dead", state.reason, detail)


# ---- operations ------------------------------------------------------------------------------------------------------


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
    responses={503: ResponseSpec(Readiness, description="The database is missing.", generate_examples=False)},
)
async def readyz(request: Request[Any, Any, Any]) -> Response[Readiness]:
    readiness = await _gateway(request).readiness()
    return Response(readiness, status_code=200 if readiness.database else 503)


# ---- the application -------------------------------------------------------------------------------------------------


ROUTES: Final = (make_draws, show_draw, watch_draw, list_transactions, show_account, healthz, readyz)


def create_app(settings: Settings) -> Front:
    """The ASGI application for `settings`; raises ConfigurationError when one that it needs is missing."""
    gateway = Gateway(settings)
    settings.need("broker_url"), settings.need("result_url")
    # What the framework cannot see, as they read their bodies themselves, is described apart.
    described = [make_draw_described, make_draws_described, *(it for it in ROUTES if it is not make_draws)]
    told = document(described, needs_key=settings.gateway_auth == "api-key")

    @get("/openapi.json", media_type="application/json")
    async def openapi() -> Response[bytes]:
        return Response(told, media_type="application/json")

    app = Litestar(
        [other_than_draws, *ROUTES, openapi, show_kinds, *static_routes(with_page=settings.gateway_page)],
        lifespan=[gateway.running],
        middleware=[DefineMiddleware(Door, keeper=gateway.keeper)],
        exception_handlers=problem_handlers(),
        request_max_body_size=BODY_BYTES_MAX,
        logging_config=None,  # the framework would put its own handlers in place of ours
        openapi_config=None,
    )
    app.state.gateway = gateway
    app.state.file_turns = asyncio.Lock()
    return Front(app, settings, gateway.keeper, partial(make_draw, gateway))
