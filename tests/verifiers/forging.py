"""What a forger of proofs can do, and the proofs that forgeries begin with."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cache
from typing import Any, Final, NamedTuple

from tests.verifiers import draws
from tests.verifiers.draws import BOOKS_KEY, PLAIN, RECEIPT_KEY, House
from tombola.producers.domain import operations
from tombola.producers.domain.books import merkle
from tombola.producers.domain.books.blocks import NO_BLOCK, Block
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.operations import draw
from tombola.producers.domain.proofs import ProofRow
from tombola.producers.domain.receipt_keys import SigningKey
from tombola.producers.storage.ledger import Posting

NO_PROOF: Final = "no proof"
OTHER_MASTER: Final = bytes(32)
OTHER_KEY: Final = SigningKey(hashlib.sha256(b"another").digest())

Fields = dict[str, Any]
Change = Callable[[Fields], str | None]


class Forgery(NamedTuple):
    """`base` is the kind of draw, and its index; `change` changes the fields of its proof, or returns another text.

    `claim` must be false. `trust` is what the player knows beside the proof.
    """

    name: str
    claim: str
    base: str
    change: Change
    trust: Callable[[Fields], Fields] = lambda _: {}


# ---- what a forger can do --------------------------------------------------------------------------------------------


def payload_of(jws: str) -> Fields:
    text = jws.split(".")[1]
    said: Fields = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    return said


def jws_of(said: Fields, key: SigningKey = RECEIPT_KEY) -> str:
    return key.sign(json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode())


def sign_anew(it: Fields, **changes: Any) -> None:
    """Sign both receipts with other contents; the settled one also with the result as it is now."""
    for kind, jws in it["receipts"].items():
        if jws is not None:
            said = payload_of(jws)
            said |= {name: value for name, value in changes.items() if name in said}
            if kind == "settled" and "result_sha256" not in changes:
                said["result_sha256"] = hashlib.sha256(it["result"].encode()).hexdigest()
            it["receipts"][kind] = jws_of(said)


def seal_anew(it: Fields) -> None:
    """Seal the rows as they are now: one block of them and two neighbours, under a new checkpoint."""
    rows = [ProofRow(**row) for row in (*it["rows"], *it["refund"])]
    leaves = [row.leaf for row in rows]
    first, last = (min(int(r.transaction_id) for r in rows), max(int(r.transaction_id) for r in rows))
    block = Block(1, first, last, len(rows), merkle.root(b"".join(leaves)).hex(), "{}", NO_BLOCK)
    it["books"] = {
        "checkpoint": BOOKS_KEY.sign(1, bytes.fromhex(block.hash)),
        "key": BOOKS_KEY.public.text,
        "blocks": [{"text": block.text, "proof": []}],
        "leaves": [
            {
                "transaction_id": row.transaction_id,
                "block": "1",
                "index": str(at),
                "proof": [x.hex() for x in merkle.inclusion_proof(at, leaves)],
            }
            for at, row in enumerate(rows)
        ],
    }


def tell_anew(it: Fields) -> None:
    """Write the result that these rows make."""
    request = operations.parse_request(it["request"].encode())
    assert isinstance(request, DrawRequest)
    it["result"] = draw.result(request, [_posting(row) for row in it["rows"]]).decode()


def _posting(row: Fields) -> Posting:
    return Posting(
        int(row["account_id"]),
        row["lottery_session_id"],
        row["idempotency_key"],
        row["business_type"],
        row["asset_code"],
        Decimal(row["delta_amount"]),
        Decimal(row["balance_before"]),
        Decimal(row["balance_after"]),
        row["notes"],
    )


def cover_up(it: Fields) -> None:
    """Balances, result, receipts and books as they would be if the rows were right."""
    balances: dict[str, Decimal] = {}
    for row in it["rows"]:
        before = balances.get(row["account_id"], Decimal(row["balance_before"]))
        after = balances[row["account_id"]] = before + Decimal(row["delta_amount"])
        row["balance_before"], row["balance_after"] = str(before), str(after)
    tell_anew(it)
    sign_anew(it)
    seal_anew(it)


def ask_anew(it: Fields, **changes: Any) -> None:
    """Another request, with its fingerprint."""
    asked = json.loads(it["request"]) | changes
    asked = {name: value for name, value in asked.items() if value is not None}
    it["request"] = json.dumps(asked, separators=(",", ":"))
    it["fingerprint"] = hashlib.sha256(it["request"].encode()).hexdigest()


def name_odds(it: Fields, text: str) -> None:
    """Other odds, which everything names."""
    before, after = it["odds"]["hash"], hashlib.sha256(text.encode()).hexdigest()
    it["odds"] = {"hash": after, "text": text}
    for row in it["rows"]:
        row["notes"] = row["notes"].replace(before, after)
    cover_up(it)
    sign_anew(it, odds_hash=after)


def flipped(jws: str) -> str:
    head, payload, signature = jws.split(".")
    return f"{head}.{payload}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}"


def with_header(jws: str, header: Fields) -> str:
    head = base64.urlsafe_b64encode(json.dumps(header, separators=(",", ":")).encode()).rstrip(b"=").decode()
    return f"{head}.{jws.partition('.')[2]}"


def hex_flipped(text: str) -> str:
    return ("1" if text[0] == "0" else "0") + text[1:]


def change_notes(it: Fields, old: str, new: str) -> None:
    assert old in it["rows"][0]["notes"]
    it["rows"][0]["notes"] = it["rows"][0]["notes"].replace(old, new)


def prizes_of(it: Fields) -> str:
    told: str = it["rows"][0]["notes"].partition("prizes=")[2].partition(" ")[0]
    return told


# ---- a table of forgeries --------------------------------------------------------------------------------------------


class Table(list[Forgery]):
    """Forgeries, in their order."""

    def add(
        self, name: str, claim: str, base: str = "win", *, trust: Callable[[Fields], Fields] = lambda _: {}
    ) -> Callable[[Change], Change]:
        """Add a forgery: a decorator of its change."""

        def added(change: Change) -> Change:
            self.append(Forgery(name, claim, base, change, trust))
            return change

        return added

    def one_field(self, name: str, claim: str, path: str, value: Any, base: str = "win") -> None:
        """Add a forgery of one field: `value` is its new value, or makes it from the old one."""

        def change(it: Fields) -> None:
            inner: Any = it
            *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
            for step in steps:
                inner = inner[step]
            inner[last] = value(inner[last]) if callable(value) else value

        self.append(Forgery(name, claim, base, change))


# ---- what is forged --------------------------------------------------------------------------------------------------


@cache
def bases() -> dict[str, Fields]:
    """Proofs that are right, by what they are of."""
    house = House()
    found: dict[str, Fields] = {}
    for index in range(60):
        for kind in draws.KINDS:
            if kind != "repeat":
                draws.KINDS[kind](house, index)
    for proof in house.proofs():
        fields: Fields = json.loads(proof.encode())
        for name in _names(fields):
            found.setdefault(name, fields)
    return found


def _names(it: Fields) -> Iterator[str]:
    """The bases that this proof can be."""
    notes = (it["rows"][0]["notes"] if it["rows"] else "") or ""
    asked, count = json.loads(it["request"]), len(it["rows"])
    has_nonce = "client_nonce" in asked
    campaign, pulls, epoch = asked["campaign"], asked.get("pulls"), it["epoch"]["name"]
    if it["refund"]:
        if len(it["refund"]) > 2 and "policy=refuse" in it["refund"][0]["notes"]:
            yield "refunded"
        if ":1.00" in it["refund"][0]["notes"]:
            yield "written off"
        return
    if campaign == PLAIN.name:
        if (
            pulls == 10
            and count >= 3
            and has_nonce
            and len(set(prizes_of(it).split(","))) > 1
            and prizes_of(it) != prizes_of(it)[::-1]
        ):
            yield "ten"
        if pulls != 10 and count > 1 and epoch not in ("0.0", "1.1"):
            yield "win"
        if sum(row["asset_code"] == "ITEM.CUP" for row in it["rows"]) > 1:
            yield "two cups"
    if campaign == "default" and count == 2:
        yield "default win"
        if epoch == "0.0" and not has_nonce:
            yield "win without nonce"
    if campaign == "default" and count == 1:
        yield "default loss"
    if campaign == "default" and it["status"] == "rejected":
        yield "rejected"
    if "gone=" in notes and pulls == 10:
        yield "scarce"
    if "tier=vip" in notes and pulls == 10:
        yield "vip"
    if "since=" in notes and not pulls and ",3" in notes.partition("since=")[2]:
        yield "due"
    if any(" code=" in row["notes"] for row in it["rows"]):
        yield "coupon"
