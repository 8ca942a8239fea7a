"""The owner's old table and the old code that writes it, for tests and the benchmark of the migration.

legacy.create(engine)
legacy.fill(engine, 50_000)
with legacy.writers(url, 4) as old:  # threads that charge and reward as the owner's service does
    ...
old.waits_s  # the duration of each draw
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pymysql
from sqlalchemy import Engine, event, text
from sqlalchemy.engine import make_url

from tombola.migrations.legacy import backfill, contract, expand, rollback, verify
from tombola.migrations.legacy.session import open_session

PROJECT = Path(__file__).parents[1]

ACCOUNTS = 200
BALANCE = 1_000_000

LEDGER = """
CREATE TABLE asset_transactions (
  transaction_id {id} NOT NULL AUTO_INCREMENT,
  account_id {id} NOT NULL,
  business_id varchar({length}) {null},
  business_type varchar(50) NOT NULL,
  asset_code varchar(50) NOT NULL,
  delta_amount decimal(10,2) NOT NULL,
  balance_before decimal(10,2) NOT NULL,
  balance_after decimal(10,2) NOT NULL,
  notes text,
  created_at datetime NOT NULL,
  updated_at datetime NOT NULL {on_update},
  PRIMARY KEY (transaction_id),
  {unique}
  KEY idx_account_created (account_id, created_at)
) ENGINE=InnoDB DEFAULT CHARSET={charset} COLLATE={collation}
"""
ACCOUNT_TABLE = """
CREATE TABLE account_asset_balances (
  id {id} NOT NULL AUTO_INCREMENT,
  user_id {id} NOT NULL,
  asset_code varchar(50) NOT NULL,
  balance decimal(10,2) NOT NULL DEFAULT 0.00,
  frozen_amount decimal(10,2) NOT NULL DEFAULT 0.00,
  level enum('gold','silver') DEFAULT 'silver',
  version int NOT NULL DEFAULT 0,
  created_at datetime NOT NULL,
  {updated_at}
  PRIMARY KEY (id),
  UNIQUE KEY uk_user (user_id, asset_code)
) ENGINE=InnoDB DEFAULT CHARSET={charset} COLLATE={collation}
"""
BOTH = "UNIQUE KEY uk_business_idempotency (business_id, business_type),"
ALONE = "UNIQUE KEY uk_business_idempotency (business_id),"
WITHOUT = ""


def create(
    engine: Engine,
    *,
    unique: str = BOTH,
    collation: str = "utf8mb4_general_ci",
    id_type: str = "bigint",
    on_update: bool = True,
    lacks_updated_at: bool = False,
    nullable: bool = False,
    length: int = 100,
) -> None:
    """Create both tables as old code has them."""
    shape = {
        "id": id_type,
        "unique": unique,
        "charset": collation.partition("_")[0],
        "collation": collation,
        "on_update": "DEFAULT current_timestamp() ON UPDATE current_timestamp()" if on_update else "",
        "updated_at": "" if lacks_updated_at else "updated_at datetime NOT NULL,",
        "null": "NULL" if nullable else "NOT NULL",
        "length": length,
    }
    with engine.begin() as connection:
        connection.execute(text(ACCOUNT_TABLE.format(**shape)))
        connection.execute(text(LEDGER.format(**shape)))
        stamps = "created_at" if lacks_updated_at else "created_at, updated_at"
        values = "'2024-01-01'" if lacks_updated_at else "'2024-01-01', '2024-01-01'"
        accounts = ", ".join(f"({number}, {number}, 'POINT', {BALANCE}, {values})" for number in range(1, ACCOUNTS + 1))
        connection.execute(
            text(f"INSERT INTO account_asset_balances (id, user_id, asset_code, balance, {stamps}) VALUES {accounts}")
        )


def fill(engine: Engine, rows: int, *, alone: bool = False) -> None:
    """Insert `rows` rows, each account's chain in order. Three of ten draws win; with `alone` each row is a draw."""
    step = 100_000
    kind = "'lottery_consume'" if alone else "IF(seq MOD 13 IN (3, 6, 9), 'lottery_reward', 'lottery_consume')"
    # A reward follows its charge, with the same business_id and account.
    draw = "seq" if alone else "IF(seq MOD 13 IN (3, 6, 9), seq - 1, seq)"
    with engine.connect() as connection:
        for start in range(1, rows + 1, step):
            connection.execute(
                text(
                    "INSERT INTO asset_transactions (account_id, business_id, business_type, asset_code, delta_amount, "
                    "balance_before, balance_after, notes, created_at, updated_at) SELECT "
                    f"1 + (({draw}) * 7) MOD {ACCOUNTS}, CONCAT('lottery_tx_', 1700000000000 + ({draw}) * 37, '_', "
                    f"LPAD(LOWER(HEX((({draw}) * 7919) MOD 16777216)), 6, '0'), '_001'), {kind}, 'POINT', 0, "
                    f"{BALANCE}, {BALANCE}, IF(seq MOD 2, NULL, 'alt'), '2024-01-01' + INTERVAL seq SECOND, "
                    f"'2024-01-01' + INTERVAL seq SECOND FROM seq_{start}_to_{min(rows, start + step - 1)}"
                )
            )
            connection.commit()


