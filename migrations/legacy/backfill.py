"""backfill: give every old row a key and a session, by the guide's two rules, in small transactions with pauses.

    sweep the old rows by primary key ─► build both indexes, online ─► catch up with old code's new rows

The size of a chunk is adapted so that it takes TARGET_S. The pause before the next chunk grows where a commit of the
backfill's own, the canary, takes longer than on the idle server: then the writers' commits take longer, too.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from tombola.migrations.legacy import checksums, record, tables
from tombola.migrations.legacy.session import OnProgress, Say, alter, code_of, each_by_itself, turn
from tombola.migrations.legacy.shapes import CAN_BE_FILLED, IS_USABLE
from tombola.migrations.legacy.tables import ACCOUNT_INDEX, KEY, KEY_INDEX, LEDGER, SESSION, SESSION_INDEX, Definition
from tombola.producers.domain.errors import ConfigurationError

TARGET_S: Final = 0.05
SIZE_FIRST, SIZE_MIN, SIZE_MAX = 500, 50, 10_000
CATCH_UP_ROWS: Final = 1000
DUPLICATE: Final = 1062
FOLLOW_EVERY_S: Final = 0.5
PAUSE_SHARE_MIN, PAUSE_SHARE_MAX = 0.05, 4.0
CANARY_EVERY_S: Final = 0.5
CANARY_S_MIN: Final = (
    0.02  # a commit that is slower than this, and than three of the first ones, is the writers' trouble
)


# ---- a chunk ---------------------------------------------------------------------------------------------------------


def chunk_statement(ledger: Definition, *, own_session: bool) -> str:
    """The guide's two rules for the rows from :first to :last that have no key or no session yet."""
    session = f"IF({IS_USABLE}, business_id, CONCAT('tx_', transaction_id))" if own_session else "business_id"
    # A value that exists stays.
    values = [f"{KEY} = COALESCE({KEY}, CONCAT('tx_', transaction_id))", f"{SESSION} = COALESCE({SESSION}, {session})"]
    values += kept(ledger)
    which = f"transaction_id BETWEEN :first AND :last AND ({KEY} IS NULL OR {SESSION} IS NULL)"
    return f"UPDATE {LEDGER} SET {', '.join(values)} WHERE {which}" + ("" if own_session else f" AND {CAN_BE_FILLED}")


def kept(ledger: Definition, prefix: str = "") -> list[str]:
    """Assignments that keep the columns which the server would set at each update."""
    found = [prefix + tables.quoted(name) for name, it in ledger.columns.items() if "on update" in it.extra.lower()]
    return [f"{name} = {name}" for name in found]


def index_statement(ledger: Definition) -> str | None:
    """The ALTER that builds the missing indexes; None if all exist."""
    wanted = {
        KEY_INDEX: f"ADD UNIQUE INDEX {KEY_INDEX} ({KEY})",
        SESSION_INDEX: f"ADD INDEX {SESSION_INDEX} ({SESSION})",
    }
    if not ledger.has_index_on("account_id"):
        wanted[ACCOUNT_INDEX] = f"ADD INDEX {ACCOUNT_INDEX} (account_id, created_at)"
    added = [how for name, how in wanted.items() if name not in ledger.indexes]
    return f"ALTER TABLE {LEDGER} {', '.join(added)}, ALGORITHM=INPLACE, LOCK=NONE" if added else None


def statements(engine: Engine, *, own_session: bool) -> list[str]:
    """The statements that are left of this step, to run by hand."""
    with each_by_itself(engine) as connection:
        ledger = tables.ledger(connection)
        update = chunk_statement(ledger, own_session=own_session)
        index = index_statement(ledger)
        return [
            f"-- for each range of some 1,000 transaction_ids up to {tables.highest_id(connection):,}, one transaction",
            update.replace(":first", "<first>").replace(":last", "<last>"),
            *([index] if index else []),
            f"-- again, until this is 0: SELECT COUNT(*) FROM {LEDGER} WHERE {KEY} IS NULL OR {SESSION} IS NULL",
        ]


# ---- the step --------------------------------------------------------------------------------------------------------


