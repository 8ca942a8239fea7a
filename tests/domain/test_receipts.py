"""Receipts as texts: what they say, to the byte, and every text that is none."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN
from tombola.producers.domain.errors import InvalidReceipt, InvalidRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.receipt_keys import ReceiptKey, SigningKey, jwk_set, read_jwk_set, signing_keys
from tombola.producers.domain.receipts import (
    EpochShown,
    Facts,
    Outcome,
    Receipt,
    SettledReceipt,
    Signer,
    parse,
    receipt_of,
    time_shown,
    verify,
)

# RFC 8037, appendix A: a key, its public key, both as in its JWK.
RFC_D = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A"
RFC_X = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
RFC_THUMB = "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"

BEGUN = datetime(2026, 11, 27, 15, tzinfo=UTC)
ACCEPTED = datetime(2026, 11, 27, 16, 0, 0, 7, tzinfo=UTC)
SETTLED = ACCEPTED + timedelta(seconds=1)
COMMITMENT = "5b" * 32
RESULT = b'{"v":1}'


def unpadded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def padded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


KEY = SigningKey(padded(RFC_D))
SIGNER = Signer(((time_shown(BEGUN), KEY),))
KEYS = {KEY.kid: ReceiptKey(KEY.public_raw, BEGUN)}
FACTS = Facts(ACCEPTED, None, EpochShown("1.17", COMMITMENT))
DRAW = DrawRequest(account_id=6, request_key="key-1", lottery_session_id="session-1")
PAYLOAD = (
    '{"receipt":"accepted","v":1,"request_key":"key-1","lottery_session_id":"session-1","account_id":6,"kind":"draw",'
    f'"campaign":"default","pulls":null,"odds_hash":"{DEFAULT_CAMPAIGN.odds_hash}","seed_epoch":"1.17",'
    f'"commitment":"{COMMITMENT}","client_nonce":null,"accepted_at":"2026-11-27T16:00:00.000007Z"}}'
)
HEADER = '{"alg":"EdDSA","kid":"%s","typ":"tombola-receipt+jws"}' % KEY.kid  # noqa: UP031


def written(header: str | bytes, payload: str | bytes, *, key: SigningKey = KEY) -> str:
    """A JWS that somebody else writes with our key, whatever it says."""
    parts = [unpadded(it.encode() if isinstance(it, str) else it) for it in (header, payload)]
    signer = Ed25519PrivateKey.from_private_bytes(key._raw)
    return ".".join([*parts, unpadded(signer.sign(".".join(parts).encode()))])


# ---- what a receipt says ---------------------------------------------------------------------------------------------


def test_a_receipt_is_this_text() -> None:
    """Written by hand here: header and payload as documented, Ed25519 by another road."""
    signed = SIGNER.sign(receipt_of(DRAW, FACTS, None))
    assert signed == written(HEADER, PAYLOAD)
    assert unpadded(KEY.public_raw) == RFC_X
    assert KEY.kid == hashlib.sha256(padded(RFC_X)).hexdigest()[:16]
    assert verify(signed, KEYS) == receipt_of(DRAW, FACTS, None)
    assert type(verify(signed, KEYS)) is Receipt


def test_a_settled_receipt_says_all_that_and_the_result() -> None:
    signed = SIGNER.sign(receipt_of(DRAW, FACTS, Outcome(RESULT, SETTLED)))
    payload = PAYLOAD.replace("accepted", "settled", 1)[:-1]
    payload += f',"result_sha256":"{hashlib.sha256(RESULT).hexdigest()}","settled_at":"2026-11-27T16:00:01.000007Z"}}'
    assert signed == written(HEADER, payload)
    found = verify(signed, KEYS)
    assert isinstance(found, SettledReceipt)
    assert found.moment == "2026-11-27T16:00:01.000007Z"


def test_what_a_request_does_not_have_is_null() -> None:
    movement = RechargeRequest(account_id=6, amount="5.00", request_key="paid-1")
    signed = SIGNER.sign(receipt_of(movement, FACTS._replace(epoch=None), None))
    said = json.loads(padded(signed.split(".")[1]))
    assert said["kind"] == "recharge"
    assert {said[name] for name in ("campaign", "pulls", "odds_hash", "seed_epoch", "commitment", "client_nonce")} == {
        None
    }
    of_campaign = DrawRequest(account_id=6, request_key="k", campaign="spring", pulls=10)
    bound = receipt_of(of_campaign, FACTS._replace(odds_hash="0d" * 32), None)
    assert (bound.campaign, bound.pulls, bound.odds_hash) == ("spring", 10, "0d" * 32)
    assert receipt_of(of_campaign, FACTS, None).odds_hash is None  # bound when it settles
    by_the_broker = receipt_of(DRAW, Facts(None, None, None), Outcome(RESULT, SETTLED))
    assert by_the_broker.accepted_at is None
    assert verify(SIGNER.sign(by_the_broker), KEYS) == by_the_broker


def test_moments_are_shown_in_utc_and_sort_as_text() -> None:
    east = ACCEPTED.astimezone(timezone(timedelta(hours=9)))
    assert time_shown(east) == time_shown(ACCEPTED) == "2026-11-27T16:00:00.000007Z"
    assert time_shown(ACCEPTED.replace(microsecond=0)) == "2026-11-27T16:00:00.000000Z"
    moments = [ACCEPTED + timedelta(microseconds=step) for step in (0, 1, 999_993, 10**9)]
    assert sorted(map(time_shown, moments)) == list(map(time_shown, moments))


# ---- texts that are no receipt ---------------------------------------------------------------------------------------

GOOD = written(HEADER, PAYLOAD)
HEAD, BODY, SIGNATURE = GOOD.split(".")
OTHER = SigningKey(bytes(range(32)))

FORGED: dict[str, Callable[[], str]] = {
    "empty": lambda: "",
    "dots": lambda: "..",
    "four parts": lambda: f"{GOOD}.{SIGNATURE}",
    "no signature": lambda: f"{HEAD}.{BODY}.",
    "blanks around it": lambda: f" {GOOD}\n",
    "padding": lambda: f"{HEAD}.{BODY}.{SIGNATURE}==",
    "standard base64": lambda: GOOD.replace("_", "/").replace("-", "+"),
    "not ascii": lambda: GOOD.replace("e", "é", 1),
    "too long": lambda: f"{HEAD}.{BODY * 20}.{SIGNATURE}",
    "half a signature": lambda: f"{HEAD}.{BODY}.{SIGNATURE[:43]}",
    "another signature": lambda: f"{HEAD}.{BODY}.{unpadded(bytes(64))}",
    "a changed payload": lambda: f"{HEAD}.{unpadded(PAYLOAD.replace('key-1', 'key-2').encode())}.{SIGNATURE}",
    "another header's signature": lambda: f"{unpadded(HEADER.replace('EdDSA', 'EdDSA ').encode())}.{BODY}.{SIGNATURE}",
    "alg none": lambda: written(HEADER.replace("EdDSA", "none"), PAYLOAD),
    "alg none, unsigned": lambda: f"{unpadded(HEADER.replace('EdDSA', 'none').encode())}.{BODY}.AA",
    "alg HS256": lambda: written(HEADER.replace("EdDSA", "HS256"), PAYLOAD),
    "alg in lower case": lambda: written(HEADER.replace("EdDSA", "eddsa"), PAYLOAD),
    "no alg": lambda: written(HEADER.replace('"alg":"EdDSA",', ""), PAYLOAD),
    "alg twice": lambda: written(HEADER.replace("{", '{"alg":"none",', 1), PAYLOAD),
    "crit": lambda: written(HEADER.replace("}", ',"crit":["exp"]}'), PAYLOAD),
    "its own key": lambda: written(HEADER.replace("}", ',"jwk":{"kty":"OKP"}}'), PAYLOAD),
    "another typ": lambda: written(HEADER.replace("tombola-receipt+jws", "JWT"), PAYLOAD),
    "no kid": lambda: written(HEADER.replace(f'"kid":"{KEY.kid}",', ""), PAYLOAD),
    "an unknown kid": lambda: written(HEADER.replace(KEY.kid, "0" * 16), PAYLOAD),
    "another key under a known kid": lambda: written(HEADER, PAYLOAD, key=OTHER),
    "another key": lambda: written(HEADER.replace(KEY.kid, OTHER.kid), PAYLOAD, key=OTHER),
    "a header in another order": lambda: written(json.dumps(json.loads(HEADER), sort_keys=True, indent=1), PAYLOAD),
    "a header that is a list": lambda: written("[]", PAYLOAD),
    "a header that is no text": lambda: written(b"\xff\xfe", PAYLOAD),
    "a payload that is no JSON": lambda: written(HEADER, b"\xff{"),
    "a payload that is a number": lambda: written(HEADER, "7"),
    "a deep payload": lambda: written(HEADER, "[" * 3000),
    "blanks in the payload": lambda: written(HEADER, PAYLOAD.replace(",", ", ")),
    "a member twice": lambda: written(HEADER, PAYLOAD.replace('"account_id":6', '"account_id":7,"account_id":6')),
    "the kind of receipt twice": lambda: written(HEADER, PAYLOAD.replace("{", '{"receipt":"accepted",', 1)),
    "an escape": lambda: written(HEADER, PAYLOAD.replace("key-1", "key\\u002d1")),
    "another order": lambda: written(
        HEADER, PAYLOAD.replace('"receipt":"accepted","v":1', '"v":1,"receipt":"accepted"')
    ),
    "a further field": lambda: written(HEADER, PAYLOAD.replace("}", ',"prize":"5.00"}')),
    "a missing field": lambda: written(HEADER, PAYLOAD.replace('"pulls":null,', "")),
    "settled without a result": lambda: written(HEADER, PAYLOAD.replace("accepted", "settled", 1)),
    "an unknown kind of receipt": lambda: written(HEADER, PAYLOAD.replace("accepted", "promised", 1)),
    "version 2": lambda: written(HEADER, PAYLOAD.replace('"v":1', '"v":2')),
    "an account as text": lambda: written(HEADER, PAYLOAD.replace(":6,", ':"6",')),
    "an account as a float": lambda: written(HEADER, PAYLOAD.replace(":6,", ":6.0,")),
    "a hash in upper case": lambda: written(HEADER, PAYLOAD.replace(COMMITMENT, COMMITMENT.upper())),
    "a time in another zone": lambda: written(HEADER, PAYLOAD.replace("07Z", "07+00:00")),
    "a time without its microseconds": lambda: written(HEADER, PAYLOAD.replace(".000007Z", "Z")),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_no_other_text_is_a_receipt(forge: Callable[[], str]) -> None:
    assert verify(GOOD, KEYS)
    with pytest.raises(InvalidReceipt) as refusal:
        verify(forge(), KEYS)
    assert len(str(refusal.value)) < 300


def test_spare_bits_are_refused() -> None:
    """64 bytes leave four bits of the last character unused: sixteen texts would be one signature."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(GOOD[-1])
    twins = [GOOD[:-1] + alphabet[last ^ spare] for spare in range(1, 16)]
    assert {padded(it.rpartition(".")[2]) for it in twins} == {padded(SIGNATURE)}
    for twin in twins:
        with pytest.raises(InvalidReceipt):
            parse(twin)


