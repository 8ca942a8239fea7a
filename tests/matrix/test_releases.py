"""How tests/servers.py starts servers of other releases, tried on a server that only says how it was called."""

import subprocess
from pathlib import Path

import pytest

from tests.matrix.releases import RELEASES, Release

pytestmark = pytest.mark.process


def release(name: str) -> Release:
    (found,) = (it for it in RELEASES if it.name == name)
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Every program of it prints its name and its arguments, one to a line."""
    for place in ("usr/sbin/mysqld", "usr/sbin/mariadbd", "usr/bin/valkey-server", "usr/lib/erlang/bin/erl"):
        program = tmp_path / "root" / place
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text('#!/bin/sh\nprintf "%s\\n" "${0##*/}" "$@"\n')
        program.chmod(0o755)
    return tmp_path / "root"


def called(root: Path, name: str, program: str, *arguments: str) -> list[str]:
    programs = root.parent / "programs"
    release(name).write_programs(root, programs)
    done = subprocess.run([programs / program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_mysql_is_started_without_what_only_mariadb_knows(root: Path) -> None:
    options = ["--no-defaults", "--datadir=/a b", "--innodb-flush-method=nosync", "--debug-no-sync", "--port=1"]
    name, *given = called(root, "MySQL 9.7", "mariadbd", *options)
    assert name == "mysqld"
    assert given[:3] == ["--no-defaults", "--datadir=/a b", "--port=1"]
    assert f"--lc-messages-dir={root}/usr/share/mysql" in given
    (init,) = (it.removeprefix("--init-file=") for it in given if it.startswith("--init-file="))
    assert "GRANT ALL" in Path(init).read_text()


def test_mysql_makes_its_folder_itself(root: Path) -> None:
    options = ["--no-defaults", "--datadir=/d", "--user=root", "--auth-root-authentication-method=normal"]
    _, *given = called(root, "MySQL 9.7", "mariadb-install-db", *options, "--skip-test-db", "--debug-no-sync")
    assert given[:4] == ["--no-defaults", "--datadir=/d", "--user=root", "--initialize-insecure"]
    assert not [it for it in given if "auth-root" in it or "no-sync" in it or "init-file" in it]


def test_valkey_is_started_as_redis(root: Path) -> None:
    assert called(root, "Valkey 9", "redis-server", "--port", "1") == ["valkey-server", "--port", "1"]


def test_erlang_is_a_link_since_its_folder_is_looked_for(root: Path) -> None:
    called(root, "RabbitMQ 4.0", "erl")
    assert (root.parent / "programs/erl").resolve() == root / "usr/lib/erlang/bin/erl"


def test_programs_are_written_anew(root: Path) -> None:
    programs = root.parent / "programs"
    for _ in range(2):
        for it in RELEASES:
            it.write_programs(root, programs)