def backfill(
    engine: Engine,
    *,
    own_session: bool,
    follow: bool,
    say: Say,
    on_progress: OnProgress,
    stopping: threading.Event | None = None,
) -> int:
    """Do what is left, and with `follow` continue until contract is done; return how many rows got a key.

    Raises ConfigurationError when rows are left whose business_id cannot be a session id.
    """
    stopping = stopping or threading.Event()
    with each_by_itself(engine) as connection:
        expanded = record.recorded(connection)
        if expanded.status != record.DONE:
            raise ConfigurationError(f"the step before is not done: run `{expanded.shape.command}` first")
        if _is_over(connection):
            say("nothing to do: every row has a key, and the ledger takes no other")
            return 0
        restore_keys(connection)
    filled = _Sweep(engine, own_session, on_progress, stopping).run()
    if stopping.is_set():
        say("stopped: run it again, and it goes on from here")
        return filled
    _build_indexes(engine, say, on_progress)
    filled += catch_up(engine, own_session=own_session)
    _end(engine, say)
    while follow and not stopping.wait(FOLLOW_EVERY_S):
        try:
            with each_by_itself(engine) as connection:
                if tables.takes_keys_only(tables.ledger(connection)):
                    say("the ledger takes no row without a key: nothing is left to follow")
                    break
            filled += catch_up(engine, own_session=own_session)
        except DBAPIError as error:
            if code_of(error) == 1054:
                raise ConfigurationError("the columns are gone: the migration was rolled back meanwhile") from None
            raise
    return filled


def _is_over(connection: Connection) -> bool:
    """Whether the backfill is recorded as done, and no row can be without a key any more."""
    ledger, known = tables.ledger(connection), record.steps(connection)
    is_done = "backfill" in known and known["backfill"].status == record.DONE
    return is_done and tables.takes_keys_only(ledger) and index_statement(ledger) is None


def restore_keys(connection: Connection) -> None:
    """Restore the keys of draws by new code whose rows a rollback has kept.

    A key that equals another key in the column's collation is restored only after contract has changed the collation.
    """
    if connection.execute(text("SELECT 1 FROM legacy_migration_keys LIMIT 1")).first() is None:
        return
    values = [f"it.{KEY} = kept.{KEY}", f"it.{SESSION} = kept.{SESSION}", *kept(tables.ledger(connection), "it.")]
    for first, last in checksums.ranges(connection, 0, tables.highest_id(connection), 5000):
        connection.execute(
            text(
                f"UPDATE IGNORE legacy_migration_keys AS kept JOIN {LEDGER} AS it "
                f"ON it.transaction_id = kept.transaction_id SET {', '.join(values)} "
                f"WHERE (it.{KEY} IS NULL OR it.{KEY} = CONCAT('tx_', it.transaction_id)) "
                "AND kept.transaction_id BETWEEN :first AND :last"
            ),
            {"first": first, "last": last},
        )


class _Sweep:
    """The sweep over the old rows, up to the highest id at its beginning."""

    def __init__(self, engine: Engine, own_session: bool, on_progress: OnProgress, stopping: threading.Event) -> None:
        self._engine, self._own_session, self._on_progress, self._stopping = engine, own_session, on_progress, stopping
        self._pause_share = PAUSE_SHARE_MIN
        self._usual_s = 0.0
        self._next_look = 0.0

    def run(self) -> int:
        with each_by_itself(self._engine) as connection:
            details = record.begin(
                connection, "backfill", {"last_id": 0, "up_to": tables.highest_id(connection), "filled": 0}
            ).details
            if details["last_id"] >= details["up_to"]:
                return 0
            statement = text(chunk_statement(tables.ledger(connection), own_session=self._own_session))
            self._usual_s = statistics.median(self._canary(connection) for _ in range(5))
        filled, size = 0, float(SIZE_FIRST)
        with self._engine.connect() as connection, each_by_itself(self._engine) as canary:
            while details["last_id"] < details["up_to"] and not self._stopping.is_set():
                begin = time.monotonic()
                try:
                    with _duplicates_told():
                        filled += self._chunk(connection, statement, details, int(size))
                except DBAPIError as error:
                    if code_of(error) not in (1205, 1213):
                        raise
                    connection.rollback()
                    size = max(SIZE_MIN, size / 2)
                    time.sleep(TARGET_S)
                    continue
                took_s = time.monotonic() - begin
                size = min(SIZE_MAX, max(SIZE_MIN, size * min(1.5, max(0.5, TARGET_S / max(took_s, 1e-4)))))
                self._on_progress("rows", details["last_id"], details["up_to"])
                self._look(canary)
                time.sleep(took_s * self._pause_share)
        return filled

    def _chunk(self, connection: Connection, statement: Any, details: dict[str, Any], size: int) -> int:
        """Fill one chunk and its checkpoint in one transaction; return the number of rows."""
        # The range is found first, by an index alone, which locks nothing.
        first, last = next(checksums.ranges(connection, details["last_id"], details["up_to"], size))
        count = connection.execute(statement, {"first": first, "last": last}).rowcount
        details |= {"last_id": last, "filled": details["filled"] + count}
        record.note(connection, "backfill", details)
        connection.commit()
        return int(count)

    def _look(self, connection: Connection) -> None:
        """Slow down while commits are slower than at the beginning, speed up otherwise."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + CANARY_EVERY_S
        took_s = self._canary(connection)
        if took_s > max(CANARY_S_MIN, 3 * self._usual_s):
            self._pause_share = min(PAUSE_SHARE_MAX, self._pause_share * 2)
        else:
            self._pause_share = max(PAUSE_SHARE_MIN, self._pause_share * 0.7)

    @staticmethod
    def _canary(connection: Connection) -> float:
        """The seconds that a commit of one row takes."""
        begin = time.monotonic()
        connection.execute(
            text(
                "INSERT INTO legacy_migration (step, status, started_at, details) "
                "VALUES ('canary', '', UTC_TIMESTAMP(6), '{}') ON DUPLICATE KEY UPDATE started_at = UTC_TIMESTAMP(6)"
            )
        )
        return time.monotonic() - begin


@contextmanager
def _duplicates_told() -> Iterator[None]:
    """Raise a ConfigurationError in place of the server's error that two rows would have the same key."""
    try:
        yield
    except DBAPIError as error:
        if code_of(error) != DUPLICATE or error.orig is None:
            raise
        raise ConfigurationError(
            f"two rows would have one key ({error.orig.args[-1]}): `tombola legacy inspect` lists such rows; give each "
            "a key of its own, then run this again"
        ) from None


