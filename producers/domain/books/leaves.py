"""The leaf of a ledger row: SHA-256 over 0x00 and the row's fields, in the order of FIELDS.

    leaf   = SHA-256(0x00 ‖ field ‖ field ‖ …)
    number = "|" ‖ text                            of NUMBERS; nothing after the "|" where the field is NULL
    text   = "|" ‖ length ‖ "|" ‖ text             of TEXTS; the length is "-", and no text follows, where it is NULL

A length is the number of the text's bytes, in decimal digits. A field's text is in UTF-8:

| fields | text | example |
| --- | --- | --- |
| `transaction_id`, `account_id` | decimal digits | `42` |
| `delta_amount`, `balance_before`, `balance_after` | two decimals, with a `-` if negative | `-1.00` |
| `created_at`, `updated_at` | UTC, with six digits of a second | `2026-01-31 23:59:59.000250` |
| all others | as stored | `lottery_consume` |

0x00 is the prefix of leaves in RFC 6962. No number has a "|" in its text, and texts have their lengths in front: no two
different rows have the same bytes. MySQL and MariaDB compute the leaf by themselves (worker.books.rows), and what they
do for each field is most of what sealing costs: hence no lengths where none is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

INTEGERS: Final = ("transaction_id", "account_id")
AMOUNTS: Final = ("delta_amount", "balance_before", "balance_after")
TIMES: Final = ("created_at", "updated_at")
NUMBERS: Final = (*INTEGERS, *AMOUNTS, *TIMES)
TEXTS: Final = ("business_id", "lottery_session_id", "idempotency_key", "business_type", "asset_code", "notes")
FIELDS: Final = (*NUMBERS, *TEXTS)
LEAF_PREFIX: Final = b"\x00"
LEAF_BYTES: Final = 32


def leaf(texts: Sequence[str | None]) -> bytes:
    """The leaf, 32 bytes, of a ledger row with these texts of FIELDS; None is NULL."""
    numbers, others = texts[: len(NUMBERS)], texts[len(NUMBERS) :]
    fields = [b"|" + (it or "").encode() for it in numbers] + [_text(it) for it in others]
    return hashlib.sha256(LEAF_PREFIX + b"".join(fields)).digest()


def _text(text: str | None) -> bytes:
    if text is None:
        return b"|-|"
    value = text.encode()
    return b"|%d|%b" % (len(value), value)
