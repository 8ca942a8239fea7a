"""Forged requests, receipts, secrets, odds; what the player kept. A table: what was changed, and what is false."""

from __future__ import annotations

import hashlib
import json
from decimal import Decimal
from typing import Final

from tests.verifiers import draws
from tests.verifiers.draws import FULL, RECEIPT_KEY, SCARCE
from tests.verifiers.forging import (
    NO_PROOF,
    OTHER_KEY,
    OTHER_MASTER,
    Fields,
    Table,
    ask_anew,
    cover_up,
    flipped,
    hex_flipped,
    jws_of,
    name_odds,
    payload_of,
    sign_anew,
    with_header,
)
from tombola.producers.domain.seeds import secret_of

forgeries: Final = Table()


# -- the request
forgeries.one_field("the request has blanks", "request", "request", lambda it: it.replace(",", ", "))
forgeries.one_field("the request has another fingerprint", "request", "fingerprint", hex_flipped)
forgeries.one_field("the request is no JSON", NO_PROOF, "request", "{")
forgeries.one_field(
    "the request has a negative account", NO_PROOF, "request", lambda it: it.replace('"account_id":', '"account_id":-')
)


@forgeries.add("the request is of another account", "accepted")
def _(it: Fields) -> None:
    ask_anew(it, account_id=7)


@forgeries.add("the request has another key", "rows")
def _(it: Fields) -> None:
    ask_anew(it, request_key="another")


@forgeries.add("the request is for another campaign", "odds")
def _(it: Fields) -> None:
    ask_anew(it, campaign="scarce")


@forgeries.add("the request asks for another number of pulls", "accepted", "ten")
def _(it: Fields) -> None:
    ask_anew(it, pulls=1)


@forgeries.add("the request asks for pulls that are not sold", "rows", "ten")
def _(it: Fields) -> None:
    ask_anew(it, pulls=7)
    sign_anew(it, pulls=7)


@forgeries.add("the request has another session", "rows")
def _(it: Fields) -> None:
    ask_anew(it, lottery_session_id="another")


@forgeries.add("the nonce was left out", "accepted", "ten")
def _(it: Fields) -> None:
    ask_anew(it, client_nonce=None)


@forgeries.add("the nonce was exchanged, with new receipts", "nonce", "ten")
def _(it: Fields) -> None:
    ask_anew(it, client_nonce="0123456789abcdef")
    sign_anew(it, client_nonce="0123456789abcdef")


@forgeries.add("the nonce was exchanged", "nonce", "ten")
def _(it: Fields) -> None:
    ask_anew(it, client_nonce="0123456789abcdef")


@forgeries.add("a nonce was invented, with new receipts", "draw", "win without nonce")
def _(it: Fields) -> None:
    asked = json.loads(it["request"])
    fields = {"v": 2, "kind": "draw"} | {
        name: asked[name] for name in ("account_id", "request_key", "lottery_session_id", "campaign")
    }
    it["request"] = json.dumps(fields | {"client_nonce": "0123456789abcdef"}, separators=(",", ":"))
    it["fingerprint"] = hashlib.sha256(it["request"].encode()).hexdigest()
    sign_anew(it, client_nonce="0123456789abcdef")


# -- the receipts
forgeries.one_field("the receipt's signature was changed", "accepted", "receipts.accepted", flipped)
forgeries.one_field("the result's receipt has another signature", "settled", "receipts.settled", flipped)
forgeries.one_field("the published keys are no JSON", NO_PROOF, "keys", "[")
forgeries.one_field(
    "the published key is not the one of its id", NO_PROOF, "keys", lambda it: it.replace('"x":"', '"x":"A', 1)
)
forgeries.one_field("nobody has published keys", "accepted", "keys", None)
forgeries.one_field("the receipt is no JWS", NO_PROOF, "receipts.accepted", "e30")


@forgeries.add("the receipt is signed by a key that was not published", "accepted")
def _(it: Fields) -> None:
    it["receipts"]["accepted"] = jws_of(payload_of(it["receipts"]["accepted"]), OTHER_KEY)


@forgeries.add("the receipt is unsigned: alg none", "accepted")
def _(it: Fields) -> None:
    header = {"alg": "none", "kid": RECEIPT_KEY.kid, "typ": "tombola-receipt+jws"}
    it["receipts"]["accepted"] = with_header(it["receipts"]["accepted"], header)


