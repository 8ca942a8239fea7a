"""The service behind the routes, without HTTP: accepts requests, finds results, reads the ledger, bounds keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

from cachetools import LRUCache
from litestar import Litestar, Request
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.brokers.registry import broker_of
from tombola.producers.domain.causes import Status
from tombola.producers.domain.errors import DrawError, OutOfBounds, ServiceUnavailable, SessionNotFound
from tombola.producers.entry import Entry
from tombola.producers.gateway.admission import Admission
from tombola.producers.gateway.campaign_answers import CampaignAnswers
from tombola.producers.gateway.intake import Intake
from tombola.producers.gateway.readers import Readers
from tombola.producers.gateway.readiness import ReadinessChecks
from tombola.producers.gateway.receipts import ReceiptDesk
from tombola.producers.gateway.results import Results
from tombola.producers.gateway.seed_answers import SeedAnswers
from tombola.producers.gateway.termination import on_termination
from tombola.producers.obstacles import find_obstacle
from tombola.producers.openings import Opened, Opening, open_account
from tombola.producers.proofs import Proofs, books_key_of
from tombola.producers.receipts import Receipts
from tombola.producers.settings import Settings
from tombola.producers.storage import books, ledger, requests
from tombola.producers.storage.api_keys import Holder
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.engines import SHORT_READ_TIMEOUT_S, open_engine
from tombola.producers.storage.faults import explain
from tombola.producers.storage.requests import Acceptance, SessionState, Submission
from tombola.producers.telemetry.pulse import Pulse

OWNERS_REMEMBERED_MAX: Final = 50_000
USERS_REMEMBERED_MAX: Final = 50_000
CHECKPOINT_KEPT_S: Final = 1.0


class Gateway:
    """The service that all routes share: one per process, opened and closed with the application."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        url, lock_wait_s = settings.need("database_url"), settings.lock_wait_s
        self.engine: Engine = open_engine(url, lock_wait_s=lock_wait_s, read_timeout_s=SHORT_READ_TIMEOUT_S)
        self.readers = Readers()
        self.entry = Entry(self.engine, relay_after_s=settings.relay_after_s)
        self._openers = Readers("open")  # apart: an opening writes, and may wait for a lock
        self.admission = Admission(settings, self.engine, self.readers)
        self.campaigns = CampaignAnswers(self.entry.campaigns, self.readers)
        self.seeds = SeedAnswers(self.read)
        receipts = Receipts.from_settings(settings, self.engine)
        self.receipts = ReceiptDesk(receipts, self.readers, self.read)
        self.proofs = Proofs(receipts, books_key_of(settings))
        self._owners: LRUCache[str, tuple[str, int]] = LRUCache(OWNERS_REMEMBERED_MAX)  # caller and account, by session
        self._users: LRUCache[int, int] = LRUCache(USERS_REMEMBERED_MAX)  # by account
        self._checkpoint: str | None = None
        self._checkpoint_until = 0.0  # monotonic
        self._reading_checkpoint = asyncio.Lock()

    @asynccontextmanager
    async def running(self, _app: Litestar) -> AsyncIterator[None]:
        """Connect intake, results and back-pressure; close all of them when the application ends."""
        settings = self.settings
        pulse = Pulse.open(settings, "gateway")
        self.intake = Intake(self.entry, broker_of(settings), pulse)
        self.results = Results(
            settings.need("result_url"), self.find_states, self.readers.pool, secret=settings.result_secret_bytes
        )
        self.readiness = ReadinessChecks(self.read, self.intake, self.results)
        self.results.start()
        await self.receipts.start()
        watching = asyncio.create_task(self.admission.watch_backlog())
        try:
            # The server lets open requests finish before it ends the application: long polls must not hold it up.
            with on_termination(self.results.stop_waiting):
                yield
        finally:
            watching.cancel()
            await self.results.close()
            await asyncio.get_running_loop().run_in_executor(None, self.intake.close)
            if pulse is not None:
                await asyncio.get_running_loop().run_in_executor(None, pulse.stop)
            self.readers.pool.shutdown(wait=False, cancel_futures=True)
            self._openers.pool.shutdown(wait=False, cancel_futures=True)
            self.campaigns.close()
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

    async def checkpoint(self) -> str | None:
        """The last checkpoint, as it stood at most CHECKPOINT_KEPT_S ago; None if no head was signed.

        Anybody may ask: one read of the database serves all who do meanwhile. Raises as `read` does.
        """
        async with self._reading_checkpoint:
            if time.monotonic() >= self._checkpoint_until:
                self._checkpoint = await self.read(books.latest_checkpoint)
                self._checkpoint_until = time.monotonic() + CHECKPOINT_KEPT_S
            return self._checkpoint

    def find_states(self, session_ids: Sequence[str]) -> dict[str, SessionState]:
        """The states of these sessions, by session; blocks."""
        found: dict[str, SessionState] = {}
        with self.engine.connect().execution_options(read_only=True) as connection:
            for some in chunks(session_ids):
                found |= requests.states_of_sessions(connection, some)
        return found

    async def outside_bounds(self, holder: Holder, account_ids: Sequence[int]) -> set[int]:
        """Those of these accounts that the bounds of the holder's API key exclude."""
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
        """Raise OutOfBounds if the bounds of the holder's API key exclude this account."""
        if not holder.bounds.are_none and await self.outside_bounds(holder, [account_id]):
            raise OutOfBounds

    async def accept_movement(self, asked: Submission) -> Acceptance:
        """Accept a movement. Raises what evidently stands against it, unless it is a repeat (producers.obstacles)."""
        if self.entry.recall(asked) is None:
            obstacle: DrawError | None = await self.read(find_obstacle, asked.request)
            if obstacle is not None:
                known = await self.readers.run(partial(self.entry.find_known, asked))
                if known is None:
                    raise obstacle
                return known
        return await self.intake.accept(asked)

    async def open_account(self, opening: Opening) -> Opened:
        """Open an account, and publish its recharge. Raises what openings.open_account raises."""
        opened = await self._openers.run(partial(open_account, self.entry, opening))
        if opened.recharge is not None and opened.recharge.is_new:
            self.intake.publish_accepted(opened.recharge)
        return opened

    async def own_request(self, request_key: str, holder: Holder) -> SessionState | None:
        """The state of the request that the holder's caller calls by this key; None where there is none.

        Raises OutOfBounds if the bounds of the holder's API key exclude its account.
        """
        state: SessionState | None = await self.read(requests.state_of_request, request_key, holder.caller)
        if state is None or state.caller != holder.caller:
            return None
        await self.must_be_within_bounds(holder, state.request.account_id)
        return state

    def remember(self, answer: Acceptance, caller: str) -> None:
        """Keep the session's caller and account, which never change: reading its result then needs no query."""
        self._owners[answer.request.lottery_session_id] = caller, answer.request.account_id

    async def state(self, session_id: str, holder: Holder) -> SessionState:
        """The session's state in the database.

        Raises SessionNotFound if the session does not exist or belongs to another caller, and OutOfBounds if the bounds
        of the holder's API key exclude its account.
        """
        state: SessionState | None = await self.read(requests.state_of_session, session_id)
        if state is None or state.caller != holder.caller:
            raise SessionNotFound
        self._owners[session_id] = state.caller, state.request.account_id
        await self.must_be_within_bounds(holder, state.request.account_id)
        return state

    async def result(self, session_id: str, holder: Holder, wait_s: float) -> tuple[bytes | None, SessionState | None]:
        """The bytes of the session's result, or None and the session's state. Raises what `state` raises."""
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
            # Redis may have evicted the result, or be away: the database decides.
            state = await self.state(session_id, holder)
            body = state.result
        return body, state

    async def result_and_receipt(
        self, session_id: str, holder: Holder, wait_s: float
    ) -> tuple[bytes | None, SessionState | None, str | None]:
        """`result`, and the session's receipt; None where receipts are not signed, or this one cannot be now.

        A receipt is of the database's row, and so is the result beside it: what Redis has may be another one.
        """
        body, state = await self.result(session_id, holder, wait_s)
        if not self.receipts.is_on:
            return body, state, None
        if state is None or (body is not None and state.result is None):
            try:
                state = await self.state(session_id, holder)
            except ServiceUnavailable:
                return body, None, None  # Redis alone has a result
        return state.result, state, await self.receipts.of_state(state)


def gateway_of(request: Request[Any, Any, Any]) -> Gateway:
    """The service behind a route."""
    gateway: Gateway = request.app.state.gateway
    return gateway


def holder_of(request: Request[Any, Any, Any]) -> Holder:
    """The holder of the API key that a request under /v1 came with (producers.gateway.admission)."""
    holder: Holder = request.scope["holder"]  # type: ignore[typeddict-item]
    return holder
