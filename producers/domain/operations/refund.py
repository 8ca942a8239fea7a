"""A refund: a draw is taken back, its cost returned and its prizes collected. Once per draw, under the draw's own key.

The draw's result stays as it was, and so do the counters of limits and guarantees. Units of stocked prizes that are
collected in full go back into stock, but for prizes with a code: a code is handed out once, ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, get_args

from tombola.producers.domain.campaigns import pulls, settling
from tombola.producers.domain.campaigns.record import read_draw_notes
from tombola.producers.domain.campaigns.scene import Versions
from tombola.producers.domain.contract import ACCOUNT_NOT_FOUND, CAMPAIGN_DEFAULT, Request, Row
from tombola.producers.domain.draw import NOTES_PREFIX, Wheels
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.keys import check_request_key
from tombola.producers.domain.operations import movements
from tombola.producers.domain.operations.movements import check_reason, check_terms, notes_of, why_not_added
from tombola.producers.domain.operations.operation import (
    Decision,
    Findings,
    Locked,
    Movement,
    Moves,
    Needs,
    Rejection,
    UnitsBack,
    Written,
)

DRAW_NOT_FOUND: Final = "DRAW_NOT_FOUND"  # there is no completed draw of this account under this key
ALREADY_REFUNDED: Final = "ALREADY_REFUNDED"
PRIZE_SPENT: Final = "PRIZE_SPENT"

REFUND_TYPE: Final = "refund"
REFUND: Final = "refund"
# The business type that collects a prize, by the business type that handed it out. A notice hands out nothing.
COLLECTED: Final[Mapping[str, str]] = MappingProxyType(
    {business_type: f"{REFUND}_{entry}" for entry, business_type in pulls.BUSINESS_TYPES.items() if entry != "notice"}
)
Policy = Literal["refuse", "charge_only", "write_off"]
POLICIES: Final = get_args(Policy)


class RefundRequest(Request, frozen=True, kw_only=True):
    """Take back `draw`, the request key of a draw of this account, by its `campaign`.

    `policy` says what happens where the account does not have a prize any more: "refuse" rejects the refund;
    "write_off" collects what is there. "charge_only" returns the cost and collects nothing.
    """

    kind = "refund"

    draw: str
    campaign: str = CAMPAIGN_DEFAULT
    policy: str = "refuse"
    reason: str = ""

    def __post_init__(self) -> None:
        Request.__post_init__(self)
        check_request_key(self.draw)
        check_request_key(self.campaign)  # a campaign's name has the same form
        if self.policy not in POLICIES:
            raise InvalidRequest(f"a policy of a refund is {', '.join(POLICIES)}, not {self.policy!r:.40}")
        check_reason(self.reason, is_required=False)
        check_terms(self)

    @property
    def ledger_key(self) -> str:
        return self.draw


FIELDS: Final = RefundRequest
TYPES: Final = MappingProxyType(
    {REFUND_TYPE: REFUND, **{f"{REFUND}_{entry}": f"{REFUND}_{entry}" for entry in ("reward", "item", "coupon")}}
)
HOUSE: Final = MappingProxyType(
    {REFUND: "house/{campaign}/sales", **dict.fromkeys(COLLECTED.values(), "house/{campaign}/prizes")}
)

result = movements.result


def needs(request: RefundRequest, _wheels: Wheels) -> Needs:
    """The account that paid, and the rows of the draw: their accounts hold its prizes."""
    return Needs((request.account_id,), rows_of=(request.draw,))


def decide(request: RefundRequest, locked: Locked) -> Decision:
    """The cost returned and the prizes collected, or a rejection."""
    payer = locked.accounts.get(request.account_id)
    if payer is None:
        return Rejection(ACCOUNT_NOT_FOUND, None)
    rows = locked.rows.get(request.draw, ())
    drawn = _Drawn.of(request, rows)
    if drawn is None or drawn.campaign(locked.wheels, locked.versions) not in (None, request.campaign):
        return Rejection(DRAW_NOT_FOUND, payer.balance)
    if any(row.idempotency_key == f"{request.draw}:{REFUND_TYPE}" for row in rows):
        return Rejection(ALREADY_REFUNDED, payer.balance)
    balances = {row.account_id: locked.accounts[row.account_id].balance for row in drawn.prizes} | {
        request.account_id: payer.balance - drawn.charge.delta
    }
    why_not = why_not_added(payer, -drawn.charge.delta)
    if why_not is not None:
        return why_not
    collected: list[tuple[Row, Decimal]] = []
    for row in drawn.prizes if request.policy != "charge_only" else ():
        taken = min(row.delta, balances[row.account_id])
        if taken < row.delta and request.policy == "refuse":
            return Rejection(PRIZE_SPENT, payer.balance)
        balances[row.account_id] -= taken
        if taken:
            collected.append((row, taken))
    back = tuple(_units_back(request, drawn, collected, locked.versions))
    return Moves(_movements(request, drawn, collected), back)


class _Drawn(NamedTuple):
    """A completed draw, by its ledger rows: its charge, and the rows that handed something out."""

    charge: Row
    prizes: Sequence[Row]

    @classmethod
    def of(cls, request: RefundRequest, rows: Sequence[Row]) -> _Drawn | None:
        """The draw that is to be taken back; None if the rows have no charge of this account."""
        key = f"{request.draw}:{settling.CONSUME_TYPE}"
        charge = next((row for row in rows if row.idempotency_key == key), None)
        if charge is None or charge.account_id != request.account_id or charge.business_type != pulls.CONSUME:
            return None
        return cls(charge, [row for row in rows if row.business_type in COLLECTED and row.delta > 0])

    def campaign(self, wheels: Wheels, versions: Versions | None) -> str | None:
        """The campaign of the draw, by its odds; None where they are not known here."""
        notes = self.charge.notes
        odds_hash = notes.removeprefix(NOTES_PREFIX).partition(" ")[0] if notes.startswith(NOTES_PREFIX) else ""
        for name, wheel in wheels.items():
            if wheel.campaign.odds_hash == odds_hash:
                return name
        odds = versions.version(odds_hash) if versions is not None and odds_hash else None
        return None if odds is None else odds.name


def _movements(request: RefundRequest, drawn: _Drawn, collected: Sequence[tuple[Row, Decimal]]) -> list[Movement]:
    # What is written off stands in the notes: a row that somebody deletes must not look like it.
    taken_of = {row.idempotency_key: taken for row, taken in collected}
    off = [
        f"{row.idempotency_key.partition(':')[2]}:{missing}"
        for row in (drawn.prizes if request.policy == "write_off" else ())
        if (missing := row.delta - taken_of.get(row.idempotency_key, Decimal(0)))
    ]
    notes = notes_of(("policy", request.policy), ("off", ",".join(off)), ("reason", request.reason))
    return [
        Movement(request.account_id, REFUND_TYPE, REFUND, -drawn.charge.delta, notes),
        *(
            Movement(
                row.account_id,
                f"{REFUND}_{row.idempotency_key.partition(':')[2]}",
                COLLECTED[row.business_type],
                -taken,
                notes,
            )
            for row, taken in collected
        ),
    ]


def _units_back(
    request: RefundRequest,
    drawn: _Drawn,
    collected: Sequence[tuple[Row, Decimal]],
    versions: Versions | None,
) -> Iterator[UnitsBack]:
    """The units of stocked prizes whose grants are all collected in full."""
    try:
        odds_hash = read_draw_notes(drawn.charge.notes).odds_hash
    except InvalidRequest:  # a draw of the built-in campaign, which has no stock
        return
    odds = None if versions is None else versions.version(odds_hash)
    if odds is None:
        return
    in_full = {row.idempotency_key for row, taken in collected if taken == row.delta}
    _, prizes = settling.prizes_won([drawn.charge, *drawn.prizes])
    units: dict[str, int] = {}
    for won in prizes:
        prize = odds.by_code.get(won.code)
        is_back = won.grants and all(it.idempotency_key in in_full and not it.code for it in won.grants)
        if prize is not None and prize.is_stocked and is_back:
            units[won.code] = units.get(won.code, 0) + 1
    for code, count in units.items():
        yield UnitsBack(odds.name, code, count, request.draw)


def check(request: RefundRequest, written: Written) -> Findings:
    """The rows return the draw's cost, and collect its prizes as the policy says (I14)."""
    return {"I14": _wrong(request, written)}


def _wrong(request: RefundRequest, written: Written) -> Iterator[str]:
    if not written.is_completed:
        return
    drawn = _Drawn.of(request, written.rows_of(request.draw))
    if drawn is None:
        yield f"refunds a draw {request.draw} that the ledger does not have"
        return
    if drawn.campaign(written.wheels, written.versions) not in (None, request.campaign):
        yield f"refunds a draw of another campaign than {request.campaign}"
    before = {row.idempotency_key: row.before for row in written.rows}
    collected: list[tuple[Row, Decimal]] = []
    for row in drawn.prizes if request.policy != "charge_only" else ():
        key = f"{request.draw}:{REFUND}_{row.idempotency_key.partition(':')[2]}"
        # What is written off has no row; a row that is missing from a refund in full is found as such.
        there = before.get(key, Decimal(0)) if request.policy == "write_off" else row.delta
        if taken := min(row.delta, there):
            collected.append((row, taken))
    yield from movements.differences(request, written, _movements(request, drawn, collected))