@forgeries.add("the receipt brings its own key", "accepted")
def _(it: Fields) -> None:
    header = {"alg": "EdDSA", "kid": RECEIPT_KEY.kid, "typ": "tombola-receipt+jws", "jwk": {"kty": "OKP"}}
    it["receipts"]["accepted"] = with_header(it["receipts"]["accepted"], header)


@forgeries.add("the key had ended before the receipt's moment", "accepted")
def _(it: Fields) -> None:
    keys = json.loads(it["keys"])
    keys["keys"][0]["exp"] = keys["keys"][0]["nbf"] + 60
    it["keys"] = json.dumps(keys)


@forgeries.add("the receipt was dated back", "accepted")
def _(it: Fields) -> None:
    jws = it["receipts"]["accepted"]
    said = payload_of(jws) | {"accepted_at": "2026-01-01T00:00:00.000000Z"}
    head, _, signature = jws.split(".")
    it["receipts"]["accepted"] = f"{head}.{jws_of(said).split('.')[1]}.{signature}"


@forgeries.add("the two receipts stand in each other's place", "accepted")
def _(it: Fields) -> None:
    receipts = it["receipts"]
    receipts["accepted"], receipts["settled"] = receipts["settled"], receipts["accepted"]


@forgeries.add("a member of the receipt comes twice", "accepted")
def _(it: Fields) -> None:
    text = json.dumps(payload_of(it["receipts"]["accepted"]), separators=(",", ":"))
    it["receipts"]["accepted"] = RECEIPT_KEY.sign(text.replace("{", '{"account_id":1,', 1).encode())


@forgeries.add("the receipts are of another draw", "accepted")
def _(it: Fields) -> None:
    sign_anew(it, request_key="another")


@forgeries.add("the receipt names another result", "settled")
def _(it: Fields) -> None:
    sign_anew(it, result_sha256="0" * 64)


@forgeries.add("the result's receipt names another acceptance", "settled")
def _(it: Fields) -> None:
    said = payload_of(it["receipts"]["settled"]) | {"accepted_at": "2026-11-01T00:00:00.000000Z"}
    it["receipts"]["settled"] = jws_of(said)


@forgeries.add("the draw settled before it was accepted", "settled")
def _(it: Fields) -> None:
    sign_anew(it, settled_at="2026-01-01T00:00:00.000000Z")


@forgeries.add("the receipt is dated like no moment", "accepted")
def _(it: Fields) -> None:
    sign_anew(it, accepted_at="yesterday")


# -- the secret
forgeries.one_field("the secret is another one", "draw", "epoch.secret", hex_flipped)
forgeries.one_field("the secret is no hex", NO_PROOF, "epoch.secret", "x")
forgeries.one_field("the anchor is another one", "anchor", "epoch.anchor", hex_flipped)
forgeries.one_field("the commitment is another one", "commitment", "epoch.commitment", hex_flipped)
forgeries.one_field(
    "the secret was public before the draw", "commitment", "epoch.revealed_at", "2026-01-01T00:00:00.000000Z"
)
forgeries.one_field("the epoch has another name", "commitment", "epoch.name", "1.19")
forgeries.one_field("the epoch is none that a chain has", "anchor", "epoch.name", "1.3651")


@forgeries.add("the secret is the one of the day before", "commitment")
def _(it: Fields) -> None:
    it["epoch"]["secret"] = secret_of(draws.MASTER, int(it["epoch"]["name"][2:]) - 1).hex()


@forgeries.add("the secret is of another chain, with a new anchor, commitment and receipts", "draw")
def _(it: Fields) -> None:
    _other_chain(it)


def _other_chain(it: Fields) -> None:
    epoch = it["epoch"]
    secret = secret_of(OTHER_MASTER, int(epoch["name"][2:]))
    epoch["secret"], epoch["anchor"] = secret.hex(), secret_of(OTHER_MASTER, 0).hex()
    epoch["commitment"] = hashlib.sha256(b"tombola-commitment-1" + secret).hexdigest()
    sign_anew(it, commitment=epoch["commitment"])


@forgeries.add("the seed of before the epochs is another one", "commitment", "win without nonce")
def _(it: Fields) -> None:
    it["epoch"]["secret"] = "00" * 32


