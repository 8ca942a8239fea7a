"""The ledger as lines of text: one value a row, since the driver takes longer for ten columns than the check does.

A line begins with 1 if it has the values of its request behind those of its row, else with 0: charges have them whose
request is a completed draw of contract v1. A row with a value that is missing, or that holds the separator, makes no
line: it is odd, its line is its id alone, and `read_odd` reads it as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, select

from tombola.producers.domain.campaigns.pulls import CONSUME
from tombola.producers.domain.causes import Status
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.audit.stored import raw_rows, stored

SEPARATOR: Final = "\x1f"
LINE_SEPARATOR: Final = "\x1e"
TEXT_BYTES_MAX: Final = 2**26
LEDGER: Final = (
    *("transaction_id", "account_id", "lottery_session_id", "idempotency_key", "business_type", "asset_code"),
    *("delta_amount", "balance_before", "balance_after", "notes"),
)
REQUEST: Final = ("request_key", "account_id", "campaign", "fingerprint", "result")  # an archived result is empty
# Where the values of a row stand in its line.
TRANSACTION_ID, ACCOUNT_ID, SESSION, KEY, BUSINESS_TYPE, ASSET, DELTA, BEFORE, AFTER, NOTES = range(1, 11)
RESULT: Final = -1  # of the request
_FIELDS: Final = {"0": 1 + len(LEDGER), "1": 1 + len(LEDGER) + len(REQUEST)}
_AMOUNTS: Final = ("delta_amount", "balance_before", "balance_after")

BEFORE_ALL_IDS: Final = 1 - 2**63  # a forger's id may be below zero

Line = list[str]


def read(connection: Connection, after_id: int, up_to_id: int, *, rows_max: int) -> list[Line]:
    """The next `rows_max` lines, with requests, of the rows from above `after_id` up to `up_to_id`, by their ids."""
    between = f"t.transaction_id > {after_id:d} AND t.transaction_id <= {up_to_id:d}"
    ordered = f"{between} ORDER BY t.transaction_id"
    if connection.dialect.name == "sqlite":
        return [_line(text) for (text,) in raw_rows(connection, f"{_SQLITE} WHERE {ordered} LIMIT {rows_max:d}")]
    # All lines in one text: the driver takes longer for each row of an answer than the server for the row itself.
    ids = f"SELECT t.transaction_id FROM asset_transactions t WHERE {ordered} LIMIT 1 OFFSET {rows_max - 1:d}"
    last = raw_rows(connection, ids)
    if last:
        between = f"t.transaction_id > {after_id:d} AND t.transaction_id <= {last[0][0]:d}"
    connection.exec_driver_sql(f"SET SESSION group_concat_max_len = {TEXT_BYTES_MAX}")
    ((count, text),) = raw_rows(connection, f"{_MYSQL_AT_ONCE} WHERE {between}")
    texts = text.split(LINE_SEPARATOR) if text else []
    if len(texts) != count:  # cut off by the server's limits, or a value holds the separator
        ordered = f"{between} ORDER BY t.transaction_id"
        return [_line(text) for (text,) in raw_rows(connection, f"{_MYSQL} WHERE {ordered}")]
    return sorted(map(_line, texts), key=id_of)


def read_of_accounts(
    connection: Connection, accounts: range, after_id: int, *, rows_max: int | None = None
) -> list[Line]:
    """The lines of the rows of the accounts in this range of ids from above `after_id`, by transaction id.

    Without requests; at most `rows_max` lines.
    """
    of_account = f"t.account_id = {accounts.start:d}"
    if len(accounts) > 1:
        of_account = f"t.account_id >= {accounts.start:d} AND t.account_id < {accounts.stop:d}"
    limit = "" if rows_max is None else f" LIMIT {rows_max:d}"
    select_lines = _SQLITE_ROWS if connection.dialect.name == "sqlite" else _MYSQL_ROWS
    where = f"t.transaction_id > {after_id:d} AND {of_account} ORDER BY t.transaction_id{limit}"
    return [_line(text) for (text,) in raw_rows(connection, f"{select_lines} WHERE {where}")]


def _line(text: str) -> Line:
    fields = text.split(SEPARATOR)
    if len(fields) == 1:  # the id alone
        return fields
    return fields if len(fields) == _FIELDS[fields[0]] else [fields[TRANSACTION_ID]]


def id_of(line: Line) -> int:
    """The transaction id of a line, odd or not."""
    return int(line[0] if is_odd(line) else line[TRANSACTION_ID])


def is_odd(line: Line) -> bool:
    """Whether the row makes no line."""
    return len(line) == 1


def read_odd(connection: Connection, lines: Iterable[Line]) -> Mapping[int, Any]:
    """The odd rows among these lines as they are stored, by transaction id, with the columns of LEDGER."""
    ids = [id_of(line) for line in lines if is_odd(line)]
    return {
        row.transaction_id: row
        for some in chunks(ids)
        for row in connection.execute(
            select(*(stored(transactions.c[name]) for name in LEDGER)).where(transactions.c.transaction_id.in_(some))
        )
    }


def cents(text: str) -> int:
    """An amount of a line in hundredths; raises ValueError for a text that is no amount with two decimals."""
    if text[-3:-2] != ".":
        raise ValueError(text)
    return int(text[:-3] + text[-2:])


def _selects(*, is_sqlite: bool) -> tuple[str, str]:
    """The statements that select lines with their requests and without, up to the WHERE."""

    def joined(values: Sequence[str]) -> str:
        parts = [part for value in values for part in (f"'{SEPARATOR}'", value)][1:]
        return " || ".join(parts) if is_sqlite else f"CONCAT({', '.join(parts)})"

    def amount(column: str) -> str:  # as DECIMAL(10,2) is printed; NULL for what is no whole number of hundredths
        if not is_sqlite:
            return column
        return (
            f"CASE typeof({column}) WHEN 'integer' THEN printf('%s%d.%02d', "
            f"CASE WHEN {column} < 0 THEN '-' ELSE '' END, abs({column}) / 100, abs({column}) % 100) END"
        )

    values = [amount(f"t.{name}") if name in _AMOUNTS else f"t.{name}" for name in LEDGER[:-1]]
    values.append("COALESCE(t.notes, '')")
    without = joined(["'0'", *values])
    is_archived = "r.result IS NULL AND r.publish_at IS NULL"
    result = f"CASE WHEN {is_archived} THEN '' ELSE COALESCE(NULLIF(r.result, ''), '?') END"
    request = joined(["''", *(f"r.{name}" for name in REQUEST[:-1]), result])  # NULL where there is no request
    row = joined(["(r.request_key IS NOT NULL)", *values])
    line = f"{row} || COALESCE({request}, '')" if is_sqlite else f"CONCAT({row}, COALESCE({request}, ''))"
    # Only charges look for a request: a look-up of NULL finds nothing, and costs nothing.
    join = (
        "LEFT JOIN api_idempotency_requests r ON r.lottery_session_id = "
        f"CASE WHEN t.business_type = '{CONSUME}' THEN t.lottery_session_id END "
        f"AND r.kind IS NULL AND r.reason IS NULL AND r.status = '{Status.COMPLETED}'"
    )
    lone = "CAST(t.transaction_id AS CHAR)"
    return (
        f"SELECT COALESCE({line}, {lone}) FROM asset_transactions t {join}",
        f"SELECT COALESCE({without}, {lone}) FROM asset_transactions t",
    )


_SQLITE, _SQLITE_ROWS = _selects(is_sqlite=True)
_MYSQL, _MYSQL_ROWS = _selects(is_sqlite=False)
_MYSQL_AT_ONCE: Final = _MYSQL.replace("SELECT ", "SELECT COUNT(*), GROUP_CONCAT(", 1).replace(
    " FROM asset_transactions", f" SEPARATOR '{LINE_SEPARATOR}') FROM asset_transactions", 1
)
