"""A made-up deployment without I/O: draws of each kind, their ledger, receipts and sealed books; and their proofs.

It draws with the project's own code, the one that settles draws; the verifiers in producers/verifiers know none of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from tests.domain.test_manifest import WINTER
from tombola.producers.domain import contract
from tombola.producers.domain.books import checkpoints, merkle
from tombola.producers.domain.books.blocks import NO_BLOCK, Block
from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.built_in import DEFAULT_ODDS
from tombola.producers.domain.campaigns.drawing import Drawing
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.campaigns.pulls import Pulled, Standing, pull_all
from tombola.producers.domain.campaigns.record import DrawNotes, GrantNotes
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel, wheels
from tombola.producers.domain.operations import draw, refund
from tombola.producers.domain.operations.operation import Locked, LockedAccount, Moves, Rejection
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.producers.domain.proofs import (
    Proof,
    ProofBlock,
    ProofBooks,
    ProofEpoch,
    ProofOdds,
    ProofReceipts,
    ProofRow,
    Times,
    epoch_of,
    hexes,
    leaf_in_block,
    row_of,
)
from tombola.producers.domain.receipt_keys import ReceiptKey, SigningKey, jwk_set
from tombola.producers.domain.receipts import EpochShown, Facts, Outcome, Signer, receipt_of, time_shown
from tombola.producers.domain.seeds import BEFORE_EPOCHS, EpochName, anchor_of, commitment_of, draw_key, secret_of
from tombola.producers.storage.ledger import Posting

MASTER: Final = bytes(range(32))
OLD_SEED: Final = bytes(range(32, 64))  # of draws of before the epochs
DAY: Final = timedelta(days=1)
START: Final = datetime(2026, 11, 1, tzinfo=UTC)
RECEIPT_KEY: Final = SigningKey(hashlib.sha256(b"receipts").digest())
BOOKS_KEY: Final = checkpoints.PrivateKey("tombola.example/books", hashlib.sha256(b"books").digest())
KEYS: Final = jwk_set([ReceiptKey(RECEIPT_KEY.public_raw, START)]).decode()
ANCHOR: Final = anchor_of(MASTER)
ROWS_PER_BLOCK: Final = 40

PLAIN: Final = manifest.parse(
    """\
name = "plain"
title = "Für alle: \\"Lose\\" — 抽奖"
asset = "POINT"
cost = { 1 = "2.00", 10 = "18.00" }
[[prize]]
code = "big"
weight = 1
grants = [
    { asset = "POINT", amount = "100.00" }, { asset = "POINT", amount = "0.50" }, { asset = "ITEM.CUP", amount = "1" },
]
[[prize]]
code = "small"
weight = 3
grants = [{ asset = "POINT", amount = "1.50" }]
[[prize]]
code = "nothing"
weight = 6
"""
)
# Two prizes that lead to each other's end: `phone` to `cup` to `five`.
SCARCE: Final = manifest.parse(
    """\
