"""Workers go on settling while the audit looks: it finds nothing that is not there, and misses nothing."""

import threading
import time
from collections.abc import Iterator
from decimal import Decimal

import pytest
from sqlalchemy import Engine, text

from tests.campaigns.shops import WHEELS, Shop
from tests.ledgers import migrated
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.operations.hold import HoldRequest
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.producers.storage.engines import open_engine
from tombola.worker.audit import audits, parts, walk
from tombola.worker.audit.audit import EVERYTHING, Scope, audit
from tombola.worker.books import sealing
from tombola.worker.ledger.accounts import open_account

MANIFEST = """
name = "one"
asset = "POINT"
cost = { 1 = "1.00" }

[[prize]]
code = "thing"
weight = 1
stock = 100000
instead = "nothing"
grants = [{ asset = "ITEM.THING", amount = "1" }]

[[prize]]
code = "nothing"
weight = 1
"""
LANES, SECONDS = 2, 8.0


@pytest.fixture
def shop(mariadb_url: str) -> Iterator[Shop]:
    engine = open_engine(mariadb_url, lock_wait_s=10)
    migrated(engine)
    made = Shop(engine)
    made.publish(MANIFEST)
    yield made
    engine.dispose()


def requests_of(lane: int, number: int, accounts: list[int]) -> list[Request]:
    key = f"l{lane}_{number:05d}"
    payer, other = accounts[number % len(accounts)], accounts[(number + 1) % len(accounts)]
    return [
        *(DrawRequest(account_id=it, request_key=f"{key}_{it}") for it in accounts),
        DrawRequest(account_id=payer, campaign="one", request_key=f"{key}_one"),
        TransferRequest(account_id=payer, to=other, amount="0.01", request_key=f"{key}_t"),
        HoldRequest(account_id=payer, amount="0.01", request_key=f"{key}_h"),
    ]


@pytest.mark.timeout(400)
def test_an_audit_beside_workers_that_settle(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "HORIZON_S", 1.0)  # no transaction here lasts half as long
    monkeypatch.setattr(walk, "PART_ROWS", 50)  # so that there are many parts
    shared = [open_account(shop.engine, user_id=user, balance=Decimal(100_000)) for user in range(1, 9)]
    stopping = threading.Event()
    failed: list[BaseException] = []

    def settle(lane: int) -> None:
        try:
            number = 0
            while not stopping.is_set():
                shop.settle(*requests_of(lane, number, shared))
                number += 1
                stopping.wait(0.05)  # the audit shares the interpreter with the lanes
        except BaseException as error:
            failed.append(error)

    lanes = [threading.Thread(target=settle, args=(lane,)) for lane in range(LANES)]
    for it in lanes:
        it.start()
    begun, positions, rows = time.monotonic(), list[int](), 0
    try:
        while time.monotonic() - begun < SECONDS or len(set(positions)) < 3:
            assert time.monotonic() - begun < 240, positions
            report = audit(shop.engine, WHEELS, Scope(goes_on=len(positions) % 4 != 3))
            assert report.violations == []
            audits.record(shop.engine, report, by="tombola.audit")
            positions.append(report.after_id)
            rows += report.rows
            sealing.seal(shop.engine, after_s=1.0)
            assert report.longest_part_s < 10
    finally:
        stopping.set()
        for it in lanes:
            it.join()
    assert failed == []
    assert positions != sorted(set(positions)), "some audits began at the first row"
    assert max(positions) > 100, "the mark has moved on meanwhile"
    assert_all_is_found(shop.engine)


def assert_all_is_found(engine: Engine) -> None:
    """What was settled beside the audits is examined by the next one."""
    with engine.begin() as connection:
        connection.execute(text("UPDATE account_asset_balances SET balance = balance + 1 WHERE id = 3"))
    for scope in (EVERYTHING, Scope(goes_on=True)):
        assert [it.subject for it in audit(engine, WHEELS, scope).violations] == ["account 3"]
