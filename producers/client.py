"""DrawClient: what a web frontend holds. Enqueue a draw, wait for its result."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple, Self

from producers.broker import Broker, open_broker
from producers.contract import DUPLICATE_REQUEST_IDEMPOTENT, DrawRequest, DrawResult, parse_result
from producers.database import open_engine
from producers.errors import DrawError, IdempotencyKeyReused
from producers.results import ResultStore
from producers.settings import Settings

PUBLISH_SIZE_MAX = 1000


class Ticket(NamedTuple):
    """The receipt of a draw: keep it, it finds the result. `result` is there when the request is a known repeat."""

    request_key: str
    lottery_session_id: str
    result: DrawResult | None = None

    @property
    def reason(self) -> str | None:
        """DUPLICATE_REQUEST_IDEMPOTENT when this was a repeat, answered with its first result."""
        return None if self.result is None else DUPLICATE_REQUEST_IDEMPOTENT


class DrawClient:
    """Enqueues draws and waits for their results.

    One per thread (a broker connection is not shared), or per process where draws are made one at a time. It imports
    no Celery and connects at first use.
    """

    def __init__(self, broker: Broker, results: ResultStore | None = None) -> None:
        self._broker = broker
        self._results = results

    @classmethod
    def from_env(cls) -> Self:
        """A client from TOMBOLA_* (see producers.settings); raises ConfigurationError when they are not right."""
        return cls.from_settings(Settings.from_env())

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """A client from `settings`: results need a result store, rebuilding them a database."""
        broker = open_broker(settings.need("broker_url"), publish_timeout_s=settings.publish_timeout_s)
        if not settings.has("result_url"):
            return cls(broker)
        engine = open_engine(settings.need("database_url")) if settings.has("database_url") else None
        return cls(broker, ResultStore.open(settings.need("result_url"), ttl_s=settings.result_ttl_s, engine=engine))

    def enqueue(self, request: DrawRequest) -> Ticket:
        """Publish a draw; return its ticket when the broker has confirmed it.

        A request whose result is known already is not sent again: the ticket carries the first result, and its reason
        is DUPLICATE_REQUEST_IDEMPOTENT. Raises IdempotencyKeyReused when that result belongs to another request,
        PublishFailed when the broker does not confirm; enqueue the same request again then, it does no harm.
        """
        known = self._known_result(request)
        if known is None:
            self._broker.publish([request.encode()])
        return Ticket(request.request_key, request.lottery_session_id, known)

    def enqueue_many(self, requests: Iterable[DrawRequest]) -> int:
        """Publish draws in confirmed batches of PUBLISH_SIZE_MAX, holding no more than one in memory.

        Returns how many were confirmed. After PublishFailed, send all of them again: repeats do no harm.
        """
        count = 0
        remaining = iter(requests)
        while chunk := list(itertools.islice(remaining, PUBLISH_SIZE_MAX)):
            self._broker.publish([request.encode() for request in chunk])
            count += len(chunk)
        return count

    def result(self, lottery_session_id: str) -> DrawResult:
        """The result, if there is one now; raises ResultNotReady otherwise."""
        return parse_result(self._store().get(lottery_session_id))

    def wait(self, lottery_session_id: str, *, timeout_s: float = 2.0) -> DrawResult:
        """The result, as soon as it is there; raises ResultNotReady after `timeout_s`."""
        return self._store().wait(lottery_session_id, timeout_s=timeout_s)

    def close(self) -> None:
        """Let go of the connections."""
        self._broker.close()
        if self._results is not None:
            self._results.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _store(self) -> ResultStore:
        if self._results is None:
            raise DrawError("this client has no result store: set TOMBOLA_RESULT_URL")
        return self._results

    def _known_result(self, request: DrawRequest) -> DrawResult | None:
        """The first result, if the store has it at hand; a store that does not answer changes nothing."""
        known = None if self._results is None else self._results.peek(request.lottery_session_id)
        if known is None:
            return None
        result = parse_result(known)
        first = (result.request_key, result.account_id, result.campaign)
        if first != (request.request_key, request.account_id, request.campaign):
            raise IdempotencyKeyReused
        return result