def fill_chains(engine: Engine, draws: int, *, first: int = 1) -> list[str]:
    """Insert `draws` draws of old code with balances that add up, every third one won; return their business_ids."""
    balances = dict.fromkeys(range(1, ACCOUNTS + 1), BALANCE)
    with engine.begin() as connection:
        found = connection.execute(text("SELECT id, balance FROM account_asset_balances"))
        balances |= {int(account_id): int(balance) for account_id, balance in found}
        rows, names = [], []
        for number in range(first, first + draws):
            account_id, session_id = (
                1 + number % 7,
                f"lottery_tx_{1_700_000_000_000 + number * 37}_00ab{number % 10}f_001",
            )
            names.append(session_id)
            for kind, delta in (("lottery_consume", -1), ("lottery_reward", 5))[: 1 + (number % 3 == 0)]:
                before = balances[account_id]
                balances[account_id] += delta
                at = datetime(2024, 1, 1) + timedelta(minutes=number)
                rows.append((account_id, session_id, kind, delta, before, before + delta, at, at))
        connection.exec_driver_sql(
            "INSERT INTO asset_transactions (account_id, business_id, business_type, asset_code, delta_amount, "
            "balance_before, balance_after, created_at, updated_at) VALUES (%s, %s, %s, 'POINT', %s, %s, %s, %s, %s)",
            rows,
        )
        connection.exec_driver_sql(
            "UPDATE account_asset_balances SET balance = %s WHERE id = %s",
            [(balance, account_id) for account_id, balance in balances.items()],
        )
    return names


# ---- the guide's steps, run by hand ----------------------------------------------------------------------------------

FILL = (
    "UPDATE asset_transactions SET idempotency_key = CONCAT('tx_', transaction_id), lottery_session_id = business_id, "
    "updated_at = updated_at WHERE idempotency_key IS NULL"
)
BY_HAND = {
    "a": (),
    # half-way: the columns in the table's collation, and half of the backfill
    "b": (
        "ALTER TABLE asset_transactions ADD COLUMN lottery_session_id varchar(100) NULL COMMENT 'ties: a draw' "
        "AFTER business_id, ADD COLUMN idempotency_key varchar(100) NULL",
        f"{FILL} AND transaction_id <= 60",
        f"{FILL} AND transaction_id BETWEEN 80 AND 90",
    ),
    "b, keys alone": (
        "ALTER TABLE asset_transactions ADD COLUMN idempotency_key varchar(100) NULL",
        "UPDATE asset_transactions SET idempotency_key = CONCAT('tx_', transaction_id), updated_at = updated_at "
        "WHERE transaction_id <= 60",
        "ALTER TABLE asset_transactions ADD UNIQUE INDEX uk_idempotency_key (idempotency_key)",
    ),
    "b, sessions alone": (
        "ALTER TABLE asset_transactions ADD COLUMN lottery_session_id varchar(100) NULL",
        "UPDATE asset_transactions SET lottery_session_id = business_id, updated_at = updated_at "
        "WHERE transaction_id > 60",
        "ALTER TABLE asset_transactions ADD INDEX idx_lottery_session_id (lottery_session_id)",
    ),
    "c": (
        "ALTER TABLE asset_transactions ADD COLUMN lottery_session_id varchar(100) NULL, "
        "ADD COLUMN idempotency_key varchar(100) NULL",
        FILL,
        "ALTER TABLE asset_transactions ADD UNIQUE INDEX uk_idempotency_key (idempotency_key)",
        "ALTER TABLE asset_transactions MODIFY lottery_session_id varchar(100) NOT NULL, "
        "MODIFY idempotency_key varchar(100) NOT NULL",
        "ALTER TABLE asset_transactions ADD INDEX idx_lottery_session_id (lottery_session_id)",
    ),
}
BY_HAND["d"] = BY_HAND["c"]


