"""The signed head of the books over HTTP: for everybody, as it was signed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal

import pytest

from tests import servers
from tests.gateway.test_http_api import problem
from tests.gateways import gateway
from tests.processes import House, wait_for
from tombola.producers.domain.books import checkpoints
from tombola.producers.domain.books.checkpoints import PrivateKey
from tombola.worker.books import anchors, head, sealing
from tombola.worker.ledger import accounts

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("checkpoints")
    with (
        servers.redis(private=True) as server,
        House(f"sqlite:///{folder}/ledger.db", server.url, server.url) as house,
    ):
        yield house


def test_anybody_gets_the_last_checkpoint(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SEEN_EVERY", timedelta(0))
    key = PrivateKey.make("shop.example/books")
    with gateway(house, TOMBOLA_GATEWAY_AUTH="api-key") as closed:
        problem(closed.client.get("/v1/checkpoints/latest"), 404, "checkpoint-not-found")
        problem(closed.client.get("/v1/checkpoints/first"), 404, "not-found")
        accounts.add(house.engine, user_id=1, balance=Decimal(10))
        assert sealing.seal(house.engine, after_s=0) == 1
        signed = anchors.sign_once(house.engine, key, every_s=0)
        assert signed is not None

        def latest() -> str:
            answer = closed.client.get("/v1/checkpoints/latest", headers={"Authorization": "Bearer unknown"})
            return answer.text if answer.status_code == 200 else ""

        wait_for(lambda: latest() == signed, within_s=5, what=latest)
        answer = closed.client.get("/v1/checkpoints/latest")
        assert answer.content == signed.encode()
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"
        assert checkpoints.read(answer.text, key.public).size == 1
        described = closed.client.get("/openapi.json").json()["paths"]["/v1/checkpoints/latest"]["get"]
        assert described["security"] == [{}]
        assert set(described["responses"]) == {"200", "404", "429", "503"}
        assert list(described["responses"]["200"]["content"]) == ["text/plain"]