@forgeries.add("all of it is made with a chain that was not published", "anchor", trust=lambda _: {"anchor": "ab" * 32})
def _(it: Fields) -> None:
    return None


@forgeries.add("the ledger names another epoch, sealed anew", "draw")
def _(it: Fields) -> None:
    for row in it["rows"]:
        row["notes"] = row["notes"].replace(f"seed={it['epoch']['name']}", "seed=1.9")
    cover_up(it)


# -- the odds
forgeries.one_field(
    "the odds' text was changed", "odds", "odds.text", lambda it: it.replace('"weight":1}', '"weight":2}')
)
forgeries.one_field("the odds have another hash", "odds", "odds.hash", hex_flipped)


@forgeries.add("the odds were changed after the draw, everything names the new ones", "draw", "ten")
def _(it: Fields) -> None:
    name_odds(it, it["odds"]["text"].replace('"weight":6', '"weight":7'))


@forgeries.add("the odds have blanks, everything names them", "odds", "ten")
def _(it: Fields) -> None:
    name_odds(it, it["odds"]["text"].replace('"weight":6', '"weight": 6'))


@forgeries.add("the odds have a weight of one and a half, everything names them", "odds", "ten")
def _(it: Fields) -> None:
    name_odds(it, it["odds"]["text"].replace('"weight":6', '"weight":6.5'))


@forgeries.add("the odds are of another campaign", "odds")
def _(it: Fields) -> None:
    it["odds"] = {"hash": SCARCE.odds_hash, "text": SCARCE.canonical.decode()}


@forgeries.add("the receipt names other odds", "odds")
def _(it: Fields) -> None:
    sign_anew(it, odds_hash=FULL.odds_hash)


# -- against what the player kept
def _kept(it: Fields) -> Fields:
    return {"receipts": [it["receipts"]["accepted"], it["receipts"]["settled"]]}


@forgeries.add("the player's receipt names another result", "kept", "ten", trust=_kept)
def _(it: Fields) -> None:
    it["rows"][0]["created_at"] = "2026-11-01 00:00:00.000001"
    for row in it["rows"]:
        for name in ("balance_before", "balance_after"):
            row[name] = str(Decimal(row[name]) + 1) if row["account_id"] == it["rows"][0]["account_id"] else row[name]
    cover_up(it)


@forgeries.add("the player's receipt names other odds", "kept", "ten", trust=_kept)
def _(it: Fields) -> None:
    name_odds(it, it["odds"]["text"].replace('"weight":6', '"weight":7'))


@forgeries.add("the player's receipt names another secret", "kept", "ten", trust=_kept)
def _(it: Fields) -> None:
    _other_chain(it)


@forgeries.add("the player's receipt is of another draw", "kept", "ten", trust=_kept)
def _(it: Fields) -> None:
    ask_anew(it, request_key="another")
    sign_anew(it, request_key="another")


@forgeries.add("the player's receipt is signed with a key that the operator denies", "kept", trust=_kept)
def _(it: Fields) -> None:
    it["receipts"] = {"accepted": None, "settled": None}
    it["keys"] = '{"keys":[]}'


# -- the form
forgeries.one_field("a proof of another version", NO_PROOF, "v", 2)
forgeries.one_field("a proof of version true", NO_PROOF, "v", True)
forgeries.one_field("the rows are no list", NO_PROOF, "rows", {})
forgeries.one_field("the epoch is a text", NO_PROOF, "epoch", "1.3")
forgeries.one_field("a text with half of a character", NO_PROOF, "result", "\ud800")


@forgeries.add("a field more", NO_PROOF)
def _(it: Fields) -> None:
    it["verdict"] = "proven"


@forgeries.add("a field less", NO_PROOF)
def _(it: Fields) -> None:
    del it["books"]


@forgeries.add("not JSON", NO_PROOF)
def _(it: Fields) -> str:
    return json.dumps(it)[:-1]


@forgeries.add("a JSON number that is none", NO_PROOF)
def _(it: Fields) -> str:
    return json.dumps(it).replace('"v": 1', '"v": NaN')


@forgeries.add("an empty list", NO_PROOF)
def _(it: Fields) -> str:
    return "[]"
