"""Movements: what a client moves other than by drawing. Each is a request, and happens once under its key.

    with engine.begin() as connection:
        ...  # book the payment
        client.recharge(6, "5.00", key="payment-17", channel="cards", connection=connection)

Every method returns the ticket of an accepted request. An empty `key` is made; `session` names the result, by default
the key. With `connection` the request is accepted inside your own transaction: it happens if and only if you commit,
and the relay publishes it after the commit.

Every method raises IdempotencyKeyReused when the key or the session belongs to another request, InvalidRequest or
InvalidKey for what cannot be expressed, AccountNotFound for an unknown account, ServiceUnavailable when the database
does not answer: then send the same again. Before anything is written, a method raises what evidently stands against
the movement; what only the locks tell (a balance that is too low) is a rejection in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import NamedTuple, TypeGuard, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers import openings
from tombola.producers.domain.contract import DrawRequest, MovementResult, Request, parse_movement_result
from tombola.producers.domain.errors import HoldNotFound, IdempotencyKeyReused, SessionNotFound
from tombola.producers.domain.keys import check_request_key, check_session_id
from tombola.producers.domain.money import parse_amount
from tombola.producers.domain.operations.adjust import AdjustRequest
from tombola.producers.domain.operations.hold import VALID_S_DEFAULT, HoldRequest
from tombola.producers.domain.operations.post import PostRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.operations.refund import Policy, RefundRequest
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.producers.domain.operations.void import VoidRequest
from tombola.producers.obstacles import find_obstacle
from tombola.producers.openings import Opening
from tombola.producers.request_client import RequestClient
from tombola.producers.storage import requests
from tombola.producers.storage.faults import explain
from tombola.producers.storage.requests import Acceptance, SessionState, Submission

Amount = str | Decimal
T = TypeVar("T")


class MovementTicket(NamedTuple):
    """What finds the result of an accepted movement. A repeat that has settled has a `result`."""

    request_key: str
    lottery_session_id: str
    result: MovementResult | None = None


class OpenedAccount(NamedTuple):
    """The user's account. `recharge` is the ticket of its opening amount: None without one, and where it was opened
    before, under another key."""

    account_id: int
    user_id: int
    asset_code: str
    is_new: bool
    recharge: MovementTicket | None = None


class MovementClient(RequestClient):
    """The methods of DrawClient for movements; the head of this file says what they have in common."""

    def recharge(
        self,
        account_id: int,
        amount: Amount,
        *,
        key: str = "",
        channel: str = "",
        reference: str = "",
        session: str = "",
        connection: Connection | None = None,
    ) -> MovementTicket:
        """Add an amount, such as a payment. `channel` is where it came from, `reference` its name there."""
        request = RechargeRequest(
            account_id=account_id,
            request_key=key,
            lottery_session_id=session,
            amount=_text(amount),
            channel=channel,
            reference=reference,
        )
        return self._move(request, connection)

    def transfer(
        self,
        account_id: int,
        to: int,
        amount: Amount,
        *,
        key: str = "",
        reference: str = "",
        session: str = "",
        connection: Connection | None = None,
    ) -> MovementTicket:
        """Move an amount from an account `to` another account of the same asset."""
        request = TransferRequest(
            account_id=account_id,
            request_key=key,
            lottery_session_id=session,
            to=to,
            amount=_text(amount),
            reference=reference,
        )
        return self._move(request, connection)

    def adjust(
        self,
        account_id: int,
        amount: Amount,
        reason: str,
        *,
        key: str = "",
        reference: str = "",
        session: str = "",
        connection: Connection | None = None,
    ) -> MovementTicket:
        """Correct a balance: add an amount, or take it away if it is below zero, and say why."""
        request = AdjustRequest(
            account_id=account_id,
            request_key=key,
            lottery_session_id=session,
            amount=_text(amount, is_signed=True),
            reason=reason,
            reference=reference,
        )
        return self._move(request, connection)

    def refund(
        self,
        lottery_session_id: str,
        *,
        policy: Policy = "refuse",
        reason: str = "",
        key: str = "",
        session: str = "",
        connection: Connection | None = None,
    ) -> MovementTicket:
        """Take back the draw of a session: return its cost and collect its prizes, once per draw under whatever key.

        `policy` says what happens where a prize is spent: see RefundRequest. Raises SessionNotFound for a session that
        is not a draw's, DrawNotCompleted, AlreadyRefunded, or PrizeSpent with the policy "refuse".
        """
        check_session_id(lottery_session_id)
        found = self._read(connection, lambda reading: requests.state_of_session(reading, lottery_session_id))
        if not (self._is_mine(found) and isinstance(draw := found.request, DrawRequest)):
            raise SessionNotFound(f"there is no draw under the lottery session {lottery_session_id}")
        request = RefundRequest(
            account_id=draw.account_id,
            request_key=key,
            lottery_session_id=session,
            draw=draw.request_key,
            campaign=draw.campaign,
            policy=policy,
            reason=reason,
        )
        return self._move(request, connection)

    def hold(
        self,
        account_id: int,
        amount: Amount,
        *,
        valid_s: int = VALID_S_DEFAULT,
        key: str = "",
        reference: str = "",
        session: str = "",
        connection: Connection | None = None,
    ) -> MovementTicket:
        """Set an amount aside until `post` or `void`, or until `valid_s` seconds have passed. The hold's name is its
        request key."""
        request = HoldRequest(
            account_id=account_id,
            request_key=key,
            lottery_session_id=session,
            amount=_text(amount),
            valid_s=valid_s,
            reference=reference,
        )
        return self._move(request, connection)

    def post(
        self,
        hold: str,
        *,
        amount: Amount = "",
        to: int | None = None,
        key: str = "",
        reference: str = "",
        session: str = "",
        connection: Connection | None = None,
    ) -> MovementTicket:
        """End a hold with a payment of `amount`, empty for all of it, `to` an account or as a purchase.

        Raises HoldNotFound, HoldNotCompleted, HoldEnded or HoldExpired.
        """
        held = self._hold(hold, connection)
        request = PostRequest(
            account_id=held.account_id,
            request_key=key,
            lottery_session_id=session,
            hold=held.request_key,
            amount=_text(amount) if amount else "",
            to=to,
            reference=reference,
        )
        return self._move(request, connection)

    def void(
        self,
        hold: str,
        *,
        reason: str = "",
        key: str = "",
        session: str = "",
        connection: Connection | None = None,
    ) -> MovementTicket:
        """End a hold without a payment: its amount returns. Raises HoldNotFound, HoldNotCompleted or HoldEnded."""
        held = self._hold(hold, connection)
        request = VoidRequest(
            account_id=held.account_id,
            request_key=key,
            lottery_session_id=session,
            hold=held.request_key,
            reason=reason,
        )
        return self._move(request, connection)

    def open_account(
        self,
        user_id: int,
        *,
        asset_code: str = "POINT",
        amount: Amount = "0",
        key: str = "",
        reference: str = "",
        connection: Connection | None = None,
    ) -> OpenedAccount:
        """Open the user's account in an asset, and recharge it with `amount` under `key`: both happen, or none.

        A user has one account of an asset: a repeat finds it. An account that exists gets no amount.
        """
        opening = Opening(user_id, asset_code, amount, key, reference, self._caller)
        if connection is not None:
            opened = openings.open_account_in(self._entry, connection, opening)
        else:
            opened = openings.open_account(self._entry, opening)
            if opened.recharge is not None and opened.recharge.is_new:
                self._publish([opened.recharge.request])
        ticket = None if opened.recharge is None else self._ticket(opened.recharge)
        return OpenedAccount(opened.account_id, user_id, asset_code, opened.is_new, ticket)

    def movement(self, lottery_session_id: str) -> MovementResult:
        """The result of a settled movement. Raises ResultNotReady before, DrawDead (with a `reason`) for a dead one."""
        return parse_movement_result(self._store().get(lottery_session_id))

    def wait_movement(self, lottery_session_id: str, *, timeout_s: float = 2.0) -> MovementResult:
        """Wait for the result. Raises DrawDead once the movement is dead, ResultNotReady after `timeout_s`."""
        return parse_movement_result(self._store().wait_for_body(lottery_session_id, timeout_s=timeout_s))

    # ---- accepting ---------------------------------------------------------------------------------------------------

    def _move(self, request: Request, connection: Connection | None) -> MovementTicket:
        """Accept and publish a movement, unless an obstacle stands against it and it is no repeat."""
        submission = Submission(request, self._caller)
        answer = None if connection is not None else self._entry.recall(submission)
        if answer is None:
            obstacle = self._read(connection, lambda reading: find_obstacle(reading, request))
            if obstacle is not None:
                answer = self._entry.find_known(submission, connection=connection)
                if answer is None:
                    raise obstacle
            elif connection is not None:
                answer = self._entry.accept_with(connection, submission)
            else:
                answer = self._entry.accept([submission])[0]
        if answer.is_conflict:
            raise IdempotencyKeyReused
        if answer.is_new and connection is None:
            self._publish([answer.request])
        return self._ticket(answer)

    def _ticket(self, answer: Acceptance) -> MovementTicket:
        accepted = answer.request
        first = None if answer.is_new else self._first_movement(answer)
        return MovementTicket(accepted.request_key, accepted.lottery_session_id, first)

    def _first_movement(self, answer: Acceptance) -> MovementResult | None:
        """The first result, for the ticket of a repeat; None before the movement has settled."""
        if (kept := self._kept_result(answer)) is not None:
            return parse_movement_result(kept)
        if (body := self._peek(answer)) is None:
            return None
        result = parse_movement_result(body)
        return result if is_result_of(answer.request, result) else None

    def _hold(self, hold: str, connection: Connection | None) -> HoldRequest:
        """The request of a hold, which names its account."""
        check_request_key(hold)
        found = self._read(connection, lambda reading: requests.state_of_request(reading, hold, self._caller))
        if not (self._is_mine(found) and isinstance(request := found.request, HoldRequest)):
            raise HoldNotFound(f"there is no hold {hold!r:.80}")
        return request

    def _is_mine(self, found: SessionState | None) -> TypeGuard[SessionState]:
        """Whether a request is on record, and this client's; a client without a caller sees the requests of all."""
        return found is not None and (not self._caller or found.caller == self._caller)

    def _read(self, connection: Connection | None, find: Callable[[Connection], T]) -> T:
        """What `find` reads, in the application's transaction if there is one."""
        if connection is not None:
            return find(connection)
        try:
            with self._entry.engine.connect().execution_options(read_only=True) as reading:
                return find(reading)
        except SQLAlchemyError as error:
            raise explain(error) from error


def is_result_of(request: Request, result: MovementResult) -> bool:
    """Whether the result is this request's. Redis may hold another one under its session: trust the database alone."""
    return (result.kind, result.request_key, result.account_id) == (
        request.kind,
        request.request_key,
        request.account_id,
    )


def _text(amount: Amount, *, is_signed: bool = False) -> str:
    """The amount as requests have it. Raises InvalidRequest."""
    return str(parse_amount(amount, is_signed=is_signed))
