#!/usr/bin/env python3
"""Verify a draw from its proof, offline. One file for Python 3.9 and later: no network, nothing to install.

    python3 verify.py proof.json
    python3 verify.py proof.json --anchor 5f3c… --keys tombola-keys.json --books-key shop.example/books+1f0c9a3e+AX…

A proof comes from `tombola proof SESSION` or `GET /v1/draws/{session}/proof`. Each of its claims is proven, not
provable yet, or false. Signatures are checked where the package `cryptography` is installed. What a proof names (keys,
anchor) is its operator's word: compare it with what was published before the draw, by the options, or by eye.

Exit code: 0 all claims are proven; 1 one is false; 2 this is no proof; 3 none is false, and not all are provable yet.

This file is written from the formats (producers/docs/verifiable.md), not from the code that draws. verify.js says the
same in a browser, word for word.
"""

import argparse
import base64
import hashlib
import hmac
import json
import re
import sys
import time
from typing import Any, Dict, Iterable, List, Optional, Set, Tuple

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    CHECKS_SIGNATURES = True
except ImportError:
    CHECKS_SIGNATURES = False

PROVEN, NOT_YET, FALSE = "proven", "not provable yet", "false"
UNCHECKED = "The signature was not checked: this program cannot check Ed25519 here. "


class Wrong(Exception):
    """The claim is false."""


class NotYet(Exception):
    """The claim cannot be proven with what the proof has."""


class NoProof(Exception):
    """This is no proof that can be read."""


def must(condition: object, words: str) -> None:
    if not condition:
        raise Wrong(words)


def matched(form: str, text: Optional[str], words: str) -> "re.Match[str]":
    found = re.fullmatch(form, text or "")
    if found is None:
        raise Wrong(words)
    return found


# ---- the form of a proof ---------------------------------------------------------------------------------------------

HASH = "[0-9a-f]{64}"
ID = "[1-9][0-9]{0,18}"
KEY = "[A-Za-z0-9._-]{1,100}"
NAME = "[A-Za-z0-9._:/-]{1,200}"
AMOUNT = r"(?:0|[1-9][0-9]{0,17})\.[0-9]{2}"
MOMENT = "[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\\.[0-9]{6}Z"
ROW_TIME = "[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}\\.[0-9]{6}"
JWS = "[A-Za-z0-9_-]+\\.[A-Za-z0-9_-]+\\.[A-Za-z0-9_-]+"
EPOCH = "(?:0|[1-9][0-9]{0,5})\\.(?:0|[1-9][0-9]{0,5})"
TEXT = r"[\s\S]*"  # any text

# A form is the pattern of a text, a whole number, or true; with None beside it, it may be null; a list has any number
# of the form in it. A field with ? may be absent; one with * stands for any number of fields that its pattern names.
NUMBER, TRUE = "#number", "#true"
LONE = re.compile("[\ud800-\udfff]")  # half of a character
ROW = {
    "transaction_id": ID, "account_id": ID, "delta_amount": f"-?{AMOUNT}", "balance_before": AMOUNT,
    "balance_after": AMOUNT, "created_at": ROW_TIME, "updated_at": ROW_TIME, "business_id": KEY,
    "lottery_session_id": KEY, "idempotency_key": NAME, "business_type": NAME, "asset_code": NAME,
    "notes": (TEXT, None),
}  # fmt: skip
SEALED = {
    "checkpoint": (TEXT, None), "key": (TEXT, None), "blocks": [{"text": TEXT, "proof": [HASH]}],
    "leaves": [{"transaction_id": ID, "block": ID, "index": "0|[1-9][0-9]{0,8}", "proof": [HASH]}],
}  # fmt: skip
FORM = {
    "v": NUMBER,
    "request": TEXT,
    "fingerprint": HASH,
    "status": "accepted|completed|rejected|dead",
    "odds": ({"hash": HASH, "text": TEXT}, None),
    "epoch": (
        {
            "name": EPOCH, "commitment": HASH, "opens_at": (MOMENT, None), "closes_at": (MOMENT, None),
            "revealed_at": (MOMENT, None), "secret": ("(?:[0-9a-f]{2}){1,512}", None), "anchor": HASH,
        },
        None,
    ),
    "rows": [ROW],
    "refund": [ROW],
    "result": (TEXT, None),
    "receipts": {"accepted": (JWS, None), "settled": (JWS, None)},
    "keys": (TEXT, None),
    "books": (SEALED, None),
}  # fmt: skip


CODE = "[A-Za-z0-9_-]{1,40}"
PRIZE = {
    "code": CODE, "weight": NUMBER, "?title": TEXT, "?stock": NUMBER, "?per_account": NUMBER, "?value": AMOUNT,
    "?instead": CODE, "?grants": [{"?asset": KEY, "?amount": AMOUNT, "?codes": TRUE, "?notify": CODE}],
}  # fmt: skip
MANIFEST = {
    "name": KEY, "?title": TEXT, "asset": KEY, "cost": {"*[1-9][0-9]{0,2}": AMOUNT}, "?opens": TEXT, "?closes": TEXT,
    "?day": TEXT, "?limits": {"?per_day": NUMBER, "?per_account": NUMBER},
    "?eligibility": {"?deny": KEY, "?allow": KEY}, "prize": [PRIZE],
    "?tier": [{"name": CODE, "spent_from": AMOUNT, "weights": {f"*{CODE}": NUMBER}}],
    "?guarantee": [{"name": CODE, "prizes": [CODE], "hard_at": NUMBER, "?soft_from": NUMBER, "?soft_step": NUMBER}],
}  # fmt: skip


def check_form(value: Any, form: Any, at: str) -> None:
    """Raise NoProof unless `value` has exactly this form."""
    is_right = True
    if isinstance(form, tuple):
        if value is not None:
            check_form(value, form[0], at)
    elif isinstance(form, dict):
        is_right = isinstance(value, dict)
        if is_right:
            _check_fields(value, form, at)
    elif isinstance(form, list):
        is_right = isinstance(value, list)
        for inner in value if is_right else ():
            check_form(inner, form[0], f"{at}[]")
    elif form == NUMBER:
        is_right = type(value) is int and 0 <= value <= 2**32
    elif form == TRUE:
        is_right = value is True
    else:
        is_right = isinstance(value, str) and not LONE.search(value) and bool(re.fullmatch(form, value))
    if not is_right:
        raise NoProof(f"{at} is not as it must be")


def _check_fields(value: Any, form: Any, at: str) -> None:
    """Raise NoProof unless the object has the fields of the form and no other."""
    any_name = next((name for name in form if name[0] == "*"), None)
    for name, inner in value.items():
        known = form.get(name, form.get(f"?{name}"))
        if known is None and any_name is not None and re.fullmatch(any_name[1:], name):
            known = form[any_name]
        if known is None or name[:1] in ("?", "*"):
            raise NoProof(f"{at} has a field that is not known")
        check_form(inner, known, f"{at}.{name}")
    for name in form:
        if name[0] not in "?*" and name not in value:
            raise NoProof(f"{at} has no {name}")


