"""Which table may be touched by whom: a decision for every table, of columns that exist."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from tombola import migrations
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage import grants
from tombola.producers.storage.grants import APPEND_ONLY, GRANTS, ROLES, Deployment, statements
from tombola.producers.storage.schema import metadata
from tombola.worker.cli import app

PRIVILEGE = re.compile(r"(SELECT|INSERT|UPDATE|DELETE)(?: \(([a-z_0-9, ]+)\))?(?:, |$)")
SECRETS = {
    ("api_keys", "secret_sha256"): {"gateway", "operator"},
    ("operators", "password_hash"): {"console", "operator"},
    ("operator_sessions", "token_sha256"): {"console"},
    ("webhooks", "secret"): {"worker", "relay", "console", "operator"},
    ("webhooks", "former_secret"): {"worker", "relay", "console", "operator"},
}


def parsed(what: str) -> dict[str, str]:
    """The columns of each privilege in a list; empty: all columns."""
    found = PRIVILEGE.findall(what)
    assert ", ".join(f"{verb} ({columns})" if columns else verb for verb, columns in found) == what
    assert len({verb for verb, _ in found}) == len(found)
    return dict(found)


def test_every_table_has_a_decision() -> None:
    assert GRANTS.keys() == metadata.tables.keys()
    assert grants.VERSION_TABLE == migrations.VERSION_TABLE


def test_every_grant_is_of_columns_that_exist_and_to_a_known_role() -> None:
    for name, by_role in GRANTS.items():
        assert by_role.keys() <= set(ROLES) - {"migrator"}
        for role, what in by_role.items():
            for verb, columns in parsed(what).items():
                named = set(columns.split(", ")) - {""}
                assert named <= set(metadata.tables[name].columns.keys()), (name, role)
                assert verb != "INSERT" or not named, (name, role)


def test_rows_that_prove_something_are_only_added() -> None:
    assert {"asset_transactions", "operator_actions", "books_blocks"} <= set(APPEND_ONLY)
    for name in APPEND_ONLY:
        for role, what in GRANTS[name].items():
            assert parsed(what).keys() <= {"SELECT", "INSERT"}, (name, role)


def test_what_was_asked_for_stays_as_it_was_accepted() -> None:
    asked = {"request_key", "lottery_session_id", "account_id", "campaign", "fingerprint", "kind", "terms", "odds_hash"}
    for role, what in GRANTS["api_idempotency_requests"].items():
        changed = parsed(what).get("UPDATE", "none")
        assert changed, role
        assert not asked & set(changed.split(", ")), role
    for role in ("relay", "auditor"):
        assert parsed(GRANTS["account_asset_balances"].get(role, "")).keys() <= {"SELECT"}
    # A gateway opens accounts. One with a balance would have no row that says whence: the audit finds it (I3).
    assert parsed(GRANTS["account_asset_balances"]["gateway"]).keys() == {"SELECT", "INSERT"}


@pytest.mark.parametrize(("table", "column"), SECRETS)
def test_secrets_are_read_only_where_they_are_used(table: str, column: str) -> None:
    readers = set()
    for role, what in GRANTS[table].items():
        columns = parsed(what).get("SELECT")
        if columns is not None and (not columns or column in columns.split(", ")):
            readers.add(role)
    assert readers == SECRETS[table, column]


def test_the_statements_name_users_and_quote_what_is_given() -> None:
    lines = list(statements(["relay"], Deployment("a_`b", host="10.%'")))
    assert lines[0].startswith("-- relay: ")
    made = re.fullmatch(r"CREATE USER 'tombola_relay'@'10\.%''' IDENTIFIED BY '([\w-]{32})';", lines[1])
    assert made
    assert lines[2] == r"GRANT SHOW VIEW ON `a\_``b`.* TO 'tombola_relay'@'10.%''';"
    assert "GRANT SELECT ON `a_``b`.`webhooks` TO 'tombola_relay'@'10.%''';" in lines
    assert lines[-1] == ""
    again = list(statements(["relay"], Deployment("a_`b", host="10.%'")))
    assert again[1] != lines[1]  # another password
    assert [*lines[:1], *lines[2:]] == list(statements(["relay"], Deployment("a_`b", host="10.%'"), are_new=False))
    on_mysql = "\n".join(statements(["worker"], Deployment("t", server="mysql")))
    assert "GRANT LOCK TABLES ON `t`.* TO" in on_mysql
    legacy = "\n".join(statements(ROLES, Deployment("t", is_legacy=True)))
    assert legacy.count("GRANT SELECT ON `t`.`legacy_migration`") == 5
    assert legacy.count("UPDATE (idempotency_key, lottery_session_id, created_at, updated_at)") == 1


def test_the_command_prints_a_table_or_sql(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    table = run(app, ["grants", "--role", "gateway"])
    assert table.exit_code == 0, table.output
    assert "SELECT, INSERT, UPDATE (caller)" in table.output
    assert "CREATE USER" not in table.output
    assert "`tombola`.`api_keys`" in table.output
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", "mysql+pymysql://root@localhost/shop")
    printed = run(app, ["grants", "--sql", "--role", "auditor", "--role", "worker", "--host", "10.0.0.%"])
    assert printed.exit_code == 0, printed.output
    users = re.findall(r"CREATE USER '(\w+)'@'10\.0\.0\.%'", printed.output)
    assert users == ["tombola_worker", "tombola_auditor"]
    assert "ON `shop`.`asset_transactions`" in printed.output
    assert "CREATE USER" not in run(app, ["grants", "--sql", "--existing"]).output
    for wrong in (["--role", "root"], ["--server", "oracle"]):
        with pytest.raises(InvalidRequest):
            run(app, ["grants", *wrong], catch_exceptions=False)