def _build_indexes(engine: Engine, say: Say, on_progress: OnProgress) -> None:
    with turn(engine, say) as connection:
        statement = index_statement(tables.ledger(connection))
        if statement is None:
            return
        say("building the indexes, online")
        upto = tables.highest_id(connection)
        with _duplicates_told():
            alter(connection, [statement], say)
        checksums.take(connection, record.recorded(connection).details, upto, on_progress)


def catch_up(engine: Engine, *, own_session: bool) -> int:
    """Fill rows that old code has added without a key, found by the indexes; return how many."""
    filled = 0
    with engine.connect() as connection:
        statement = text(chunk_statement(tables.ledger(connection), own_session=own_session))
        fillable = "" if own_session else f" AND {CAN_BE_FILLED}"
        query = text(f"{_blank(fillable)} ORDER BY transaction_id LIMIT {CATCH_UP_ROWS}")
        while True:
            found = list(connection.execute(query).scalars())
            try:
                if found:
                    with _duplicates_told():
                        filled += connection.execute(statement, {"first": found[0], "last": found[-1]}).rowcount
                connection.commit()
            except DBAPIError as error:
                if code_of(error) not in (1205, 1213):
                    raise
                connection.rollback()  # a writer holds a row: try again a moment later
                time.sleep(TARGET_S)
                continue
            if len(found) < CATCH_UP_ROWS // 10:  # rows that are added meanwhile are for the next call
                return filled


def _blank(condition: str = "") -> str:
    """A query for the rows without a key or without a session, each through its index."""
    return (
        f"SELECT transaction_id FROM {LEDGER} FORCE INDEX ({KEY_INDEX}) WHERE {KEY} IS NULL{condition} UNION "
        f"SELECT transaction_id FROM {LEDGER} FORCE INDEX ({SESSION_INDEX}) WHERE {SESSION} IS NULL{condition}"
    )


def without_key(connection: Connection) -> int:
    """The number of rows without a key or a session. Fast only with both indexes."""
    return int(connection.execute(text(f"SELECT COUNT(*) FROM ({_blank()}) AS blank")).scalar_one())


def _end(engine: Engine, say: Say) -> None:
    with each_by_itself(engine) as connection:
        connection.execute(text("DELETE FROM legacy_migration WHERE step = 'canary'"))
        ids = list(connection.execute(text(_blank(f" AND NOT COALESCE({CAN_BE_FILLED}, 0)"))).scalars())
        if ids:
            raise ConfigurationError(
                f"{len(ids):,} rows have a business_id that cannot be a session's id (such as transaction_id "
                f"{', '.join(map(str, ids[:5]))}; `tombola legacy inspect` says why): give them one, or run this again "
                "with --own-session: each gets a session of its own, tx_{transaction_id}"
            )
        known = record.steps(connection)["backfill"]
        if known.status != record.DONE:
            record.end(connection, "backfill", known.details)
        say(f"every row has a key except the latest of old code ({without_key(connection):,} now)")
