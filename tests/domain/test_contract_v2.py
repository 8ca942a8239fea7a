"""Contract v2, a request for pulls: against the golden files, against its JSON Schema, and v1 beside it."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tombola.producers.domain.contract
from tests.domain.test_contract import has_integral_float, keyish, values
from tombola.producers.domain import errors, operations
from tombola.producers.domain.contract import (
    ACCOUNT_ID_MAX,
    BODY_BYTES_MAX,
    PULLS_MAX,
    VERSION_WITH_KIND,
    DrawRequest,
    PullsResult,
    parse_result,
)
from tombola.producers.domain.errors import DrawError, InvalidRequest

GOLDEN = Path(__file__).parent / "golden"
SCHEMA = json.loads((Path(tombola.producers.domain.contract.__file__).parent / "draw_request.v2.json").read_bytes())


def golden(name: str) -> list[Any]:
    cases: list[Any] = json.loads((GOLDEN / f"{name}.v2.json").read_bytes())
    return [pytest.param(case, id=case["name"]) for case in cases]


# ---- golden files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", golden("requests"))
def test_a_golden_request_is_read_and_written_byte_for_byte(case: dict[str, Any]) -> None:
    canonical = case["canonical"].encode()
    request = operations.parse_request(canonical)
    assert request == DrawRequest(**case["fields"])
    assert request.encode() == canonical
    assert request.fingerprint() == case["fingerprint"] == hashlib.sha256(canonical).hexdigest()
    for other in case["also_accepted"]:
        assert operations.parse_request(other.encode()).encode() == canonical


@pytest.mark.parametrize("case", golden("results"))
def test_a_golden_result_is_read_and_written_byte_for_byte(case: dict[str, Any]) -> None:
    result = parse_result(case["body"].encode())
    assert isinstance(result, PullsResult)
    assert result.encode() == case["body"].encode()
    assert result.won is case["won"]
    plain = json.loads(case["body"])
    assert [it["pull"] for it in plain["prizes"]] == list(range(1, len(plain["prizes"]) + 1))
    told = {grant["idempotency_key"] for prize in plain["prizes"] for grant in prize["grants"]}
    rows = {row["idempotency_key"] for row in plain["transactions"]}
    assert rows - told == ({f"{result.request_key}:consume"} if result.status == "completed" else set())


@pytest.mark.parametrize("case", golden("invalid"))
def test_a_golden_invalid_body_is_refused_with_its_reason(case: dict[str, str]) -> None:
    with pytest.raises(DrawError) as refused:
        operations.parse_request(case["body"].encode())
    assert type(refused.value) is getattr(errors, case["error"])
    assert case["reason"] in str(refused.value)
    assert str(refused.value).isprintable()


# ---- the JSON Schema -------------------------------------------------------------------------------------------------


def fits_schema(document: object) -> bool:
    valid: bool = jsonschema.Draft202012Validator(SCHEMA).is_valid(document)
    return valid


def fits_parser(document: object) -> bool:
    """Whether the parser takes it for a request for pulls."""
    with contextlib.suppress(InvalidRequest):
        request = operations.parse_request(json.dumps(document).encode())
        return isinstance(request, DrawRequest) and request.pulls is not None
    return False


nearly_requests = st.fixed_dictionaries(
    {
        "v": st.one_of(st.just(2), st.just(2), values),
        "kind": st.one_of(st.just("draw"), st.just("draw"), values),
        "request_key": st.one_of(keyish, values),
        "account_id": st.one_of(st.integers(1, 9), values),
        "pulls": st.one_of(st.integers(-1, 102), values),
    },
    optional={
        "lottery_session_id": st.one_of(keyish, values),
        "campaign": st.one_of(keyish, values),
        "extra": values,
    },
)
documents = nearly_requests.flatmap(
    lambda full: st.one_of(
        st.just(full), st.sets(st.sampled_from(sorted(full))).map(lambda some: {key: full[key] for key in some})
    )
)


@given(documents)
@example({"v": 2, "kind": "draw", "request_key": "k", "account_id": 6, "pulls": 10})
@example({"v": 2, "kind": "draw", "request_key": "k\n", "account_id": 6, "pulls": 10})
@example({"v": 2, "kind": "draw", "request_key": "k", "account_id": 6, "campaign": "c\n", "pulls": 10})
@example({"v": 1, "request_key": "k", "account_id": 6})
def test_schema_and_parser_agree(document: object) -> None:
    if not has_integral_float(document):
        assert fits_schema(document) == fits_parser(document)


def test_the_schema_is_one_and_has_the_bounds_of_the_code() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    properties = SCHEMA["properties"]
    assert properties["v"]["const"] == VERSION_WITH_KIND
    assert properties["kind"]["const"] == DrawRequest.kind
    assert (properties["pulls"]["minimum"], properties["pulls"]["maximum"]) == (1, PULLS_MAX)
    assert properties["account_id"]["maximum"] == ACCOUNT_ID_MAX
    assert set(properties) == {"v", "kind", *DrawRequest.__struct_fields__}


# ---- round trips -----------------------------------------------------------------------------------------------------

keys = st.from_regex(r"\A[A-Za-z0-9._-]{1,64}\Z")
requests = st.builds(
    DrawRequest,
    account_id=st.integers(1, ACCOUNT_ID_MAX),
    request_key=keys,
    lottery_session_id=st.one_of(st.just(""), st.from_regex(r"\A[A-Za-z0-9._-]{1,100}\Z")),
    campaign=keys,
    pulls=st.one_of(st.none(), st.integers(1, PULLS_MAX)),
)


@given(requests)
def test_a_request_survives_the_journey(request: DrawRequest) -> None:
    again = operations.parse_request(request.encode())
    assert again == request
    assert again.encode() == request.encode()
    assert len(request.encode()) < BODY_BYTES_MAX
    assert fits_schema(json.loads(request.encode())) == (request.pulls is not None)


@given(requests, requests)
def test_fingerprints_tell_requests_apart(one: DrawRequest, other: DrawRequest) -> None:
    """Also a draw without `pulls` from one with `pulls: 1`: their results differ."""
    assert (one.fingerprint() == other.fingerprint()) == (one == other)


def test_a_request_without_pulls_has_the_bytes_of_v1() -> None:
    expected = b'{"v":1,"request_key":"k","lottery_session_id":"k","account_id":6,"campaign":"winter-2026"}'
    assert DrawRequest(account_id=6, request_key="k", campaign="winter-2026").encode() == expected


@pytest.mark.parametrize("pulls", [0, 101, -1, True, 1.0, "10", [1]])
def test_what_a_worker_would_refuse_is_refused_where_it_is_made(pulls: Any) -> None:
    with pytest.raises(InvalidRequest, match="pulls"):
        DrawRequest(account_id=6, campaign="winter-2026", pulls=pulls)
