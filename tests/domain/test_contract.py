"""Contract v1 against the golden files, against its JSON Schema, and against what a hostile publisher may send."""

import base64
import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tombola.producers.domain.contract
from tombola.producers.domain import errors
from tombola.producers.domain.contract import (
    BODY_BYTES_MAX,
    DrawRequest,
    DrawResult,
    LedgerRow,
    parse_request,
    parse_result,
)
from tombola.producers.domain.errors import DrawError, InvalidKey, InvalidRequest, UnknownVersion

GOLDEN = Path(__file__).parent / "golden"
SCHEMA = json.loads((Path(tombola.producers.domain.contract.__file__).parent / "draw_request.v1.json").read_bytes())
K = "lottery_req_1700000000000_0123abcd_007"


def golden(name: str) -> list[Any]:
    cases: list[Any] = json.loads((GOLDEN / f"{name}.json").read_bytes())
    return [pytest.param(case, id=case["name"]) for case in cases]


def body_of(case: dict[str, str]) -> bytes:
    return base64.b64decode(case["body_base64"]) if "body_base64" in case else case["body"].encode()


def body(**changes: Any) -> bytes:
    fields = {"v": 1, "request_key": "k", "account_id": 6} | changes
    return json.dumps(fields).encode()


# ---- golden files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden("requests"))
def test_a_golden_request_is_read_and_written_byte_for_byte(case: dict[str, Any]) -> None:
    canonical = case["canonical"].encode()
    request = parse_request(canonical)
    assert {name: getattr(request, name) for name in case["fields"]} == case["fields"]
    assert request.encode() == canonical
    assert request == DrawRequest(**case["fields"])
    # Not by our own hashing: the fingerprint is defined as what any language gets from the bytes.
    assert request.fingerprint() == case["fingerprint"] == hashlib.sha256(canonical).hexdigest()
    for other in case["also_accepted"]:
        assert parse_request(other.encode()) == request
        assert parse_request(other.encode()).encode() == canonical


def test_different_golden_requests_have_different_fingerprints() -> None:
    cases = [case.values[0] for case in golden("requests")]
    assert len({case["fingerprint"] for case in cases}) == len(cases)


@pytest.mark.parametrize("case", golden("results"))
def test_a_golden_result_is_read_and_written_byte_for_byte(case: dict[str, Any]) -> None:
    result = parse_result(case["body"].encode())
    assert result.encode() == case["body"].encode()
    assert result.won is case["won"]
    plain = json.loads(case["body"])
    assert plain["prize_amount"] == result.prize_amount
    assert [row["idempotency_key"] for row in plain["transactions"]] == [
        row.idempotency_key for row in result.transactions
    ]


@pytest.mark.parametrize("case", golden("invalid"))
def test_a_golden_invalid_body_is_refused_with_its_reason(case: dict[str, str]) -> None:
    with pytest.raises(DrawError) as refused:
        parse_request(body_of(case))
    assert type(refused.value) is getattr(errors, case["error"])
    assert case["reason"] in str(refused.value)
    # It ends up in a log and in the dead letters: one line, and not the sender's own megabyte.
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300


# ---- the JSON Schema -------------------------------------------------------------------------------------------------


def fits_schema(document: object) -> bool:
    valid: bool = jsonschema.Draft202012Validator(SCHEMA).is_valid(document)
    return valid


def fits_parser(document: object) -> bool:
    try:
        parse_request(json.dumps(document).encode())
    except InvalidRequest:
        return False
    return True


def has_integral_float(value: object) -> bool:
    """JSON Schema counts 6.0 among the integers; we refuse it, as a language may have rounded it on the way."""
    if isinstance(value, dict):
        return any(map(has_integral_float, value.values()))
    return isinstance(value, float) and math.isfinite(value) and value.is_integer()


keyish = st.one_of(
    st.from_regex(r"\A[A-Za-z0-9._-]{1,64}\Z"),
    st.text(alphabet="aZ9._-:\n \x00é", max_size=3),
    st.integers(60, 104).map(lambda length: "k" * length),
)
values = st.one_of(
    keyish,
    st.integers(-2, 12),
    st.sampled_from([2**63 - 1, 2**63, -(2**63), 10**30]),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(), max_size=2),
)
nearly_requests = st.fixed_dictionaries(
    {
        "v": st.one_of(st.just(1), st.just(1), values),
        "request_key": st.one_of(keyish, values),
        "account_id": st.one_of(st.integers(1, 9), values),
    },
    optional={
        "lottery_session_id": st.one_of(keyish, values),
        "campaign": st.one_of(keyish, values),
        "extra": st.one_of(values),
    },
)
documents = st.one_of(
    nearly_requests,
    nearly_requests.flatmap(
        lambda full: st.sets(st.sampled_from(sorted(full))).map(lambda some: {k: full[k] for k in some})
    ),
    values,
)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(documents)
@example({"v": 1, "request_key": "k\n", "account_id": 6})
@example({"v": 1, "request_key": "k", "account_id": 6, "lottery_session_id": "s\n"})
@example({"v": 1, "request_key": "k", "account_id": 6, "campaign": "c\n"})
@example({"v": True, "request_key": "k", "account_id": 6})
@example({"v": 1, "request_key": "k", "account_id": True})
@example({"v": 1, "request_key": "k", "account_id": 2**63})
def test_the_schema_and_the_parser_agree(document: object) -> None:
    if not has_integral_float(document):
        assert fits_schema(document) == fits_parser(document)


