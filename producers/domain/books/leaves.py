"""The leaf of a ledger row: SHA-256 over 0x00 and the row's fields, each with its length in front.

    leaf  = SHA-256(0x00 ‖ field ‖ field ‖ …)          the 13 fields of FIELDS, in that order
    field = decimal digits of the number of bytes ‖ ":" ‖ the bytes
            or "-" where the field is NULL

A field's bytes are its value as text, in UTF-8:

| fields | text | example |
| --- | --- | --- |
| `transaction_id`, `account_id` | decimal digits | `42` |
| `delta_amount`, `balance_before`, `balance_after` | two decimals, with a `-` if negative | `-1.00` |
| `created_at`, `updated_at` | UTC, with six digits of a second | `2026-01-31 23:59:59.000250` |
| all others | as stored | `lottery_consume` |

0x00 is the prefix of leaves in RFC 6962. Lengths make the fields of a leaf unambiguous: no two different rows have the
same bytes. MySQL and MariaDB compute the leaf by themselves (worker.books.rows), from the same text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

FIELDS: Final = (
    "transaction_id",
    "account_id",
    "business_id",
    "lottery_session_id",
    "idempotency_key",
    "business_type",
    "asset_code",
    "delta_amount",
    "balance_before",
    "balance_after",
    "notes",
    "created_at",
    "updated_at",
)
INTEGERS: Final = frozenset({"transaction_id", "account_id"})
AMOUNTS: Final = frozenset({"delta_amount", "balance_before", "balance_after"})
TIMES: Final = frozenset({"created_at", "updated_at"})
LEAF_PREFIX: Final = b"\x00"
LEAF_BYTES: Final = 32


def leaf(texts: Sequence[str | None]) -> bytes:
    """The leaf, 32 bytes, of a ledger row with these texts of FIELDS; None is NULL."""
    return hashlib.sha256(LEAF_PREFIX + b"".join(map(_field, texts))).digest()


def _field(text: str | None) -> bytes:
    if text is None:
        return b"-"
    value = text.encode()
    return b"%d:%b" % (len(value), value)
