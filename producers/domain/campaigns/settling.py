"""A draw by a campaign: the decision, the prizes in its result, and what the audit checks. Pure, no I/O.

producers.domain.operations.draw calls this for every campaign but the built-in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from decimal import Decimal
from functools import lru_cache, partial
from typing import Final, NamedTuple

from tombola.producers.domain.campaigns.drawing import Drawing
from tombola.producers.domain.campaigns.odds import Odds, Prize
from tombola.producers.domain.campaigns.pulls import (
    CAMPAIGN_CLOSED,
    CONSUME,
    Pulled,
    Standing,
    pull_all,
    why_rejected,
)
from tombola.producers.domain.campaigns.record import DrawNotes, GrantNotes, read_draw_notes, read_grant_notes
from tombola.producers.domain.campaigns.scene import Bound, Scene
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import (
    ACCOUNT_NOT_FOUND,
    INSUFFICIENT_BALANCE,
    DrawRequest,
    GrantWon,
    PrizeWon,
    Row,
)
from tombola.producers.domain.draw import DrawKey
from tombola.producers.domain.operations.operation import Locked, Movement, Play, Refusal, Rejection

CONSUME_TYPE: Final = "consume"


def decide(request: DrawRequest, locked: Locked) -> Play | Rejection | Refusal:
    """The charge and what the prizes hand out; or a rejection or refusal."""
    scene = locked.scene
    bound = None if scene is None else scene.bound(request.request_key, request.campaign)
    if scene is None or bound is None:
        return Refusal(Cause.UNKNOWN_CAMPAIGN, f"there is no campaign {request.campaign!r} here")
    odds, pulls = bound.odds, request.pulls or 1
    if pulls not in odds.cost:
        return Refusal(Cause.INVALID, f"campaign {odds.name} does not sell {pulls} pulls in one request")
    account = locked.accounts.get(request.account_id)
    if account is None or account.asset_code != odds.asset_code:
        return Rejection(ACCOUNT_NOT_FOUND, None)
    standing = scene.standing(request.account_id, odds.name)
    reason = None
    if odds.has_terms or not bound.is_open:
        reason = _why_rejected(request, bound, scene, standing)
    if reason is None and account.balance < odds.cost[pulls]:
        reason = INSUFFICIENT_BALANCE
    if reason is not None:
        return Rejection(reason, account.balance)
    key = scene.draw_key(request.request_key, odds.name)
    if key is None:
        charge = Movement(request.account_id, CONSUME_TYPE, CONSUME, -odds.cost[pulls], "")
        return Play((charge,), odds.name)
    pulled = scene.foreseen(request, standing)
    if pulled is None:
        drawing = drawing_of(request, odds, key.key)
        pulled = pull_all(odds, drawing, pulls, standing, bound.moment, lambda code: scene.units(odds.name, code))
    return _play(request, odds, standing, pulled, scene, key.seed_name)


def drawing_of(request: DrawRequest, odds: Odds, draw_key: bytes) -> Drawing:
    """The pulls of this request by these odds."""
    return Drawing(draw_key, odds, request.account_id, request.request_key, request.client_nonce.encode())


def _why_rejected(request: DrawRequest, bound: Bound, scene: Scene, standing: Standing) -> str | None:
    if not bound.is_open:
        return CAMPAIGN_CLOSED
    account_id = request.account_id
    return why_rejected(
        bound.odds, request.pulls or 1, standing, bound.moment, lambda name: scene.is_listed(name, account_id)
    )


def _play(request: DrawRequest, odds: Odds, standing: Standing, pulled: Pulled, scene: Scene, seed_name: str) -> Play:
    if len(pulled.prizes) == 1 and not (pulled.gone or odds.has_counters or odds.has_codes):
        return _plain_play(request, odds, pulled, scene, seed_name)
    notes = DrawNotes(
        odds_hash=odds.odds_hash,
        seed_name=seed_name,
        prizes=tuple([prize.code for prize in pulled.prizes]),
        tier=pulled.tier,
        pulls_before=standing.pulls if odds.has_counters else None,
        since_hit=standing.counters(odds) if odds.guarantees else (),
        gone=pulled.gone,
    )
    code_of_pull = _codes(odds, pulled, scene) if odds.has_codes else {}
    movements = [
        Movement(request.account_id, CONSUME_TYPE, CONSUME, -odds.cost[len(pulled.prizes)], written(notes)),
        *_grants(request, odds, pulled, code_of_pull, scene),
    ]
    key = f"{request.request_key}:{CONSUME_TYPE}"
    return Play(movements, odds.name, pulled, dict.fromkeys(code_of_pull.values(), key), odds.has_counters)


def _plain_play(request: DrawRequest, odds: Odds, pulled: Pulled, scene: Scene, seed_name: str) -> Play:
    """A single pull that nothing but the weights decided: what it writes depends on its prize alone."""
    charge, rows = _plain_rows(odds, pulled.prizes[0], seed_name)
    movements = [Movement(request.account_id, CONSUME_TYPE, CONSUME, -odds.cost[1], charge)]
    for entry, business_type, amount, asset_code, notes in rows:
        account_id = request.account_id if not asset_code else scene.prize_account(request.account_id, asset_code)
        movements.append(Movement(account_id, entry, business_type, amount, notes))
    return Play(movements, odds.name, pulled)


@lru_cache(maxsize=4096)
def _plain_rows(odds: Odds, prize: Prize, seed_name: str) -> tuple[str, list[tuple[str, str, Decimal, str, str]]]:
    """The notes of the charge; and of each grant its entry, business type, amount, other asset (or none) and notes."""
    pulled = Pulled((prize,), "", (), {}, Standing())
    charge = DrawNotes(odds.odds_hash, seed_name, (prize.code,)).written()
    rows = []
    for won in pulled.grants():
        asset_code = "" if won.grant.notify or won.grant.asset_code == odds.asset_code else won.grant.asset_code
        notes = GrantNotes(odds.odds_hash, prize.code, won.pull, "", won.grant.notify).written()
        rows.append((won.entry, won.business_type, won.grant.amount, asset_code, notes))
    return charge, rows


# Without counters the notes of many draws are equal, and so are those of most grants.
@lru_cache(maxsize=4096)
def written(notes: DrawNotes | GrantNotes) -> str:
    """The notes' text."""
    return notes.written()


