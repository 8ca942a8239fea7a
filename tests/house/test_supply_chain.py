"""`make audit-deps` asks a database of vulnerabilities that the test is: something is known, nothing, or no answer."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BILL = ROOT / "build" / "tombola.cdx.json"
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-oldest.lock")


def locked(name: str) -> dict[str, str]:
    """Version by name."""
    return dict(re.findall(r"^([a-z0-9._-]+)(?:\[[^]]*\])?==(\S+)", (ROOT / name).read_text(), re.MULTILINE))


@contextmanager
def known_of(*vulnerable: str) -> Iterator[str]:
    """A server that knows one vulnerability of each of these, by OSV's API; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer: dict[str, Any] = {}
            if (name := asked["package"]["name"]) in vulnerable:
                affected = {"package": {"name": name, "ecosystem": "PyPI"}, "versions": [asked["version"]]}
                answer = {"vulns": [{"id": "GHSA-test-0001", "summary": "it is open", "affected": [affected]}]}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/query"
        finally:
            server.shutdown()
            thread.join()


def audit_deps(url: str, *, has_bill: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `make audit-deps` against the server at `url`; with `has_bill`, without making the bill of materials."""
    done_already = ["-o", ".venv/dev", *(["-o", "sbom"] if has_bill else [])]
    command = ["make", "-s", *done_already, "audit-deps", f"ARGS=--vulnerability-service osv --osv-url {url}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)


@pytest.mark.process
def test_nothing_is_known_and_the_bill_of_materials_names_all() -> None:
    BILL.unlink(missing_ok=True)
    with known_of() as url:
        done = audit_deps(url)
    assert done.returncode == 0, done.stdout + done.stderr
    bill = json.loads(BILL.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    root = bill["metadata"]["component"]
    assert (root["name"], root["version"]) == ("tombola", "0.1.0")
    named = {it["name"].lower(): it["version"] for it in bill["components"]}
    assert named == locked("requirements.lock")
    assert len(named) > 40
    assert all(it["externalReferences"][0]["hashes"] for it in bill["components"])


@pytest.mark.process
def test_what_is_known_is_named_and_fails() -> None:
    with known_of("sqlalchemy") as url:
        done = audit_deps(url, has_bill=True)
    assert done.returncode != 0
    assert re.search(r"sqlalchemy\s+\S+\s+GHSA-test-0001", done.stdout)
    assert "audit-deps: update these" in done.stderr


@pytest.mark.process
def test_no_data_is_no_clean_bill() -> None:
    done = audit_deps("http://127.0.0.1:1/v1/query", has_bill=True)
    assert done.returncode != 0
    assert "audit-deps: NOTHING WAS AUDITED" in done.stderr


@pytest.mark.parametrize("tool", ["pip-audit", "cyclonedx-bom", "axe-playwright-python"])
def test_users_install_none_of_these_tools(tool: str) -> None:
    assert tool in locked("requirements-dev.lock")
    assert tool not in locked("requirements.lock")


@pytest.mark.parametrize("package", ["flask", "django", "fastapi", "faker", "polyfactory"])
def test_no_framework_comes_along_for_a_file_of_javascript_and_no_maker_of_examples(package: str) -> None:
    assert package not in locked("requirements.lock")
    assert package not in locked("requirements-dev.lock")


@pytest.mark.parametrize("file", ["Makefile", "Dockerfile"])
def test_what_a_lock_leaves_out_is_not_asked_for(file: str) -> None:
    """Litestar asks for polyfactory, which the locks leave out: pip takes a lock as it stands, or not at all."""
    lines = [it for it in (ROOT / file).read_text().splitlines() if re.search(r"pip install .*\.lock", it)]
    assert lines
    assert all("--no-deps --require-hashes" in it for it in lines)


@pytest.mark.process
@pytest.mark.parametrize("package", ["polyfactory", "faker"])
def test_the_gateway_makes_its_document_without_what_a_lock_leaves_out(package: str) -> None:
    """Also where somebody has it installed: there, a route that asked for made-up examples would go unnoticed."""
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from tombola.producers.gateway.app import DESCRIBED\n"
        "from tombola.producers.gateway.document import document\n"
        "sys.stdout.buffer.write(document(DESCRIBED, needs_key=True))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["openapi"].startswith("3.")


def test_the_oldest_are_the_floors_of_the_base() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    floors = {}
    for it in dependencies:
        name, _, floor = it.partition(">=")
        floors[name.partition("[")[0]] = floor
    oldest = locked("requirements-oldest.lock")
    assert {name: re.sub(r"(\.0)+$", "", oldest[name]) for name in floors} == floors


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_file_has_its_hash(name: str) -> None:
    blocks = re.split(r"\n(?=[a-z0-9])", (ROOT / name).read_text())
    assert all("--hash=sha256:" in it for it in blocks if "==" in it)
