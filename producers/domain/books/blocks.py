"""A sealed block: a range of ledger rows, what they are hashed to, and what the house moved in them.

    hash = SHA-256(0x00 ‖ text)      text: the lines below, each with a newline (0x0A) at its end, in UTF-8

    tombola block 1                  the format
    17                               number, from 1
    3001                             first_id, the first transaction_id of the range: last_id of the block before, + 1
    4000                             last_id
    998                              row_count: ids have gaps, where a transaction was rolled back
    9f3c…                            root of the Merkle tree over the rows' leaves, by transaction_id; 64 hex digits
    {"house/default/sales":{"POINT":"12.00"}}      sums: JSON, keys sorted, no blanks, ASCII
    77ab…                            previous: the hash of the block before; 64 zeros for block 1

The prefix 0x00 makes the hash of a block its leaf hash in the tree over all blocks, whose root a checkpoint signs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple

from tombola.producers.domain.books.house import HouseAccount
from tombola.producers.domain.books.merkle import leaf_hash

FORMAT: Final = "tombola block 1"
NO_BLOCK: Final = "0" * 64  # `previous` of block 1


class Block(NamedTuple):
    """A sealed block, as in books_blocks. `root`, `previous` and the block's hash are 64 hex digits."""

    number: int
    first_id: int
    last_id: int
    row_count: int
    root: str
    sums: str
    previous: str

    @property
    def text(self) -> str:
        """What the block's hash covers: all of it."""
        return "".join(f"{line}\n" for line in (FORMAT, *self))

    @property
    def hash(self) -> str:
        """The hash of this block, 64 hex digits."""
        return leaf_hash(self.text.encode()).hex()


def written_sums(sums: Mapping[HouseAccount, Decimal]) -> str:
    """The sums of a block as its text: a JSON object of objects, by account and asset."""
    by_account: dict[str, dict[str, str]] = {}
    for (account, asset_code), delta in sums.items():
        by_account.setdefault(account, {})[asset_code] = f"{delta:.2f}"
    return json.dumps(by_account, sort_keys=True, separators=(",", ":"))


def read_sums(text: str) -> dict[HouseAccount, Decimal]:
    """The sums in a text of `written_sums`; raises ValueError for any other text."""
    by_account: Any = json.loads(text)
    try:
        return {(name, asset): Decimal(it) for name, moved in by_account.items() for asset, it in moved.items()}
    except (AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(f"not the sums of a block: {text!r:.100}") from error
