"""Forged draws, ledger rows, results, sealed books and refunds. A table: what was changed, and what is false.

Most are what an operator could do who has all keys: the result is written anew, the receipts are signed anew and the
books are sealed anew, so that only one thing can tell.
"""

from __future__ import annotations

import copy
from decimal import Decimal
from typing import Final

from tests.verifiers.draws import BOOKS_KEY
from tests.verifiers.forging import (
    NO_PROOF,
    Fields,
    Table,
    bases,
    change_notes,
    cover_up,
    hex_flipped,
    prizes_of,
    seal_anew,
    sign_anew,
)
from tombola.producers.domain import operations
from tombola.producers.domain.books.checkpoints import PrivateKey
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.operations import draw
from tombola.producers.domain.operations.operation import Rejection

forgeries: Final = Table()


# -- the draw, by an operator who has all keys
@forgeries.add("a win was turned into none", "draw")
def _(it: Fields) -> None:
    change_notes(it, f"prizes={prizes_of(it)}", "prizes=nothing")
    del it["rows"][1:]
    cover_up(it)


@forgeries.add("a win of the built-in campaign was turned into none", "draw", "default win")
def _(it: Fields) -> None:
    del it["rows"][1:]
    cover_up(it)


@forgeries.add("a loss of the built-in campaign was turned into a win", "draw", "default loss")
def _(it: Fields) -> None:
    row = copy.deepcopy(it["rows"][0])
    key = row["idempotency_key"].replace(":consume", ":reward")
    it["rows"].append(row | {"transaction_id": str(int(row["transaction_id"]) + 1), "idempotency_key": key})
    it["rows"][1] |= {"business_type": "lottery_reward", "delta_amount": "5.00"}
    cover_up(it)


@forgeries.add("the prizes of two pulls were exchanged", "draw", "ten")
def _(it: Fields) -> None:
    codes = prizes_of(it).split(",")
    change_notes(it, f"prizes={','.join(codes)}", f"prizes={','.join(codes[::-1])}")
    cover_up(it)


@forgeries.add("a prize was said to be gone, and was not drawn", "draw", "scarce")
def _(it: Fields) -> None:
    change_notes(it, "gone=", "gone=9.cup,")
    cover_up(it)


@forgeries.add("a prize that was gone is not named", "draw", "scarce")
def _(it: Fields) -> None:
    notes = it["rows"][0]["notes"]
    it["rows"][0]["notes"] = notes[: notes.index(" gone=")]
    cover_up(it)


@forgeries.add("an account in a tier was drawn without it", "draw", "vip")
def _(it: Fields) -> None:
    for old, new in ((" tier=vip", ""), (f"prizes={prizes_of(it)}", f"prizes={prizes_of(it)[::-1]}")):
        change_notes(it, old, new)
    cover_up(it)


@forgeries.add("the tier is one that the odds do not have", "draw", "vip")
def _(it: Fields) -> None:
    change_notes(it, "tier=vip", "tier=vvip")
    cover_up(it)


@forgeries.add("the pulls since the last hit were set back", "draw", "due")
def _(it: Fields) -> None:
    notes = it["rows"][0]["notes"]
    since = notes.partition("since=")[2].partition(" ")[0]
    change_notes(it, f"since={since}", "since=0,0")
    cover_up(it)


@forgeries.add("there were more pulls since the last hit than pulls", "rows", "due")
def _(it: Fields) -> None:
    notes = it["rows"][0]["notes"]
    pulls = notes.partition("pulls=")[2].partition(" ")[0]
    change_notes(it, f"pulls={pulls}", "pulls=0")
    cover_up(it)


@forgeries.add("the notes leave out the counters", "draw", "due")
def _(it: Fields) -> None:
    notes = it["rows"][0]["notes"]
    it["rows"][0]["notes"] = notes[: notes.index(" pulls=")]
    cover_up(it)


# -- the ledger rows
forgeries.one_field("a row has another key", "rows", "rows.1.idempotency_key", lambda it: f"x{it}")
forgeries.one_field("a row has another business type", "rows", "rows.1.business_type", "lottery_item")
forgeries.one_field("a row has another amount", "rows", "rows.1.delta_amount", "99.00")
forgeries.one_field("a row has another asset", "rows", "rows.1.asset_code", "COIN")
forgeries.one_field("a row has other notes", "rows", "rows.1.notes", lambda it: f"{it} code=X")
forgeries.one_field("a row has no notes", "rows", "rows.1.notes", None)
forgeries.one_field("a row is of another session", "rows", "rows.1.lottery_session_id", "another")
forgeries.one_field("a row's balance does not continue", "rows", "rows.1.balance_before", "1.00")
forgeries.one_field("a row's balance does not add up", "rows", "rows.1.balance_after", "1.00")
forgeries.one_field("a row's amount is no amount", NO_PROOF, "rows.1.delta_amount", "5")
forgeries.one_field("a row has a field more", NO_PROOF, "rows.1", lambda it: it | {"extra": "1"})


