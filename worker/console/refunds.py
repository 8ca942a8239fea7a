"""The page where an operator refunds a draw: what each policy would do now, and the form."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Engine
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from tombola.producers.domain import keys
from tombola.producers.domain.contract import DrawRequest, MovementResult
from tombola.producers.domain.operations.refund import POLICIES, RefundRequest
from tombola.worker.console.pages import Page, act, page, url_of
from tombola.worker.console.security.roles import must_act
from tombola.worker.movements.finding import find_draw
from tombola.worker.movements.settling import Moved, foretell, settle, why_rejected
from tombola.worker.operators.actions import checked_reason

POLICY_SAYS = {
    "refuse": "return the cost and collect the prizes; refuse where one is spent",
    "charge_only": "return the cost; the prizes stay",
    "write_off": "return the cost and collect what is left of the prizes; the rest is written off",
}


class Choice(NamedTuple):
    """A policy, and what a refund by it would do now; `why_not` is empty where it would go through."""

    policy: str
    says: str
    result: MovementResult
    why_not: str


class RefundPage(Page):
    """A refund of one draw: `?session=`. For operators; a form that is sent twice has one effect."""

    path = "/story/refund"
    add_to_menu = False

    @page("")
    async def index(self, request: Request) -> Response:
        must_act(request)
        draw = await self.read(find_draw, request.query_params.get("session", "").strip())
        choices = await run_in_threadpool(_choices, self.services.engine, draw)
        chosen = next((it.policy for it in choices if not it.why_not), None)
        return self.show(
            request,
            "refund.html",
            "Refund a draw",
            draw=draw,
            choices=choices,
            chosen=chosen,
            key=keys.make_act_key("draw_refund"),
        )

    @page("", methods=("POST",))
    async def submit(self, request: Request) -> Response:
        must_act(request)
        form = request.state.form
        draw = await self.read(find_draw, form.get("session", "").strip())
        return await act(
            request,
            _refund,
            self.services.engine,
            draw,
            key=form.get("key", ""),
            policy=form.get("policy", ""),
            reason=form.get("reason", ""),
            message=_told,
            back=url_of("/story", {"q": draw.lottery_session_id}),
        )


def _refund(engine: Engine, draw: DrawRequest, *, key: str, policy: str, reason: str, operator: str) -> Moved:
    request = _request(draw, key=keys.check_request_key(key), policy=policy, reason=checked_reason(reason))
    return settle(engine, request, operator=operator, reason=request.reason)


def _told(moved: Moved) -> str:
    result = moved.result
    if moved.is_repeat:
        return "This form was sent before: the draw was refunded then, once."
    return f"The draw is refunded: account {result.account_id} holds {result.balance_after} now."


def _choices(engine: Engine, draw: DrawRequest) -> list[Choice]:
    """What each policy would do now."""
    found = []
    for policy in POLICIES:
        result = foretell(engine, _request(draw, policy=policy, reason="a forecast")).result
        why_not = why_rejected(result) if result.status == "rejected" else ""
        found.append(Choice(policy, POLICY_SAYS[policy], result, why_not))
    return found


def _request(draw: DrawRequest, *, policy: str, reason: str, key: str = "") -> RefundRequest:
    return RefundRequest(
        account_id=draw.account_id,
        request_key=key,
        draw=draw.request_key,
        campaign=draw.campaign,
        policy=policy,
        reason=reason,
    )
