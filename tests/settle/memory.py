"""A consumer on deliveries and a result store in memory: each step is seen, and can be made to fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import cast

from msgspec.structs import replace
from sqlalchemy import Engine, func, select

from tests.ledgers import migrated
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.draw import wheels
from tombola.producers.domain.errors import ServiceUnavailable
from tombola.producers.results import ResultStore, StoredResult
from tombola.producers.settings import Settings
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import api_idempotency_requests, dead_letters
from tombola.worker.deliveries import Delivery
from tombola.worker.ledger.accounts import open_account
from tombola.worker.settle.consumer import Consumer
from tombola.worker.settle.rules import Rules

NOWHERE = "redis://127.0.0.1:1/0"


class Memory:
    """Deliveries in memory: what is fetched stays in hand until it is acked, requeued or released."""

    def __init__(self, events: list[str]) -> None:
        self.waiting: list[Delivery] = []
        self.in_hand: list[Delivery] = []
        self.acked: list[bytes] = []
        self.requeued: list[bytes] = []
        self.asked: list[int] = []  # how many each fetch may return
        self.failures: list[Exception] = []  # of the next fetches
        self.is_closed = False
        self.before_fetch: Callable[[], None] = lambda: None
        self._events = events

    def add(self, *bodies: bytes, count: int = 1) -> None:
        first = 1 + len(self.waiting) + len(self.in_hand) + len(self.acked)
        self.waiting += [Delivery(body, first + place, count) for place, body in enumerate(bodies)]

    def fetch(self, count_max: int, *, wait_s: float) -> list[Delivery]:
        self.before_fetch()
        self.asked.append(count_max)
        if self.failures:
            raise self.failures.pop(0)
        fetched, self.waiting = self.waiting[:count_max], self.waiting[count_max:]
        self.in_hand += fetched
        if fetched:
            self._events.append("fetch")
        return fetched

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        self.acked += [self._taken(it).body for it in deliveries]
        self._events.append("ack")

    def keep(self, deliveries: Sequence[Delivery]) -> None:
        self._events.append("keep")

    def requeue(self, deliveries: Sequence[Delivery]) -> None:
        for it in deliveries:
            self.requeued.append(self._taken(it).body)
            self.waiting.append(it)

    def release(self) -> None:
        self.waiting = [replace(it, count=it.count + 1) for it in self.in_hand] + self.waiting
        self.in_hand = []
        self._events.append("release")

    def fetch_dead(self, count_max: int) -> list[Delivery]:
        return []

    def ack_dead(self, deliveries: Sequence[Delivery]) -> None:
        raise AssertionError

    def close(self) -> None:
        self.is_closed = True

    def _taken(self, delivery: Delivery) -> Delivery:
        """Out of hand; raises ValueError for a delivery that is not in hand, such as one that was acked before."""
        return self.in_hand.pop(self.in_hand.index(delivery))


class Store:
    """A result store in memory, which takes nothing while it `is_away`."""

    def __init__(self, events: list[str], engine: Engine) -> None:
        self.put_results: dict[str, bytes] = {}
        self.settled_before_put: list[int] = []
        self.is_away = False
        self._events = events
        self._engine = engine

    def put(self, results: Sequence[StoredResult]) -> None:
        if results:
            self._events.append("put")
            self.settled_before_put.append(settled_in(self._engine))
        if self.is_away:
            raise ServiceUnavailable("the result store does not answer")
        self.put_results |= {it.task_id: it.body for it in results}

    def renew(self, lottery_session_ids: Sequence[str]) -> list[str]:
        self._events.append("renew")
        if self.is_away:
            raise ServiceUnavailable("the result store does not answer")
        return [it for it in lottery_session_ids if it not in self.put_results]

    def put_dead(self, dead: Sequence[Request], reason: str) -> None:
        self._events.append("put dead")


class House:
    """A consumer with all that surrounds it; `events` are the steps of its rounds, in order."""

    def __init__(self, database_url: str, *, batch_size: int, accounts: int = 2) -> None:
        self.engine = open_engine(database_url)
        migrated(self.engine)
        self.account_ids = [
            open_account(self.engine, user_id=it, balance=Decimal(100)) for it in range(1, accounts + 1)
        ]
        self.settings = Settings.from_env(
            {
                "TOMBOLA_DATABASE_URL": database_url,
                "TOMBOLA_BROKER_URL": NOWHERE,
                "TOMBOLA_RESULT_URL": NOWHERE,
                "TOMBOLA_SEED": "5eed" * 16,
                "TOMBOLA_BATCH_SIZE_MAX": str(batch_size),
            }
        )
        self.events: list[str] = []
        self.source = Memory(self.events)
        self.store = Store(self.events, self.engine)
        rules = Rules.of(self.settings, self.engine, wheels(self.settings.seed_bytes))
        self.consumer = Consumer(self.source, self.engine, cast(ResultStore, self.store), rules, self.settings)

    def draws(self, count: int, *, account: int = 0) -> list[DrawRequest]:
        """`count` draws of one account, not published."""
        return [
            DrawRequest(account_id=self.account_ids[account], request_key=f"k{account}_{it}") for it in range(count)
        ]

    def publish(self, count: int, *, account: int = 0) -> list[bytes]:
        """Publish `count` draws of one account; return their bodies."""
        bodies = [draw.encode() for draw in self.draws(count, account=account)]
        self.source.add(*bodies)
        return bodies

    def causes(self) -> list[str]:
        with self.engine.connect() as connection:
            return sorted(connection.execute(select(dead_letters.c.cause)).scalars())


def settled_in(engine: Engine) -> int:
    table = api_idempotency_requests
    with engine.connect() as connection:
        count = select(func.count()).select_from(table).where(table.c.settled_at.is_not(None))
        return int(connection.execute(count).scalar_one())
