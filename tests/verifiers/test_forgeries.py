"""Forged proofs are refused by both verifiers, with the same words."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from tests.verifiers import forged_books, forged_papers
from tests.verifiers.forging import NO_PROOF, Forgery, bases
from tests.verifiers.running import Report, in_node, in_python, options_of

FORGERIES = (*forged_papers.forgeries, *forged_books.forgeries)
pytestmark = pytest.mark.process


def made(forgery: Forgery) -> tuple[str, Report]:
    """The text of a forged proof, and what is known beside it."""
    fields = copy.deepcopy(bases()[forgery.base])
    trust = forgery.trust(copy.deepcopy(fields))
    text = forgery.change(fields)
    assert text is not None or trust or json.dumps(fields) != json.dumps(bases()[forgery.base]), (
        f"nothing was forged: {forgery.name}"
    )
    return json.dumps(fields) if text is None else text, trust


def test_there_are_enough_kinds() -> None:
    assert len(FORGERIES) >= 100
    assert len({it.name for it in FORGERIES}) == len(FORGERIES)


def test_what_is_forged_is_right_before(tmp_path: Path) -> None:
    names = {it.base for it in FORGERIES}
    reports = in_python(tmp_path, [json.dumps(bases()[name]) for name in sorted(names)])
    assert {it["verdict"] for it in reports} == {"proven"}


def test_every_forgery_is_refused_by_both(tmp_path: Path) -> None:
    asked = [made(it) for it in FORGERIES]
    by_js = in_node(tmp_path, asked)
    plain = iter(in_python(tmp_path, [text for text, trust in asked if not trust]))
    wrong: list[tuple[object, ...]] = []
    for forgery, (text, trust), js in zip(FORGERIES, asked, by_js, strict=True):
        report = in_python(tmp_path, [text], *options_of(tmp_path, trust))[0] if trust else next(plain)
        false = {it["claim"] for it in report["claims"] if it["verdict"] == "false"} or {report["verdict"]}
        if forgery.claim not in false or report["verdict"] not in ("false", NO_PROOF):
            wrong.append((forgery.name, forgery.claim, false, report))
        if js | {"error": ""} != report | {"error": ""}:
            wrong.append((forgery.name, "the verifiers do not agree", js, report))
    assert wrong == []
