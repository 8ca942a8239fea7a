"""The servers of other releases, and the programs by which tests/servers.py starts each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT_LOGIN: Final = (
    "CREATE USER IF NOT EXISTS root@'127.0.0.1' IDENTIFIED BY ''; "
    "GRANT ALL ON *.* TO root@'127.0.0.1' WITH GRANT OPTION;"
)


LINK: Final = "-> "


@dataclass(frozen=True)
class Release:
    """A server: its packages in a Debian `suite`, the mark of the tests that use it, and the way to start it.

    `programs` are scripts by name, or links to programs where the text begins with `->`. In their text ROOT is the
    folder in which the packages are unpacked, HERE the folder of the scripts. With `moves` the suite is one whose
    packages change from day to day: what fails there is told, and fails nothing.
    """

    name: str
    suite: str
    packages: Sequence[str]
    mark: str
    programs: dict[str, str]
    moves: bool = False

    def write_programs(self, root: Path, folder: Path) -> None:
        """Make the folder of programs that comes first on the path of the tests."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in self.programs.items():
            script, text = folder / name, text.replace("ROOT", str(root)).replace("HERE", str(folder))
            script.unlink(missing_ok=True)
            if text.startswith(LINK):
                script.symlink_to(text.removeprefix(LINK))
            else:
                script.write_text(f"#!/bin/sh\n{text}\n")
                script.chmod(0o755)
        (folder / "init.sql").write_text(f"{ROOT_LOGIN}\n")


_MARIADB: Final = {
    "mariadbd": 'exec ROOT/usr/sbin/mariadbd "$@" --basedir=ROOT/usr --plugin-dir=ROOT/usr/lib/mysql/plugin',
    "mariadb-install-db": 'exec ROOT/usr/bin/mariadb-install-db "$@" --basedir=ROOT/usr',
}
# MySQL does not know some options of MariaDB: they are left out. A folder is made by the server itself.
_WITHOUT: Final = 'for it in "$@"; do shift; case "$it" in {}) ;; *) set -- "$@" "$it" ;; esac; done\n'
_OF_MYSQL: Final = (
    "--secure-file-priv=NULL --lc-messages-dir=ROOT/usr/share/mysql "
    "--character-sets-dir=ROOT/usr/share/mysql/charsets --plugin-dir=ROOT/usr/lib/mysql/plugin"
)
_MYSQL: Final = {
    "mariadbd": _WITHOUT.format("--debug-no-sync|--innodb-flush-method=*")
    + f'exec ROOT/usr/sbin/mysqld "$@" {_OF_MYSQL} --mysqlx=0 --pid-file=pid --init-file=HERE/init.sql',
    "mariadb-install-db": _WITHOUT.format(
        "--auth-root-*|--skip-test-db|--debug-no-sync|--innodb-flush-method=*|--innodb-flush-log-*"
    )
    + f'exec ROOT/usr/sbin/mysqld "$@" --initialize-insecure {_OF_MYSQL}',
}
_RABBITMQ: Final = {
    "rabbitmq-server": 'export PATH=HERE:"$PATH"\nexec ROOT/usr/lib/rabbitmq/bin/rabbitmq-server "$@"',
    "erl": "-> ROOT/usr/lib/erlang/bin/erl",
}

_REDIS: Final = {"redis-server": 'exec ROOT/usr/bin/redis-server "$@"'}
_VALKEY: Final = {"redis-server": 'exec ROOT/usr/bin/valkey-server "$@"'}

RELEASES: Final = (
    Release("MariaDB 11.8", "trixie", ("mariadb-server-core", "mariadb-client-core"), "mariadb", _MARIADB),
    Release("MySQL 9.7", "sid", ("mysql-server-core",), "mariadb", _MYSQL, moves=True),
    Release("RabbitMQ 4.0", "trixie", ("rabbitmq-server",), "rabbitmq", _RABBITMQ),
    Release("RabbitMQ 4.3", "sid", ("rabbitmq-server",), "rabbitmq", _RABBITMQ, moves=True),
    Release("Redis 8", "trixie", ("redis-server",), "redis", _REDIS),
    Release("Valkey 8.1", "trixie", ("valkey-server",), "redis", _VALKEY),
    Release("Valkey 9", "sid", ("valkey-server",), "redis", _VALKEY, moves=True),
)