name = "scarce"
asset = "POINT"
cost = { 1 = "3.00", 10 = "25.00" }
[[prize]]
code = "phone"
weight = 5
stock = 1
instead = "cup"
grants = [{ asset = "ITEM.PHONE", amount = "1" }]
[[prize]]
code = "cup"
weight = 3
per_account = 1
instead = "five"
grants = [{ asset = "ITEM.CUP", amount = "1" }, { notify = "cup-won" }]
[[prize]]
code = "five"
weight = 2
grants = [{ asset = "POINT", amount = "5.00" }]
"""
)
FULL: Final = manifest.parse(
    WINTER.replace(
        "hard_at = 90\nsoft_from = 75\nsoft_step = 300", "hard_at = 12\nsoft_from = 8\nsoft_step = 900"
    ).replace('instead = "nothing"', 'instead = "five"')
    + '[[guarantee]]\nname = "any"\nprizes = ["phone", "five", "coupon"]\nhard_at = 4\n'
)
ODDS: Final[Mapping[str, Odds]] = {it.name: it for it in (PLAIN, SCARCE, FULL, DEFAULT_ODDS)}


class _Versions:
    """Every version that this deployment has."""

    def version(self, odds_hash: str) -> Odds | None:
        return next((it for it in (PLAIN, SCARCE, FULL) if it.odds_hash == odds_hash), None)


@dataclass(frozen=True)
class Epoch:
    """A seed epoch: `secret` is known to the deployment, and shown in proofs if it is revealed."""

    name: EpochName
    secret: bytes
    is_revealed: bool = True

    @property
    def commitment(self) -> str:
        return hashlib.sha256(self.secret).hexdigest() if self.name.is_before_epochs else commitment_of(self.secret)

    @property
    def notes_name(self) -> str:
        return self.commitment[:16] if self.name.is_before_epochs else str(self.name)

    def key(self, campaign: str) -> bytes:
        return self.secret if self.name.is_before_epochs else draw_key(self.secret, campaign)

    def shown(self) -> ProofEpoch:
        opens = START + self.name.epoch * DAY
        times = Times(opens, opens + DAY, opens + 2 * DAY if self.is_revealed else None)
        anchor = hashlib.sha256(self.secret).digest() if self.name.is_before_epochs else ANCHOR
        return epoch_of(self.name, self.commitment, times, self.secret if self.is_revealed else None, anchor)


def epoch_number(number: int, *, is_revealed: bool = True) -> Epoch:
    """An epoch of the deployment's chain; number 0 is the one of draws of before the epochs."""
    if number == 0:
        return Epoch(BEFORE_EPOCHS, OLD_SEED, is_revealed)
    return Epoch(EpochName(1, number), secret_of(MASTER, number), is_revealed)


@dataclass
class Drawn:
    """A draw and what was written of it; `rows` and `refund` have no place in the books yet."""

    request: DrawRequest
    epoch: Epoch | None
    rows: list[Posting] = field(default_factory=list)
    refund: list[Posting] = field(default_factory=list)
    rejection: Rejection | None = None
    status: str = "completed"

    @property
    def accepted_at(self) -> datetime:
        number = 1 if self.epoch is None else self.epoch.name.epoch
        return START + number * DAY + timedelta(hours=1, microseconds=250)

    @property
    def settled_at(self) -> datetime:
        return self.accepted_at + timedelta(seconds=1)

    @property
    def result(self) -> bytes | None:
        if self.status not in ("completed", "rejected"):
            return None
        return draw.result(self.request, self.rejection if self.rejection is not None else self.rows)