def take_by_hand(engine: Engine, shape: str) -> None:
    """Run the guide's statements that lead to `shape`, a key of BY_HAND."""
    with engine.begin() as connection:
        for statement in BY_HAND[shape]:
            connection.execute(text(statement.replace(": a", r"\: a")))


@dataclass
class Writers:
    """Running threads of old code."""

    waits_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    draws: int = 0


def old_draw(connection: pymysql.Connection[Any], session_id: str, account_id: int, *, wins: bool) -> None:
    """One draw by old code: lock the account, insert the rows, update the balance."""
    _draw(connection, session_id, account_id, wins, lambda kind: {})


def service_draw(connection: pymysql.Connection[Any], session_id: str, account_id: int, *, wins: bool) -> None:
    """One draw by the owner's new code: as old_draw, with a key in each row."""
    _draw(
        connection, session_id, account_id, wins,
        lambda kind: {"lottery_session_id": session_id, "idempotency_key": f"{session_id}:{kind.partition('_')[2]}"},
    )  # fmt: skip


def drawn_key_draw(connection: pymysql.Connection[Any], session_id: str, account_id: int, *, wins: bool) -> None:
    """As service_draw, with keys of the form in the guide's drawing, which do not contain the request."""
    _draw(
        connection, session_id, account_id, wins,
        lambda kind: {
            "lottery_session_id": session_id,
            "idempotency_key": f"{kind}_{account_id}_{time.time_ns() // 1_000_000}_{random.randbytes(3).hex()}",
        },
    )  # fmt: skip


def _draw(
    connection: pymysql.Connection[Any],
    session_id: str,
    account_id: int,
    wins: bool,
    keys: Callable[[str], dict[str, str]],
) -> None:
    with connection.cursor() as cursor:
        connection.begin()
        cursor.execute("SELECT balance FROM account_asset_balances WHERE id = %s FOR UPDATE", (account_id,))
        (balance,) = cursor.fetchone() or (None,)
        assert balance is not None
        for kind, delta in (("lottery_consume", -1), ("lottery_reward", 5))[: 1 + wins]:
            given = keys(kind)
            cursor.execute(
                f"INSERT INTO asset_transactions ({''.join(f'{name}, ' for name in given)}account_id, business_id, "
                "business_type, asset_code, delta_amount, balance_before, balance_after, created_at, updated_at) "
                f"VALUES ({'%s, ' * len(given)}%s, %s, %s, 'POINT', %s, %s, %s, UTC_TIMESTAMP(), UTC_TIMESTAMP())",
                (*given.values(), account_id, session_id, kind, delta, balance, balance + delta),
            )
            balance += delta
        cursor.execute("UPDATE account_asset_balances SET balance = %s WHERE id = %s", (balance, account_id))
        connection.commit()


def connect(url: str) -> pymysql.Connection[Any]:
    parts = make_url(url)
    return pymysql.connect(
        host=parts.host or "127.0.0.1", port=parts.port or 3306, user=parts.username, password=parts.password or "",
        database=parts.database, charset="utf8mb4", ssl_disabled=True,
    )  # fmt: skip


@contextmanager
def writers(
    url: str, count: int, *, rate: float = 50.0, wins: bool = True, draw: Callable[..., None] = old_draw
) -> Iterator[Writers]:
    """`count` threads that call `draw`, each up to `rate` times a second."""
    work, stopping = Writers(), threading.Event()

    def run(number: int) -> None:
        chance, connection = random.Random(number), connect(url)
        try:
            while not stopping.is_set():
                begin = time.perf_counter()
                session_id = f"old_{number}_{time.time_ns()}"
                try:
                    draw(connection, session_id, chance.randint(1, ACCOUNTS), wins=wins and chance.random() < 0.3)
                    work.draws += 1
                except pymysql.MySQLError as error:
                    work.failures.append(str(error))
                    with suppress(pymysql.MySQLError):
                        connection.rollback()
                took_s = time.perf_counter() - begin
                work.waits_s.append(took_s)
                stopping.wait(max(0.0, 1 / rate - took_s))
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield work
    finally:
        stopping.set()
        for thread in threads:
            thread.join(10)