def _codes(odds: Odds, pulled: Pulled, scene: Scene) -> dict[int, str]:
    """The codes that this request gets, by the number of the pull."""
    pools = {
        code: iter(scene.codes(odds.name, code, count))
        for code, count in pulled.taken.items()
        if odds.by_code[code].has_codes
    }
    return {pull: next(pools[it.code]) for pull, it in enumerate(pulled.prizes, 1) if it.code in pools}


def _grants(
    request: DrawRequest, odds: Odds, pulled: Pulled, codes: Mapping[int, str], scene: Scene | None
) -> Iterator[Movement]:
    """The movements of what the prizes hand out. Without a scene each is on the account that pays."""
    for won in pulled.grants():
        grant = won.grant
        is_here = scene is None or grant.notify or grant.asset_code == odds.asset_code
        account_id = request.account_id if is_here else scene.prize_account(request.account_id, grant.asset_code)  # type: ignore[union-attr]
        code = codes.get(won.pull, "") if grant.has_code else ""
        notes = GrantNotes(odds.odds_hash, won.prize.code, won.pull, code, grant.notify)
        text = written(notes) if not code else notes.written()
        yield Movement(account_id, won.entry, won.business_type, grant.amount, text)


# ---- in the result ---------------------------------------------------------------------------------------------------


def prizes_won(rows: Sequence[Row]) -> tuple[str | None, list[PrizeWon]]:
    """The odds hash and the outcome of each pull, from the ledger rows of a draw."""
    notes = next((read_draw_notes(row.notes) for row in rows if row.business_type == CONSUME), None)
    if notes is None:
        return None, []
    grants: dict[int, list[GrantWon]] = {}
    for row in rows:
        if row.business_type != CONSUME:
            said = read_grant_notes(row.notes)
            asset_code = "" if said.notify else row.asset_code
            won = GrantWon(asset_code, str(row.delta), said.notify, said.code, row.idempotency_key)
            grants.setdefault(said.pull, []).append(won)
    return notes.odds_hash, [
        PrizeWon(pull, code, grants.get(pull, [])) for pull, code in enumerate(notes.prizes, start=1)
    ]


# ---- in the audit ----------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """A ledger row that a draw must have written: whatever the account that a prize in another asset went to."""

    idempotency_key: str
    business_type: str
    asset_code: str
    delta: str
    notes: str


def expected_rows(request: DrawRequest, rows: Sequence[Row], odds: Odds, key: DrawKey) -> Sequence[Expected]:
    """The ledger rows that this draw must have written, recomputed from its key, its odds and what its notes record.

    Raises InvalidRequest, ValueError or KeyError for notes that no draw by these odds has written.
    """
    notes = next(read_draw_notes(row.notes) for row in rows if row.business_type == CONSUME)
    drawing = drawing_of(request, odds, key.key)
    counters = notes.since_hit
    gone = notes.gone
    prizes: list[Prize] = []
    met: list[tuple[int, str]] = []
    for pull in range(1, (request.pulls or 1) + 1):
        gone_now = {code for at, code in gone if at == pull}
        prize, unavailable, counters = drawing.pull(pull, notes.tier, counters, partial(_is_there, gone_now))
        prizes.append(prize)
        met += ((pull, code) for code in unavailable)
    pulled = Pulled(tuple(prizes), notes.tier, tuple(met), {}, Standing())
    codes = {said.pull: said.code for row in rows if row.business_type != CONSUME and (said := _of_grant(row)).code}
    wanted = notes._replace(
        odds_hash=odds.odds_hash,
        seed_name=key.seed_name,
        prizes=tuple(prize.code for prize in prizes),
        gone=tuple(met),
    )
    request_key = request.request_key
    charge = Expected(
        f"{request_key}:{CONSUME_TYPE}", CONSUME, odds.asset_code, str(-odds.cost[len(prizes)]), wanted.written()
    )
    granted = zip(_grants(request, odds, pulled, codes, None), pulled.grants(), strict=True)
    return [
        charge,
        *(
            Expected(
                f"{request_key}:{it.entry_type}",
                it.business_type,
                won.grant.asset_code or odds.asset_code,
                str(it.delta),
                it.notes,
            )
            for it, won in granted
        ),
    ]


def _is_there(gone: Set[str], prize: Prize) -> bool:
    return prize.code not in gone


def as_expected(row: Row) -> Expected:
    """A row as it stands in the ledger."""
    return Expected(row.idempotency_key, row.business_type, row.asset_code, str(row.delta), row.notes)


def _of_grant(row: Row) -> GrantNotes:
    return read_grant_notes(row.notes)
