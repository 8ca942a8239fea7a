"""Lanes: a large batch is settled in transactions side by side that share no account.

So they never wait for each other, which two batches of random accounts nearly always do.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Final

from sqlalchemy import Engine

from tombola.producers.domain.contract import Request
from tombola.producers.domain.draw import Wheels
from tombola.producers.domain.operations import operation_of
from tombola.worker.ledger.old_rows import OldDraws
from tombola.worker.settle import batch
from tombola.worker.settle.batch import Answer, Effort, Handling

SPLIT_SIZE_MIN: Final = 64  # a smaller batch is sooner done in one transaction


class Lanes:
    """Settles batches on one ledger, in up to `count` transactions at once."""

    def __init__(
        self,
        engine: Engine,
        wheels: Wheels,
        count: int,
        *,
        old_draws: OldDraws | None = None,
        accepted_only: bool = False,
    ) -> None:
        self._engine = engine
        self._wheels = wheels
        self._old_draws = old_draws
        self._accepted_only = accepted_only
        # SQLite has one writer at a time.
        self._count = 1 if engine.dialect.name == "sqlite" else count
        self._pool = ThreadPoolExecutor(self._count, thread_name_prefix="lane")

    def settle(self, draws: Sequence[Request], handling: Handling, effort: Effort) -> list[Answer]:
        """An answer for each draw, in their order; raises what batch.settle raises, when all lanes are done."""
        if self._count == 1 or len(draws) < SPLIT_SIZE_MIN:
            return self._settle(draws, handling, effort)
        by_lane: dict[int, list[int]] = {}
        across: list[int] = []
        for position, draw in enumerate(draws):
            accounts = operation_of(draw).needs(draw, self._wheels).accounts
            lane = _lane_of(accounts[0], self._count)
            if len(accounts) > 1 and any(_lane_of(it, self._count) != lane for it in accounts):
                across.append(position)
            else:
                by_lane.setdefault(lane, []).append(position)
        under_way = [
            (positions, self._pool.submit(self._settle, [draws[i] for i in positions], handling, effort))
            for positions in by_lane.values()
        ]
        wait([future for _, future in under_way])
        answers: dict[int, Answer] = {}
        for positions, future in under_way:
            answers.update(zip(positions, future.result(), strict=True))
        if across:  # what needs accounts of several lanes comes when these are empty
            answers.update(zip(across, self._settle([draws[i] for i in across], handling, effort), strict=True))
        return [answers[position] for position in range(len(draws))]

    def _settle(self, draws: Sequence[Request], handling: Handling, effort: Effort) -> list[Answer]:
        return batch.settle(
            self._engine,
            draws,
            self._wheels,
            effort=effort,
            handling=handling,
            old_draws=self._old_draws,
            accepted_only=self._accepted_only,
        )


def _lane_of(account_id: int, lanes: int) -> int:
    """Always the same lane for an account, spread evenly also where ids come in steps (Galera's auto-increment)."""
    return (account_id * 0x9E3779B1 >> 16) % lanes
