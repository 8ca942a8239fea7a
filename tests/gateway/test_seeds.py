"""Seed epochs over HTTP, for everybody."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests import servers
from tests.gateway.test_http_api import problem
from tests.gateways import gateway
from tests.processes import SEED, House
from tests.seeds.shops import LENGTH, SeededShop
from tombola.producers.domain.seeds import anchor_of, commitment_of, hashed_down

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("seeds")
    with (
        servers.redis(private=True) as server,
        House(f"sqlite:///{folder}/ledger.db", server.url, server.url) as house,
    ):
        yield house


def test_anybody_reads_commitments_and_secrets(house: House) -> None:
    with gateway(house, TOMBOLA_GATEWAY_AUTH="api-key", TOMBOLA_SEED="") as closed:

        def page(**asked: str) -> httpx.Response:
            answer = closed.client.get("/v1/seeds", params=asked)
            assert answer.status_code == 200, answer.text
            return answer

        assert page(after="0.0").json() == {"chains": [], "epochs": [], "next": None}
        shop = SeededShop(house.engine, bytes.fromhex(SEED))
        shop.pass_time(12 * LENGTH)
        shop.reveal()
        found = page().json()
        _, chain = found["chains"]
        assert (chain["chain"], chain["anchor"], chain["epochs"]) == (1, anchor_of(bytes.fromhex(SEED)).hex(), 3650)
        names = [it["epoch"] for it in found["epochs"]]
        assert names == [f"1.{it}" for it in range(6, 21)]
        assert found["next"] == "1.20"
        for it in found["epochs"]:
            number = int(it["epoch"].partition(".")[2])
            assert (it["secret"] is not None) == (number <= 12)
            if it["secret"] is not None:
                secret = bytes.fromhex(it["secret"])
                assert commitment_of(secret) == it["commitment"]
                assert hashed_down(secret, number).hex() == chain["anchor"]
        following = page(after="1.20")
        assert [it["epoch"] for it in following.json()["epochs"]] == [f"1.{it}" for it in range(21, 121)]
        assert following.headers["cache-control"] == "no-cache"
        assert page(after="1.3600").json()["next"] is None
        assert [it["epoch"] for it in page(after="1.3649").json()["epochs"]] == ["1.3650"]
        problem(closed.client.get("/v1/seeds", params={"after": "yesterday"}), 400, "invalid-request")
        described = closed.client.get("/openapi.json").json()["paths"]["/v1/seeds"]["get"]
        assert described["security"] == [{}]
        assert set(described["responses"]) == {"200", "400", "429", "503"}
        shop.entry.close()
