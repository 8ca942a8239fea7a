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
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Answer
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

    def settle(self, draws: Sequence[Request], handling: Handling, *, has_patience: bool = True) -> list[Answer]:
        """An answer for each draw, in their order. Raises what tries.settle raises, after all lanes have ended."""
        if self._count == 1 or len(draws) < SPLIT_SIZE_MIN:
            return tries.settle(self._engine, draws, self._rules, handling, has_patience=has_patience)

        def settle(positions: Sequence[int]) -> list[Answer]:
            some = [draws[i] for i in positions]
            return tries.settle(self._engine, some, self._rules, handling, has_patience=has_patience)

        by_lane: dict[int, list[int]] = {}
        across: list[int] = []
        for position, draw in enumerate(draws):
            accounts = operation_of(draw).needs(draw, self._rules.wheels).accounts
            lane = _lane_of(accounts[0], self._count)
            if len(accounts) > 1 and any(_lane_of(it, self._count) != lane for it in accounts):
                across.append(position)
            else:
                by_lane.setdefault(lane, []).append(position)
        under_way = [(positions, self._pool.submit(settle, positions)) for positions in by_lane.values()]
        wait([future for _, future in under_way])
        answers: dict[int, Answer] = {}
        for positions, future in under_way:
            answers.update(zip(positions, future.result(), strict=True))
        if across:  # requests that need accounts of several lanes: settled after all lanes have ended
            answers.update(zip(across, settle(across), strict=True))
        return [answers[position] for position in range(len(draws))]


def _lane_of(account_id: int, lanes: int) -> int:
    """Always the same lane for an account, spread evenly also where ids come in steps (Galera's auto-increment)."""
    return (account_id * 0x9E3779B1 >> 16) % lanes