def read_json(text: str) -> Any:
    """The value of JSON; raises ValueError for other text."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("too deep") from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


# ---- small tools -----------------------------------------------------------------------------------------------------


def sha256(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def written(value: Any) -> str:
    """JSON as tombola writes it: no blanks, fields in the order given."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def unpacked(text: str) -> Optional[bytes]:
    """The bytes of base64url without padding; None for other text."""
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return None
    return raw if base64.urlsafe_b64encode(raw).rstrip(b"=").decode() == text else None


def prefixed(value: bytes) -> bytes:
    """The bytes after their length in four bytes."""
    return len(value).to_bytes(4, "big") + value


def cents(amount: str) -> int:
    return int(amount.replace(".", ""))


def amount_of(number: int) -> str:
    sign = "-" if number < 0 else ""
    return f"{sign}{abs(number) // 100}.{abs(number) % 100:02}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(texts: Iterable[str]) -> str:
    return ", ".join(texts) if texts else "nothing"


def is_signed(raw_key: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the Ed25519 signature is right; raises NotYet where it cannot be checked here."""
    if not CHECKS_SIGNATURES:
        raise NotYet(UNCHECKED + "Install the Python package cryptography, or use the page verify.html.")
    try:
        Ed25519PublicKey.from_public_bytes(raw_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def node(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right)


def is_included(leaf: bytes, index: int, size: int, proof: List[bytes], root: bytes) -> bool:
    """Whether the Merkle tree (RFC 9162, 2.1.3.2) of `size` leaves with this root has `leaf` at `index`."""
    if index >= size:
        return False
    at, last, found = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if at & 1 or at == last:
            found = node(sibling, found)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            found = node(found, sibling)
        at, last = at >> 1, last >> 1
    return last == 0 and found == root


# ---- odds ------------------------------------------------------------------------------------------------------------


class Odds:
    """The odds that a text says: of the built-in campaign, or a manifest in its canonical form."""

    name: str
    asset: str
    cost: Dict[int, str]
    prizes: List[Any]

    def __init__(self, text: str, odds_hash: str) -> None:
        self.hash = odds_hash
        self.tiers: Dict[str, List[int]] = {}
        self.guarantees: List[Any] = []
        self.limits: Dict[str, Any] = {}
        self.has_counters = False
        self.is_manifest = text.startswith("{")
        if self.is_manifest:
            self._read_manifest(text)
        else:
            self._read_line(text)
        self.by_code = {it["code"]: it for it in self.prizes}
        self.weights = [it["weight"] for it in self.prizes]

    def _read_line(self, text: str) -> None:
        """default,POINT,1.00,30x5.00,70x0.00"""
        if not re.fullmatch(f"{KEY},{KEY},{AMOUNT}(?:,[1-9][0-9]{{0,9}}x{AMOUNT})+", text):
            raise ValueError("not odds")
        self.name, self.asset, cost, *prizes = text.split(",")
        self.cost = {1: cost}
        self.prizes = []
        for it in prizes:
            weight, amount = it.split("x")
            self.prizes.append({"code": amount, "weight": int(weight), "grants": [], "limited": False})

    def _read_manifest(self, text: str) -> None:
        form = read_json(text)
        if json.dumps(form, sort_keys=True, separators=(",", ":"), ensure_ascii=False) != text:
            raise ValueError("not canonical")
        check_form(form, MANIFEST, "odds")
        self.name, self.asset = form["name"], form["asset"]
        self.cost = {int(pulls): amount for pulls, amount in form["cost"].items()}
        self.prizes = []
        for it in form["prize"]:
            grants = it.get("grants", [])
            limited = "stock" in it or "per_account" in it or any("codes" in grant for grant in grants)
            self.prizes.append({**it, "grants": grants, "limited": limited})
        for it in form.get("tier", []):
            self.tiers[it["name"]] = [it["weights"][prize["code"]] for prize in self.prizes]
        for it in form.get("guarantee", []):
            if ("soft_from" in it) != ("soft_step" in it):
                raise ValueError("half a guarantee")
            self.guarantees.append({**it, "prizes": set(it["prizes"])})
        self.limits = {**form.get("limits", {}), **form.get("eligibility", {})}
        self.has_counters = bool(
            self.tiers or self.guarantees or form.get("limits") or any("per_account" in it for it in self.prizes)
        )


# ---- drawing ---------------------------------------------------------------------------------------------------------


def hkdf(key: bytes, info: bytes) -> bytes:
    """32 bytes by HKDF-SHA256 without salt (RFC 5869)."""
    extracted = hmac.new(bytes(32), key, "sha256").digest()
    return hmac.new(extracted, info + b"\x01", "sha256").digest()


class Drawing:
    """The pulls of one request: HMAC-SHA256 over length-prefixed fields, 64 bits, and the weights."""

    def __init__(self, key: bytes, odds: Odds, account: str, request_key: str, nonce: str) -> None:
        self.key, self.odds = key, odds
        version = b"tombola-draw-2" if odds.is_manifest else b"tombola-draw-1"
        texts = (account.encode(), request_key.encode(), nonce.encode())
        fields = (version, odds.name.encode(), bytes.fromhex(odds.hash), *texts)
        self.prefix = b"".join(map(prefixed, fields))

    def ticket(self, pull: int, question: bytes, tickets: int) -> int:
        """A number from 0 to below `tickets`. Numbers that would favour some outcomes are drawn again."""
        must(tickets > 0, "By these odds nothing could be won.")
        limit = (2**64 // tickets) * tickets
        message = self.prefix
        if self.odds.is_manifest:
            message += prefixed(str(pull).encode()) + prefixed(question)
        counter = 0
        while True:
            digest = hmac.new(self.key, message + prefixed(counter.to_bytes(8, "big")), "sha256").digest()
            value = int.from_bytes(digest[:8], "big")
            if value < limit:
                return value % tickets
            counter += 1

    def draw(self, pull: int, weights: List[int], since: List[int]) -> int:
        """The index of the prize that the tickets say, whether it was there or not."""
        guarantees = list(zip(self.odds.guarantees, since))
        due = next((it for it, count in guarantees if count + 1 >= it["hard_at"]), None)
        if due is not None:
            weights = self.within(weights, due)
        base = sum(weights)
        added = [
            (it, max(0, count + 2 - it["soft_from"]) * it["soft_step"] if "soft_from" in it else 0)
            for it, count in guarantees
            if due is None or it["prizes"] < due["prizes"]
        ]
        ticket = self.ticket(pull, b"prize", base + sum(tickets for _, tickets in added))
        if ticket >= base:
            ticket -= base
            for guarantee, tickets in added:
                if ticket < tickets:
                    weights = self.within(weights, guarantee)
                    ticket = self.ticket(pull, b"guarantee", sum(weights))
                    break
                ticket -= tickets
        for index, weight in enumerate(weights):
            if ticket < weight:
                return index
            ticket -= weight
        raise Wrong("By these odds nothing could be won.")

    def within(self, weights: List[int], guarantee: Any) -> List[int]:
        codes = guarantee["prizes"]
        return [weight if it["code"] in codes else 0 for it, weight in zip(self.odds.prizes, weights)]

    def all(self, pulls: int, noted: Any) -> Tuple[List[str], List[str]]:
        """The codes of the prizes of all pulls, and what was drawn and not there, as notes write it."""
        odds, since = self.odds, list(noted["since"])
        weights = odds.tiers[noted["tier"]] if noted["tier"] else odds.weights
        codes, met = [], []
        for pull in range(1, pulls + 1):
            prize = odds.prizes[self.draw(pull, weights, since)]
            while prize["limited"] and f"{pull}.{prize['code']}" in noted["gone"]:
                met.append(f"{pull}.{prize['code']}")
                must(met.count(met[-1]) == 1, "The odds go in a circle.")
                must(prize.get("instead") in odds.by_code, "The odds do not say what is drawn instead.")
                prize = odds.by_code[prize["instead"]]
            codes.append(prize["code"])
            since = [0 if prize["code"] in it["prizes"] else count + 1 for it, count in zip(odds.guarantees, since)]
        return codes, met


# ---- a proof, read ---------------------------------------------------------------------------------------------------

COUNT = "(?:0|[1-9][0-9]{0,9})"
DRAW_NOTES = (
    f"odds=({HASH}) seed=({EPOCH}|[0-9a-f]{{16}}) prizes=([^ ]+)(?: tier=([^ ]+))?(?: pulls=({COUNT}))?"
    f"(?: since=({COUNT}(?:,{COUNT})*))?(?: gone=([^ ]+))?"
)
GRANT_NOTES = f"odds={HASH} prize=[^ ]+ pull=([1-9][0-9]{{0,2}})(?: code=([!-~]+))?(?: notify=([^ ]+))?"
PLAIN_NOTES = f"odds=({HASH}) seed=({EPOCH}|[0-9a-f]{{16}})"
REFUND_NOTES = "policy=(refuse|charge_only|write_off)(?: off=([^ ]+))?(?: reason=[\\s\\S]*)?"
ENTRIES = {"reward": "lottery_reward", "item": "lottery_item", "coupon": "lottery_coupon", "notice": "lottery_notice"}
REJECTED = {
    "INSUFFICIENT_BALANCE": "the balance was below the price",
    "ACCOUNT_NOT_FOUND": "the account does not exist",
    "CAMPAIGN_CLOSED": "the campaign was not open",
    "LIMIT_REACHED": "a limit of the campaign was reached",
    "NOT_ELIGIBLE": "the account may not take part",
}
RECEIPT_NAMES = {"accepted": "the receipt for the request", "settled": "the receipt for the result"}


HEADER = '{"alg":"EdDSA","kid":"([0-9a-f]{16})","typ":"tombola-receipt\\+jws"}'


class Proof:
    """A proof and what else is known. `trust` has what was published or kept: anchor, keys, books_key, receipts."""

    def __init__(self, fields: Any, trust: Any) -> None:
        self.it, self.trust = fields, trust
        self.rows, self.refund, self.epoch = fields["rows"], fields["refund"], fields["epoch"]
        self.status, self.result = fields["status"], fields["result"]
        told = fields["keys"] if trust.get("keys") is None else trust["keys"]
        self.keys = {} if told is None else keys_of(told)
        try:
            asked = read_json(fields["request"])
            self.key, self.session = asked["request_key"], asked["lottery_session_id"]
            self.account, self.campaign = asked["account_id"], asked["campaign"]
            self.pulls, self.nonce = asked.get("pulls"), asked.get("client_nonce", "")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise NoProof("the request is not one for a draw") from None
        texts_are_right = all(
            isinstance(it, str) and re.fullmatch(KEY, it) for it in (self.key, self.session, self.campaign)
        )
        if (
            not texts_are_right
            or type(self.account) is not int
            or not re.fullmatch(ID, str(self.account))
            or not (self.pulls is None or (type(self.pulls) is int and 1 <= self.pulls <= 100))
            or not isinstance(self.nonce, str)
            or not re.fullmatch("(?:[A-Za-z0-9_-]{16,64})?", self.nonce)
        ):
            raise NoProof("the request is not one for a draw")

    # -- what the request, the odds, the notes and the receipts say

    def canonical_request(self) -> str:
        if self.pulls is None and not self.nonce:
            return written(
                {
                    "v": 1, "request_key": self.key, "lottery_session_id": self.session, "account_id": self.account,
                    "campaign": self.campaign,
                }
            )  # fmt: skip
        fields = {
            "v": 2, "kind": "draw", "account_id": self.account, "request_key": self.key,
            "lottery_session_id": self.session, "campaign": self.campaign,
        }  # fmt: skip
        if self.pulls is not None:
            fields["pulls"] = self.pulls
        if self.nonce:
            fields["client_nonce"] = self.nonce
        return written(fields)

    def odds(self) -> Odds:
        """The odds; raises Wrong for a text that is none, or is not the one that was named."""
        told = self.it["odds"]
        if told is None:
            raise NotYet("The proof names no odds.")
        must(sha256(told["text"].encode()).hex() == told["hash"], "The odds are not the ones whose hash is named.")
        try:
            return Odds(told["text"], told["hash"])
        except (NoProof, ValueError, KeyError, TypeError, AttributeError):
            raise Wrong("The text of the odds cannot be read.") from None

    def charge(self) -> Any:
        """The row of the charge, the first one."""
        if self.status not in ("completed", "rejected"):
            raise NotYet("The draw has not been settled: there is no result yet.")
        must(self.rows, "A settled draw has a charge in the ledger, and this one has no row.")
        return self.rows[0]

    def noted(self, odds: Odds) -> Any:
        """What the charge's notes record; raises Wrong for notes that no draw by these odds has written."""
        form = DRAW_NOTES if odds.is_manifest else PLAIN_NOTES
        found = matched(form, self.charge()["notes"], "The notes of the charge cannot be read.")
        if not odds.is_manifest:
            return {"seed": found[2], "prizes": [], "tier": "", "pulls": None, "since": [], "gone": []}
        noted: Dict[str, Any] = {
            "seed": found[2],
            "prizes": found[3].split(","),
            "tier": found[4] or "",
            "pulls": None if found[5] is None else int(found[5]),
            "since": [int(it) for it in found[6].split(",")] if found[6] else [],
            "gone": found[7].split(",") if found[7] else [],
        }
        must(
            (noted["pulls"] is not None) == odds.has_counters
            and len(noted["since"]) == len(odds.guarantees)
            and (not noted["tier"] or noted["tier"] in odds.tiers)
            and all(it <= min(noted["pulls"] or 0, 1_000_000) for it in noted["since"]),
            "The notes record counters that no account can have under these odds.",
        )
        return noted

    def receipt(self, jws: str, kind: str) -> Any:
        """The fields of a receipt; raises Wrong if it is not about this request. Its signature: `signed`."""
        name = RECEIPT_NAMES[kind]
        _, payload, _ = (unpacked(it) for it in jws.split("."))
        try:
            text = (payload or b"").decode()
            said = read_json(text)
            own = [said[it] for it in ("odds_hash", "seed_epoch", "commitment", "accepted_at")]
            more = [said[it] for it in ("result_sha256", "settled_at")] if kind == "settled" else []
        except (ValueError, KeyError, TypeError):
            raise Wrong(f"Not readable: {name}.") from None
        fields = {
            "receipt": kind, "v": 1, "request_key": self.key, "lottery_session_id": self.session,
            "account_id": self.account, "kind": "draw", "campaign": self.campaign, "pulls": self.pulls,
            "odds_hash": own[0], "seed_epoch": own[1], "commitment": own[2], "client_nonce": self.nonce or None,
            "accepted_at": own[3],
        }  # fmt: skip
        if more:
            fields.update(result_sha256=more[0], settled_at=more[1])
        must(text == written(fields), f"Not about this request: {name}.")
        forms = [(HASH, own[0]), (EPOCH, own[1]), (HASH, own[2]), (MOMENT, own[3])]
        forms += [(HASH, more[0]), (MOMENT, more[1])] if more else []
        must(
            all(it is None or (isinstance(it, str) and re.fullmatch(form, it)) for form, it in forms)
            and (own[1] is None) == (own[2] is None)
            and (more or own[3] is not None)
            and None not in more,
            f"Not readable: {name}.",
        )
        return said

    def signed(self, jws: str, at: str, name: str) -> None:
        """Raise Wrong unless one of the published keys has signed this receipt; `at` is the moment that it says."""
        head, _, signature = (unpacked(it) for it in jws.split("."))
        found = matched(HEADER, (head or b"").decode("latin-1"), f"Not readable: {name}.")
        must(found[1] in self.keys, f"Signed by a key that is not among the published ones: {name}.")
        raw, end = self.keys[found[1]]
        must(end is None or at < end, f"Dated after the end of the key that signed it: {name}.")
        message = jws.rpartition(".")[0].encode()
        must(is_signed(raw, signature or b"", message), f"The signature is not right: {name}.")

    def said(self, kind: str) -> Any:
        """The fields of the proof's own receipt of this kind, None without one."""
        jws = self.it["receipts"][kind]
        return None if jws is None else self.receipt(jws, kind)


# ---- the claims: each returns words, or raises Wrong or NotYet -------------------------------------------------------


def request_is_yours(p: Proof) -> str:
    must(p.it["request"] == p.canonical_request(), "The bytes of the request are not in their one form.")
    must(sha256(p.it["request"].encode()).hex() == p.it["fingerprint"], "The request has another fingerprint.")
    return f"Account {p.account} asked for {counted(p.pulls or 1, 'pull')} of {p.campaign}, under the key {p.key}."


def receipt_is_right(p: Proof) -> str:
    said = p.said("accepted")
    if said is None:
        raise NotYet("There is no receipt in this proof. Receipts are signed where the operator has set a key.")
    p.signed(p.it["receipts"]["accepted"], said["accepted_at"], RECEIPT_NAMES["accepted"])
    return f"The operator signed that this request was accepted, at {said['accepted_at']}."


def kept_receipts_fit(p: Proof) -> str:
    for jws in p.trust["receipts"]:
        must(re.fullmatch(JWS, jws), "This is no receipt.")
        payload = unpacked(jws.split(".")[1]) or b""
        kind = "settled" if payload.startswith(b'{"receipt":"settled"') else "accepted"
        kept, now = p.receipt(jws, kind), p.said("accepted")
        p.signed(jws, kept["settled_at" if kind == "settled" else "accepted_at"], "your own receipt")
        if kind == "settled":
            must(p.result is not None, "Your receipt names a result, and this proof has none.")
            must(
                kept["result_sha256"] == sha256(p.result.encode()).hex(),
                "Your receipt names another result than this proof.",
            )
        named = p.it["odds"]
        is_right = named is None or kept["odds_hash"] in (None, named["hash"])
        must(is_right, "Your receipt names other odds than this proof.")
        epoch = p.epoch
        if kept["seed_epoch"] is None:
            raise NotYet("Your receipt names no secret: the draw was bound to one when it settled.")
        if epoch is not None and (kept["seed_epoch"], kept["commitment"]) != (epoch["name"], epoch["commitment"]):
            if (
                now is not None
                and (kept["accepted_at"] or "") < now["accepted_at"]
                and kept["seed_epoch"] != epoch["name"]
            ):
                raise NotYet(
                    "After your receipt the request was accepted once more, under another secret. Ask the operator "
                    "why: this happens to a request that was given up and then replayed."
                )
            raise Wrong("Your receipt names another secret than this proof.")
    return "What you kept says the same as this proof."


def secret_was_fixed(p: Proof) -> str:
    epoch, said = p.epoch, p.said("accepted")
    if epoch is None:
        raise NotYet("The proof names no secret yet.")
    if p.status == "completed":
        noted = p.noted(p.odds())
        must(noted["seed"] == seed_name(epoch), "The ledger names another secret than this proof.")
    secret, commitment = epoch["secret"], epoch["commitment"]
    if said is not None and said["seed_epoch"] is None:
        said = None
    if said is not None:
        must(
            (said["seed_epoch"], said["commitment"]) == (epoch["name"], commitment),
            "The receipt names another secret than this proof.",
        )
        must(
            epoch["revealed_at"] is None or said["accepted_at"] < epoch["revealed_at"],
            "The request was accepted when its secret was public already.",
        )
    if secret is None:
        raise NotYet(published_later(epoch))
    must(
        commitment_of(epoch) == commitment,
        "The published secret is not the one that was promised before the draw.",
    )
    if said is None:
        raise NotYet("The secret fits, but without a receipt that names it nothing shows that it was promised before.")
    return f"The receipt promised the secret of epoch {epoch['name']} by its fingerprint, and the published one has it."


def published_later(epoch: Any) -> str:
    until = epoch["closes_at"]
    ends = "" if until is None else f", after {until}"
    return f"The secret of epoch {epoch['name']} is not published yet. Ask for the proof again when it is over{ends}."


def seed_name(epoch: Any) -> str:
    """How notes name the secret of an epoch: draws of before the epochs have the beginning of its SHA-256."""
    name: str = epoch["name"] if epoch["name"] != "0.0" else epoch["anchor"][:16]
    return name


def commitment_of(epoch: Any) -> str:
    secret = bytes.fromhex(epoch["secret"])
    return sha256((b"" if epoch["name"] == "0.0" else b"tombola-commitment-1") + secret).hex()


def secret_is_of_the_chain(p: Proof) -> str:
    epoch = p.epoch
    if epoch is None:
        raise NotYet("The proof names no secret yet.")
    trusted = p.trust.get("anchor")
    must(trusted is None or trusted == epoch["anchor"], "The proof names another anchor than the one you gave.")
    if epoch["secret"] is None:
        raise NotYet(published_later(epoch))
    # The chain of draws of before the epochs is one seed and its hash.
    steps = 1 if epoch["name"] == "0.0" else int(epoch["name"].partition(".")[2])
    must(1 <= steps <= 3650, "A chain has the epochs 1 to 3650.")
    found = bytes.fromhex(epoch["secret"])
    for _ in range(steps):
        found = sha256(found)
    must(found.hex() == epoch["anchor"], "The secret does not belong to the chain with this anchor.")
    given = "the anchor that you gave" if trusted is not None else f"the anchor {epoch['anchor']}"
    return f"Hashed {counted(steps, 'time')}, the secret is {given}: it was fixed when the chain began."


def odds_are_named(p: Proof) -> str:
    odds = p.odds()
    must(odds.name == p.campaign, f"These are the odds of another campaign, {odds.name}.")
    for kind in ("accepted", "settled"):
        said = p.said(kind)
        is_right = said is None or said["odds_hash"] in (None, odds.hash)
        must(is_right, f"Other odds are named by {RECEIPT_NAMES[kind]}.")
    for row in p.rows:
        must((row["notes"] or "").startswith(f"odds={odds.hash} "), "The ledger names other odds than this proof.")
    said = p.said("accepted")
    where = "the receipt" if said is not None and said["odds_hash"] else "the ledger" if p.rows else "the record"
    return f"The odds of {odds.name} have the hash that {where} names, {odds.hash[:16]}…"


def recomputed(p: Proof) -> Any:
    """The odds, what the notes record, and what the secret says: codes of prizes, and what was drawn and gone."""
    odds = p.odds()
    noted = p.noted(odds)
    pulls = p.pulls or 1
    must(pulls in odds.cost, f"These odds do not sell {counted(pulls, 'pull')} at once.")
    epoch = p.epoch
    if epoch is None:
        raise NotYet("The proof names no secret yet.")
    must(noted["seed"] == seed_name(epoch), "The ledger names another secret than this proof.")
    if epoch["secret"] is None:
        raise NotYet(published_later(epoch))
    secret = bytes.fromhex(epoch["secret"])
    key = secret if epoch["name"] == "0.0" else hkdf(secret, b"draw" + p.campaign.encode())
    codes, met = Drawing(key, odds, str(p.account), p.key, p.nonce).all(pulls, noted)
    return odds, noted, codes, met


def prizes_are_drawn(p: Proof) -> str:
    odds, noted, codes, met = recomputed(p)
    if odds.is_manifest:
        must(noted["prizes"] == codes, f"The secret says {listed(codes)}; the ledger says {listed(noted['prizes'])}.")
        must(noted["gone"] == met, "The ledger says of other prizes that they were not there than the draw met.")
    else:
        paid = [row["delta_amount"] for row in p.rows if row["business_type"] == "lottery_reward"]
        wanted = [it for it in codes if cents(it)]
        must(paid == wanted, f"The secret says {listed(wanted)}; the ledger says {listed(paid)}.")
    return f"Drawn again with the secret, the odds and your request: {listed(codes)}."


def nonce_went_in(p: Proof) -> str:
    for kind in ("accepted", "settled"):
        p.said(kind)  # raises for a receipt with another nonce
    prizes_are_drawn(p)
    return f"The random word {p.nonce} went in. Where your browser made it, no request key was chosen for its outcome."


def expected_rows(p: Proof) -> List[Any]:
    """The rows that the draw must have written: key, type, asset, amount, notes, whether on the account that pays."""
    odds = p.odds()
    noted = p.noted(odds)
    pulls = p.pulls or 1
    must(pulls in odds.cost, f"These odds do not sell {counted(pulls, 'pull')} at once.")
    charge = f"-{odds.cost[pulls]}"
    if not odds.is_manifest:
        notes = f"odds={odds.hash} seed={noted['seed']}"
        rows = [(f"{p.key}:consume", "lottery_consume", odds.asset, charge, notes, True)]
        for row in p.rows[1:2]:
            amount = row["delta_amount"]
            must(cents(amount) > 0 and amount in odds.by_code, f"These odds have no prize of {amount}.")
            rows.append((f"{p.key}:reward", "lottery_reward", odds.asset, amount, notes, True))
        return rows
    must(len(noted["prizes"]) == pulls, "The notes do not name one prize for each pull.")
    rows = [(f"{p.key}:consume", "lottery_consume", odds.asset, charge, p.charge()["notes"], True)]
    for pull, code in enumerate(noted["prizes"], 1):
        must(code in odds.by_code, f"These odds have no prize {code}.")
        seen: Dict[str, int] = {}
        for grant in odds.by_code[code]["grants"]:
            rows.append(_granted(p, odds, pull, code, grant, seen))
    return rows


def _granted(p: Proof, odds: Odds, pull: int, code: str, grant: Any, seen: Any) -> Any:
    asset, notify = grant.get("asset", ""), grant.get("notify", "")
    kind = "notice" if notify else {"ITEM": "item", "COUPON": "coupon"}.get(asset.partition(".")[0], "reward")
    kind = kind if "." in asset or notify else "reward"
    number = seen[kind] = seen.get(kind, 0) + 1
    entry = f"{kind}_{pull}_{number}" if number > 1 else kind if (p.pulls or 1) == 1 else f"{kind}_{pull}"
    key, notes = f"{p.key}:{entry}", f"odds={odds.hash} prize={code} pull={pull}"
    if grant.get("codes"):
        told = next((it["notes"] for it in p.rows if it["idempotency_key"] == key), "")
        words = f"The prize {code} hands out a code, and the ledger has none."
        found = matched(re.escape(notes) + " code=([!-~]{1,100})", told, words)
        notes = f"{notes} code={found[1]}"
    if notify:
        return key, ENTRIES[kind], odds.asset, "0.00", f"{notes} notify={notify}", True
    return key, ENTRIES[kind], asset, grant["amount"], notes, asset == odds.asset


def check_rows(p: Proof, found: List[Any], expected: List[Any], session: str) -> None:
    """Raise Wrong unless the rows are the expected ones, each in order, and the balances continue."""
    account_of: Dict[str, str] = {}
    balance_of: Dict[str, int] = {}
    last = 0
    for row, (key, business_type, asset, amount, notes, is_payer) in zip(found, expected):
        wanted = (key, business_type, asset, amount, notes)
        names = ("idempotency_key", "business_type", "asset_code", "delta_amount", "notes")
        must(tuple(row[it] for it in names) == wanted, f"The ledger row {row['idempotency_key']} is not as it must be.")
        must(row["lottery_session_id"] == row["business_id"] == session, f"The ledger row {key} is of another session.")
        account = row["account_id"]
        is_own = account == str(p.account) if is_payer is True else account == account_of.setdefault(asset, account)
        must(is_own and (is_payer is True or account != str(p.account)), f"The ledger row {key} is on another account.")
        before, after = cents(row["balance_before"]), cents(row["balance_after"])
        must(after == before + cents(amount), f"The balance after the ledger row {key} does not add up.")
        must(balance_of.get(account, before) == before, f"The balance before the ledger row {key} does not continue.")
        must(int(row["transaction_id"]) > last, "The ledger rows are not in their order.")
        balance_of[account], last = after, int(row["transaction_id"])
    for row in found[len(expected) :]:
        raise Wrong(f"The ledger has a row {row['idempotency_key']} that the draw does not say.")
    for key, *_ in expected[len(found) :]:
        raise Wrong(f"The ledger lacks the row {key}.")


def rows_are_right(p: Proof) -> str:
    if p.status in ("accepted", "dead"):
        must(not p.rows, "The draw has not been settled, and yet there are ledger rows.")
        if p.status == "accepted":
            raise NotYet("The draw has not been settled: nothing was charged so far.")
        return "The request was given up. Nothing was charged."
    expected = expected_rows(p)
    check_rows(p, p.rows, expected, p.session)
    got = [f"{amount} {asset}" for _, _, asset, amount, _, _ in expected[1:] if cents(amount)]
    return f"Charged {expected[0][3][1:]} {expected[0][2]}; handed out: {listed(got)}."


def result_is_right(p: Proof) -> str:
    if p.status in ("accepted", "dead"):
        must(p.result is None, "The draw has not been settled, and yet there is a result.")
        raise NotYet("The draw has no result.")
    must(p.result is not None, "A settled draw has a result, and this proof has none.")
    must(p.result == expected_result(p), "The result is not what the ledger says.")
    return "Each byte of the result follows from the request and the ledger rows."


def expected_result(p: Proof) -> str:
    shown = ("idempotency_key", "business_type", "asset_code", "delta_amount", "balance_before", "balance_after")
    own = [row for row in p.rows if row["account_id"] == str(p.account)]
    paid = sum(cents(row["delta_amount"]) for row in own if row["business_type"] == "lottery_reward")
    reason, balance = rejection_of(p) if p.status == "rejected" else (None, own[-1]["balance_after"] if own else None)
    fields = {
        "v": 1 if p.pulls is None else 2, "request_key": p.key, "lottery_session_id": p.session,
        "account_id": p.account, "campaign": p.campaign, "status": p.status, "reason": reason,
        "prize_amount": amount_of(paid), "balance_after": balance,
        "transactions": [{name: row[name] for name in shown} for row in p.rows],
    }  # fmt: skip
    if p.pulls is None:
        return written(fields)
    fields.update(kind="draw", odds_hash=None, prizes=[])
    if p.status == "completed":
        odds = p.odds()
        must(odds.is_manifest, "The built-in campaign sells single draws.")
        prizes = [{"pull": pull, "code": it, "grants": []} for pull, it in enumerate(p.noted(odds)["prizes"], 1)]
        for row in p.rows[1:]:
            found = matched(GRANT_NOTES, row["notes"], "The notes of a prize cannot be read.")
            must(int(found[1]) <= len(prizes), "The notes of a prize cannot be read.")
            prizes[int(found[1]) - 1]["grants"].append(
                {
                    "asset_code": "" if found[3] else row["asset_code"], "amount": row["delta_amount"],
                    "notify": found[3] or "", "code": found[2] or "", "idempotency_key": row["idempotency_key"],
                }
            )  # fmt: skip
        fields.update(odds_hash=odds.hash, prizes=prizes)
    return written(fields)


def rejection_of(p: Proof) -> Tuple[str, Optional[str]]:
    """The reason and the balance that a rejected result says."""
    try:
        said = read_json(p.result or "")
        reason, balance = said["reason"], said["balance_after"]
    except (ValueError, KeyError, TypeError):
        raise Wrong("The result cannot be read.") from None
    is_balance = balance is None or (isinstance(balance, str) and re.fullmatch(AMOUNT, balance))
    must(isinstance(reason, str) and reason in REJECTED and is_balance, "The result names no reason that exists.")
    return reason, balance


def rejection_is_right(p: Proof) -> str:
    must(not p.rows, "A rejected draw has no ledger row, and this one has.")
    must(not p.refund, "A rejected draw has no refund, and this one has.")
    reason, balance = rejection_of(p)
    must((reason == "ACCOUNT_NOT_FOUND") == (balance is None), "The balance in the result does not fit its reason.")
    if p.it["odds"] is not None:
        odds, pulls = p.odds(), p.pulls or 1
        must(pulls in odds.cost, f"These odds do not sell {counted(pulls, 'pull')} at once.")
        if reason == "INSUFFICIENT_BALANCE":
            must(cents(balance or "") < cents(odds.cost[pulls]), f"The balance {balance} is enough for the price.")
        if reason == "LIMIT_REACHED":
            must({"per_day", "per_account"} & odds.limits.keys(), "These odds have no limit.")
        if reason == "NOT_ELIGIBLE":
            must({"deny", "allow"} & odds.limits.keys(), "By these odds everybody may take part.")
    return f"Nothing was drawn and nothing was charged: {REJECTED[reason]}."


def result_receipt_is_right(p: Proof) -> str:
    said = p.said("settled")
    if said is None:
        raise NotYet("There is no receipt for a result in this proof.")
    must(p.result is not None, "The receipt names a result, and this proof has none.")
    must(
        said["result_sha256"] == sha256(p.result.encode()).hex(),
        "The receipt names another result than the one in this proof.",
    )
    accepted = p.said("accepted")
    names = ("odds_hash", "seed_epoch", "commitment", "accepted_at")
    must(
        accepted is None or all(said[it] == accepted[it] for it in names),
        "The receipt for the result and the one for the request do not say the same.",
    )
    is_after = said["accepted_at"] is None or said["accepted_at"] <= said["settled_at"]
    must(is_after, "By its receipt the draw settled before it was accepted.")
    p.signed(p.it["receipts"]["settled"], said["settled_at"], RECEIPT_NAMES["settled"])
    return f"The operator signed exactly this result, at {said['settled_at']}."


NUMBERS = (
    "transaction_id", "account_id", "delta_amount", "balance_before", "balance_after", "created_at", "updated_at",
)  # fmt: skip
TEXTS = ("business_id", "lottery_session_id", "idempotency_key", "business_type", "asset_code", "notes")


def leaf_of(row: Any) -> bytes:
    fields = b"".join(b"|" + row[name].encode() for name in NUMBERS)
    for name in TEXTS:
        value = None if row[name] is None else row[name].encode()
        fields += b"|-|" if value is None else b"|" + str(len(value)).encode() + b"|" + value
    return sha256(b"\x00" + fields)


def rows_are_sealed(p: Proof) -> str:
    rows = p.rows + p.refund
    if not rows:
        raise NotYet("The draw has not been settled: there is nothing to seal.")
    books = p.it["books"]
    if books is None:
        raise NotYet("The ledger rows are not sealed yet. Ask for the proof again in some minutes.")
    roots, blocks = {}, {}
    for it in books["blocks"]:
        lines = it["text"].split("\n")
        must(
            len(lines) == 9
            and lines[0] == "tombola block 1"
            and lines[8] == ""
            and all(re.fullmatch(ID, line) for line in lines[1:5])
            and re.fullmatch(HASH, lines[5])
            and re.fullmatch(HASH, lines[7]),
            "A sealed block cannot be read.",
        )
        blocks[lines[1]] = (*map(int, lines[2:5]), sha256(b"\x00" + it["text"].encode()), it["proof"])
        roots[lines[1]] = bytes.fromhex(lines[5])
    leaves = {it["transaction_id"]: it for it in books["leaves"]}
    for row in rows:
        it = leaves.get(row["transaction_id"])
        if it is None:
            raise NotYet(f"The ledger row {row['idempotency_key']} is not sealed yet.")
        must(it["block"] in blocks, "The proof lacks the block that a ledger row is said to be in.")
        first, last, count, _, _ = blocks[it["block"]]
        proof = [bytes.fromhex(sibling) for sibling in it["proof"]]
        must(
            first <= int(row["transaction_id"]) <= last
            and is_included(leaf_of(row), int(it["index"]), count, proof, roots[it["block"]]),
            f"The ledger row {row['idempotency_key']} is not the one that was sealed.",
        )
    return blocks_are_signed(p, books, {leaves[row["transaction_id"]]["block"] for row in rows}, blocks)


NOTE = "([^\n]+)\n(0|[1-9][0-9]{0,15})\n([A-Za-z0-9+/]{43}=)\n\n([\\s\\S]+)"


def blocks_are_signed(p: Proof, books: Any, used: Set[str], blocks: Any) -> str:
    note = books["checkpoint"]
    if note is None:
        raise NotYet("The ledger rows are sealed, and no signed checkpoint covers them yet.")
    found = matched(NOTE, note, "The checkpoint cannot be read.")
    origin, size, root = found[1], int(found[2]), standard_base64(found[3])
    must(root, "The checkpoint cannot be read.")
    numbers = sorted(int(it) for it in used)
    if numbers[-1] > size:
        raise NotYet("The ledger rows are sealed, and no signed checkpoint covers them yet.")
    for number in numbers:
        *_, block_hash, proof = blocks[str(number)]
        must(
            is_included(block_hash, number - 1, size, [bytes.fromhex(it) for it in proof], root),
            f"The sealed block {number} is not under the signed checkpoint.",
        )
    given = p.trust.get("books_key")
    text = books["key"] if given is None else given
    if text is None:
        raise NotYet("The checkpoint was not checked: give the operator's public key of the books.")
    name, _, rest = text.strip().partition("+")
    key_id, _, packed = rest.partition("+")
    key = standard_base64(packed)
    must(len(key) == 33 and key[:1] == b"\x01", "This is no public key of the books.")
    must(sha256(name.encode() + b"\n" + key).hex()[:8] == key_id, "This is no public key of the books.")
    must(origin == name, "The checkpoint is of another origin than the key.")
    for line in found[4].split("\n"):
        words = line.split(" ")
        signature = standard_base64(words[2]) if len(words) == 3 else b""
        if words[0] == "\N{EM DASH}" and words[1:2] == [name] and signature[:4].hex() == key_id:
            message = f"{found[1]}\n{found[2]}\n{found[3]}\n".encode()
            must(is_signed(key[1:], signature[4:], message), "The signature of the checkpoint is not right.")
            where = ", ".join(map(str, numbers))
            return f"The rows are in block {where} of the sealed books, under a signed checkpoint of {size} blocks."
    raise Wrong("The checkpoint is not signed by the key of the books.")


def standard_base64(text: str) -> bytes:
    """The bytes of base64, none for text that is not the one way to write them."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        return b""
    return raw if base64.b64encode(raw).decode() == text else b""


def refund_is_right(p: Proof) -> str:
    must(p.status == "completed", "A draw that was not settled has a refund.")
    odds, first = p.odds(), p.refund[0]
    found = matched(REFUND_NOTES, first["notes"], "The notes of the refund cannot be read.")
    policy, off = found[1], {}
    for word in (found[2] or "").split(",") if found[2] else []:
        entry, _, amount = word.partition(":")
        must(re.fullmatch(AMOUNT, amount) and cents(amount) > 0, "The notes of the refund cannot be read.")
        off[entry] = cents(amount)
    must(policy == "write_off" or not off, "Only a refund that writes off may leave out a prize.")
    must(p.rows, "A settled draw has a charge in the ledger, and this one has no row.")
    charge = p.rows[0]
    back = amount_of(-cents(charge["delta_amount"]))
    expected = [(f"{p.key}:refund", "refund", odds.asset, back, first["notes"], True)]
    collected = []
    for row in p.rows[1:] if policy != "charge_only" else []:
        entry, amount = row["idempotency_key"].partition(":")[2], cents(row["delta_amount"])
        missing = off.pop(entry, 0)
        must(missing <= amount, "The refund writes off more than was handed out.")
        if amount > missing:
            taken, business_type = amount_of(missing - amount), row["business_type"].replace("lottery_", "refund_")
            is_payer = row["account_id"] == str(p.account)
            key = f"{p.key}:refund_{entry}"
            expected.append((key, business_type, row["asset_code"], taken, first["notes"], is_payer))
            collected.append(f"{taken[1:]} {row['asset_code']}")
    must(not off, "The refund writes off what was not handed out.")
    check_rows(p, p.refund, expected, first["lottery_session_id"])
    of_asset = {row["asset_code"]: row["account_id"] for row in p.rows}
    for row in p.refund[1:]:
        must(row["account_id"] == of_asset[row["asset_code"]], "The refund collects from another account.")
    must(first["lottery_session_id"] != p.session, "The refund has the session of the draw.")
    return f"Returned {back} {odds.asset}; collected: {listed(collected)}."


# ---- all of it -------------------------------------------------------------------------------------------------------

CLAIMS = (
    ("request", "What you asked for", request_is_yours),
    ("accepted", "The receipt for your request", receipt_is_right),
    ("kept", "The receipts that you kept", kept_receipts_fit),
    ("commitment", "The secret was promised before your draw", secret_was_fixed),
    ("anchor", "The secret belongs to the published chain", secret_is_of_the_chain),
    ("nonce", "Your own random word went into the draw", nonce_went_in),
    ("odds", "The odds are the ones that were named", odds_are_named),
    ("draw", "The prizes are what the secret says", prizes_are_drawn),
    ("rejection", "Why nothing was drawn", rejection_is_right),
    ("rows", "The charge and the prizes in the ledger", rows_are_right),
    ("result", "The result says what the ledger says", result_is_right),
    ("settled", "The receipt for your result", result_receipt_is_right),
    ("refund", "The refund", refund_is_right),
    ("sealed", "The ledger rows are sealed", rows_are_sealed),
)


def claims_of(p: Proof) -> Set[str]:
    """Which claims this proof makes, by name."""
    names = {"request", "accepted", "odds", "result", "settled"}
    if p.status == "rejected":
        names.add("rejection")
    else:
        names |= {"commitment", "anchor", "draw", "rows", "sealed"}
        names |= {"nonce"} if p.nonce else set()
        names |= {"refund"} if p.refund else set()
    return names | ({"kept"} if p.trust.get("receipts") else set())


def limits_of(p: Proof) -> List[str]:
    """What a proof cannot show by itself, in words."""
    limits = []
    if p.status != "rejected" and not p.nonce:
        limits.append(
            "Your request had no random word of yours: you did not choose any randomness. Somebody who knew the secret "
            "could have chosen the request key by its outcome."
        )
    if p.status == "rejected":
        limits.append("The reason is the operator's record: a proof cannot show your balance, or what others did.")
    if p.status == "completed":
        try:
            odds = p.odds()
            noted = p.noted(odds)
        except (Wrong, NotYet, ValueError, LookupError, TypeError):
            odds, noted = None, None
        if odds is not None and odds.has_counters:
            limits.append(
                "How much you had spent and how often you had drawn before (tier, counters) is the operator's record. "
                "Your earlier draws show it: compare."
            )
        if noted is not None and noted["gone"]:
            gone = listed([word.partition(".")[2] for word in noted["gone"]])
            limits.append(f"That these prizes were not there any more is the operator's record: {gone}.")
        if any(row["account_id"] != str(p.account) for row in p.rows):
            limits.append("That the other accounts in the rows are yours is the operator's record.")
    if p.trust.get("keys") is None or p.trust.get("anchor") is None:
        limits.append(
            "Keys and anchor in a proof are its operator's word. Compare them with what was published before your draw."
        )
    return limits


def verify(text: str, trust: Any = None) -> Any:
    """The report on a proof: its verdict, its claims with their verdicts and words, its limits. Raises NoProof."""
    try:
        fields = read_json(text)
    except ValueError:
        raise NoProof("this is not JSON") from None
    check_form(fields, FORM, "the proof")
    if fields["v"] != 1:
        raise NoProof("this program reads proofs of version 1")
    p = Proof(fields, trust or {})
    names, claims = claims_of(p), []
    for name, title, proves in CLAIMS:
        if name in names:
            try:
                verdict, words = PROVEN, proves(p)
            except Wrong as wrong:
                verdict, words = FALSE, str(wrong)
            except NotYet as not_yet:
                verdict, words = NOT_YET, str(not_yet)
            except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
                verdict, words = FALSE, "This part of the proof cannot be read."
            claims.append({"claim": name, "title": title, "verdict": verdict, "words": words})
    verdicts = {it["verdict"] for it in claims}
    verdict = FALSE if FALSE in verdicts else NOT_YET if NOT_YET in verdicts else PROVEN
    return {"session": p.session, "verdict": verdict, "claims": claims, "limits": limits_of(p)}


def keys_of(text: str) -> Dict[str, Tuple[bytes, Optional[str]]]:
    """The keys of a JWK Set (RFC 8037) and their ends, by their ids. Raises NoProof for other text."""
    keys: Dict[str, Tuple[bytes, Optional[str]]] = {}
    try:
        for it in read_json(text)["keys"]:
            raw, end = unpacked(it["x"]) or b"", it.get("exp")
            if it["kty"] != "OKP" or it["crv"] != "Ed25519" or len(raw) != 32 or sha256(raw).hex()[:16] != it["kid"]:
                raise ValueError("not the key that its id says")
            if end is not None and (type(end) is not int or not 0 <= end < 2**37):
                raise ValueError("not a time")
            keys[it["kid"]] = raw, None if end is None else moment_of(end)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise NoProof("the published keys cannot be read") from None
    return keys


def moment_of(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description="Verify draws from their proofs, offline.")
    parser.add_argument("proof", nargs="+", help="a file; - reads the standard input")
    parser.add_argument("--anchor", help="the anchor that was published, 64 hex digits")
    parser.add_argument("--keys", help="a file: the published keys, /.well-known/tombola-keys.json")
    parser.add_argument("--books-key", help="the operator's public key of the sealed books")
    parser.add_argument("--receipt", action="append", default=[], help="a file with a receipt that you kept")
    parser.add_argument("--json", action="store_true", help="a line of JSON per proof")
    given = parser.parse_args()
    trust = {"anchor": given.anchor, "books_key": given.books_key}
    codes = {FALSE: 1, NOT_YET: 3, PROVEN: 0}
    found = []
    for name in given.proof:
        try:
            trust["keys"] = None if given.keys is None else _content(given.keys)
            trust["receipts"] = [_content(it).strip() for it in given.receipt]
            report = verify(_content(name), trust)
        except (NoProof, OSError, UnicodeDecodeError) as error:
            report = {"session": None, "verdict": "no proof", "claims": [], "limits": [], "error": str(error)}
        found.append(codes.get(report["verdict"], 2))
        sys.stdout.write(f"{written(report) if given.json else _told(report)}\n")
    sys.exit(next((it for it in (1, 2, 3) if it in found), 0))


def _content(name: str) -> str:
    if name == "-":
        return sys.stdin.read()
    with open(name, encoding="utf-8") as file:
        return file.read()


def _told(report: Any) -> str:
    if report["session"] is None:
        return f"This is no proof: {report['error']}."
    lines = [f"Draw {report['session']}: {report['verdict']}", ""]
    for it in report["claims"]:
        lines += [f"  {it['verdict']:<17} {it['title']}", f"  {'':<17} {it['words']}"]
    return "\n".join(lines + [""] + [f"  Note: {it}" for it in report["limits"]])


if __name__ == "__main__":
    main()
