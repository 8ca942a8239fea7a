"""The kinds of broker, by the scheme of a URL. Code that depends on the kind asks here, and never looks at a scheme.

redis://   Stream `draws`, consumer group `workers`; an entry has a field `body`
amqp://    quorum queue `draws` on the direct exchange `draws`; what the broker gives up goes to `draws.dead`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.domain.signatures import NO_KEYS, Headers, Keyring


class BrokerKind(NamedTuple):
    """A kind of broker.

    `keeps_results`: the same server can be the result store. `has_remote_control`: workers listen to Celery's remote
    control unless a setting turns it off.
    """

    name: str
    schemes: tuple[str, ...]
    keeps_results: bool
    has_remote_control: bool


REDIS: Final = BrokerKind("Redis", ("redis", "rediss"), keeps_results=True, has_remote_control=True)
# On RabbitMQ remote control is one more queue that can be lost.
RABBITMQ: Final = BrokerKind("RabbitMQ", ("amqp", "amqps"), keeps_results=False, has_remote_control=False)

BROKER_SCHEMES: Final = (*REDIS.schemes, *RABBITMQ.schemes)
RESULT_SCHEMES: Final = tuple(scheme for kind in (REDIS, RABBITMQ) if kind.keeps_results for scheme in kind.schemes)
_BY_SCHEME: Final[Mapping[str, BrokerKind]] = {scheme: kind for kind in (REDIS, RABBITMQ) for scheme in kind.schemes}


class Broker(Protocol):
    """Publishes bodies on the queue `draws`, with a signature each where there is a secret; bodies are canonical.

    Threads may share one, and a forked child may go on using it.
    """

    def publish(self, bodies: Sequence[bytes], headers: Headers | None = None) -> None:
        """Publish all `bodies`, each with its own of `headers`; return when the broker has confirmed every body.

        Raises PublishFailed otherwise; some bodies may be queued. Publish all of them again: a second copy does no
        harm. Raises BrokerBlocked, a PublishFailed, while the broker says that it takes no messages.
        """

    def backlog(self) -> int:
        """The number of waiting messages, with the messages in hand where the broker counts them.

        Raises PublishFailed when the broker does not answer; BrokerBlocked while it says that it takes no messages.
        """

    def close(self) -> None:
        """Close the connection."""


class BrokerSettings(Protocol):
    """The settings that `broker_of` reads (producers.settings.Settings)."""

    @property
    def publish_timeout_s(self) -> float: ...
    @property
    def keyring(self) -> Keyring: ...
    def need(self, name: str) -> str: ...


def scheme_of(url: str) -> str:
    """`redis` of `redis://…`; of a URL with several hosts the first scheme."""
    return url.partition("://")[0]


def find_kind(url: str) -> BrokerKind | None:
    """The kind of broker behind `url`; None for another scheme, or for no URL."""
    return _BY_SCHEME.get(scheme_of(url))


def kind_of(url: str) -> BrokerKind:
    """The kind of broker behind `url`; raises ConfigurationError for another scheme."""
    kind = find_kind(url)
    if kind is None:  # the URL may hold a password: the message does not repeat the URL
        raise ConfigurationError(f"the URL of a broker begins with {any_of(BROKER_SCHEMES)}")
    return kind


def any_of(schemes: Sequence[str]) -> str:
    """Schemes as a message lists them: `redis:// or rediss://`."""
    return " or ".join(f"{scheme}://" for scheme in schemes)


def broker_of(settings: BrokerSettings) -> Broker:
    """The broker of `settings`, which signs the messages it publishes; it connects at first use."""
    url, timeout_s = settings.need("broker_url"), settings.publish_timeout_s
    return open_broker(url, publish_timeout_s=timeout_s, keyring=settings.keyring)


def open_broker(url: str, *, publish_timeout_s: float, keyring: Keyring = NO_KEYS) -> Broker:
    """The broker behind `url`; it connects at first use. With `keyring` it signs the messages it publishes.

    Raises ConfigurationError for a scheme that no kind of broker has.
    """
    return _OPEN[kind_of(url)](url, publish_timeout_s, keyring)


# A process uses one kind of broker: the client library of the other kind is not imported.


def _open_stream(url: str, publish_timeout_s: float, keyring: Keyring) -> Broker:
    from tombola.producers.brokers.redis_clients import open_redis
    from tombola.producers.brokers.streams import StreamBroker

    return StreamBroker(open_redis(url, timeout_s=publish_timeout_s), keyring=keyring)


def _open_quorum_queue(url: str, publish_timeout_s: float, keyring: Keyring) -> Broker:
    from tombola.producers.brokers.quorum_queues import QueueBroker

    return QueueBroker(url, publish_timeout_s=publish_timeout_s, keyring=keyring)


_OPEN: Final[Mapping[BrokerKind, Callable[[str, float, Keyring], Broker]]] = {
    REDIS: _open_stream,
    RABBITMQ: _open_quorum_queue,
}