def test_every_changed_character_is_found() -> None:
    for place in range(0, len(GOOD), 7):
        other = "A" if GOOD[place] != "A" else "B"
        with pytest.raises(InvalidReceipt):
            verify(GOOD[:place] + other + GOOD[place + 1 :], KEYS)


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_read_from_its_text_alone() -> None:
    made = SigningKey.make()
    assert SigningKey.read(made.text).sign(b"x") == made.sign(b"x") != SigningKey.make().sign(b"x")
    assert made.text not in repr(made)
    assert signing_keys("") == signing_keys("  ") == ()
    assert [it.kid for it in signing_keys(f"{made.text}, {KEY.text}")] == [made.kid, KEY.kid]


@pytest.mark.parametrize(
    "text",
    [
        "secretsecret",
        KEY.text.removeprefix("PRIVATE+KEY+"),
        KEY.text[:-4],
        KEY.text + "A",
        KEY.text.replace(KEY.kid, OTHER.kid),
        KEY.text.replace("nWGx", "nWGy"),
        f"{KEY.text},",
        f"{KEY.text},{KEY.text}",
        f"{KEY.text} {OTHER.text}",
        "PRIVATE+KEY+shop.example/books+1a2b3c4d+" + base64.b64encode(b"\x01" + bytes(32)).decode(),
    ],
)
def test_what_is_no_key_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        signing_keys(text)
    assert "nWG" not in str(refusal.value)
    assert "secretsecret" not in str(refusal.value)


