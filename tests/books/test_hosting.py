"""Who seals: the task of Celery, and every relay, whatever its broker does."""

from __future__ import annotations

import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.processes import House, wait_for
from tombola.producers.storage import books
from tombola.worker.host import tasks
from tombola.worker.ledger import accounts
from tombola.worker.relay.relay import Relay

CLOSED = f"redis://{servers.HOST}:1/0"


def blocks_of(house: House) -> int:
    with house.engine.connect().execution_options(read_only=True) as connection:
        last = books.last_sealed(connection)
    return 0 if last is None else last.block.number


@pytest.fixture
def house(tmp_path: Path) -> Any:
    with House(f"sqlite:///{tmp_path}/ledger.db", CLOSED, CLOSED) as house:
        yield house


def test_the_task_seals_every_second(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in house.env.items():  # the module makes an app of them
        monkeypatch.setenv(name, value)
    from tombola.worker.celery import SEAL_EVERY_S, make_app

    app = make_app(house.settings)
    beat = app.conf.beat_schedule["seal"]
    assert (beat["task"], beat["schedule"]) == ("tombola.seal", SEAL_EVERY_S)
    # Where no worker takes them, tasks do not pile up.
    assert beat["options"]["expires"] == SEAL_EVERY_S
    accounts.add(house.engine, user_id=1, balance=Decimal(10))
    assert tasks.run_seal(app.tasks["tombola.seal"]) == 1
    assert tasks.run_seal(app.tasks["tombola.seal"]) == 0
    assert blocks_of(house) == 1


def test_a_relay_seals_while_its_broker_is_away(house: House) -> None:
    accounts.add(house.engine, user_id=1, balance=Decimal(10))
    relay, stopping = Relay.from_settings(house.settings), threading.Event()
    running = threading.Thread(target=relay.run, args=(stopping,))
    running.start()
    try:
        wait_for(lambda: blocks_of(house) == 1, within_s=10, what=lambda: "nothing is sealed")
    finally:
        stopping.set()
        running.join(20)
    assert not running.is_alive()
    relay.close()
