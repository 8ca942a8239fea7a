"""What the doctor makes of what it is told: the verdicts that need no server."""

import io
from datetime import timedelta

import pytest
from rich.console import Console

from tombola.producers.settings import Settings
from tombola.producers.storage.clock import utc_now
from tombola.worker.doctor import Check, show
from tombola.worker.doctor.checks import attempt, clock_ahead, clock_verdict, numbers_of, release_verdict
from tombola.worker.doctor.configuration import examine_settings
from tombola.worker.doctor.database import VERSIONS_MIN, key_columns, product_and_version


@pytest.mark.parametrize(
    ("said", "product", "status"),
    [
        ("10.11.19-MariaDB-0+deb12u1", "MariaDB", "ok"),
        ("5.5.5-10.6.1-MariaDB-log", "MariaDB", "ok"),
        ("10.5.23-MariaDB", "MariaDB", "fail"),
        ("8.0.16", "MySQL", "ok"),
        ("8.4.3-cloud", "MySQL", "ok"),
        ("8.0.15", "MySQL", "fail"),
        ("5.7.44-log", "MySQL", "fail"),
    ],
)
def test_a_database_server_is_new_enough_or_not(said: str, product: str, status: str) -> None:
    found, version = product_and_version(said)
    assert found == product
    assert release_verdict(found, version, VERSIONS_MIN[found])[0] == status


@pytest.mark.parametrize(
    ("version", "status"), [("6.2.0", "ok"), ("6.2", "ok"), ("7.0.15", "ok"), ("6.0.16", "fail"), ("10.0.0", "ok")]
)
def test_a_version_is_compared_by_its_numbers(version: str, status: str) -> None:
    status_found, found, cure = release_verdict("Redis", version, (6, 2))
    assert (status_found, found) == (status, f"Redis {version}")
    assert ("6.2" in cure) == (status == "fail")
    assert numbers_of("4.0.0-rc.1+7") == (4, 0, 0)


@pytest.mark.parametrize(
    ("ahead_s", "uncertain_s", "status"),
    [(0.1, 0.01, "ok"), (-0.1, 0.01, "ok"), (1, 0.01, "warn"), (-1, 0.01, "warn"), (-9, 0.1, "fail"), (2, 1.9, "ok")],
)
def test_clocks_differ_by_more_than_the_way_there_takes(ahead_s: float, uncertain_s: float, status: str) -> None:
    found_status, found, cure = clock_verdict(ahead_s, uncertain_s)
    assert found_status == status
    assert ("ahead" in found) == (ahead_s > 0)
    assert ("NTP" in cure) == (status != "ok")


def test_a_clock_is_measured() -> None:
    ahead_s, uncertain_s = clock_ahead(lambda: utc_now() + timedelta(seconds=30))
    assert ahead_s == pytest.approx(30, abs=0.1)
    assert 0 <= uncertain_s < 0.1


def settings(**values: str) -> Settings:
    return Settings.from_env({f"TOMBOLA_{name.upper()}": value for name, value in values.items()})


@pytest.mark.parametrize(
    ("values", "name", "status"),
    [
        ({}, "seed", "skip"),
        ({"seed": "5eed" * 16}, "seed", "ok"),
        ({}, "result secret", "warn"),
        ({"result_secret": "5eed" * 16}, "result secret", "ok"),
        ({}, "message secret", "warn"),
        ({"message_secret": "5eed" * 16}, "message secret", "ok"),
        ({"accepted_only": "true"}, "message secret", "ok"),
        ({}, "remote control", "warn"),
        ({"remote_control": "false"}, "remote control", "ok"),
        ({"broker_url": "amqp://x"}, "remote control", "ok"),
        ({"database_url": "sqlite:///x.db"}, "remote control", "skip"),
        ({}, "claim time", "ok"),
        ({"claim_after_s": "6.5"}, "claim time", "warn"),
        ({"claim_after_s": "6.5", "broker_url": "amqp://x"}, "claim time", "ok"),
    ],
)
def test_settings_that_are_right_somewhere(values: dict[str, str], name: str, status: str) -> None:
    checks = {check.name: check for check in examine_settings(settings(**values))}
    assert checks[name].status == status
    assert bool(checks[name].cure) == (status in ("warn", "fail"))
    assert "5eed5eed" not in str(checks)


def test_a_mistake_of_our_own_is_a_check_as_well() -> None:
    def look() -> tuple[str, str, str]:
        raise KeyError("maxmemory")

    check = attempt("memory", look)  # type: ignore[arg-type]
    assert (check.status, check.found) == ("fail", "this check failed: KeyError: 'maxmemory'")


def test_all_key_columns_are_looked_at() -> None:
    assert key_columns() >= {
        ("asset_transactions", "idempotency_key"),
        ("asset_transactions", "lottery_session_id"),
        ("asset_transactions", "business_id"),
        ("api_idempotency_requests", "request_key"),
        ("api_idempotency_requests", "campaign"),
        ("dead_letters", "cause"),
        ("dead_letters", "body_sha256"),
    }
    assert not {column for _, column in key_columns()} & {"result", "notes", "error", "balance"}


def test_checks_are_shown_with_their_cures() -> None:
    out = io.StringIO()
    console = Console(file=out, soft_wrap=True)
    good = [Check("seed", "ok", "there"), Check("queue", "warn", "no [queue]", "start one"), Check("log", "skip", "no")]
    assert show(good, console)
    assert not show([*good, Check("seed", "fail", "not there", "set it")], console)
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert lines[:4] == ["✓ seed there", "! queue no [queue]", "→ start one", "– log no"]
    assert lines[5] == "1 in order, 1 to look at, 1 skipped"
    assert lines[-4:] == ["✗ seed not there", "→ set it", "", "1 in order, 1 to look at, 1 wrong, 1 skipped"]
