"""Empty ledgers at the newest revision, copied from a ledger that the migrations made.

On a database server the migrations take ten times as long as creating the resulting tables, and most tests need their
own ledger. tests/migrations tests the migrations themselves.
"""

import atexit
import functools
import shutil
import tempfile
from decimal import Decimal
from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, select

from tombola import migrations
from tombola.producers.domain import keys
from tombola.producers.domain.operations.recharge import RECHARGE
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import account_asset_balances
from tombola.worker.ledger import accounts
from tombola.worker.operators import actions

_statements: dict[object, list[str]] = {}  # the statements that make a ledger, by server version


def migrated(engine_or_url: Engine | str) -> None:
    """Bring a database to the newest revision: an empty one by copying, any other by its migrations."""
    given = isinstance(engine_or_url, Engine)
    engine = engine_or_url if isinstance(engine_or_url, Engine) else open_engine(engine_or_url)
    try:
        if engine.dialect.name == "sqlite":
            _copy_file(engine)
        else:
            _copy_tables(engine)
    finally:
        if not given:
            engine.dispose()


def _copy_file(engine: Engine) -> None:
    path = Path(engine.url.database or "")
    if path.exists():
        migrations.upgrade(engine)
    else:
        shutil.copyfile(_template(), path)


@functools.cache
def _template() -> Path:
    folder = tempfile.mkdtemp(prefix="tombola-template-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "ledger.db"
    engine = open_engine(f"sqlite:///{path}")
    migrations.upgrade(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")  # so that the file is complete
    engine.dispose()
    return path


def _copy_tables(engine: Engine) -> None:
    with engine.connect() as connection:
        is_empty = not inspect(connection).get_table_names()
        statements = _statements.get(connection.dialect.server_version_info)
        if statements is not None and is_empty:
            connection.exec_driver_sql("SET foreign_key_checks = 0")
            for statement in statements:
                connection.exec_driver_sql(statement)
            connection.exec_driver_sql("SET foreign_key_checks = 1")
            connection.commit()
            return
    migrations.upgrade(engine)
    if is_empty:  # a table that had rows hands out other ids: tests count on the first account being 1
        with engine.connect() as connection:
            _statements[connection.dialect.server_version_info] = _statements_of(connection)


def _statements_of(connection: Connection) -> list[str]:
    tables = [str(row[0]) for row in connection.exec_driver_sql("SHOW TABLES")]
    made = [str(connection.exec_driver_sql(f"SHOW CREATE TABLE {it}").one()[1]) for it in tables]
    return [*made, f"INSERT INTO {migrations.VERSION_TABLE} VALUES ('{migrations.current_revision(connection)}')"]


def recharge(
    engine: Engine, account_id: int, amount: Decimal, *, row_key: str | None = None, by: str | None = None
) -> Decimal:
    """A recharge as releases before movements were requests made it: a ledger row, its record, and no request.

    Returns the balance after it.
    """
    key = row_key or keys.make_standalone_key(RECHARGE, account_id)
    with engine.begin() as connection:
        found = select(account_asset_balances).where(account_asset_balances.c.id == account_id).with_for_update()
        after = accounts._pay_in(connection, connection.execute(found).one(), amount, key, by=by)
        if by is not None:
            details = {"account_id": account_id, "key": key, "amount": f"{amount:.2f}"}
            actions.record(
                connection, operator=by, action=accounts.ACCOUNT_RECHARGE, reason="", count=1, details=details
            )
    return after
