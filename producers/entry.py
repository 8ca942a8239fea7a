"""The way in: a request is accepted in the database before anything else happens to it.

What was accepted is remembered here, a bounded number of keys, so that a storm of repeats does not reach the database.
The memory only ever says what the database said before: a request's content, its caller and its outcome never change.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from cachetools import LRUCache
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from producers import requests
from producers.database import Fault, Transaction, explain, fault_of, open_engine, statement, transaction, utc_now
from producers.errors import DrawError
from producers.forks import in_child
from producers.requests import Acceptance, Asked, Known, State

TRIES_MAX: Final = 5
REMEMBERED_MAX: Final = 20_000
ACCEPTED_FOR_S: Final = 5.0  # then the database is asked again: it may have settled, and Redis may not say so


class Entry:
    """Accepts requests. Safe to share between threads."""

    def __init__(self, engine: Engine, *, relay_after_s: float) -> None:
        self.engine = engine
        url = engine.url.render_as_string(hide_password=False)
        # SQLite inserts many rows one by one: there it takes a transaction to make them one.
        self._lean = None if engine.dialect.name == "sqlite" else open_engine(url, is_lean=True)
        self._relay_after = timedelta(seconds=relay_after_s)
        self._remembered: LRUCache[str, tuple[Known, float]] = LRUCache(REMEMBERED_MAX)  # by request key, with the time
        self._make_lock()
        in_child(self, Entry._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def recall(self, asked: Asked) -> Acceptance | None:
        """The answer to a repeat that was accepted through here; None for what only the database can tell."""
        with self._lock:
            known, since = self._remembered.get(asked.request.request_key, (None, 0.0))
        if known is None or not (known.is_settled or time.monotonic() < since + ACCEPTED_FOR_S):
            return None
        is_mine = (known.fingerprint, known.caller) == (asked.request.fingerprint(), asked.caller)
        return Acceptance(asked.request, known if is_mine else None)

    def accept(self, asked: Sequence[Asked]) -> list[Acceptance]:
        """Accept `asked` all at once; return when that is durable, with an answer for each in their order.

        The new ones are to be published once, now: the relay looks after them only later.
        Raises ServiceUnavailable or ConfigurationError when the database cannot be used: nothing is promised then,
        though an accept whose commit was under way may turn out to have happened. Ask again with the same key.
        """
        if not asked:
            return []
        for attempt in range(TRIES_MAX):
            if attempt:
                time.sleep(random.uniform(0, 0.01 * 2**attempt))
            now = utc_now()
            # All that is written is one INSERT: it needs no transaction around it. Where that fails, the rest of the
            # tries find out with one; what had been inserted after all is known then, and left to the relay.
            is_lean = self._lean is not None and attempt == 0
            unit = statement(self._lean) if self._lean is not None and is_lean else transaction(self.engine)
            try:
                with unit as open_transaction:
                    answers = requests.accept(
                        open_transaction, asked, now, publish_at=now + self._relay_after, is_published=True
                    )
                break
            except DrawError:
                raise
            except Exception as error:
                fault = fault_of(error)
                is_worth_a_try = fault is Fault.CONFLICT or (is_lean and fault is Fault.OUTAGE)
                if not is_worth_a_try or attempt == TRIES_MAX - 1:
                    raise explain(error) from error
        self._remember(answers)
        return answers

    def close(self) -> None:
        """Let go of the connections, the engine's as well."""
        if self._lean is not None:
            self._lean.dispose()
        self.engine.dispose()

    def accept_with(self, connection: Connection, asked: Asked) -> Acceptance:
        """Accept one request inside the caller's transaction: it happens if that commits, and the relay publishes it.

        Raises the driver's errors, after which the caller's transaction is to be rolled back.
        """
        if not connection.in_transaction():
            connection.begin()  # or its commit() would find nothing to commit
        now = utc_now()
        joined = Transaction(connection.connection.driver_connection, is_sqlite=connection.dialect.name == "sqlite")
        # Not remembered: it is accepted only when the caller commits.
        (answer,) = requests.accept(joined, [asked], now, publish_at=now, is_published=False)
        return answer

    def state_of(self, lottery_session_id: str) -> State | None:
        """How a session stands, from the database; None for one that nobody has asked for.

        Raises ServiceUnavailable or ConfigurationError when the database cannot be used.
        """
        try:
            with self.engine.connect().execution_options(read_only=True) as connection:
                return requests.state_of_session(connection, lottery_session_id)
        except SQLAlchemyError as error:
            raise explain(error) from error

    def _remember(self, answers: Sequence[Acceptance]) -> None:
        now = time.monotonic()
        with self._lock:
            for answer in answers:
                if (known := answer.known) is not None:
                    # What has settled stays as it is; all else may have become something else by then.
                    if not known.is_settled:
                        known = Known(known.fingerprint, known.caller, requests.ACCEPTED)
                    self._remembered[answer.request.request_key] = (known, now)
