"""From a draw to a shop's receiver: a real worker settles, a real relay delivers, whatever the receiver does."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from tests import processes
from tests.campaigns.shops import BY
from tests.campaigns.test_settling import WINTER
from tests.fulfilments.books import add_webhook
from tests.processes import House, wait_for
from tests.receivers import Answer, Received, Receiver
from tombola.producers.client import DrawClient
from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.contract import DrawRequest, PullsResult
from tombola.producers.storage.campaigns import CampaignState
from tombola.worker.campaigns import versions

RELAY = [sys.executable, "-m", "tombola.worker", "relay"]
DRAWS = 12


@pytest.fixture
def house(mariadb_url: str, redis_url: str) -> Iterator[House]:
    with House(mariadb_url, redis_url, redis_url, TOMBOLA_WEBHOOK_PRIVATE="true") as house:
        yield house


def test_each_prize_reaches_the_shop_under_its_own_key(house: House) -> None:
    odds = manifest.parse(WINTER)
    versions.publish(house.engine, odds, bounds=versions.Bounds(return_max=100.0), **BY)
    versions.move(house.engine, odds.name, CampaignState.OPEN, **BY)
    seen: Counter[str] = Counter()

    def answer(received: Received) -> Answer:
        seen[received.key] += 1
        return 500 if seen[received.key] == 1 else 204  # it acted, and says that it failed

    (account,) = house.accounts(1, balance=10_000)
    with Receiver(answer) as receiver:
        add_webhook(house.engine, "shop", receiver.url, "draw.settled", "phone-won", "grant.item")
        with (
            processes.worker(house.env) as worker,
            processes.worker(house.env, command=RELAY, until="relaying") as relay,
            DrawClient.from_settings(house.settings) as client,
        ):
            draws = [DrawRequest(account_id=account, campaign="winter", pulls=10) for _ in range(DRAWS)]
            client.enqueue_many(draws)
            house.wait_settled(DRAWS, within_s=60, log=worker.log)
            results = [client.result(it.lottery_session_id) for it in draws]
            expected = {it.request_key for it in draws} | {
                grant.idempotency_key
                for result in results
                if isinstance(result, PullsResult)
                for prize in result.prizes
                if prize.code == "phone"
                for grant in prize.grants
            }
            assert len(expected) == DRAWS + 2 * 3  # three phones, each a thing to ship and a message to write
            wait_for(
                lambda: {key for key, times in seen.items() if times > 1} == expected,
                within_s=120,
                what=lambda: f"{len(seen)} of {len(expected)} were delivered\n{relay.log()[-3000:]}",
            )
        bodies = {key: {it.body for it in receiver.received if it.key == key} for key in expected}
    assert all(len(same) == 1 for same in bodies.values())
    assert house.violations() == []
