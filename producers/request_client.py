"""What a client does with requests of every kind: accept them, publish them, and find their results."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tombola.producers.brokers.registry import Broker, broker_of
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import DrawError, PublishFailed
from tombola.producers.domain.keys import check_caller
from tombola.producers.entry import Entry
from tombola.producers.receipts import Receipts
from tombola.producers.results import LOOK_TIMEOUT_S, ResultStore
from tombola.producers.settings import Settings
from tombola.producers.storage.engines import SHORT_READ_TIMEOUT_S, open_engine
from tombola.producers.storage.requests import Acceptance
from tombola.producers.telemetry import tracing

log = logging.getLogger(__name__)


class RequestClient:
    """The connections of a client, and what requests of all kinds have in common. See DrawClient."""

    def __init__(
        self,
        entry: Entry,
        broker: Broker,
        results: ResultStore | None = None,
        *,
        receipts: Receipts | None = None,
        caller: str = "",
    ) -> None:
        """Raises InvalidRequest for a `caller` that is not a valid name; empty means no caller."""
        if caller:
            check_caller(caller)
        self._entry = entry
        self._broker = broker
        self._results = results
        self._receipts = receipts
        self._caller = caller

    @classmethod
    def from_env(cls) -> Self:
        """A client from TOMBOLA_* (see producers.settings); raises ConfigurationError for invalid settings."""
        return cls.from_settings(Settings.from_env())

    @classmethod
    def from_settings(cls, settings: Settings, *, caller: str = "") -> Self:
        """A client from `settings`: a database and a broker, and a result store to wait for results."""
        url, lock_wait_s = settings.need("database_url"), settings.lock_wait_s
        engine = open_engine(url, lock_wait_s=lock_wait_s, read_timeout_s=SHORT_READ_TIMEOUT_S)
        broker = broker_of(settings)
        results = None
        if settings.has("result_url"):
            results = ResultStore.from_settings(settings, engine=engine, timeout_s=LOOK_TIMEOUT_S)
        entry, receipts = Entry(engine, relay_after_s=settings.relay_after_s), Receipts.from_settings(settings, engine)
        return cls(entry, broker, results, receipts=receipts, caller=caller)

    def close(self) -> None:
        """Close the connections."""
        self._broker.close()
        self._entry.close()
        if self._results is not None:
            self._results.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _publish(self, requests: Sequence[Request]) -> None:
        """Publish at once. Where the broker fails, the requests stay accepted, and the relay publishes them."""
        if not requests:
            return
        try:
            with tracing.publishing(len(requests)) as beside:
                bodies = [request.encode() for request in requests]
                if beside is None:
                    self._broker.publish(bodies)
                else:
                    self._broker.publish(bodies, [beside] * len(bodies))
        except PublishFailed as error:
            log.warning("%s; %d accepted draws are left to the relay", error, len(requests))

    def _store(self) -> ResultStore:
        if self._results is None:
            raise DrawError("this client has no result store: set TOMBOLA_RESULT_URL")
        return self._results

    def _kept_result(self, answer: Acceptance) -> bytes | None:
        """The first result's bytes for a repeat that had settled when the database answered; None for any other."""
        if answer.record is None or not answer.record.is_settled:
            return None
        return self._entry.first_result(answer.request.lottery_session_id)

    def _peek(self, answer: Acceptance) -> bytes | None:
        """The bytes that Redis has under the session of a repeat: perhaps another request's result."""
        return None if self._results is None else self._results.peek(answer.request.lottery_session_id)
