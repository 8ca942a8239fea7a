"""Gateway processes for tests, and a worker's part done in this process.

with gateways.gateway(house, TOMBOLA_GATEWAY_AUTH="none") as gateway:    # answering when this returns
    gateway.client.post("/v1/draws", json={"account_id": 6})
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from tests import processes, servers
from tests.processes import House, Worker, wait_for
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.results import ResultStore, StoredResult
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Settled
from tombola.worker.settle.rules import Rules

TIMEOUT_S = 40.0
OPEN_TO_ALL = {"TOMBOLA_GATEWAY_AUTH": "none", "TOMBOLA_GATEWAY_RATE_MAX": "1000000"}


@dataclass
class Gateway:
    """One gateway that answers at `url`; `process` is its parent process."""

    url: str
    client: httpx.Client
    process: Worker
    metrics_port: int

    def draw(self, body: object, key: str | None = None, **headers: str) -> httpx.Response:
        headers |= {} if key is None else {"Idempotency-Key": key}
        return self.client.post("/v1/draws", json=body, headers=headers)

    def metrics(self) -> str:
        """Its metrics, from the port that Prometheus scrapes."""
        return httpx.get(f"http://{servers.HOST}:{self.metrics_port}/metrics", timeout=TIMEOUT_S).text

    def show(self, session: str, wait_s: float = 0, headers: Mapping[str, str] | None = None) -> httpx.Response:
        return self.client.get(f"/v1/draws/{session}", params={"wait": wait_s}, headers=headers)


@contextmanager
def gateway(house: House, *arguments: str, **env: str) -> Iterator[Gateway]:
    """A gateway under the house's settings and `env`, on its own port."""
    port, metrics_port = servers._free_port(), servers._free_port()
    env = {"TOMBOLA_METRICS_PORT": str(metrics_port), "TOMBOLA_METRICS_HOST": servers.HOST} | env
    command = [sys.executable, "-m", "tombola.worker", "gateway", "--port", str(port), *arguments]
    url = f"http://{servers.HOST}:{port}"
    with (
        processes.worker(house.env | env, command=command, until="startup complete") as process,
        httpx.Client(base_url=url, timeout=TIMEOUT_S) as client,
    ):
        wait_for(lambda: _is_up(client), within_s=TIMEOUT_S, what=process.log)
        yield Gateway(url, client, process, metrics_port)


def settle(house: House, *asked: DrawRequest, store: bool = True) -> list[bytes]:
    """What a worker does with these draws: settle them, and put their results unless told not to."""
    answers = tries.settle(house.engine, asked, Rules(house.wheels, tries_max=1))
    settled = [answer for answer in answers if isinstance(answer, Settled)]
    assert len(settled) == len(asked)
    if store:
        put(house, [StoredResult(it.request.lottery_session_id, it.result, it.settled_at) for it in settled])
    return [it.result for it in settled]


def put(house: House, results: Sequence[StoredResult]) -> None:
    """Store and announce results."""
    store = ResultStore.open(house.settings.need("result_url"), ttl_s=600)
    store.put(results)
    store.close()


def _is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").text == "ok"
    except httpx.TransportError:
        return False
