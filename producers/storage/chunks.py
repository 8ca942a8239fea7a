"""Cut sequences into chunks, above all for IN lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, TypeVar

# From 1,000 values in an IN list on, MariaDB runs the query as a join with a temporary table and sorts its rows: rows
# are no longer locked in the order of the index (ARCHITECTURE, Measured traps). The margin is for the server's setting.
IN_LIST_MAX: Final = 900

T = TypeVar("T")


def chunks(values: Sequence[T], size_max: int = IN_LIST_MAX) -> Iterator[Sequence[T]]:
    """`values` in their order, in chunks of `size_max`; the last chunk may be shorter."""
    return (values[start : start + size_max] for start in range(0, len(values), size_max))