# ---- steps as processes that tests kill ------------------------------------------------------------------------------


def main() -> None:
    """`python -m tests.legacy URL STEP…`: run the steps, each in children that are killed, and then to its end.

    STEP/7 is killed at every seventh of its statements, STEP*3@0.5 three times within half a second.
    """
    url, *steps = sys.argv[1:]
    engine = open_session(url)
    for step in steps:
        name, by_statement, stride = step.partition("/")
        name, by_time, kills = name.partition("*")
        if by_statement:
            print(f"{step}: {_kill_at_every(engine, name, int(stride))} kills", flush=True)
        elif by_time:
            times, _, within_s = kills.partition("@")
            _kill_within(engine, name, int(times), float(within_s))
        run_step(engine, name)


def _kill_at_every(engine: Engine, step: str, stride: int) -> int:
    """Run the step in children that are killed -9 at their 1st, 1 + stride-th, … statement, until one completes it.

    Children are killed in turn before the statement is sent and while the server executes it. Return the kills.
    """
    for number in range(1000):
        last = 1 + number * stride
        seen = itertools.count(1)

        def end(*_arguments: object, last: int = last, seen: Iterator[int] = seen, number: int = number) -> None:
            if next(seen) == last:
                if number % 2:
                    threading.Timer(0.001, os.kill, (os.getpid(), signal.SIGKILL)).start()
                else:
                    os.kill(os.getpid(), signal.SIGKILL)

        _, how = os.waitpid(_child(engine, step, at_each_statement=end), 0)
        if not os.WIFSIGNALED(how):
            assert os.WEXITSTATUS(how) == 0
            return number
    raise AssertionError("no child completed the step")


def _kill_within(engine: Engine, step: str, kills: int, within_s: float) -> None:
    """Run the step in `kills` children, each killed -9 at a random moment of its first `within_s` seconds."""
    for _ in range(kills):
        child = _child(engine, step)
        time.sleep(random.uniform(0, within_s))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _child(engine: Engine, step: str, *, at_each_statement: Callable[..., None] | None = None) -> int:
    """Fork a process that runs the step; its id. It exits with 0 when the step is done, with 1 when it failed."""
    engine.dispose()
    child = os.fork()
    if child:
        return child
    try:
        if at_each_statement is not None:
            event.listen(engine, "before_cursor_execute", at_each_statement)
        run_step(engine, step)
    except BaseException as error:
        print(error, flush=True)
        os._exit(1)
    os._exit(0)


def run_step(engine: Engine, step: str) -> None:
    """Run one step to its end."""

    def say(line: str) -> None:
        print(line, flush=True)

    def on_progress(*_progress: object) -> None:
        pass

    match step:
        case "expand":
            expand.expand(engine, say=say, on_progress=on_progress)
        case "adopt":
            expand.adopt(engine, say=say, on_progress=on_progress)
        case "backfill":
            backfill.backfill(engine, own_session=False, follow=False, say=say, on_progress=on_progress)
        case "verify":
            found = verify.verify(engine, on_progress=on_progress)
            assert found.is_clean, found.problems
        case "contract":
            contract.contract(
                engine, drop_business_unique=True, quiet_s=0.2, writers_wait=True, say=say, on_progress=on_progress
            )
        case "rollback":
            rollback.rollback(engine, keep_new_rows=False, writers_wait=True, say=say)
        case "rollback, rows kept":
            rollback.rollback(engine, keep_new_rows=True, writers_wait=True, say=say)
        case _:
            raise AssertionError(step)


def kill_and_resume(url: str, *steps: str, timeout_s: float = 120) -> list[str]:
    """Run steps as `main` takes them in a process of their own; return the lines of its output."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.legacy", url, *steps],
        cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


if __name__ == "__main__":
    main()
