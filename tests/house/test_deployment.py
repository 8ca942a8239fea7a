"""docker-compose.yml and the files around it. No Docker engine is needed: the file is read, not run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from tombola.worker.cli import MODULES

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return loaded


def without_merges(text: str) -> str:
    """The validator does not know YAML's merge keys."""
    return re.sub(r"<<: \*[\w-]+", "", text)


def test_it_is_a_compose_file() -> None:
    parsed = PyCompose.from_yaml(without_merges(COMPOSE.read_text()))
    parsed.validate()
    assert {"mariadb", "redis", "rabbitmq", "migrate", "worker", "relay", "gateway"} <= set(parsed.service_names())


def test_the_validator_refuses_a_misspelt_key() -> None:
    broken = COMPOSE.read_text().replace("healthcheck:", "healthchek:", 1)
    with pytest.raises(Exception, match="healthchek"):
        PyCompose.from_yaml(without_merges(broken)).validate()


@pytest.mark.process
def test_no_security_finding_of_weight() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "compose_lint", str(COMPOSE)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_secret_is_in_the_file(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for name, value in (service.get("environment") or {}).items():
            if re.search(r"PASS|SEED|SECRET", name) and name != "MARIADB_RANDOM_ROOT_PASSWORD":  # a switch
                assert re.fullmatch(r"|\$\{\w+(:\?[^}]*|:-)\}", value), f"{name} holds a value"
    assert all(
        not line.partition("=")[2] for line in (ROOT / ".env.example").read_text().splitlines() if line[:1] != "#"
    )


def test_everything_that_stays_up_is_watched(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if service.get("restart") == "unless-stopped":
            assert "healthcheck" in service, name


def test_redis_keeps_what_it_is_given(compose: dict[str, Any]) -> None:
    command = " ".join(compose["services"]["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_workers_wait_for_the_migration_and_scale(compose: dict[str, Any]) -> None:
    worker = compose["services"]["worker"]
    assert worker["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert "container_name" not in worker
    assert "ports" not in worker
    assert compose["services"]["rabbitmq"]["profiles"] == ["rabbitmq"]


@pytest.mark.parametrize("name", ["relay", "gateway"])
def test_what_stands_before_the_broker_has_no_seed(compose: dict[str, Any], name: str) -> None:
    assert compose["services"][name]["environment"]["TOMBOLA_SEED"] == ""


def test_the_image_holds_what_the_wheel_needs() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    build, _, image = dockerfile.partition("\nFROM ")
    for folder in ("producers", "worker", "migrations"):
        assert f"COPY {folder} " in build
    assert "--require-hashes" in build
    # What runs is what is installed: there is no second copy of it beside.
    assert [line for line in image.splitlines() if line.startswith("COPY")] == [
        "COPY --from=build /opt/tombola /opt/tombola"
    ]


def test_every_command_is_one_that_the_image_has(compose: dict[str, Any]) -> None:
    ours = {name: it["command"] for name, it in compose["services"].items() if it.get("image") == "tombola"}
    assert ours["migrate"] == ["tombola", "migrate"]
    for command in ours.values():
        if command[0] == "celery":
            assert command[1:3] == ["-A", "tombola.worker"]
        else:
            assert command[0] == "tombola"
            assert command[1] in MODULES