def test_the_key_that_was_valid_at_its_moment_signs() -> None:
    """So a receipt stays the same to the byte when a new key comes."""
    new = (time_shown(ACCEPTED + timedelta(hours=1)), OTHER)
    both = Signer((new, (time_shown(BEGUN), KEY)))
    receipt, settled = (
        receipt_of(DRAW, FACTS, None),
        receipt_of(DRAW, FACTS, Outcome(RESULT, ACCEPTED + timedelta(hours=1))),
    )
    assert both.sign(receipt) == SIGNER.sign(receipt)
    assert parse(both.sign(settled)).kid == OTHER.kid
    long_ago = receipt_of(DRAW, FACTS._replace(accepted_at=BEGUN - timedelta(days=9)), None)
    assert parse(both.sign(long_ago)).kid == KEY.kid
    assert parse(Signer((new,)).sign(receipt)).kid == OTHER.kid  # the old key has left the settings


def test_a_key_that_has_ended_signs_nothing_later() -> None:
    def with_end(end: datetime) -> dict[str, ReceiptKey]:
        return {KEY.kid: ReceiptKey(KEY.public_raw, BEGUN, end)}

    assert verify(GOOD, with_end(ACCEPTED + timedelta(microseconds=1)))
    for end in (ACCEPTED, BEGUN):
        with pytest.raises(InvalidReceipt, match="not valid any more"):
            verify(GOOD, with_end(end))
    before = receipt_of(DRAW, FACTS._replace(accepted_at=BEGUN - timedelta(days=9)), None)
    assert verify(SIGNER.sign(before), KEYS) == before


