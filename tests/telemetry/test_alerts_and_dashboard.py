"""Alert rules and dashboard name only what the code exports, and all of it; what they tell to do can be done."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml
from prometheus_client import REGISTRY

import tombola.producers.gateway.app
import tombola.producers.telemetry.metrics
import tombola.producers.web.protocol
import tombola.worker.metrics
from tombola.producers.domain.causes import Cause, DeadReason, LetterState
from tombola.producers.domain.operations import OPERATIONS
from tombola.producers.settings import PREFIX, Settings
from tombola.worker.cli import app

MONITORING = Path(tombola.worker.metrics.__file__).parent / "monitoring"
ALERTS, DASHBOARD, SCRAPING = (MONITORING / name for name in ("alerts.yml", "grafana.json", "prometheus.yml"))
OTHERS = {"up"}  # Prometheus's own
WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "bool", "offset"}
SAMPLES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "gauge": ("",),
}
# What a matcher may ask for, where the values are a closed set.
VALUES: dict[str, set[str]] = {
    "state": set(LetterState),
    "cause": set(Cause),
    "kind": set(OPERATIONS) - {"draw"},
    "role": set(tombola.producers.telemetry.metrics.ROLES),
    "reason": {DeadReason.NEVER_SETTLED, DeadReason.TIMED_OUT},
    "outcome": {"settled", "rejected", "repeat", "parked_again", "refused", "accepted", "replayed", "conflict"},
}


def exported() -> dict[str, set[str]]:
    """Every name under which the code exports samples, with the labels they have."""
    assert tombola.producers.gateway.app  # imported for the names that they register
    assert tombola.producers.web.protocol
    found: dict[str, set[str]] = {}
    for collector, names in list(REGISTRY._collector_to_names.items()):
        labels = set(getattr(collector, "_labelnames", ()))
        kind = getattr(collector, "_type", "")
        for ending in SAMPLES.get(kind, ()):
            name = getattr(collector, "_name", "") + ending
            if name.startswith("tombola_"):
                assert name in names
                found[name] = labels | ({"le"} if ending == "_bucket" else set())
    return found


EXPORTED = exported()


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def queries() -> Iterator[tuple[str, str]]:
    """Every PromQL expression, with where it is."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def names_in(expression: str) -> set[str]:
    """The metrics that a PromQL expression reads: what is neither function, nor label, nor a word of the language."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    bare = re.sub(r"\b\d[\w.]*", "", bare)
    return {name for name in re.findall(r"[a-zA-Z_:][\w:]*(?!\s*[\w:(])", bare) if name not in WORDS}


def mistakes_in(expression: str) -> list[str]:
    """What an expression asks for that nobody exports."""
    found = [f"no metric {name}" for name in sorted(names_in(expression) - set(EXPORTED) - OTHERS)]
    for name, matchers in re.findall(r"(tombola_\w+)\{([^}]*)\}", expression):
        for label, operator, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
            if label not in EXPORTED.get(name, set()):
                found.append(f"{name} has no label {label}")
            if label in VALUES:
                wanted = value.split("|") if "~" in operator else [value]
                found += [f"{label} is never {it}" for it in wanted if it not in VALUES[label]]
    labels = set().union(*(EXPORTED.get(name, set()) for name in names_in(expression)))
    for grouped in re.findall(r"\bby\s*\(([^)]*)\)", expression):
        found += [f"nothing here has a label {it.strip()}" for it in grouped.split(",") if it.strip() not in labels]
    return found


def test_there_is_something_to_look_at() -> None:
    assert len(rules()) > 10
    assert sum(bool(panel.get("targets")) for panel in panels()) > 15
    assert {"tombola_draws_total", "tombola_gateway_requests_total", "tombola_accepted_backlog"} <= set(EXPORTED)


@pytest.mark.parametrize(("where", "expression"), [pytest.param(*it, id=it[0]) for it in queries()])
def test_only_what_is_exported_is_asked_for(where: str, expression: str) -> None:
    assert names_in(expression), f"{where} asks for nothing"
    assert mistakes_in(expression) == [], where


@pytest.mark.parametrize(
    ("expression", "mistake"),
    [
        ("sum(rate(tombola_drawn_total[5m])) > 0", "no metric tombola_drawn_total"),
        ("sum(rate(tombola_draws[5m]))", "no metric tombola_draws"),
        ("max(tombola_broker_backlog_total) or vector(0)", "no metric tombola_broker_backlog_total"),
        ("rate(tombola_batch_seconds_total[1m])", "no metric tombola_batch_seconds_total"),
        ("time() - tombla_relay_last > 60", "no metric tombla_relay_last"),
        (
            "sum by (le) (rate(tombola_batch_seconds_buckets[$__rate_interval]))",
            "no metric tombola_batch_seconds_buckets",
        ),
        ('tombola_draws_total{result="settled"}', "tombola_draws_total has no label result"),
        ('tombola_members{role="worker|relay"}', "role is never worker|relay"),
        ('tombola_dead_letters{state=~"parked|dead"}', "state is never dead"),
        ("sum by (account_id) (tombola_parked_total)", "nothing here has a label account_id"),
    ],
)
def test_what_is_not_exported_would_be_noticed(expression: str, mistake: str) -> None:
    assert mistake in mistakes_in(expression)


@pytest.mark.parametrize("name", sorted(it for it in EXPORTED if not it.endswith(("_sum", "_count"))))
def test_all_that_is_exported_is_on_the_dashboard(name: str) -> None:
    shown = {it for panel in panels() for target in panel.get("targets", ()) for it in names_in(target["expr"])}
    assert name in shown


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_no_label_is_without_end(name: str) -> None:
    closed = {"le", "route", "method", "status", "code", *VALUES}
    assert EXPORTED[name] <= closed, "a label for each key or account would never end"


# ---- alerts ----------------------------------------------------------------------------------------------------------


def ids(rule: dict[str, Any]) -> str:
    return str(rule["alert"])


@pytest.mark.parametrize("rule", rules(), ids=ids)
def test_an_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert all(text.strip() for text in rule["annotations"].values())
    assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
    assert told(rule) or "log" in rule["annotations"]["description"], "it tells where to look"


def told(rule: dict[str, Any]) -> list[str]:
    """The tombola commands that an alert names."""
    return re.findall(r"`tombola ([^`]+)`", rule["annotations"]["description"])


@pytest.mark.parametrize("rule", rules(), ids=ids)
def test_the_commands_that_it_names_are_there(rule: dict[str, Any]) -> None:
    for command in told(rule):
        assert refusal_of(command) is None, command


def refusal_of(command: str) -> str | None:
    """Why `tombola COMMAND` cannot be typed like that; None if it can."""
    found: Any = typer.main.get_command(app)
    for word in command.split():
        if hasattr(found, "get_command"):
            found = found.get_command(None, word)
            if found is None:
                return f"no command {word}"
        elif word.startswith("--"):
            assert isinstance(found, click.Command) or hasattr(found, "params")
            if word not in {option for parameter in found.params for option in parameter.opts}:
                return f"no option {word}"
    return None


def test_a_command_that_is_not_there_would_be_noticed() -> None:
    assert refusal_of("doctor") is None
    assert refusal_of("physician") == "no command physician"
    assert refusal_of("dead-letters grouped") == "no command grouped"
    assert refusal_of("relay --forever") == "no option --forever"


def test_alerts_have_names_of_their_own() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    assert all(name.startswith("Tombola") for name in names)


def test_settings_that_are_named_are_settings() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for file in MONITORING.iterdir():
        assert set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", file.read_text())) <= known, file.name


# ---- dashboard and scraping ------------------------------------------------------------------------------------------


def test_the_dashboard_can_be_imported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    (variable,) = dashboard["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    assert dashboard["uid"] == "tombola"
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))
    for panel in panels():
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert {panel["datasource"]["uid"]} | {it["datasource"]["uid"] for it in panel["targets"]} == {
                "${datasource}"
            }


def test_no_panel_lies_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_example_scrapes_every_kind_and_finds_the_rules() -> None:
    config = yaml.safe_load(SCRAPING.read_text())
    scraped = set(tombola.producers.telemetry.metrics.ROLES) - {
        "beat"
    }  # which only sends tasks: its pulse says that it does
    assert {job["job_name"] for job in config["scrape_configs"]} == {f"tombola-{it}" for it in scraped}
    assert [(MONITORING / name).is_file() for name in config["rule_files"]] == [True]
    compose = yaml.safe_load((MONITORING.parents[1] / "docker-compose.yml").read_text())
    for job in config["scrape_configs"]:
        (where,) = job["dns_sd_configs"]
        (service,) = where["names"]
        environment = compose["services"][service]["environment"]
        assert where["port"] == int(environment["TOMBOLA_METRICS_PORT"])


def test_the_wheel_holds_them() -> None:
    packaged = (MONITORING.parents[1] / "pyproject.toml").read_text()
    assert '"tombola.worker" = ["monitoring/*"' in packaged
