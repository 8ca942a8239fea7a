"""Both verifiers, as a stranger runs them: verify.py in a process of its own, verify.js in Node and in Chromium."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

VERIFIERS: Final = Path(__file__).parents[2] / "producers" / "verifiers"
TIMEOUT_S: Final = 150
# `trust` as verify.js takes it, by the names of verify.py.
_TRUST_IN_JS: Final = {"anchor": "anchor", "keys": "keys", "books_key": "booksKey", "receipts": "receipts"}

Report = dict[str, Any]

# Runs verify.js over lines of JSON: {text, trust} in, a report out.
NODE_PROGRAM: Final = """\
import { readFileSync } from 'node:fs';
import { NoProof, verify } from './verify.mjs';

for (const line of readFileSync(0, 'utf8').split('\\n').filter(Boolean)) {
  const { text, trust } = JSON.parse(line);
  let report;
  try {
    report = await verify(text, trust);
  } catch (error) {
    if (!(error instanceof NoProof)) throw error;
    report = { session: null, verdict: 'no proof', claims: [], limits: [], error: error.message };
  }
  console.log(JSON.stringify(report));
}
"""


def in_python(
    folder: Path, texts: Sequence[str], *options: str, python: Sequence[str] = (sys.executable, "-I")
) -> list[Report]:
    """The reports of verify.py, run away from the project, on these proofs."""
    program = shutil.copy(VERIFIERS / "verify.py", folder / "verify.py")
    names = []
    for number, text in enumerate(texts):
        names.append(folder / f"{number}.json")
        names[-1].write_text(text, encoding="utf-8", errors="surrogatepass")
    command = [*python, str(program), "--json", *options, *map(str, names)]
    done = subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode in (0, 1, 2, 3), done.stderr
    assert done.stderr == ""
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == len(texts)
    assert done.returncode == _exit_code({it["verdict"] for it in reports})
    return reports


def _exit_code(verdicts: set[str]) -> int:
    for verdict, code in (("false", 1), ("no proof", 2), ("not provable yet", 3)):
        if verdict in verdicts:
            return code
    return 0


def options_of(folder: Path, trust: Report) -> list[str]:
    """The options of verify.py that say what is known beside the proof."""
    options = []
    for name, option in (("anchor", "--anchor"), ("books_key", "--books-key")):
        if trust.get(name) is not None:
            options += [option, trust[name]]
    for number, text in enumerate(trust.get("receipts", [])):
        file = folder / f"receipt-{number}.txt"
        file.write_text(f"{text}\n")
        options += ["--receipt", str(file)]
    if trust.get("keys") is not None:
        file = folder / "keys.json"
        file.write_text(trust["keys"])
        options += ["--keys", str(file)]
    return options


def in_node(folder: Path, asked: Sequence[tuple[str, Report]]) -> list[Report]:
    """The reports of verify.js, run by Node, on these proofs and what is known beside each."""
    shutil.copy(VERIFIERS / "verify.js", folder / "verify.mjs")
    (folder / "run.mjs").write_text(NODE_PROGRAM)
    given = "".join(f"{json.dumps({'text': text, 'trust': in_js(trust)})}\n" for text, trust in asked)
    done = subprocess.run(
        ["node", "run.mjs"], cwd=folder, input=given, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def in_js(trust: Report) -> Report:
    """What is known beside a proof, by the names of verify.js."""
    return {_TRUST_IN_JS[name]: value for name, value in trust.items()}


def shown(reports: Sequence[Report]) -> list[tuple[Any, ...]]:
    """What is wrong in reports, for a failing test."""
    return [
        (it["session"], it["verdict"], [(c["claim"], c["words"]) for c in it["claims"] if c["verdict"] != "proven"])
        for it in reports
        if it["verdict"] != "proven"
    ]
