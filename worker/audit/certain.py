"""Draws that are certainly right: decided on the lines of the ledger alone, since nearly all draws are.

This says less than `check` of the operation (producers.domain.operations.draw), never anything else: what is not
certain is read again in full, and checked there. Only plain draws of the built-in campaign can be certain.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from tombola.producers.domain.contract import DrawRequest, DrawResult, LedgerRow
from tombola.producers.domain.draw import BlindWheel, Wheel, Wheels
from tombola.producers.domain.errors import DrawError
from tombola.producers.domain.operations.draw import CONSUME, CONSUME_TYPE, REWARD, REWARD_TYPE
from tombola.worker.audit.lines import Line
from tombola.worker.audit.seeds import NotedSeeds, Window
from tombola.worker.seeds.binding import seed_noted

PLANS_MAX: Final = 1_000
_ACCOUNT: Final = 4_711_471_147_114_711  # stands for an account id, which is no text, in a result's pattern
_is_name = re.compile(r"<(\w+)>")


class _Plan(NamedTuple):
    """What the lines of a draw of one campaign and seed say; the pattern of its result with one row and with two."""

    wheel: Wheel
    window: Window
    charge: tuple[str, str, str, str]  # business type, asset, amount and notes
    results: tuple[str, str]


class CertainDraws:
    """Says of which draws the ledger, the request and the kept result are certainly right."""

    def __init__(self, wheels: Wheels, seeds: NotedSeeds) -> None:
        self._wheels = wheels
        self._seeds = seeds
        self._plans: dict[tuple[str, str], _Plan | None] = {}  # by campaign and notes

    def is_right(self, lines: Sequence[Line]) -> bool:
        """Whether these lines of one session are all that its draw must have written, and its request says so."""
        charge = lines[0]
        if charge[0] != "1":
            return False
        (_, _, account, session, charge_key, business_type, asset, delta, before, after, notes,
         key, asked_account, campaign, fingerprint, bound_to, accepted_at, drawn_at, kept) = charge  # fmt: skip
        plan = self._plan(campaign, notes)
        if plan is None or plan.window.why_not(bound_to, accepted_at, drawn_at):
            return False
        if account != asked_account or (business_type, asset, delta, notes) != plan.charge:
            return False
        try:
            request = DrawRequest(
                account_id=int(account), request_key=key, lottery_session_id=session, campaign=campaign
            )
        except (DrawError, ValueError):
            return False
        if request.fingerprint() != fingerprint or charge_key != f"{key}:{CONSUME_TYPE}":
            return False
        prize = plan.wheel.draw(request.account_id, key).amount
        said = {"key": key, "session": session, "account": account, "before": before, "after": after}
        if prize:
            amount = str(prize)
            if len(lines) != 2 or not self._is_reward(lines[1], account, key, (REWARD, asset, amount, notes)):
                return False
            said |= {"paid": amount, "before_reward": lines[1][8], "after_reward": lines[1][9]}
        elif len(lines) != 1:
            return False
        return not kept or kept == plan.results[len(lines) - 1] % said

    def _plan(self, campaign: str, notes: str) -> _Plan | None:
        """The plan of draws of a campaign with these notes; None where no draw with them is certain."""
        try:
            return self._plans[campaign, notes]
        except KeyError:
            noted = self._seeds.of(seed_noted(notes))
        if noted is None:
            return None
        if len(self._plans) >= PLANS_MAX:
            self._plans.clear()
        wheel = (self._wheels if noted.seed is None else noted.seed.wheels).get(campaign)
        is_known = wheel is not None and not isinstance(wheel, BlindWheel)
        made = self._plans[campaign, notes] = _plan(wheel, noted.window) if wheel is not None and is_known else None
        return made

    def _is_reward(self, line: Line, account: str, key: str, says: tuple[str, str, str, str]) -> bool:
        _, _, account_of_row, _, row_key, business_type, asset, delta, _, _, notes, *request = line
        return (
            not request
            and account_of_row == account
            and row_key == f"{key}:{REWARD_TYPE}"
            and (business_type, asset, delta, notes) == says
        )


def _plan(wheel: Wheel, window: Window) -> _Plan:
    campaign = wheel.campaign
    charge = (CONSUME, campaign.asset_code, str(-campaign.cost), wheel.notes)
    return _Plan(wheel, window, charge, (_pattern(wheel, with_reward=False), _pattern(wheel, with_reward=True)))


def _pattern(wheel: Wheel, *, with_reward: bool) -> str:
    """The bytes of a result as a pattern for `%`: as the contract encodes them, whatever it says."""
    campaign = wheel.campaign
    rows = [
        LedgerRow(f"<key>:{CONSUME_TYPE}", CONSUME, campaign.asset_code, str(-campaign.cost), "<before>", "<after>")
    ]
    if with_reward:
        reward = (f"<key>:{REWARD_TYPE}", REWARD, campaign.asset_code, "<paid>", "<before_reward>", "<after_reward>")
        rows.append(LedgerRow(*reward))
    result = DrawResult(
        request_key="<key>",
        lottery_session_id="<session>",
        account_id=_ACCOUNT,
        campaign=campaign.name,
        status="completed",
        reason=None,
        prize_amount="<paid>" if with_reward else "0.00",
        balance_after="<after_reward>" if with_reward else "<after>",
        transactions=rows,
    )
    text = result.encode().decode().replace("%", "%%").replace(str(_ACCOUNT), "<account>")
    return _is_name.sub(r"%(\1)s", text)