@pytest.mark.parametrize("case", golden("requests"))
def test_golden_requests_fit_the_schema(case: dict[str, Any]) -> None:
    for text in [case["canonical"], *case["also_accepted"]]:
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("case", golden("invalid"))
def test_golden_invalid_bodies_do_not_fit_the_schema(case: dict[str, str]) -> None:
    try:
        document = json.loads(body_of(case).decode("utf-8"))
    except ValueError:
        return  # no JSON to begin with
    assert has_integral_float(document) or not fits_schema(document)


def test_the_schema_is_one_and_names_the_parsers_limits() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert str(BODY_BYTES_MAX) in SCHEMA["description"]
    assert SCHEMA["properties"]["account_id"]["maximum"] == tombola.producers.domain.contract.ACCOUNT_ID_MAX
    assert SCHEMA["properties"]["campaign"]["default"] == tombola.producers.domain.contract.CAMPAIGN_DEFAULT
    assert SCHEMA["properties"]["v"]["const"] == tombola.producers.domain.contract.VERSION


# ---- round trips -----------------------------------------------------------------------------------------------------

keys = st.from_regex(r"\A[A-Za-z0-9._-]{1,64}\Z")
requests = st.builds(
    DrawRequest,
    account_id=st.integers(1, 2**63 - 1),
    request_key=keys,
    lottery_session_id=st.one_of(st.just(""), st.from_regex(r"\A[A-Za-z0-9._-]{1,100}\Z")),
    campaign=keys,
)


@given(requests)
def test_a_request_survives_the_journey(request: DrawRequest) -> None:
    again = parse_request(request.encode())
    assert again == request
    assert again.encode() == request.encode()
    assert len(request.encode()) < BODY_BYTES_MAX
    assert fits_schema(json.loads(request.encode()))


@given(requests, requests)
def test_fingerprints_tell_requests_apart(one: DrawRequest, other: DrawRequest) -> None:
    assert (one.fingerprint() == other.fingerprint()) == (one == other)


amounts = st.decimals(min_value=-9999, max_value=9999, places=2).map(str)
results = st.builds(
    DrawResult,
    request_key=keys,
    lottery_session_id=keys,
    account_id=st.integers(1, 2**63 - 1),
    campaign=keys,
    status=st.sampled_from(["completed", "rejected"]),
    reason=st.one_of(st.none(), st.text(max_size=50)),
    prize_amount=amounts,
    balance_after=st.one_of(st.none(), amounts),
    transactions=st.lists(st.builds(LedgerRow, keys, keys, keys, amounts, amounts, amounts), max_size=3),
)


@given(results)
def test_a_result_survives_the_journey(result: DrawResult) -> None:
    assert parse_result(result.encode()) == result
    assert parse_result(result.encode()).encode() == result.encode()
    assert json.loads(result.encode())["transactions"] == [
        {name: getattr(row, name) for name in row.__struct_fields__} for row in result.transactions
    ]


@given(st.binary(max_size=200))
def test_no_bytes_are_worse_than_invalid(noise: bytes) -> None:
    for parse in (parse_request, parse_result):
        with contextlib.suppress(DrawError):
            parse(noise)


@given(st.text(max_size=60))
def test_a_key_from_outside_is_taken_as_it_is_or_refused(text: str) -> None:
    try:
        request = parse_request(json.dumps({"v": 1, "request_key": text, "account_id": 6}).encode())
    except InvalidRequest:
        return
    assert request.request_key == text


# ---- hostile bodies --------------------------------------------------------------------------------------------------

NESTED = 8000
HOSTILE: dict[str, Callable[[], bytes]] = {
    "ten megabytes of blanks": lambda: b" " * (10 << 20),
    "ten megabytes in a field": lambda: body(campaign="x" * (10 << 20)),
    "valid, but for a blank too many": lambda: body() + b" " * (BODY_BYTES_MAX + 1 - len(body())),
    "lists in lists": lambda: b"[" * NESTED,
    "objects in objects": lambda: b'{"v":' * 3000,
    "nested in an unknown field": lambda: b'{"v":1,"x":' + b"[" * NESTED + b"]" * NESTED + b"}",
    "nested in a later version": lambda: b'{"v":2,"x":' + b"[" * NESTED + b"]" * NESTED + b"}",
    "a number of 16,000 digits": lambda: b'{"v":1,"request_key":"k","account_id":' + b"9" * 16_000 + b"}",
    "a version of 16,000 digits": lambda: b'{"v":' + b"9" * 16_000 + b"}",
    "a float of 16,000 digits": lambda: b'{"v":1,"request_key":"k","account_id":0.' + b"1" * 16_000 + b"}",
    "1,500 unknown fields": lambda: json.dumps({f"f{i}": 1 for i in range(1500)}).encode(),
}