class House:
    """Draws, in the order of their ledger."""

    def __init__(self) -> None:
        self.drawn: list[Drawn] = []
        self.balances: dict[tuple[int, str], Decimal] = {}
        self.standings: dict[tuple[int, str], Standing] = {}
        self.codes = iter(f"WINTER-{number:06}" for number in range(1_000_000))

    # -- drawing

    def balance(self, account_id: int, asset_code: str) -> Decimal:
        return self.balances.setdefault((account_id, asset_code), Decimal("1000000.00"))

    def draw(self, request: DrawRequest, epoch: Epoch, units: Callable[[str], int] = lambda _: 10) -> Drawn:
        """Draw: the charge and the prizes, as settling writes them."""
        drawn = Drawn(request, epoch)
        key, nonce = epoch.key(request.campaign), request.client_nonce.encode()
        odds = ODDS[request.campaign]
        if odds is DEFAULT_ODDS:
            prize = Wheel(DEFAULT_CAMPAIGN, key).draw(request.account_id, request.request_key, nonce)
            notes = f"odds={odds.odds_hash} seed={epoch.notes_name}"
            entries = [("consume", "lottery_consume", "POINT", -DEFAULT_CAMPAIGN.cost, notes)]
            if prize.amount:
                entries.append(("reward", "lottery_reward", "POINT", prize.amount, notes))
        else:
            pulled, standing = self._pull(request, odds, key, units, drawn.accepted_at)
            notes = DrawNotes(
                odds.odds_hash,
                epoch.notes_name,
                tuple(prize.code for prize in pulled.prizes),
                pulled.tier,
                standing.pulls if odds.has_counters else None,
                standing.counters(odds) if odds.guarantees else (),
                pulled.gone,
            ).written()
            cost = odds.cost[request.pulls or 1]
            entries = [("consume", "lottery_consume", odds.asset_code, -cost, notes), *self._granted(odds, pulled)]
        drawn.rows = list(self._post(request, request.request_key, request.lottery_session_id, entries))
        self.drawn.append(drawn)
        return drawn

    def _pull(
        self, request: DrawRequest, odds: Odds, key: bytes, units: Callable[[str], int], moment: datetime
    ) -> tuple[Pulled, Standing]:
        standing = self.standings.get((request.account_id, odds.name), Standing())
        drawing = Drawing(key, odds, request.account_id, request.request_key, request.client_nonce.encode())
        pulled = pull_all(odds, drawing, request.pulls or 1, standing, moment, units)
        self.standings[request.account_id, odds.name] = pulled.after
        return pulled, standing

    def _granted(self, odds: Odds, pulled: Pulled) -> Iterator[tuple[str, str, str, Decimal, str]]:
        codes = {pull: next(self.codes) for pull, it in enumerate(pulled.prizes, 1) if it.has_codes}
        for won in pulled.grants():
            code = codes[won.pull] if won.grant.has_code else ""
            notes = GrantNotes(odds.odds_hash, won.prize.code, won.pull, code, won.grant.notify).written()
            yield won.entry, won.business_type, won.grant.asset_code or odds.asset_code, won.grant.amount, notes

    def _post(
        self, request: Any, ledger_key: str, session: str, entries: Iterable[tuple[str, str, str, Decimal, str]]
    ) -> Iterator[Posting]:
        for entry, business_type, asset_code, delta, notes in entries:
            before = self.balance(request.account_id, asset_code)
            after = self.balances[request.account_id, asset_code] = before + delta
            account_id = account_in(request.account_id, asset_code)
            yield Posting(
                account_id, session, f"{ledger_key}:{entry}", business_type, asset_code, delta, before, after, notes
            )

    def reject(self, request: DrawRequest, epoch: Epoch | None, reason: str, balance: str | None) -> Drawn:
        """A draw that is rejected."""
        rejection = Rejection(reason, None if balance is None else Decimal(balance))
        drawn = Drawn(request, epoch, rejection=rejection, status="rejected")
        self.drawn.append(drawn)
        return drawn

    def unsettled(self, request: DrawRequest, epoch: Epoch, status: str) -> Drawn:
        """A draw that has not settled, or was given up."""
        drawn = Drawn(request, epoch, status=status)
        self.drawn.append(drawn)
        return drawn

    def take_back(self, drawn: Drawn, policy: str, *, spent: bool = False) -> None:
        """Refund a draw, by the code that settles refunds; with `spent` the account has nothing of its prizes left."""
        asked = RefundRequest(
            account_id=drawn.request.account_id,
            request_key=f"{drawn.request.request_key}-back",
            draw=drawn.request.request_key,
            campaign=drawn.request.campaign,
            policy=policy,
            reason="the wheel was stuck, sorry",
        )
        assets = {row.account_id: row.asset_code for row in drawn.rows}
        if spent:
            for asset_code in set(assets.values()) - {"POINT"}:
                self.balances[drawn.request.account_id, asset_code] = Decimal("0.00")
        held = {
            account_id: LockedAccount(asset, self.balance(drawn.request.account_id, asset))
            for account_id, asset in assets.items()
        }
        locked = Locked(held, wheels(MASTER), rows={asked.draw: drawn.rows}, versions=_Versions())
        decided = refund.decide(asked, locked)
        assert isinstance(decided, Moves), decided
        entries = [
            (it.entry_type, it.business_type, assets[it.account_id], it.delta, it.notes) for it in decided.movements
        ]
        drawn.refund = list(self._post(drawn.request, asked.draw, asked.lottery_session_id, entries))

    # -- proofs

    def proofs(self) -> list[Proof]:
        """The proof of each draw, in their order; the whole ledger is sealed."""
        rows: list[ProofRow] = []
        own: list[tuple[list[ProofRow], list[ProofRow]]] = []
        for drawn in self.drawn:
            parts = []
            for postings in (drawn.rows, drawn.refund):
                made = [_proof_row(it, len(rows) + at, drawn.settled_at) for at, it in enumerate(postings, 1)]
                rows += made
                parts.append(made)
            own.append((parts[0], parts[1]))
        blocks, leaves_of = _sealed(rows)
        hashes = [bytes.fromhex(block.hash) for block in blocks]
        note = BOOKS_KEY.sign(len(blocks), merkle.root(b"".join(hashes)))
        return [
            _proof(drawn, *parts, _books(note, blocks, hashes, leaves_of, [*parts[0], *parts[1]]))
            for drawn, parts in zip(self.drawn, own, strict=True)
        ]