def test_keys_are_a_jwk_set() -> None:
    half = timedelta(microseconds=500_000)
    keys = [ReceiptKey(OTHER.public_raw, BEGUN), ReceiptKey(KEY.public_raw, BEGUN + half, SETTLED + half)]
    told = json.loads(jwk_set(keys))
    assert told["keys"][1] == {
        **{"kid": KEY.kid, "kty": "OKP", "crv": "Ed25519", "x": RFC_X, "use": "sig", "alg": "EdDSA"},
        "nbf": int(BEGUN.timestamp()),
        "exp": int(SETTLED.timestamp()) + 1,
    }
    assert "exp" not in told["keys"][0]
    thumb = json.dumps({name: told["keys"][1][name] for name in ("crv", "kty", "x")}, separators=(",", ":"))
    assert unpadded(hashlib.sha256(thumb.encode()).digest()) == RFC_THUMB
    read = read_jwk_set(jwk_set(keys))
    assert list(read) == [OTHER.kid, KEY.kid]
    assert verify(GOOD, read)
    assert read[OTHER.kid] == keys[0]
    assert json.loads(jwk_set([])) == {"keys": []}


@pytest.mark.parametrize(
    "changes",
    [{"x": unpadded(OTHER.public_raw)}, {"x": "AA"}, {"x": "!"}, {"kid": "0" * 16}, {"crv": "X25519"}, {"kty": "RSA"},
     {"alg": "none"}, {"nbf": "soon"}, {"exp": 10**30}, {"exp": 10**15}],
)  # fmt: skip
def test_a_key_that_is_not_what_its_id_says_is_refused(changes: dict[str, object]) -> None:
    (jwk,) = json.loads(jwk_set([ReceiptKey(KEY.public_raw, BEGUN)]))["keys"]
    with pytest.raises(InvalidReceipt):
        read_jwk_set(json.dumps({"keys": [jwk | changes]}).encode())
    for garbage in (b"", b"[]", b"{}", b"\xff"):
        with pytest.raises(InvalidReceipt):
            read_jwk_set(garbage)