@forgeries.add("too much was charged, sealed anew", "rows")
def _(it: Fields) -> None:
    it["rows"][0]["delta_amount"] = "-3.00"
    cover_up(it)


@forgeries.add("the prize went to another account, sealed anew", "rows")
def _(it: Fields) -> None:
    it["rows"][1]["account_id"] = "7"
    cover_up(it)


@forgeries.add("the prizes of one asset went to two accounts, sealed anew", "rows", "two cups")
def _(it: Fields) -> None:
    row = [row for row in it["rows"] if row["asset_code"] == "ITEM.CUP"][-1]
    row["account_id"] = "99"
    cover_up(it)


@forgeries.add("a prize was not handed out, sealed anew", "rows")
def _(it: Fields) -> None:
    del it["rows"][-1]
    cover_up(it)


@forgeries.add("a prize was handed out twice, sealed anew", "rows")
def _(it: Fields) -> None:
    row = it["rows"][1]
    key = f"{row['idempotency_key']}_1_9"
    it["rows"].append(row | {"idempotency_key": key, "transaction_id": str(int(it["rows"][-1]["transaction_id"]) + 1)})
    cover_up(it)


@forgeries.add("the rows are in another order, sealed anew", "rows", "ten")
def _(it: Fields) -> None:
    it["rows"][1:] = it["rows"][:0:-1]
    cover_up(it)


@forgeries.add("the ids of the rows are in another order, sealed anew", "rows")
def _(it: Fields) -> None:
    first, second = it["rows"][:2]
    first["transaction_id"], second["transaction_id"] = second["transaction_id"], first["transaction_id"]
    seal_anew(it)


@forgeries.add("the code was kept back, sealed anew", "rows", "coupon")
def _(it: Fields) -> None:
    for row in it["rows"]:
        row["notes"] = row["notes"].partition(" code=")[0] if " code=" in row["notes"] else row["notes"]
    cover_up(it)


@forgeries.add("there are no rows", "rows")
def _(it: Fields) -> None:
    it["rows"] = []


# -- the result
forgeries.one_field(
    "the result says another prize", "result", "result", lambda it: it.replace('"prize_amount":"', '"prize_amount":"1')
)
forgeries.one_field("the result has blanks", "result", "result", lambda it: it.replace(",", ", "))
forgeries.one_field("there is no result", "result", "result", None)
forgeries.one_field("the draw is said to be rejected", "rejection", "status", "rejected")
forgeries.one_field("the draw is said to wait", "rows", "status", "accepted")
forgeries.one_field("the draw is said to be given up", "rows", "status", "dead")
forgeries.one_field("the draw is said to be something else", NO_PROOF, "status", "lost")


@forgeries.add("the result says another prize, signed anew", "result", "ten")
def _(it: Fields) -> None:
    it["result"] = it["result"].replace('"prize_amount":"', '"prize_amount":"1')
    sign_anew(it)


# -- rejected draws
def _reject_anew(it: Fields, reason: str, balance: str | None) -> None:
    request = operations.parse_request(it["request"].encode())
    assert isinstance(request, DrawRequest)
    rejection = Rejection(reason, None if balance is None else Decimal(balance))
    it["result"] = draw.result(request, rejection).decode()
    sign_anew(it)


@forgeries.add("rejected for a limit that the odds do not have", "rejection", "rejected")
def _(it: Fields) -> None:
    _reject_anew(it, "LIMIT_REACHED", "5.00")


@forgeries.add("rejected for a list that the odds do not have", "rejection", "rejected")
def _(it: Fields) -> None:
    _reject_anew(it, "NOT_ELIGIBLE", "5.00")


@forgeries.add("rejected for a balance that is enough", "rejection", "rejected")
def _(it: Fields) -> None:
    _reject_anew(it, "INSUFFICIENT_BALANCE", "5.00")


@forgeries.add("rejected for a reason that does not exist", "rejection", "rejected")
def _(it: Fields) -> None:
    _reject_anew(it, "BAD_LUCK", "5.00")


@forgeries.add("rejected for an account that does not exist, which has a balance", "rejection", "rejected")
def _(it: Fields) -> None:
    _reject_anew(it, "ACCOUNT_NOT_FOUND", "5.00")


