"""The ledger as lines of text: one value a row, since the driver takes longer for ten columns than the check does.

A line begins with 1 if it has the values of its request behind those of its row, else with 0: charges have them whose
request is a completed draw. A row with a value that is missing, or that holds the separator, makes no line: it is odd,
its line is its id alone, and `read_odd` reads it as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, select

from tombola.producers.domain.campaigns.pulls import CONSUME
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.audit.stored import raw_rows, stored, texts

SEPARATOR: Final = "\x1f"
LEDGER: Final = (
    *("transaction_id", "account_id", "lottery_session_id", "idempotency_key", "business_type", "asset_code"),
    *("delta_amount", "balance_before", "balance_after", "notes"),
)
# Terms are empty for a draw of contract v1. The epoch that the request is bound to (empty: none), when it was accepted,
# and when it was drawn; the result is empty where no text is kept.
REQUEST: Final = (
    *("request_key", "account_id", "campaign", "fingerprint", "terms"),
    *("seed_epoch", "accepted_at", "drawn_at", "result"),
)
# Where the values of a row stand in its line.
TRANSACTION_ID, ACCOUNT_ID, SESSION, KEY, BUSINESS_TYPE, ASSET, DELTA, BEFORE, AFTER, NOTES = range(1, 11)
_FIELDS: Final = {"0": 1 + len(LEDGER), "1": 1 + len(LEDGER) + len(REQUEST)}
_AMOUNTS: Final = ("delta_amount", "balance_before", "balance_after")

BEFORE_ALL_IDS: Final = 1 - 2**63  # a forger's id may be below zero

Line = list[str]


def read(connection: Connection, after_id: int, up_to_id: int, *, rows_max: int) -> list[Line]:
    """The next `rows_max` lines, with requests, of the rows from above `after_id` up to `up_to_id`, by their ids."""
    is_sqlite = connection.dialect.name == "sqlite"
    between = f"t.transaction_id > {after_id:d} AND t.transaction_id <= {up_to_id:d}"
    ids = f"SELECT t.transaction_id FROM asset_transactions t WHERE {between} ORDER BY t.transaction_id"
    last = raw_rows(connection, f"{ids} LIMIT 1 OFFSET {rows_max - 1:d}")
    if last:
        between = f"t.transaction_id > {after_id:d} AND t.transaction_id <= {last[0][0]:d}"
    text, of_rows, _ = _SQL[is_sqlite]
    return sorted(map(_line, texts(connection, text, f"{of_rows} WHERE {between}")), key=id_of)


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
    _, _, text = _SQL[connection.dialect.name == "sqlite"]
    where = f"t.transaction_id > {after_id:d} AND {of_account} ORDER BY t.transaction_id{limit}"
    return [_line(it) for (it,) in raw_rows(connection, f"SELECT {text} FROM asset_transactions t WHERE {where}")]


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


def amount_text(column: str, *, is_sqlite: bool) -> str:
    """SQL for an amount as DECIMAL(10,2) is printed; NULL for what is no whole number of hundredths in SQLite."""
    if not is_sqlite:
        return column
    return (
        f"CASE typeof({column}) WHEN 'integer' THEN printf('%s%d.%02d', "
        f"CASE WHEN {column} < 0 THEN '-' ELSE '' END, abs({column}) / 100, abs({column}) % 100) END"
    )


def joined(values: Sequence[str], *, is_sqlite: bool) -> str:
    """SQL for these values as one text, with separators between them; NULL if one of them is."""
    parts = [part for value in values for part in (f"'{SEPARATOR}'", value)][1:]
    return " || ".join(parts) if is_sqlite else f"CONCAT({', '.join(parts)})"


def _sql(*, is_sqlite: bool) -> tuple[str, str, str]:
    """SQL for a line with its request, for the rows that it is of, and for a line without a request."""
    values = [
        amount_text(f"t.{name}", is_sqlite=is_sqlite) if name in _AMOUNTS else f"t.{name}" for name in LEDGER[:-1]
    ]
    values.append("COALESCE(t.notes, '')")
    without = joined(["'0'", *values], is_sqlite=is_sqlite)
    result = "CASE r.result WHEN '' THEN '?' ELSE COALESCE(r.result, '') END"
    # NULL where there is no request.
    terms = "CASE WHEN r.kind IS NULL THEN '' ELSE COALESCE(NULLIF(r.terms, ''), '?') END"
    bound = [terms, "COALESCE(r.seed_epoch, '')", "COALESCE(r.accepted_at, r.created_at)", "t.created_at"]
    request = joined(["''", *(f"r.{name}" for name in REQUEST[:4]), *bound, result], is_sqlite=is_sqlite)
    row = joined(["(r.request_key IS NOT NULL)", *values], is_sqlite=is_sqlite)
    line = f"{row} || COALESCE({request}, '')" if is_sqlite else f"CONCAT({row}, COALESCE({request}, ''))"
    # Only charges look for a request: a look-up of NULL finds nothing, and costs nothing.
    rows = (
        "FROM asset_transactions t LEFT JOIN api_idempotency_requests r ON r.lottery_session_id = "
        f"CASE WHEN t.business_type = '{CONSUME}' THEN t.lottery_session_id END "
        f"AND (r.kind IS NULL OR r.kind = '{DrawRequest.kind}') "
        f"AND r.reason IS NULL AND r.status = '{Status.COMPLETED}'"
    )
    # Not a CAST on servers: a text that is cast has a collation of its own, which does not mix with old tables'.
    lone = "CAST(t.transaction_id AS CHAR)" if is_sqlite else "CONCAT(t.transaction_id, '')"
    return f"COALESCE({line}, {lone})", rows, f"COALESCE({without}, {lone})"


_SQL: Final = {is_sqlite: _sql(is_sqlite=is_sqlite) for is_sqlite in (False, True)}
