"""Strangers verify draws of each kind from their proofs alone: in Python without the project, and in JavaScript."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.verifiers import draws
from tests.verifiers.draws import ANCHOR, BOOKS_KEY, KEYS, KINDS, House, epoch_number, proofs_of
from tests.verifiers.running import VERIFIERS, Report, in_node, in_python, options_of, shown
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.proofs import Proof

DRAWS = 24  # of each kind
MANY = 1_000

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True, scope="module")
def _node() -> None:
    if shutil.which("node") is None:
        pytest.fail("verify.js needs Node here: install it")


def verdicts(report: Report) -> dict[str, str]:
    return {it["claim"]: it["verdict"] for it in report["claims"]}


def words(report: Report, claim: str) -> str:
    return next(str(it["words"]) for it in report["claims"] if it["claim"] == claim)


def texts(proofs: list[Proof]) -> list[str]:
    return [it.encode().decode() for it in proofs]


def proven_by_both(folder: Path, proofs: list[Proof]) -> list[Report]:
    given = texts(proofs)
    by_python = in_python(folder, given)
    assert shown(by_python) == []
    assert in_node(folder, [(text, {}) for text in given]) == by_python
    return by_python


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_each_kind_are_proven(kind: str, tmp_path: Path) -> None:
    reports = proven_by_both(tmp_path, proofs_of(kind, DRAWS))
    assert len(reports) == DRAWS


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_draws_of_each_kind_are_proven(kind: str, tmp_path: Path) -> None:
    assert len(proven_by_both(tmp_path, proofs_of(kind, MANY))) == MANY


def test_the_kinds_are_what_they_are_called() -> None:
    """Otherwise the tests above would prove draws that are all alike."""

    def count(kind: str, is_so: Callable[[Proof], bool]) -> int:
        return sum(map(is_so, proofs_of(kind, DRAWS)))

    def notes(proof: Proof) -> str:
        return proof.rows[0].notes or ""

    assert count("single", lambda it: len(it.rows) == 1) > 5
    assert count("single", lambda it: len(it.rows) > 1) > 5
    assert count("single", lambda it: it.epoch is not None and it.epoch.name == "0.0") > 3
    assert count("ten-pull", lambda it: '"pulls":10' in it.request) == DRAWS
    assert count("ten-pull", lambda it: "ITEM.CUP" in (it.result or "")) > 5
    assert count("sold out", lambda it: " gone=" in notes(it)) > DRAWS / 2
    assert count("sold out", lambda it: ".phone," in notes(it) and ".cup" in notes(it)) > 3
    assert count("guarantee", lambda it: ",3" in notes(it).partition("since=")[2]) > 2
    assert count("tier", lambda it: " tier=vip " in notes(it)) == DRAWS
    assert count("tier", lambda it: " code=" in "".join(row.notes or "" for row in it.rows)) > 3
    assert count("rejected", lambda it: it.status == "rejected") == DRAWS
    assert count("refunded", lambda it: len(it.refund) > 1) > 3
    assert count("refunded", lambda it: " off=" in (it.refund[0].notes or "")) > 0
    assert count("refunded", lambda it: it.epoch is not None and it.refund[0].delta_amount == "18.00") == DRAWS
    assert count("ten-pull", lambda it: "client_nonce" in it.request) == DRAWS / 2


def test_a_repeat_has_the_same_proof_and_fits_the_receipts_of_the_first(tmp_path: Path) -> None:
    first, again = proofs_of("repeat", DRAWS), proofs_of("repeat", DRAWS)
    assert texts(first) == texts(again)
    for proof, repeat in zip(first[:5], again, strict=False):
        kept = {"receipts": [it for it in (proof.receipts.accepted, proof.receipts.settled) if it]}
        [report] = in_python(tmp_path, texts([repeat]), *options_of(tmp_path, kept))
        assert verdicts(report)["kept"] == "proven", shown([report])
        assert in_node(tmp_path, [(texts([repeat])[0], kept)]) == [report]


def test_what_was_published_replaces_what_the_proof_says(tmp_path: Path) -> None:
    trust = {"anchor": ANCHOR.hex(), "keys": KEYS, "books_key": BOOKS_KEY.public.text}
    given = texts(proofs_of("ten-pull", 3))
    by_python = in_python(tmp_path, given, *options_of(tmp_path, trust))
    assert shown(by_python) == []
    assert in_node(tmp_path, [(text, trust) for text in given]) == by_python
    assert not [it for report in by_python for it in report["limits"] if "Compare" in it]


# ---- not provable yet ------------------------------------------------------------------------------------------------


def not_yet(folder: Path, proof: Proof, **changes: object) -> Report:
    """The report of both verifiers on a proof with these fields."""
    text = json.dumps(json.loads(proof.encode()) | changes, separators=(",", ":"))
    [report] = in_python(folder, [text])
    assert in_node(folder, [(text, {})]) == [report]
    assert report["verdict"] == "not provable yet", report
    return report


def test_before_the_secret_is_published_all_but_the_draw_is_proven(tmp_path: Path) -> None:
    house = House()
    house.draw(DrawRequest(account_id=6, request_key="k"), epoch_number(3, is_revealed=False))
    report = not_yet(tmp_path, house.proofs()[0])
    open_ones = {name for name, verdict in verdicts(report).items() if verdict != "proven"}
    assert open_ones == {"commitment", "anchor", "draw"}
    assert "2026-11-05T00:00:00.000000Z" in words(report, "draw")


@pytest.mark.parametrize("status", ["accepted", "dead"])
def test_a_draw_that_has_not_settled(status: str, tmp_path: Path) -> None:
    house = House()
    house.unsettled(DrawRequest(account_id=6, request_key="k"), epoch_number(3), status)
    found = verdicts(not_yet(tmp_path, house.proofs()[0]))
    assert found["request"] == found["accepted"] == found["commitment"] == found["odds"] == "proven"
    assert found["rows"] == ("proven" if status == "dead" else "not provable yet")
    assert found["draw"] == found["result"] == found["settled"] == found["sealed"] == "not provable yet"


def test_without_receipts_nobody_knows_what_was_promised(tmp_path: Path) -> None:
    [proof] = proofs_of("ten-pull", 1)
    report = not_yet(tmp_path, proof, receipts={"accepted": None, "settled": None})
    open_ones = {name for name, verdict in verdicts(report).items() if verdict != "proven"}
    assert open_ones == {"accepted", "commitment", "settled"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda _: None, "not sealed yet"),
        (lambda books: books | {"leaves": []}, "is not sealed yet"),
        (lambda books: books | {"checkpoint": None}, "no signed checkpoint covers them yet"),
        (lambda books: books | {"checkpoint": BOOKS_KEY.sign(0, bytes(32))}, "no signed checkpoint covers them yet"),
        (lambda books: books | {"key": None}, "give the operator's public key"),
    ],
)
def test_rows_that_are_not_sealed_yet(change: Callable[[Report], Report | None], says: str, tmp_path: Path) -> None:
    [proof] = proofs_of("ten-pull", 1)
    report = not_yet(tmp_path, proof, books=change(json.loads(proof.encode())["books"]))
    assert {name for name, verdict in verdicts(report).items() if verdict != "proven"} == {"sealed"}
    assert says in words(report, "sealed")


def test_a_request_that_was_given_up_and_replayed_in_another_epoch(tmp_path: Path) -> None:
    """Its receipt of before names another secret: no forgery, and nothing that a player should overlook."""
    kept = House()
    kept.unsettled(DrawRequest(account_id=6, request_key="k"), epoch_number(3), "dead")
    now = House()
    now.draw(DrawRequest(account_id=6, request_key="k"), epoch_number(5))
    trust = {"receipts": [kept.proofs()[0].receipts.accepted]}
    text = texts(now.proofs())[0]
    [report] = in_python(tmp_path, [text], *options_of(tmp_path, trust))
    assert verdicts(report)["kept"] == "not provable yet"
    assert "accepted once more" in words(report, "kept")
    assert in_node(tmp_path, [(text, trust)]) == [report]


def test_what_a_proof_cannot_show_is_said(tmp_path: Path) -> None:
    def limits(proof: Proof) -> str:
        [report] = in_python(tmp_path, texts([proof]))
        return "\n".join(report["limits"])

    assert "you did not choose any randomness" in limits(proofs_of("single", 1)[0])
    with_nonce = limits(proofs_of("single", 2)[1])
    assert "randomness" not in with_nonce
    assert "Keys and anchor" in with_nonce
    assert "how often you had drawn before" in limits(proofs_of("tier", 1)[0])
    assert "not there any more is the operator's record: cup, phone" in limits(proofs_of("sold out", 2)[1])
    assert "The reason is the operator's record" in limits(proofs_of("rejected", 1)[0])


# ---- alone -----------------------------------------------------------------------------------------------------------


def test_verify_py_is_for_python_3_9_and_its_standard_library() -> None:
    tree = ast.parse((VERIFIERS / "verify.py").read_text(), feature_version=(3, 9))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [it.name for it in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - sys.stdlib_module_names == {"cryptography"}


def test_verify_js_imports_nothing_and_asks_no_network() -> None:
    source = (VERIFIERS / "verify.js").read_text()
    code = "\n".join(line for line in source.splitlines() if not line.startswith("//"))
    for word in ("import ", "import(", "require(", "fetch(", "XMLHttpRequest", "WebSocket", "eval(", "document."):
        assert word not in code, word


def test_without_cryptography_it_says_that_signatures_were_not_checked(tmp_path: Path) -> None:
    given = texts(proofs_of("ten-pull", 1))
    [report] = in_python(tmp_path, given, python=(sys.executable, "-I", "-S"))
    assert report["verdict"] == "not provable yet"
    unchecked = {it["claim"]: it["words"] for it in report["claims"] if it["verdict"] != "proven"}
    assert unchecked.keys() == {"accepted", "settled", "sealed"}
    assert all("The signature was not checked" in it for it in unchecked.values())


def test_in_words_for_people(tmp_path: Path) -> None:
    (tmp_path / "proof.json").write_bytes(proofs_of("ten-pull", 1)[0].encode())
    program = [sys.executable, "-I", str(VERIFIERS / "verify.py")]
    done = subprocess.run([*program, "proof.json"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "Draw session.plain.10.6.0: proven" in done.stdout
    assert "The prizes are what the secret says" in done.stdout
    missing = subprocess.run([*program, "none.json"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert missing.returncode == 2
    assert "This is no proof" in missing.stdout


def test_the_made_up_deployment_draws_as_the_golden_vectors_say() -> None:
    """tests/domain/test_draw.py holds the code that draws to these; here the verifier is held to them."""
    sys.path.insert(0, str(VERIFIERS))
    try:
        import verify  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(VERIFIERS))
    golden = json.loads((Path(draws.__file__).parents[1] / "domain" / "golden" / "draws.json").read_bytes())
    for it in golden:
        odds = verify.Odds(it["odds"], it["odds_hash"])
        nonce = bytes.fromhex(it["client_nonce"]).decode()
        drawing = verify.Drawing(bytes.fromhex(it["seed"]), odds, str(it["account_id"]), it["request_key"], nonce)
        codes, _ = drawing.all(1, {"tier": "", "since": [], "gone": []})
        assert codes == [it["prize"]], it["name"]
