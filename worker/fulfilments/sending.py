"""One HTTP call to a webhook: bounded in time, in what is read of the answer, and in where it may lead.

httpx sends, as it lets the caller bound a whole call (asyncio.timeout ends a call at any point, also one whose answer
comes a byte at a time), connect to an address of the caller's choice with the certificate checked for the host's name
(`sni_hostname`), and neither follow redirects nor use the environment's proxies.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from importlib.metadata import version
from typing import Final, NamedTuple

import httpx

from tombola.producers.domain.errors import InvalidRequest
from tombola.worker.fulfilments.addresses import Target, checked_url, resolve
from tombola.worker.fulfilments.signatures import signatures

# httpx logs every call at INFO, with the whole URL, which may hold a token of the receiver's.
logging.getLogger("httpx").setLevel(logging.WARNING)

ANSWER_BYTES_MAX: Final = 4096  # read, so that the connection can be used again
ANSWER_S_MAX: Final = 1.0  # for reading it, once the status has come
SHOWN_LENGTH_MAX: Final = 120  # of an answer that is no success, for the operator
GONE: Final = 410


class Message(NamedTuple):
    """What is sent. `webhook_id` is the same at every attempt, and has no dot."""

    idempotency_key: str
    webhook_id: str
    body: bytes


class Place(NamedTuple):
    """Where a webhook leads: its checked URL, and the checked addresses of its host."""

    target: Target
    addresses: Sequence[str]


class Outcome(NamedTuple):
    """What came of a call: `status` is None where no answer came; `error` is None where the receiver took it."""

    status: int | None
    error: str | None

    @property
    def is_final(self) -> bool:
        """Whether the receiver asks never to be called again."""
        return self.status == GONE


def certificates() -> ssl.SSLContext:
    """Which certificates are trusted: certifi's, or those that SSL_CERT_FILE or SSL_CERT_DIR name."""
    return httpx.create_ssl_context(trust_env=True)


def client(trusted: ssl.SSLContext, *, calls_max: int) -> httpx.AsyncClient:
    """A client for the calls to one webhook. One for each: a pooled connection was checked for one host's name."""
    limits = httpx.Limits(max_connections=calls_max, max_keepalive_connections=calls_max)
    return httpx.AsyncClient(verify=trusted, trust_env=False, follow_redirects=False, limits=limits, timeout=None)


async def find_place(
    url: str, *, is_private_allowed: bool, timeout_s: float, resolver: Executor | None = None
) -> Place | Outcome:
    """Where a webhook's URL leads now, or why it leads nowhere. `resolver` has the threads that wait for the system's.

    Such a thread can hang for longer than `timeout_s`.
    """
    try:
        target = checked_url(url, is_private_allowed=is_private_allowed)
        async with asyncio.timeout(timeout_s):
            addresses = await asyncio.get_running_loop().run_in_executor(
                resolver, lambda: resolve(target, is_private_allowed=is_private_allowed)
            )
    except InvalidRequest as error:
        return Outcome(None, str(error))
    except TimeoutError:
        return Outcome(None, f"the host was not resolved within {timeout_s:g} s")
    except OSError as error:
        return Outcome(None, f"the host cannot be resolved: {error.strerror or error}")
    return Place(target, addresses)


async def send(
    through: httpx.AsyncClient, place: Place, secrets: Sequence[str], message: Message, *, timeout_s: float
) -> Outcome:
    """Post a message to the first address that takes a connection. Never raises httpx's errors."""
    try:
        async with asyncio.timeout(timeout_s):
            answer = await _post(through, place, secrets, message)
    except TimeoutError:
        return Outcome(None, f"no answer within {timeout_s:g} s")
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return Outcome(None, _one_line(f"{type(error).__name__}: {error}"))
    try:
        beginning = await _beginning(answer)
    finally:
        await answer.aclose()
    # The status has come: whatever becomes of the rest, the receiver took the message or did not.
    return Outcome(answer.status_code, None if answer.is_success else _said(answer.status_code, beginning))


async def _post(through: httpx.AsyncClient, place: Place, secrets: Sequence[str], message: Message) -> httpx.Response:
    """The answer, without its body. Raises httpx's errors."""
    target, addresses = place
    timestamp_s = int(time.time())
    headers = {
        "Host": target.authority,
        "Content-Type": "application/json",
        "User-Agent": f"tombola/{version('tombola')}",
        "Accept-Encoding": "identity",
        "Idempotency-Key": message.idempotency_key,
        "Webhook-Id": message.webhook_id,
        "Webhook-Timestamp": str(timestamp_s),
        "Webhook-Signature": signatures(secrets, message.webhook_id, timestamp_s, message.body),
    }
    # The address was checked; the certificate is checked for the name.
    name = {"sni_hostname": target.host.rstrip(".")}
    for address in addresses:
        request = through.build_request(
            "POST", target.at(address), content=message.body, headers=headers, extensions=name
        )
        try:
            return await through.send(request, stream=True)
        except httpx.ConnectError:
            if address == addresses[-1]:
                raise
    raise AssertionError("a host has at least one address")


async def _beginning(answer: httpx.Response) -> bytes:
    """The first ANSWER_BYTES_MAX bytes of an answer's body, or what of them comes within ANSWER_S_MAX."""
    read = b""
    with suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(ANSWER_S_MAX):
            async for part in answer.aiter_raw(ANSWER_BYTES_MAX):
                read += part
                if len(read) >= ANSWER_BYTES_MAX:
                    break
    return read[:ANSWER_BYTES_MAX]


def _said(status: int, text: bytes) -> str:
    where = " (redirects are not followed)" if 300 <= status < 400 else ""
    shown = _one_line(text.decode("utf-8", "replace"))[:SHOWN_LENGTH_MAX]
    return f"answered {status}{where}" + (f": {shown}" if shown else "")


def _one_line(text: str) -> str:
    """`text` as one line of printable characters: a stranger has written it."""
    return " ".join("".join(it if it.isprintable() else " " for it in text).split())
