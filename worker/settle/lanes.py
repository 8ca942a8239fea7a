"""Lanes: a large batch is settled in transactions side by side that share no account.

So lanes never wait for each other's locks, as two batches of random accounts nearly always do.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final

from sqlalchemy import Engine

from tombola.producers.domain.contract import Request
from tombola.producers.domain.operations import operation_of
from tombola.worker.settle import repeats, tries
from tombola.worker.settle.answers import Answer, Repeat
from tombola.worker.settle.batch import Handling
from tombola.worker.settle.rules import Rules

SPLIT_SIZE_MIN: Final = 64  # one transaction settles a smaller batch sooner


class Lanes:
    """Settles batches on one ledger, in up to `count` transactions at once."""

    def __init__(self, engine: Engine, rules: Rules, count: int) -> None:
        self._engine = engine
        self._rules = rules
        # SQLite has one writer at a time.
        self._count = 1 if engine.dialect.name == "sqlite" else count
        self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="lane")

    def settle(
        self, draws: Sequence[Request], handling: Handling, *, has_patience: bool = True
    ) -> list[Answer | Repeat]:
        """An answer for each draw, in their order, repeats without their results: `tell` reads these.

        Raises what tries.settle raises, after all lanes have ended.
        """
        if self._count == 1 or len(draws) < SPLIT_SIZE_MIN:
            return tries.settle_unread(self._engine, draws, self._rules, handling, has_patience=has_patience)

        def settle(positions: Sequence[int]) -> list[Answer | Repeat]:
            some = [draws[i] for i in positions]
            return tries.settle_unread(self._engine, some, self._rules, handling, has_patience=has_patience)

        needed = [operation_of(draw).needs(draw, self._rules.wheels).accounts for draw in draws]
        partners = _Partners()
        for accounts in needed:
            if len(accounts) > 1:
                partners.join(accounts)
        by_lane: dict[int, list[int]] = {}
        for position, accounts in enumerate(needed):
            by_lane.setdefault(_lane_of(partners.of(accounts[0]), self._count), []).append(position)
        under_way = [(positions, self._pool.submit(settle, positions)) for positions in by_lane.values()]
        wait([future for _, future in under_way])
        answers: dict[int, Answer | Repeat] = {}
        for positions, future in under_way:
            answers.update(zip(positions, future.result(), strict=True))
        return [answers[position] for position in range(len(draws))]

    def tell(self, answers: Sequence[Answer | Repeat]) -> list[Answer]:
        """`answers` with the results of the repeats among them. Raises as repeats.tell does."""
        return repeats.tell(self._engine, answers, self._rules)


class _Partners:
    """Accounts that requests of one batch touch together, such as both sides of a transfer: they share a lane."""

    def __init__(self) -> None:
        self._next: dict[int, int] = {}

    def join(self, accounts: Sequence[int]) -> None:
        """These accounts, and all partners of each, are partners from now on."""
        first = self.of(accounts[0])
        for other in accounts[1:]:
            last = self.of(other)
            if last != first:
                self._next[last] = first

    def of(self, account_id: int) -> int:
        """One of the account's partners, the same for all of them."""
        while (further := self._next.get(account_id)) is not None:
            account_id = further
        return account_id


def _lane_of(account_id: int, lanes: int) -> int:
    """Always the same lane for an account, spread evenly also where ids come in steps (Galera's auto-increment)."""
    return (account_id * 0x9E3779B1 >> 16) % lanes