def account_in(account_id: int, asset_code: str) -> int:
    """The account of the same user in another asset."""
    return account_id if asset_code == "POINT" else account_id * 1000 + sum(asset_code.encode()) % 1000


def _proof_row(posting: Posting, transaction_id: int, at: datetime) -> ProofRow:
    return row_of(
        {
            "transaction_id": transaction_id,
            "account_id": posting.account_id,
            "delta_amount": posting.delta,
            "balance_before": posting.before,
            "balance_after": posting.after,
            "created_at": at,
            "updated_at": at,
            "business_id": posting.lottery_session_id,
            "lottery_session_id": posting.lottery_session_id,
            "idempotency_key": posting.idempotency_key,
            "business_type": posting.business_type,
            "asset_code": posting.asset_code,
            "notes": posting.notes,
        }
    )


def _sealed(rows: Sequence[ProofRow]) -> tuple[list[Block], dict[int, list[bytes]]]:
    blocks: list[Block] = []
    leaves_of: dict[int, list[bytes]] = {}
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        some = rows[start : start + ROWS_PER_BLOCK]
        number = len(blocks) + 1
        leaves_of[number] = [row.leaf for row in some]
        root = merkle.root(b"".join(leaves_of[number])).hex()
        previous = blocks[-1].hash if blocks else NO_BLOCK
        blocks.append(Block(number, start + 1, start + len(some), len(some), root, "{}", previous))
    return blocks, leaves_of


