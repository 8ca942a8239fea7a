"""Proofs of draws that a worker has settled, gathered from a database, and verified by a stranger."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.books.conftest import seal_all
from tests.campaigns.shops import Shop, open_shop
from tests.verifiers.draws import BOOKS_KEY, RECEIPT_KEY
from tests.verifiers.running import Report, in_node, in_python, shown
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import ProofNotFound
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.producers.domain.proofs import Proof
from tombola.producers.proofs import Proofs
from tombola.producers.receipts import Receipts
from tombola.producers.storage import books, requests
from tombola.worker.books import anchors, head
from tombola.worker.campaigns import codes
from tombola.worker.relay.retention import archive_once

pytestmark = pytest.mark.process
BY = {"operator": "ann", "reason": "for Monday"}

FAIR = """
name = "fair"
asset = "POINT"
cost = { 1 = "10.00", 10 = "90.00" }

[limits]
per_account = 40

[[prize]]
code = "phone"
weight = 30
stock = 2
instead = "coupon"
grants = [{ asset = "ITEM.PHONE", amount = "1" }, { notify = "phone-won" }]

[[prize]]
code = "coupon"
weight = 30
instead = "five"
value = "1.00"
grants = [{ asset = "COUPON.10", amount = "1", codes = true }]

[[prize]]
code = "five"
weight = 20
grants = [{ asset = "POINT", amount = "5.00" }, { asset = "COIN", amount = "2.50" }]

[[prize]]
code = "nothing"
weight = 60

[[tier]]
name = "vip"
spent_from = "150.00"
weights = { nothing = 10 }

[[guarantee]]
name = "any"
prizes = ["phone", "coupon", "five"]
hard_at = 4
soft_from = 2
soft_step = 50
"""


@pytest.fixture
def shop(database_url: str) -> Iterator[Shop]:
    with open_shop(database_url) as made:
        made.publish(FAIR)
        codes.load(made.engine, "fair", "coupon", {f"CODE-{number}": number for number in range(1, 4)}, **BY)
        made.look()
        yield made


class Gathering:
    """Proofs of one shop, whose processes have all keys."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        self.proofs = Proofs(Receipts(shop.engine, [RECEIPT_KEY]), BOOKS_KEY.public.text)

    def seal(self) -> None:
        seal_all(self.shop.engine)
        anchors.sign_once(self.shop.engine, BOOKS_KEY, every_s=0)

    def proof(self, session: str) -> Proof:
        with self.shop.engine.connect() as connection:
            state = requests.state_of_session(connection, session)
        assert state is not None
        with self.shop.engine.connect() as connection:
            return self.proofs.of(connection, state)


def verified(folder: Path, *proofs: Proof) -> list[Report]:
    texts = [it.encode().decode() for it in proofs]
    by_python = in_python(folder, texts)
    assert in_node(folder, [(text, {}) for text in texts]) == by_python
    assert [it for it in by_python if it["verdict"] == "false"] == [], shown(by_python)
    return by_python


def unproven(report: Report) -> set[str]:
    return {it["claim"] for it in report["claims"] if it["verdict"] != "proven"}


def test_draws_of_a_worker_are_proven(shop: Shop, tmp_path: Path) -> None:
    account = shop.account("5000.00", user=1)
    draws = [DrawRequest(account_id=account, request_key=f"d-{n}", client_nonce=f"nonce-{n:016}") for n in range(5)]
    draws += [DrawRequest(account_id=account, request_key=f"o-{n}", campaign="fair", pulls=10) for n in range(4)]
    draws += [DrawRequest(account_id=account, request_key="one", campaign="fair", lottery_session_id="session-1")]
    for some in (draws[:5], draws[5:7], draws[7:]):
        shop.draw(*some)
    gathering = Gathering(shop)
    gathering.seal()
    proofs = [gathering.proof(it.lottery_session_id) for it in draws]

    reports = verified(tmp_path, *proofs)
    assert [unproven(it) for it in reports] == [set()] * len(draws), shown(reports)
    notes = " ".join(it.rows[0].notes or "" for it in proofs)
    assert " gone=" in notes
    assert " tier=vip" in notes
    assert " code=CODE-1" in " ".join(row.notes or "" for it in proofs for row in it.rows)

    again = [gathering.proof(it.lottery_session_id).encode() for it in draws]
    assert again == [it.encode() for it in proofs], "the proof of a draw at one state has always the same bytes"
    archive_once(shop.engine, older_than_s=0)
    assert [gathering.proof(it.lottery_session_id).encode() for it in draws] == again


