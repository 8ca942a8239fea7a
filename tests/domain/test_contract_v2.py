"""Contract v2, a draw with pulls or a client nonce: against the golden files and its JSON Schema, and v1 beside it."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

import tombola.producers.domain.contract
from tests.domain.test_contract import has_integral_float, keyish, values
from tombola.producers.domain import errors, operations
from tombola.producers.domain.contract import (
    ACCOUNT_ID_MAX,
    BODY_BYTES_MAX,
    CLIENT_NONCE_LENGTH_MAX,
    CLIENT_NONCE_LENGTH_MIN,
    PULLS_MAX,
    TERMS_LENGTH_MAX,
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
    """Whether the parser takes it for a draw of contract v2."""
    with contextlib.suppress(InvalidRequest):
        request = operations.parse_request(json.dumps(document).encode())
        return isinstance(request, DrawRequest) and request.terms is not None
    return False


nonces = st.from_regex(r"\A[A-Za-z0-9_-]{16,64}\Z")


nearly_requests = st.fixed_dictionaries(
    {
        "v": st.one_of(st.just(2), st.just(2), values),
        "kind": st.one_of(st.just("draw"), st.just("draw"), values),
        "request_key": st.one_of(keyish, values),
        "account_id": st.one_of(st.integers(1, 9), values),
    },
    optional={
        "pulls": st.one_of(st.integers(-1, 102), values),
        "client_nonce": st.one_of(nonces, st.integers(14, 66).map(lambda length: "n" * length), keyish, values),
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
@example({"v": 1, "request_key": "k", "account_id": 6, "client_nonce": "n" * 16})
@example({"v": 2, "kind": "draw", "request_key": "k", "account_id": 6})
@example({"v": 2, "kind": "draw", "request_key": "k", "account_id": 6, "client_nonce": "n" * 16})
@example({"v": 2, "kind": "draw", "request_key": "k", "account_id": 6, "client_nonce": "n" * 16 + "\n"})
@example({"v": 2, "kind": "draw", "request_key": "k", "account_id": 6, "pulls": 10, "client_nonce": ""})
@example({"v": 2, "kind": "draw", "request_key": "k", "account_id": 6, "pulls": None, "client_nonce": "n" * 16})
def test_schema_and_parser_agree(document: object) -> None:
    if not has_integral_float(document):
        assert fits_schema(document) == fits_parser(document)


def test_the_schema_is_one_and_has_the_bounds_of_the_code() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    properties = SCHEMA["properties"]
    assert properties["v"]["const"] == VERSION_WITH_KIND
    assert properties["kind"]["const"] == DrawRequest.kind
    assert (properties["pulls"]["minimum"], properties["pulls"]["maximum"]) == (1, PULLS_MAX)
    lengths = f"{{{CLIENT_NONCE_LENGTH_MIN},{CLIENT_NONCE_LENGTH_MAX}}}"
    assert properties["client_nonce"]["pattern"] == f"^[A-Za-z0-9_-]{lengths}$"
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
    client_nonce=st.one_of(st.just(""), nonces),
)


@given(requests)
def test_a_request_survives_the_journey(request: DrawRequest) -> None:
    again = operations.parse_request(request.encode())
    assert again == request
    assert again.encode() == request.encode()
    assert len(request.encode()) < BODY_BYTES_MAX
    assert fits_schema(json.loads(request.encode())) == (request.terms is not None)
    assert operations.restore(*row_of(request)) == request


def row_of(request: DrawRequest) -> tuple[str, str, int, str, str | None, str | None]:
    """What the request's row keeps of it."""
    kind = None if request.terms is None else request.kind
    return request.request_key, request.lottery_session_id, request.account_id, request.campaign, kind, request.terms


@given(requests, requests)
def test_fingerprints_tell_requests_apart(one: DrawRequest, other: DrawRequest) -> None:
    """Also a draw without `pulls` from one with `pulls: 1`, whose results differ, and one nonce from another."""
    assert (one.fingerprint() == other.fingerprint()) == (one == other)


@given(requests)
def test_a_request_without_a_nonce_is_what_it_was_before_there_were_nonces(request: DrawRequest) -> None:
    """Bytes, terms and fingerprint, written down here anew: rows and messages of the release before go on."""
    plain = structs.replace(request, client_nonce="")
    common = {"request_key": plain.request_key, "lottery_session_id": plain.lottery_session_id}
    if plain.pulls is None:
        body: dict[str, Any] = {"v": 1} | common | {"account_id": plain.account_id, "campaign": plain.campaign}
        terms = None
    else:
        body = {"v": 2, "kind": "draw", "account_id": plain.account_id} | common
        body |= {"campaign": plain.campaign, "pulls": plain.pulls}
        terms = f'["{plain.campaign}",{plain.pulls}]'
    expected = json.dumps(body, separators=(",", ":")).encode()
    assert (plain.encode(), plain.terms) == (expected, terms)
    assert plain.fingerprint() == hashlib.sha256(expected).hexdigest()
    assert operations.restore(*row_of(plain)) == plain
    if request.client_nonce:
        assert request.fingerprint() != plain.fingerprint()


def test_the_terms_of_a_request_with_a_nonce_name_it() -> None:
    single = DrawRequest(account_id=6, request_key="k", client_nonce="n" * 16)
    assert single.terms == f'["default",null,"{"n" * 16}"]'
    assert operations.restore(*row_of(single)) == single
    longest = DrawRequest(account_id=6, campaign="c" * 64, pulls=PULLS_MAX, client_nonce="n" * CLIENT_NONCE_LENGTH_MAX)
    assert len(longest.terms or "") <= TERMS_LENGTH_MAX


@pytest.mark.parametrize(
    "terms",
    [
        None,
        "",
        "6",
        "[]",
        '["default"]',
        '["default",null]',
        '["default",10,""]',
        '["default", 10]',
        '["default",null,"short"]',
        '["default",null,7]',
        '["default",null,"nnnnnnnnnnnnnnnn","more"]',
        '{"campaign":"default"}',
    ],
)
def test_other_terms_make_no_draw(terms: str | None) -> None:
    with pytest.raises(InvalidRequest):
        operations.restore("k", "k", 6, "default", "draw", terms)


def test_a_request_without_pulls_has_the_bytes_of_v1() -> None:
    expected = b'{"v":1,"request_key":"k","lottery_session_id":"k","account_id":6,"campaign":"winter-2026"}'
    assert DrawRequest(account_id=6, request_key="k", campaign="winter-2026").encode() == expected


@pytest.mark.parametrize("pulls", [0, 101, -1, True, 1.0, "10", [1]])
def test_what_a_worker_would_refuse_is_refused_where_it_is_made(pulls: Any) -> None:
    with pytest.raises(InvalidRequest, match="pulls"):
        DrawRequest(account_id=6, campaign="winter-2026", pulls=pulls)


@pytest.mark.parametrize("nonce", ["n" * 15, "n" * 65, "n" * 15 + ".", "n" * 16 + "\n", "n" * 16 + "\u0663", " " * 16])
def test_a_nonce_that_a_worker_would_refuse_is_refused_where_it_is_made(nonce: str) -> None:
    with pytest.raises(InvalidRequest, match="client_nonce is 16 to 64 characters"):
        DrawRequest(account_id=6, client_nonce=nonce)