def _books(
    note: str, blocks: Sequence[Block], hashes: Sequence[bytes], leaves_of: Mapping[int, list[bytes]],
    own: Sequence[ProofRow],
) -> ProofBooks | None:  # fmt: skip
    if not own:
        return None
    numbers = {(int(row.transaction_id) - 1) // ROWS_PER_BLOCK + 1 for row in own}
    leaves = [
        leaf_in_block(row, number, leaves_of[number])
        for row in own
        for number in [(int(row.transaction_id) - 1) // ROWS_PER_BLOCK + 1]
    ]
    proven = [
        ProofBlock(blocks[number - 1].text, hexes(merkle.inclusion_proof(number - 1, hashes)))
        for number in sorted(numbers)
    ]
    return ProofBooks(note, BOOKS_KEY.public.text, proven, leaves)


def _proof(drawn: Drawn, rows: list[ProofRow], back: list[ProofRow], books: ProofBooks | None) -> Proof:
    request, odds, result = drawn.request, ODDS.get(drawn.request.campaign), drawn.result
    shown = None if drawn.epoch is None else EpochShown(str(drawn.epoch.name), drawn.epoch.commitment)
    facts = Facts(drawn.accepted_at, None if odds is None else odds.odds_hash, shown)
    signer = Signer(((time_shown(START), RECEIPT_KEY),))
    settled = None if result is None else signer.sign(receipt_of(request, facts, Outcome(result, drawn.settled_at)))
    return Proof(
        request=request.encode().decode(),
        fingerprint=request.fingerprint(),
        status=drawn.status,
        odds=None if odds is None else ProofOdds(odds.odds_hash, odds.canonical.decode()),
        epoch=None if drawn.epoch is None else drawn.epoch.shown(),
        rows=rows,
        refund=back,
        result=None if result is None else result.decode(),
        receipts=ProofReceipts(signer.sign(receipt_of(request, facts, None)), settled),
        keys=KEYS,
        books=books,
    )


# ---- the kinds -------------------------------------------------------------------------------------------------------


def _request(index: int, campaign: str, pulls: int | None = None, *, account: int = 6) -> DrawRequest:
    """A request; every other one has a nonce, and every third one a session of its own."""
    return DrawRequest(
        account_id=contract.ACCOUNT_ID_MAX // 1000 - 7 if account == 6 and index % 5 == 0 else account,
        request_key=f"{campaign}-{pulls or 1}-{account}-{index}",
        lottery_session_id=f"session.{campaign}.{pulls or 1}.{account}.{index}" if index % 3 == 0 else "",
        campaign=campaign,
        pulls=pulls,
        client_nonce=f"nonce-{index:_>20}" if index % 2 else "",
    )


def single(house: House, index: int) -> None:
    campaign, pulls = (("default", None), ("plain", None), ("plain", 1))[index % 3]
    house.draw(_request(index, campaign, pulls), epoch_number(index % 5))


def ten_pull(house: House, index: int) -> None:
    house.draw(_request(index, "plain", 10), epoch_number(1 + index % 20))


def sold_out(house: House, index: int) -> None:
    request = _request(index, "scarce", 10 if index % 2 else None, account=100 + index)
    house.draw(request, epoch_number(3), lambda _: index % 2)


def guarantee(house: House, index: int) -> None:
    house.draw(_request(index, "winter-2026", account=20 + index // 40), epoch_number(4))


def tier(house: House, index: int) -> None:
    account = 1000 + index
    standing = Standing(pulls=100, spent=Decimal("1000.00"), since_hit={"ssr": index % 12, "any": index % 4})
    house.standings[account, "winter-2026"] = standing
    house.draw(_request(index, "winter-2026", 10, account=account), epoch_number(5))


def rejected(house: House, index: int) -> None:
    campaign, reason, balance = (
        ("default", "INSUFFICIENT_BALANCE", "0.99"),
        ("plain", "ACCOUNT_NOT_FOUND", None),
        ("winter-2026", "LIMIT_REACHED", "55.00"),
        ("winter-2026", "NOT_ELIGIBLE", "1000.00"),
        ("winter-2026", "CAMPAIGN_CLOSED", "5.10"),
        ("winter-2026", "INSUFFICIENT_BALANCE", "89.99"),
    )[index % 6]
    request = _request(index, campaign, 10 if campaign == "winter-2026" else None)
    house.reject(request, epoch_number(6), reason, balance)


def refunded(house: House, index: int) -> None:
    drawn = house.draw(_request(index, "plain", 10, account=3000 + index), epoch_number(7))
    policy = refund.POLICIES[index % 3]
    house.take_back(drawn, policy, spent=policy == "write_off")


KINDS: Final[Mapping[str, Callable[[House, int], None]]] = {
    "single": single,
    "ten-pull": ten_pull,
    "sold out": sold_out,
    "guarantee": guarantee,
    "tier": tier,
    "repeat": single,
    "rejected": rejected,
    "refunded": refunded,
}


def proofs_of(kind: str, count: int) -> list[Proof]:
    """The proofs of so many draws of a kind."""
    house = House()
    for index in range(count):
        KINDS[kind](house, index)
    return house.proofs()
