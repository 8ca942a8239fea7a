"""Contract v2, the kinds beside the draw: against the golden files, and against their JSON Schema."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import tombola.producers.domain.contract
from tests.domain.test_contract import has_integral_float, keyish, values
from tombola.producers.domain import errors, operations
from tombola.producers.domain.contract import ACCOUNT_ID_MAX, VERSION_WITH_KIND, Request, parse_movement_result
from tombola.producers.domain.errors import DrawError, InvalidRequest
from tombola.producers.domain.operations import OPERATIONS
from tombola.producers.domain.operations.hold import VALID_S_DEFAULT, VALID_S_MAX
from tombola.producers.domain.operations.movements import REASON_LENGTH_MAX
from tombola.producers.domain.operations.refund import POLICIES

GOLDEN = Path(__file__).parent / "golden"
DOMAIN = Path(tombola.producers.domain.contract.__file__).parent
SCHEMA = json.loads((DOMAIN / "movement_requests.v2.json").read_bytes())
BY_KIND = {it["properties"]["kind"]["const"]: it for it in SCHEMA["oneOf"]}
KINDS = sorted(OPERATIONS.keys() - {"draw"})
# What no JSON Schema can say of a body that fits one.
UNSEEN = ("shorten", "printable", "itself", "zone")


def golden(name: str) -> list[Any]:
    cases: list[Any] = json.loads((GOLDEN / f"movement_{name}.v2.json").read_bytes())
    return [pytest.param(case, id=case["name"]) for case in cases]


# ---- golden files ----------------------------------------------------------------------------------------------------


def test_the_golden_requests_are_of_every_kind() -> None:
    assert {it.values[0]["kind"] for it in golden("requests")} == set(KINDS)


@pytest.mark.parametrize("case", golden("requests"))
def test_a_golden_request_is_read_and_written_byte_for_byte(case: dict[str, Any]) -> None:
    canonical = case["canonical"].encode()
    request = operations.parse_request(canonical)
    assert request == OPERATIONS[case["kind"]].FIELDS(**case["fields"])
    assert request.encode() == canonical
    assert request.fingerprint() == case["fingerprint"] == hashlib.sha256(canonical).hexdigest()
    for other in case["also_accepted"]:
        assert operations.parse_request(other.encode()).encode() == canonical
        assert fits_schema(json.loads(other)), other
    assert fits_schema(json.loads(canonical))


@pytest.mark.parametrize("case", golden("requests"))
def test_a_golden_request_is_restored_from_its_row(case: dict[str, Any]) -> None:
    it = operations.parse_request(case["canonical"].encode())
    campaign = getattr(it, "campaign", "")
    row = (it.request_key, it.lottery_session_id, it.account_id, campaign, it.kind, it.terms)
    assert operations.restore(*row) == it


@pytest.mark.parametrize("case", golden("results"))
def test_a_golden_result_is_read_and_written_byte_for_byte(case: dict[str, str]) -> None:
    assert parse_movement_result(case["body"].encode()).encode() == case["body"].encode()


@pytest.mark.parametrize("case", golden("invalid"))
def test_a_golden_invalid_body_is_refused_with_its_reason(case: dict[str, str]) -> None:
    with pytest.raises(DrawError) as refused:
        operations.parse_request(case["body"].encode())
    assert type(refused.value) is getattr(errors, case["error"])
    assert case["reason"] in str(refused.value)
    assert str(refused.value).isprintable()
    assert not fits_schema(json.loads(case["body"])) or any(it in str(refused.value) for it in UNSEEN)


# ---- the JSON Schema -------------------------------------------------------------------------------------------------


def fits_schema(document: object) -> bool:
    valid: bool = jsonschema.Draft202012Validator(SCHEMA).is_valid(document)
    return valid


def why_refused(document: object) -> str | None:
    """Why the parser refuses it; None for a movement."""
    try:
        request: Request = operations.parse_request(json.dumps(document).encode())
    except InvalidRequest as error:
        return str(error)
    return None if request.kind in KINDS else "a draw"


GOOD: dict[str, dict[str, Any]] = {
    case.values[0]["kind"]: json.loads(case.values[0]["canonical"]) for case in golden("requests")
}
texts = st.one_of(
    st.text(alphabet="05.-+e A~é\n\x00/", max_size=6),
    st.sampled_from(
        ["5.00", "-5", "0", "-0.00", "99999999.99", "100000000", "refuse", "write_off", "x" * 101, "é" * 60]
    ),
    keyish,
    values,
)


@st.composite
def nearly_movements(draw: st.DrawFn) -> dict[str, Any]:
    """A good request with up to two fields changed, one missing, or one more."""
    body = dict(GOOD[draw(st.sampled_from(KINDS))])
    for name in draw(st.lists(st.sampled_from([*body, "extra", "to", "kind", "v"]), max_size=2)):
        body[name] = draw(texts)
    if draw(st.booleans()):
        del body[draw(st.sampled_from(sorted(body)))]
    return body


@given(nearly_movements())
@example(GOOD["recharge"] | {"amount": "5\n"})
@example(GOOD["recharge"] | {"amount": "00000000.00"})
@example(GOOD["adjust"] | {"amount": "--5"})
@example(GOOD["post"] | {"amount": "0"})
@example(GOOD["hold"] | {"request_key": "k\n"})
@settings(max_examples=400, suppress_health_check=list(HealthCheck))
def test_schema_and_parser_agree(document: dict[str, Any]) -> None:
    if has_integral_float(document):
        return
    refused = why_refused(document)
    if fits_schema(document):
        assert refused is None or any(it in refused for it in UNSEEN), refused
    else:
        # A time may be written in more ways than the schema shows.
        assert refused is not None, document


def test_the_schema_has_the_kinds_and_bounds_of_the_code() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert sorted(BY_KIND) == KINDS
    defs = SCHEMA["$defs"]
    assert defs["v"]["const"] == VERSION_WITH_KIND
    assert defs["account_id"]["maximum"] == ACCOUNT_ID_MAX
    assert defs["reason"]["maxLength"] == REASON_LENGTH_MAX
    for kind, shape in BY_KIND.items():
        assert set(shape["properties"]) == {"v", "kind", *OPERATIONS[kind].FIELDS.__struct_fields__}, kind
    valid_s = BY_KIND["hold"]["properties"]["valid_s"]
    assert (valid_s["maximum"], valid_s["default"]) == (VALID_S_MAX, VALID_S_DEFAULT)
    assert tuple(BY_KIND["refund"]["properties"]["policy"]["enum"]) == POLICIES
