"""Signatures against the golden ones, which openssl made, and against whatever a stranger may send for one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tombola.producers.domain.contract import DrawRequest, parse_request
from tombola.producers.domain.errors import ConfigurationError, NotSigned
from tombola.producers.domain.signatures import SIGNATURE_LENGTH, Keyring
from tombola.producers.settings import Settings

GOLDEN = json.loads((Path(__file__).parent / "golden" / "signatures.json").read_bytes())
OLD, NEW, OTHER = (bytes([number]) * 32 for number in (1, 2, 3))
DRAW = DrawRequest(account_id=6, request_key="k")


@pytest.mark.parametrize("case", [pytest.param(it, id=it["name"]) for it in GOLDEN])
def test_a_golden_signature_is_made_and_known(case: dict[str, str]) -> None:
    keyring = Settings.from_env({"TOMBOLA_MESSAGE_SECRET": case["secret"]}).keyring
    assert keyring.sign(case["body"].encode()) == case["signature"]
    assert len(case["signature"]) == SIGNATURE_LENGTH
    keyring.check(parse_request(case["body"].encode()), case["signature"])


def test_it_covers_what_is_asked_for_and_not_how_it_is_written() -> None:
    keyring = Keyring((NEW,))
    signature = keyring.sign(DRAW.encode())
    keyring.check(parse_request(b'{ "account_id": 6,\n "request_key": "k", "v": 1 }'), signature)
    for changed in ({"account_id": 7}, {"request_key": "l"}, {"lottery_session_id": "s"}, {"campaign": "c"}):
        fields: dict[str, Any] = {"account_id": 6, "request_key": "k"} | changed
        with pytest.raises(NotSigned):
            keyring.check(DrawRequest(**fields), signature)


def test_the_first_secret_signs_and_all_of_them_verify() -> None:
    old, both, new = Keyring((OLD,)), Keyring((NEW, OLD)), Keyring((NEW,))
    assert both.sign(DRAW.encode()) == new.sign(DRAW.encode()) != old.sign(DRAW.encode())
    for signing, verifying in ((old, both), (both, both), (new, both), (both, new)):
        verifying.check(DRAW, signing.sign(DRAW.encode()))
    for signing, verifying in ((old, new), (both, old), (Keyring((OTHER,)), both)):
        with pytest.raises(NotSigned):
            verifying.check(DRAW, signing.sign(DRAW.encode()))


@pytest.mark.parametrize(
    "signature",
    [None, "", "0" * 64, b"\xff" * 64, 7, 1.5, True, [], {}, "ü" * 64, "\ud800" * 64, "A" * 10_000, ["x"] * 3],
    ids=repr,
)
def test_whatever_else_is_there_is_no_signature(signature: Any) -> None:
    with pytest.raises(NotSigned):
        Keyring((NEW, OLD)).check(DRAW, signature)
    Keyring().check(DRAW, signature)  # nothing is asked for where there is no secret


def test_a_signature_in_capitals_or_cut_is_none() -> None:
    signature = Keyring((NEW,)).sign(DRAW.encode())
    for wrong in (signature.upper(), signature[:-1], signature + "0", f" {signature}", signature.encode()):
        with pytest.raises(NotSigned):
            Keyring((NEW,)).check(DRAW, wrong)


def test_what_travels_beside_the_bodies() -> None:
    bodies = [DRAW.encode(), DrawRequest(account_id=7, request_key="l").encode()]
    keyring = Keyring((NEW,))
    signatures = [keyring.sign(body) for body in bodies]
    assert keyring.beside(bodies, None) == [{"signature": it} for it in signatures]
    traced = [{"traceparent": "00-1-2-01"}, {}]
    assert keyring.beside(bodies, traced) == [
        {"traceparent": "00-1-2-01", "signature": signatures[0]},
        {"signature": signatures[1]},
    ]
    assert Keyring().beside(bodies, None) is None
    assert Keyring().beside(bodies, traced) is traced


def test_secrets_are_parsed_and_not_told() -> None:
    keyring = Settings.from_env({"TOMBOLA_MESSAGE_SECRET": f"{NEW.hex()}, {OLD.hex()}"}).keyring
    assert keyring.secrets == (NEW, OLD)
    assert Settings.from_env({}).keyring.secrets == ()
    for wrong in ("c0ffee", "x" * 64, f"{NEW.hex()},", f",{NEW.hex()}", f"{NEW.hex()} {OLD.hex()}x", ","):
        with pytest.raises(ConfigurationError, match="TOMBOLA_MESSAGE_SECRET: at least 32 hex digits") as refused:
            Settings.from_env({"TOMBOLA_MESSAGE_SECRET": wrong})
        assert NEW.hex() not in str(refused.value)
    assert NEW.hex() not in repr(Settings.from_env({"TOMBOLA_MESSAGE_SECRET": NEW.hex()}))