FORGED = ["\x1b[31m", "a\nERROR forged log line", "\u202eright to left", "\u2028", "\x00", "x" * 9000, "\\"]


@pytest.mark.parametrize("name", FORGED, ids=range(len(FORGED)))
def test_a_field_name_cannot_forge_or_flood_a_log(name: str) -> None:
    """The parser's message quotes it."""
    for parse in (parse_request, parse_result):
        with pytest.raises(DrawError) as refused:
            parse(body(**{name: 1}))
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 300


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_body_is_refused_at_once(make: Callable[[], bytes]) -> None:
    hostile = make()
    begun_s = time.perf_counter()
    with pytest.raises(InvalidRequest) as refused:
        parse_request(hostile)
    assert time.perf_counter() - begun_s < 0.25
    assert len(str(refused.value)) < 300
    assert str(refused.value).isprintable()


def test_a_body_of_exactly_the_limit_is_read() -> None:
    assert parse_request(body() + b" " * (BODY_BYTES_MAX - len(body()))).request_key == "k"


def test_of_a_field_twice_the_last_counts() -> None:
    """As in JavaScript, Python and most parsers. What counts is what is fingerprinted, so it cannot change later."""
    request = parse_request(b'{"v":1,"request_key":"k","account_id":6,"account_id":7}')
    assert request.account_id == 7
    assert request.fingerprint() == DrawRequest(request_key="k", account_id=7).fingerprint()


@pytest.mark.parametrize("version", [0, 2, 3, -1, 10**6, 2**64])
def test_another_version_says_what_to_do(version: int) -> None:
    """Whatever else its body holds: a worker of today cannot know the shape of tomorrow's."""
    for hostile in (body(v=version), body(v=version, extra={"a": [1]}), json.dumps({"v": version}).encode()):
        with pytest.raises(UnknownVersion, match=r"upgrade the workers, then replay"):
            parse_request(hostile)


@pytest.mark.parametrize("version", [True, None, "2", 2.0, [2], {"v": 2}])
def test_what_is_no_version_is_invalid(version: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_request(body(v=version))
    assert not isinstance(refused.value, UnknownVersion)


# ---- made in Python --------------------------------------------------------------------------------------------------


def test_a_request_makes_its_own_key_and_session() -> None:
    one, other = DrawRequest(account_id=6), DrawRequest(account_id=6)
    assert one.request_key != other.request_key
    assert one.lottery_session_id == one.request_key
    assert one.campaign == "default"
    assert DrawRequest(account_id=6, request_key="k", lottery_session_id="s").lottery_session_id == "s"


def test_a_request_does_not_change() -> None:
    request = DrawRequest(account_id=6)
    with pytest.raises(AttributeError):
        request.account_id = 7  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"account_id": 0}, InvalidRequest),
        ({"account_id": -6}, InvalidRequest),
        ({"account_id": 2**63}, InvalidRequest),
        ({"account_id": True}, InvalidRequest),
        ({"account_id": 6.0}, InvalidRequest),
        ({"account_id": "6"}, InvalidRequest),
        ({"account_id": None}, InvalidRequest),
        ({"account_id": 6, "request_key": "a:b"}, InvalidKey),
        ({"account_id": 6, "request_key": "k" * 65}, InvalidKey),
        ({"account_id": 6, "lottery_session_id": "a b"}, InvalidKey),
        ({"account_id": 6, "campaign": ""}, InvalidRequest),
        ({"account_id": 6, "campaign": "c\n"}, InvalidRequest),
    ],
)
def test_what_a_worker_would_refuse_is_refused_where_it_is_made(
    fields: dict[str, Any], error: type[InvalidRequest]
) -> None:
    with pytest.raises(error):
        DrawRequest(**fields)


@pytest.mark.parametrize("status", ["pending", "", None])
def test_a_result_has_one_of_two_statuses(status: object) -> None:
    stored = json.loads(golden("results")[0].values[0]["body"])
    with pytest.raises(DrawError):
        parse_result(json.dumps(stored | {"status": status}).encode())


def test_a_result_with_an_unknown_field_is_none() -> None:
    stored = json.loads(golden("results")[0].values[0]["body"])
    with pytest.raises(DrawError, match="extra"):
        parse_result(json.dumps(stored | {"extra": 1}).encode())


def test_the_result_in_the_interface_is_the_golden_one() -> None:
    won = json.loads(golden("results")[0].values[0]["body"])
    assert list(won) == [
        *("v", "request_key", "lottery_session_id", "account_id", "campaign", "status", "reason"),
        *("prize_amount", "balance_after", "transactions"),
    ]
    assert [row["idempotency_key"] for row in won["transactions"]] == [f"{K}:consume", f"{K}:reward"]
