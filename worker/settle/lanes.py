"""Lanes: a large batch is settled in transactions side by side that share no account.

So lanes never wait for each other's locks, as two batches of random accounts nearly always do. An account stays in its
lane, and each lane takes one part after the other: so a second batch can begin while the first one is under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

from sqlalchemy import Engine

from tombola.producers.domain.contract import Request
from tombola.producers.domain.operations import operation_of
from tombola.worker.settle import repeats, tries
from tombola.worker.settle.answers import Answer, Deferred, Repeat
from tombola.worker.settle.batch import Handling
from tombola.worker.settle.rules import Rules

SPLIT_SIZE_MIN: Final = 64  # one transaction settles a smaller batch sooner


Answers = list[Answer | Repeat]


class UnderWay:
    """A batch that is being settled, in a part for each lane: the positions of its draws, and their answers."""

    def __init__(self, parts: Sequence[tuple[Sequence[int], Future[Answers]]]) -> None:
        self._parts = parts

    def wait(self) -> None:
        """Return when all parts have ended, well or not."""
        wait([future for _, future in self._parts])

    def answers(self) -> Answers:
        """An answer for each draw, in their order, repeats without their results: Lanes.tell reads these.

        Raises what tries.settle raises, after all parts have ended.
        """
        self.wait()
        answers: dict[int, Answer | Repeat] = {}
        for positions, future in self._parts:
            answers.update(zip(positions, future.result(), strict=True))
        return [answers[position] for position in range(len(answers))]


class Lanes:
    """Settles batches on one ledger, in up to `count` transactions at once."""

    def __init__(self, engine: Engine, rules: Rules, count: int) -> None:
        self._engine = engine
        self._rules = rules
        # SQLite has one writer at a time.
        self._count = 1 if engine.dialect.name == "sqlite" else count
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=f"lane_{it}") for it in range(self._count)]
        self._has_met_locks = [False] * self._count  # in its last part

    def are_split(self, draws: int) -> bool:
        """Whether a batch of so many draws is settled by the lanes' threads, and not by the caller's."""
        return self._count > 1 and draws >= SPLIT_SIZE_MIN

    def begin(self, draws: Sequence[Request], handling: Handling, *, has_patience: bool = True) -> UnderWay:
        """Begin to settle `draws`. Never raises. A batch that is not split has ended when this returns."""
        if not self.are_split(len(draws)):
            return UnderWay([(range(len(draws)), self._settled(draws, handling, has_patience=has_patience))])
        needed = [operation_of(draw).needs(draw, self._rules.wheels).accounts for draw in draws]
        partners = _Partners()
        for accounts in needed:
            if len(accounts) > 1:
                partners.join(accounts)
        by_lane: dict[int, list[int]] = {}
        for position, accounts in enumerate(needed):
            by_lane.setdefault(_lane_of(partners.of(accounts[0]), self._count), []).append(position)
        return UnderWay(
            [
                (
                    positions,
                    self._threads[lane].submit(
                        self._settle, lane, [draws[i] for i in positions], handling, has_patience=has_patience
                    ),
                )
                for lane, positions in by_lane.items()
            ]
        )

    def _settle(self, lane: int, draws: Sequence[Request], handling: Handling, *, has_patience: bool) -> Answers:
        # The part before has waited in full for locks that another transaction holds: this one does not wait as well.
        has_patience = has_patience and not self._has_met_locks[lane]
        answers = tries.settle_unread(self._engine, draws, self._rules, handling, has_patience=has_patience)
        self._has_met_locks[lane] = any(isinstance(it, Deferred) for it in answers)
        return answers

    def _settled(self, draws: Sequence[Request], handling: Handling, *, has_patience: bool) -> Future[Answers]:
        """The outcome of settling `draws` in the caller's thread."""
        future: Future[Answers] = Future()
        try:
            answers = tries.settle_unread(self._engine, draws, self._rules, handling, has_patience=has_patience)
            future.set_result(answers)
        except Exception as error:
            future.set_exception(error)
        return future

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