@forgeries.add("rejected, and charged", "rejection", "rejected")
def _(it: Fields) -> None:
    it["rows"] = copy.deepcopy(bases()["default loss"])["rows"]


# -- the sealed books
forgeries.one_field(
    "a row was changed after it was sealed", "sealed", "rows.1.created_at", "2026-01-01 00:00:00.000000"
)
forgeries.one_field("the leaf has another place", "sealed", "books.leaves.1.index", lambda it: str(int(it) + 1))
forgeries.one_field("the leaf's proof was changed", "sealed", "books.leaves.1.proof.0", hex_flipped)
forgeries.one_field("the leaf's proof is too long", "sealed", "books.leaves.1.proof", lambda it: [*it, "0" * 64])
forgeries.one_field("the leaf's proof is too short", "sealed", "books.leaves.1.proof", lambda it: it[:-1])
forgeries.one_field("the row is in a block that the proof lacks", "sealed", "books.leaves.1.block", "99")
forgeries.one_field(
    "the block's root was changed", "sealed", "books.blocks.0.text", lambda it: it.replace(it.split("\n")[5], "0" * 64)
)
forgeries.one_field(
    "the block's sums were changed", "sealed", "books.blocks.0.text", lambda it: it.replace("{}", '{"house/x":{}}')
)
forgeries.one_field("the block does not reach to the row", "sealed", "books.blocks.0.text", lambda it: _last_id_1(it))
forgeries.one_field("the block is no block", "sealed", "books.blocks.0.text", "tombola block 2\n")
forgeries.one_field("the checkpoint is of more blocks", "sealed", "books.checkpoint", lambda it: _line(it, 1, "9"))
forgeries.one_field(
    "the checkpoint has another root", "sealed", "books.checkpoint", lambda it: _line(it, 2, "A" * 43 + "=")
)
forgeries.one_field(
    "the checkpoint is of another origin", "sealed", "books.checkpoint", lambda it: _line(it, 0, "x.example/books")
)
forgeries.one_field(
    "the checkpoint has another signature", "sealed", "books.checkpoint", lambda it: f"{it[:-10]}{it[-9:-1]}A\n"
)
forgeries.one_field(
    "the checkpoint is signed by nobody", "sealed", "books.checkpoint", lambda it: f"{it.partition('—')[0]}nobody\n"
)
forgeries.one_field("the checkpoint is no checkpoint", "sealed", "books.checkpoint", "hello")
forgeries.one_field("the key of the books is no key", "sealed", "books.key", "hello")


@forgeries.add(
    "the books are sealed with a key that was not published", "sealed",
    trust=lambda _: {"books_key": PrivateKey(BOOKS_KEY.name, bytes(32)).public.text},
)  # fmt: skip
def _(it: Fields) -> None:
    return None


def _last_id_1(text: str) -> str:
    lines = text.split("\n")
    return "\n".join([*lines[:3], "1", *lines[4:]])


def _line(note: str, at: int, text: str) -> str:
    lines = note.split("\n")
    return "\n".join([*lines[:at], text, *lines[at + 1 :]])


# -- the refund
forgeries.one_field("the refund returns less", "refund", "refund.0.delta_amount", "1.00", "refunded")
forgeries.one_field("the refund's policy was changed", "refund", "refund.0.notes", "policy=charge_only", "refunded")
forgeries.one_field("the refund has no policy", "refund", "refund.0.notes", "reason=none", "refunded")
forgeries.one_field("the refund collects from another account", "refund", "refund.1.account_id", "77", "refunded")
forgeries.one_field("the refund collects less", "refund", "refund.1.delta_amount", "-0.01", "refunded")
forgeries.one_field("the refund lacks a row", "refund", "refund", lambda it: it[:-1], "refunded")
forgeries.one_field("the refund has a row more", "refund", "refund", lambda it: [*it, it[-1]], "refunded")
forgeries.one_field("a refund of a draw that has not settled", "refund", "status", "accepted", "refunded")


@forgeries.add("the refund writes off what was not handed out", "refund", "written off")
def _(it: Fields) -> None:
    for row in it["refund"]:
        row["notes"] = row["notes"].replace("off=", "off=reward_77:1.00,")
    seal_anew(it)


@forgeries.add("the refund writes off more than was handed out", "refund", "written off")
def _(it: Fields) -> None:
    for row in it["refund"]:
        row["notes"] = row["notes"].replace(":1.00", ":2.00")
    seal_anew(it)