def test_a_draw_before_it_settles_and_before_it_is_sealed(shop: Shop, tmp_path: Path) -> None:
    account = shop.account("5000.00", user=1)
    asked = DrawRequest(account_id=account, request_key="k")
    gathering = Gathering(shop)
    shop.accept(asked)
    accepted = gathering.proof("k")
    shop.settle(asked)
    settled = gathering.proof("k")
    seal_all(shop.engine)
    unsigned = gathering.proof("k")
    gathering.seal()

    reports = verified(tmp_path, accepted, settled, unsigned, gathering.proof("k"))
    assert accepted.status == "accepted"
    assert accepted.receipts.settled is None
    assert accepted.receipts.accepted == settled.receipts.accepted
    assert [unproven(it) - unproven(reports[3]) for it in reports[1:]] == [{"sealed"}, {"sealed"}, set()]


def test_repeats_rejected_and_refunded_draws(shop: Shop, tmp_path: Path) -> None:
    poor, rich = shop.account("5.00", user=1), shop.account("5000.00", user=2)
    rejected = DrawRequest(account_id=poor, request_key="poor", campaign="fair")
    drawn = DrawRequest(account_id=rich, request_key="rich", campaign="fair", pulls=10)
    shop.draw(rejected, drawn)
    gathering = Gathering(shop)
    gathering.seal()
    first = gathering.proof("rich")
    shop.settle(drawn, drawn)
    assert gathering.proof("rich") == first, "a repeat changes nothing"

    shop.settle(RefundRequest(account_id=rich, request_key="back", draw="rich", campaign="fair", reason="sorry"))
    unsealed = gathering.proof("rich")
    gathering.seal()
    reports = verified(tmp_path, first, unsealed, gathering.proof("rich"), gathering.proof("poor"))
    claims = [{it["claim"] for it in report["claims"]} for report in reports]
    assert [("refund" in it, "rejection" in it) for it in claims] == [
        (False, False),
        (True, False),
        (True, False),
        (False, True),
    ]
    assert "sealed" in unproven(reports[1])
    assert unproven(reports[3]) == set()


def test_a_row_that_was_changed_in_the_database_is_found(database_url: str, tmp_path: Path) -> None:
    with open_shop(database_url, balances=False) as shop:
        account = shop.account("5000.00", user=1)
        shop.draw(DrawRequest(account_id=account, request_key="k"), DrawRequest(account_id=account, request_key="l"))
        gathering = Gathering(shop)
        gathering.seal()
        with shop.engine.begin() as connection:
            connection.execute(
                text(
                    "UPDATE asset_transactions SET created_at = '2026-01-01 00:00:00.000000' WHERE idempotency_key = :k"
                ),
                {"k": "k:consume"},
            )
        [report] = in_python(tmp_path, [gathering.proof("k").encode().decode()])
        assert {it["claim"] for it in report["claims"] if it["verdict"] == "false"} == {"sealed"}


def test_only_draws_have_proofs(shop: Shop) -> None:
    account = shop.account(user=1)
    shop.settle(RechargeRequest(account_id=account, request_key="pay", amount="1.00"))
    with pytest.raises(ProofNotFound):
        Gathering(shop).proof("pay")


def test_blocks_in_trees_of_many_tiles(shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(books, "TILE", 4)
    monkeypatch.setattr(head, "SEEN_EVERY", timedelta(0))  # each draw gets a block of its own
    account = shop.account("5000.00", user=1)
    gathering = Gathering(shop)
    asked = [DrawRequest(account_id=account, request_key=f"k-{number}") for number in range(19)]
    for number, it in enumerate(asked):
        shop.draw(it)
        gathering.seal()
        if number % 3 == 0:
            gathering.proof("k-0")  # the tree grows while it is kept
    reports = verified(tmp_path, *(gathering.proof(it.lottery_session_id) for it in asked))
    assert not any("sealed" in unproven(it) for it in reports), shown(reports)
    fresh = Gathering(shop)
    proofs = [gathering.proof(it.lottery_session_id) for it in asked]
    assert [fresh.proof(it.lottery_session_id) for it in asked] == proofs
    assert len({it.books.leaves[0].block for it in proofs if it.books is not None}) == len(asked)
