"""Forgeries by whoever can write to the database: each is found, by its name, by an audit of everything; and by the
audit that goes on from the last clean one where it is newer than that or touches what every audit looks at.

What leaves no trace but in sealed blocks (a row changed in place below the mark, a cut tail, a chain made anew) is
found by I9: tests/books.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import fakeredis
import pytest
from sqlalchemy import Connection, Engine, delete, insert, select, text

from tests.campaigns.shops import BY, SEED, WHEELS, Shop
from tests.kept_results import keep_results
from tests.ledgers import migrated, recharge
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.operations.hold import HoldRequest
from tombola.producers.domain.operations.post import PostRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.producers.results import KEY_PREFIX, ResultStore, StoredResult
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import metadata
from tombola.worker.audit import audits, parts
from tombola.worker.audit.audit import Scope, audit
from tombola.worker.audit.report import Report
from tombola.worker.books import sealing
from tombola.worker.campaigns import codes
from tombola.worker.fulfilments import webhooks
from tombola.worker.ledger import accounts
from tombola.worker.settle.answers import Settled

pytestmark = pytest.mark.slow

MANIFEST = """
name = "one"
asset = "POINT"
cost = { 1 = "1.00", 5 = "5.00" }

[[prize]]
code = "thing"
weight = 1
stock = 50
instead = "nothing"
grants = [{ asset = "ITEM.THING", amount = "1" }]

[[prize]]
code = "coupon"
weight = 1
instead = "nothing"
grants = [{ asset = "COUPON.X", amount = "1", codes = true }]

[[prize]]
code = "nothing"
weight = 1
"""
L, A, R = "asset_transactions", "account_asset_balances", "api_idempotency_requests"
ROW = (
    f"INSERT INTO {L} (account_id, business_id, lottery_session_id, idempotency_key, business_type, asset_code, "
    "delta_amount, balance_before, balance_after, notes, created_at, updated_at)"
)
LAST = f"(SELECT MAX(transaction_id) FROM {L} WHERE account_id = 1)"
DRAWS = 12


class Forgery(NamedTuple):
    """Statements with names of the phase in braces and amounts as ¤9.99; a word of what is found, by invariant.

    `is_always_found`: also by the audit that goes on, if the rows are older than its mark.
    """

    statements: list[str]
    found: dict[str, str]
    is_always_found: bool = True


def appended(key: str, business_type: str, amount: str, *, session: str = "", notes: str = "NULL") -> list[str]:
    """A row that continues the chain of account 1, and its balance."""
    return [
        f"{ROW} SELECT 1, '{session or key}', '{session or key}', '{key}', '{business_type}', 'POINT', ¤{amount}, "
        f"balance_after, balance_after + ¤{amount}, {notes}, created_at, updated_at FROM {L} "
        f"WHERE transaction_id = {LAST}",
        f"UPDATE {A} SET balance = balance + ¤{amount} WHERE id = 1",
    ]


FORGERIES: dict[str, Forgery] = {
    "a balance raised": Forgery(
        [f"UPDATE {A} SET balance = balance + ¤50.00 WHERE id = 1"], {"I3": "account 1: holds"}
    ),
    "a balance raised, with a row": Forgery(
        appended("recharge_1_1700000000000_abcdef", "recharge", "50.00"),
        {"I12": "50.00 to account 1: neither a request nor an operator made it"},
    ),
    "a balance lowered": Forgery(
        [f"UPDATE {A} SET balance = balance - ¤1.00 WHERE id = 4"], {"I3": "account 4: holds"}
    ),
    "an account with a balance and no rows": Forgery(
        [
            f"INSERT INTO {A} (user_id, asset_code, balance, created_at, updated_at) "
            f"SELECT 77, 'POINT', ¤500.00, created_at, updated_at FROM {A} WHERE id = 1"
        ],
        {"I3": "holds 500.00, and has no rows"},
    ),
    "an account is gone": Forgery([f"DELETE FROM {A} WHERE id = 4"], {"I3": "account 4: there is no such account"}),
    "an account of another asset": Forgery(
        [f"UPDATE {A} SET asset_code = 'GOLD' WHERE id = 1"], {"I3": "account 1: is of GOLD, its rows are of POINT"}
    ),
    "the opening row is gone": Forgery(
        [f"DELETE FROM {L} WHERE account_id = 4 AND balance_before = 0"],
        {"I3": "account 4", "I4": "and is its account's first row"},
    ),
    "the opening row of a chain is gone": Forgery(
        [f"DELETE FROM {L} WHERE account_id = 1 AND balance_before = 0"],
        {"I4": "begins at 100.00, and is its account's first row", "I3": "account 1: holds"},
    ),
    "a draw is gone, with its request": Forgery(
        [f"DELETE FROM {L} WHERE lottery_session_id = '{{lost}}'", f"DELETE FROM {R} WHERE request_key = '{{lost}}'"],
        {"I4": "the one before ended at", "I3": "account 1: holds"},
    ),
    "a charge is gone": Forgery(
        [f"DELETE FROM {L} WHERE idempotency_key = '{{lost}}:consume'"], {"I4": "the one before ended at"}
    ),
    "a request is gone": Forgery(
        [f"DELETE FROM {R} WHERE request_key = '{{lost}}'"],
        {"I1": "session {lost}: was charged without a request"},
        is_always_found=False,
    ),
    "a row before all others": Forgery(
        [
            f"{ROW.replace('(account_id', '(transaction_id, account_id')} "
            f"SELECT -5, 1, 'x', 'x', 'recharge_1_1700000000000_abcdef', 'recharge', 'POINT', ¤9.00, 0, ¤9.00, NULL, "
            f"created_at, updated_at FROM {L} WHERE transaction_id = {LAST}"
        ],
        {"I4": "begins at 0.00, the one before ended at 9.00"},
    ),
    "a row in a gap": Forgery(
        [
            f"{ROW.replace('(account_id', '(transaction_id, account_id')} "
            f"SELECT {{gap}}, 1, 'x', 'x', 'recharge_1_1700000000000_abcdef', 'recharge', 'POINT', ¤9.00, "
            f"balance_after, balance_after + ¤9.00, NULL, created_at, updated_at FROM {L} "
            f"WHERE transaction_id = (SELECT MAX(transaction_id) FROM {L} WHERE account_id = 1 AND "
            f"transaction_id < {{gap}})"
        ],
        {"I4": "the one before ended at", "I3": "account 1: holds"},
    ),
    "two rows swapped": Forgery(
        [
            f"UPDATE {L} SET transaction_id = 900000 WHERE idempotency_key = '{{lost}}:consume'",
            f"UPDATE {L} SET transaction_id = {{lost_id}} WHERE idempotency_key = '{{won}}:consume'",
            f"UPDATE {L} SET transaction_id = {{won_id}} WHERE transaction_id = 900000",
        ],
        {"I4": "the one before ended at"},
        is_always_found=False,
    ),
    "a charge of another amount": Forgery(
        [f"UPDATE {L} SET delta_amount = ¤-0.50 WHERE idempotency_key = '{{lost}}:consume'"],
        {"I4": "-0.50 is not", "I10": "request {lost}", "I14": "request {lost}: lacks the ledger row"},
        is_always_found=False,
    ),
    "a reward of another amount, and all that follows": Forgery(
        [
            f"UPDATE {L} SET delta_amount = ¤6.00, balance_after = balance_after + ¤1.00 "
            "WHERE idempotency_key = '{won}:reward'",
            f"UPDATE {L} SET balance_before = balance_before + ¤1.00, balance_after = balance_after + ¤1.00 "
            "WHERE account_id = 1 AND transaction_id > {won_id} + 1",
            f"UPDATE {A} SET balance = balance + ¤1.00 WHERE id = 1",
        ],
        {"I2": "request {won}: was paid 6.00, its draw says 5.00"},
        is_always_found=False,  # but the balance is, see below
    ),
    "a charge with other notes": Forgery(
        [f"UPDATE {L} SET notes = 'odds=other' WHERE idempotency_key = '{{lost}}:consume'"],
        {"I2": "request {lost}: was drawn with other odds"},
        is_always_found=False,
    ),
    "a reward with other notes": Forgery(
        [f"UPDATE {L} SET notes = 'odds=other' WHERE idempotency_key = '{{won}}:reward'"],
        {"I14": "request {won}: lacks the ledger row {won}:reward"},
        is_always_found=False,
    ),
    "a reward of another business type": Forgery(
        [f"UPDATE {L} SET business_type = 'adjustment' WHERE idempotency_key = '{{won}}:reward'"],
        {"I2": "request {won}: was paid 0, its draw says 5.00"},
        is_always_found=False,
    ),
    "an unknown business type": Forgery(
        [f"UPDATE {L} SET business_type = 'bonus' WHERE idempotency_key = '{{won}}:reward'"],
        {"I13": "its business type 'bonus' is unknown"},
        is_always_found=False,
    ),
    "a row of another asset": Forgery(
        [f"UPDATE {L} SET asset_code = 'GOLD' WHERE idempotency_key = '{{lost}}:consume'"],
        {"I4": "is of GOLD, the rows before it are of POINT"},
        is_always_found=False,
    ),
    "a row moved to another account": Forgery(
        [f"UPDATE {L} SET account_id = 4 WHERE idempotency_key = '{{lost}}:consume'"],
        {"I3": "account 4: holds 104.00, its rows say 103.00", "I4": "account 1, transaction"},
    ),
    "a row under another key": Forgery(
        [f"UPDATE {L} SET idempotency_key = 'x:consume' WHERE idempotency_key = '{{lost}}:consume'"],
        {"I11": "request {lost}: its session holds foreign rows: ['x:consume']"},
        is_always_found=False,
    ),
    "a row of another session": Forgery(
        [f"UPDATE {L} SET lottery_session_id = 'x' WHERE idempotency_key = '{{lost}}:consume'"],
        {"I1": "session x: was charged without a request"},
        is_always_found=False,
    ),
    "another result": Forgery(
        [f"UPDATE {R} SET result = REPLACE(result, '-1.00', '-2.00') WHERE request_key = '{{lost}}'"],
        {"I10": "request {lost}: its kept result is not what the ledger says"},
        is_always_found=False,
    ),
    "another fingerprint": Forgery(
        [f"UPDATE {R} SET fingerprint = '{'0' * 64}' WHERE request_key = '{{lost}}'"],
        {"I10": "request {lost}: its row does not match its fingerprint"},
        is_always_found=False,
    ),
    "a request of another account": Forgery(
        [f"UPDATE {R} SET account_id = 4 WHERE request_key = '{{lost}}'"],
        {"I10": "request {lost}: its row does not match", "I11": "request {lost}: its session moves another account"},
        is_always_found=False,
    ),
    "a rejected request completed": Forgery(
        [f"UPDATE {R} SET status = 'completed', reason = NULL WHERE request_key = '{{poor}}'"],
        {"I1": "request {poor}: is completed and has 0 charges", "I10": "request {poor}"},
        is_always_found=False,
    ),
    "a reward twice": Forgery(
        appended("{won}:reward_2", "lottery_reward", "5.00", session="{won}", notes="notes"),
        {"I2": "request {won}: was paid 10.00, its draw says 5.00"},
    ),
    "a reward that was not drawn": Forgery(
        appended("{lost}:reward", "lottery_reward", "5.00", session="{lost}", notes="notes"),
        {"I2": "request {lost}: was paid 5.00, its draw says 0"},
    ),
    "a charge without a request": Forgery(
        appended("x:consume", "lottery_consume", "-1.00", session="x"),
        {"I1": "session x: was charged without a request"},
    ),
    "a reward without a request": Forgery(
        appended("x:reward", "lottery_reward", "5.00", session="x"), {"I1": "session x: was charged without a request"}
    ),
    "a recharge of a draw's session": Forgery(
        appended("x:recharge", "recharge", "5.00", session="{lost}"),
        {"I11": "request {lost}: its session holds foreign rows"},
    ),
    "a transfer that another account got": Forgery(
        [f"UPDATE {L} SET account_id = 3 WHERE idempotency_key = '{{move}}:transfer_in'"],
        {"I3": "account 4: holds", "I4": "account 3, transaction"},
    ),
    "a refund of more": Forgery(
        [f"UPDATE {L} SET delta_amount = ¤2.00 WHERE idempotency_key = '{{back}}:refund'"],
        {"I14": "back: lacks the ledger row {back}:refund of 1.00", "I4": "2.00 is not"},
        is_always_found=False,
    ),
    "a hold of more": Forgery(
        ["UPDATE account_holds SET amount = ¤9.00 WHERE hold_key = '{hold}'"], {"I14": "hold {hold}: holds 9.00"}
    ),
    "a hold opened again": Forgery(
        ["UPDATE account_holds SET state = 'open' WHERE hold_key = '{held}'"],
        {"I14": "hold {held}: is open, its ledger rows say posted"},
    ),
    "a hold is gone": Forgery(
        ["DELETE FROM account_holds WHERE hold_key = '{hold}'"],
        {"I14": "hold {hold}: has ledger rows, and is not among the holds"},
        is_always_found=False,
    ),
    "a hold without a row": Forgery(
        [
            "INSERT INTO account_holds SELECT 'x', account_id, asset_code, amount, state, expires_at, created_at, "
            "updated_at FROM account_holds WHERE hold_key = '{hold}'"
        ],
        {"I14": "hold x: has no ledger row that took its amount"},
    ),
    "a manifest changed": Forgery(
        ["UPDATE campaign_versions SET manifest = REPLACE(manifest, '\"weight\":1', '\"weight\":2')"],
        {"I2": "version 1 of one: its manifest is not the one with the hash"},
    ),
    "a version that nobody published": Forgery(
        [
            "INSERT INTO campaign_versions SELECT REPLACE(odds_hash, SUBSTR(odds_hash, 1, 1), '0'), campaign, 2, "
            "manifest, created_by, created_at, published_at FROM campaign_versions"
        ],
        {"I12": "version 2 of one: its publication is not on record"},
    ),
    "a campaign closed": Forgery(
        ["UPDATE campaigns SET state = 'closed'"], {"I12": "campaign one: is closed, on record open"}
    ),
    "stock raised": Forgery(
        ["UPDATE campaign_stock SET units = units + 9 WHERE prize = 'thing'"], {"I7": "prize thing of one"}
    ),
    "stock raised, with a change": Forgery(
        [
            "UPDATE campaign_stock SET units = units + 9 WHERE prize = 'thing'",
            "INSERT INTO campaign_stock_changes (campaign, prize, units, operator, reason, at) "
            "SELECT campaign, prize, 9, operator, reason, at FROM campaign_stock_changes WHERE prize = 'thing'",
        ],
        {"I12": "prize thing of one: 59 units came into stock, 50 are on record"},
    ),
    "units back from a draw that was not refunded": Forgery(
        [
            "UPDATE campaign_stock SET units = units + 1 WHERE prize = 'thing'",
            "INSERT INTO campaign_stock_changes (campaign, prize, units, operator, reason, at) "
            "SELECT campaign, prize, 1, 'refund', '{lost}', at FROM campaign_stock_changes WHERE prize = 'thing'",
        ],
        {"I12": "1 units came back from {lost}, which was not refunded"},
    ),
    "a code handed out twice": Forgery(
        [
            f"UPDATE {L} SET notes = REPLACE(notes, 'code=', 'code=X-0000') WHERE notes LIKE '%code=%' "
            "AND lottery_session_id LIKE '{phase}%'"
        ],
        {"I7": "handed it out"},
        is_always_found=False,
    ),
    "a code taken back": Forgery(
        ["UPDATE campaign_codes SET taken_by = NULL WHERE taken_by LIKE '{phase}%'"], {"I7": "codes of coupon of one"}
    ),
    "a code taken by another draw": Forgery(
        ["UPDATE campaign_codes SET taken_by = '{lost}:consume' WHERE taken_by LIKE '{phase}%'"],
        {"I7": "taken by {lost}:consume"},
        is_always_found=False,
    ),
    "a request that waits for ever": Forgery(
        [f"UPDATE {R} SET accepted_at = '2024-01-01 00:00:00.000000' WHERE request_key = 'waits'"],
        {"I8": "request waits: was accepted"},
    ),
    "a webhook that leads elsewhere": Forgery(
        ["UPDATE webhooks SET url = 'https://example.org/x'"], {"I12": "webhook shop: leads to https://example.org/x"}
    ),
    "a webhook that nobody added": Forgery(
        [
            "INSERT INTO webhooks (name, url, secret, events, created_by, created_at) "
            "SELECT 'x', url, secret, events, created_by, created_at FROM webhooks"
        ],
        {"I12": "webhook x: it is not on record"},
    ),
    "a recharge off the record": Forgery(
        ["DELETE FROM operator_actions WHERE action = 'account recharge'"], {"I12": "it is not on record"}
    ),
}  # fmt: skip


class Books:
    """A shop in two phases: `old` was audited and found clean, `new` came after it."""

    def __init__(self, engine: Engine, *, is_sealed: bool = False) -> None:
        self.shop = Shop(engine)
        self.engine = engine
        self.redis = fakeredis.FakeRedis()
        self.store = ResultStore(self.redis, ttl_s=3600)
        self.gaps: dict[str, int] = {}
        self._open()
        self._settle("o")
        if is_sealed:
            sealing.seal(engine, after_s=0)
        report = self.audit()
        self.blocks_at_mark = report.blocks
        assert report.violations == []
        assert report.is_clean, report.obstacles
        audits.record(engine, report, by="tombola.audit")
        self.before_new = self._read()
        self._settle("n")
        if is_sealed:
            sealing.seal(engine, after_s=0)
        self._kept = self._read()

    def audit(self, *, goes_on: bool = False) -> Report:
        return audit(self.engine, WHEELS, Scope(goes_on, self.store))

    def _open(self) -> None:
        for user, balance in enumerate(("100.00", "0.50", "0.00", "100.00"), 1):
            accounts.add(self.engine, user_id=user, balance=Decimal(balance), by="ann")
        self.shop.publish(MANIFEST)
        codes.load(self.engine, "one", "coupon", {f"X-{number:04}": number for number in range(50)}, **BY)
        wanted = webhooks.Wanted("shop", "https://example.com/hook", ("*",))
        webhooks.add(self.engine, wanted, is_private_allowed=False, **BY)
        self.shop.accept(DrawRequest(account_id=1, request_key="waits"))

    def _settle(self, phase: str) -> None:
        """The requests of a phase: each of its own batch, as the audit meets them one by one."""
        draws: list[Request] = [DrawRequest(account_id=1, request_key=f"{phase}{it:02}") for it in range(DRAWS)]
        by_campaign = [
            DrawRequest(account_id=1, campaign="one", request_key=f"{phase}c{it}", pulls=5) for it in range(3)
        ]
        self._answers(draws[: DRAWS // 2])
        self._leave_a_gap(phase)
        recharge(self.engine, 1, Decimal(5), by="ann")
        self._answers(draws[DRAWS // 2 :])
        self.shop.accept(*by_campaign)
        self._answers(by_campaign)
        self._answers(
            [
                RechargeRequest(account_id=1, request_key=f"{phase}r", amount="9.00"),
                TransferRequest(account_id=1, request_key=f"{phase}t", to=4, amount="2.00"),
                HoldRequest(account_id=1, request_key=f"{phase}h", amount="3.00"),
                HoldRequest(account_id=1, request_key=f"{phase}p", amount="3.00"),
                DrawRequest(account_id=2, request_key=f"{phase}poor"),
            ]
        )
        keep_results(self.engine, *[f"{phase}{it:02}" for it in range(DRAWS // 2)])  # as an older release did
        self._answers([PostRequest(account_id=1, request_key=f"{phase}q", hold=f"{phase}p")])
        self._answers(
            [
                RefundRequest(
                    account_id=1, request_key=f"{phase}back", draw=f"{phase}00", reason="why", policy="charge_only"
                )
            ]
        )

    def _answers(self, some: list[Any]) -> None:
        answers = self.shop.settle(*some)
        assert all(isinstance(it, Settled) for it in answers), answers
        self.store_results([it for it in answers if isinstance(it, Settled)])

    def store_results(self, answers: list[Settled]) -> None:
        for it in answers:
            stored = StoredResult(it.request.lottery_session_id, it.result, it.settled_at)
            self.redis.set(KEY_PREFIX + stored.task_id, stored.envelope())

    def _leave_a_gap(self, phase: str) -> None:
        """Ids that no row has, as a transaction that was rolled back leaves them."""
        with self.engine.begin() as connection:
            newest = connection.execute(text(f"SELECT MAX(transaction_id) FROM {L}")).scalar_one()
            if self.engine.dialect.name == "sqlite":
                connection.execute(text(f"UPDATE sqlite_sequence SET seq = {newest + 3} WHERE name = '{L}'"))
            else:
                connection.execute(text(f"ALTER TABLE {L} AUTO_INCREMENT = {newest + 4}"))
        self.gaps[phase] = newest + 2

    def names(self, phase: str) -> dict[str, Any]:
        """What the statements of a forgery name."""
        keys = [f"{phase}{it:02}" for it in range(1, DRAWS)]
        won = next(it for it in keys if WHEELS["default"].draw(1, it).amount)
        lost = next(it for it in keys if not WHEELS["default"].draw(1, it).amount)
        with self.engine.connect().execution_options(read_only=True) as connection:
            ids = {
                f"{name}_id": connection.execute(
                    text(f"SELECT transaction_id FROM {L} WHERE idempotency_key = '{key}:consume'")
                ).scalar_one()
                for name, key in (("won", won), ("lost", lost))
            }
        return ids | {
            "phase": phase,
            "won": won,
            "lost": lost,
            "poor": f"{phase}poor",
            "move": f"{phase}t",
            "hold": f"{phase}h",
            "held": f"{phase}p",
            "back": f"{phase}00",
            "gap": self.gaps[phase],
        }

    def forge(self, statements: list[str], names: dict[str, Any]) -> None:
        """Write past every check that the database has."""

        def stored(amount: re.Match[str]) -> str:
            return str(int(Decimal(amount[1]) * 100)) if self.engine.dialect.name == "sqlite" else amount[1]

        with unchecked(self.engine) as connection:
            for statement in statements:
                told = re.sub(r"¤(-?[\d.]+)", stored, statement.format(**names)).replace("%", "%%")
                told = told if self.engine.dialect.name != "sqlite" else told.replace("%%", "%")
                assert connection.exec_driver_sql(told).rowcount, told

    def _read(self) -> dict[Any, list[dict[str, Any]]]:
        with self.engine.connect().execution_options(read_only=True) as connection:
            return {
                it: [dict(row) for row in connection.execute(select(it)).mappings()] for it in metadata.sorted_tables
            }

    def replace(self, table: Any, rows: list[dict[str, Any]]) -> None:
        with unchecked(self.engine) as connection:
            connection.execute(delete(table))
            if rows:
                connection.execute(insert(table), rows)

    def restore(self) -> None:
        """The books as they were before the forgery."""
        now = self._read()
        for table, rows in self._kept.items():
            if now[table] != rows:
                self.replace(table, rows)
        self.shop.look()


@contextmanager
def unchecked(engine: Engine) -> Iterator[Connection]:
    """A transaction in which no constraint is checked."""
    with engine.connect().execution_options(autobegin=False) as connection:
        driver: Any = connection.connection.driver_connection
        if engine.dialect.name == "sqlite":
            for pragma in ("foreign_keys=OFF", "ignore_check_constraints=ON"):
                driver.execute(f"PRAGMA {pragma}")
        else:
            with driver.cursor() as cursor:
                cursor.execute("SET check_constraint_checks=0, foreign_key_checks=0, sql_mode=''")
        with connection.begin():
            yield connection
        connection.invalidate()  # the next one checks again


@pytest.fixture
def books(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Books]:
    monkeypatch.setattr(parts, "HORIZON_S", 0.0)  # nothing else is at work: every row is old enough for the mark
    engine = open_engine(database_url)
    migrated(engine)
    yield Books(engine)
    engine.dispose()


def missed(report: Report, forgery: Forgery, names: dict[str, Any]) -> list[str]:
    """The invariants that the audit should have found broken, and has not in these words."""
    said = {
        invariant: [str(it) for it in report.violations if it.invariant == invariant] for invariant in report.counts
    }
    return [
        f"{invariant} {words.format(**names)}: {said[invariant]}"
        for invariant, words in forgery.found.items()
        if not any(words.format(**names) in it for it in said[invariant])
    ]


def test_every_forgery_is_found(books: Books) -> None:
    assert len(FORGERIES) >= 30
    since = books.audit(goes_on=True)
    assert (since.violations, since.is_clean, since.is_of_everything) == ([], True, False)
    assert 0 < since.rows < books.audit().rows
    not_found: list[tuple[str, ...]] = []
    for what, forgery in FORGERIES.items():
        for phase in ("n", "o") if books.engine.dialect.name == "sqlite" else ("n",):
            names = books.names(phase)
            books.forge(forgery.statements, names)
            everything = books.audit()
            assert not everything.obstacles, (what, phase, everything.obstacles)
            not_found += [(what, phase, it) for it in missed(everything, forgery, names)]
            if phase == "n" or forgery.is_always_found:
                since = books.audit(goes_on=True)
                assert not since.is_of_everything
                assert since.reached is None, what
                not_found += [(what, phase, "since", it) for it in missed(since, forgery, names)]
            books.restore()
    assert not not_found, "\n".join(map(str, not_found))
    assert books.audit().is_clean


def test_a_forged_result_in_the_store_is_found(books: Books) -> None:
    name = books.names("n")["lost"]
    stored = books.redis.get(KEY_PREFIX + name)
    assert isinstance(stored, bytes)
    books.redis.set(KEY_PREFIX + name, stored.replace(b'"balance_after":"', b'"balance_after":"9'))
    for goes_on in (False, True):
        report = books.audit(goes_on=goes_on)
        assert [str(it) for it in report.violations] == [
            f"I6 session {name}: the result store has another result than the database"
        ]
        assert report.results > DRAWS
    books.redis.delete(KEY_PREFIX + name)  # a result that is forgotten is rebuilt
    assert books.audit().is_clean


def test_a_store_that_is_away_is_not_looked_at(books: Books) -> None:
    away = ResultStore.open("redis://127.0.0.1:1/0", ttl_s=10, timeout_s=1)
    report = audit(books.engine, WHEELS, Scope(results=away))
    assert (report.violations, report.states["I6"], report.is_clean) == ([], "not looked at", False)
    assert report.reached is not None, "the result store has no part in a mark"
    away.close()


def test_a_forged_mark_is_none(books: Books) -> None:
    """Who raises a balance, and what the last audit knows of it as well, is found: everything is examined then."""
    raise_balance = [f"UPDATE {A} SET balance = balance + ¤50.00 WHERE id = 4"]
    for statements in (
        ["UPDATE audit_marks SET mark = REPLACE(mark, '\"transaction_id\":', '\"transaction_id\":1')"],
        ["UPDATE audited_accounts SET state = REVERSE(state)"]
        if books.engine.dialect.name != "sqlite"
        else ["UPDATE audited_accounts SET state = zeroblob(LENGTH(state))"],
        ["DELETE FROM audited_accounts"],
        ["DELETE FROM audit_marks"],
        ["UPDATE audit_marks SET mac = REPLACE(mac, SUBSTR(mac, 1, 1), '_')"],
    ):
        books.forge([*raise_balance, *statements], {})
        report = books.audit(goes_on=True)
        assert report.is_of_everything
        assert report.counts["I3"] == 1
        books.restore()


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Books]:
    """Books whose rows are sealed, those of the mark and those after it."""
    engine = open_engine(f"sqlite:///{tmp_path}/ledger.db")
    migrated(engine)
    yield Books(engine, is_sealed=True)
    engine.dispose()


def test_what_only_seals_find(sealed: Books) -> None:
    """Rows, requests, holds and balances agree: without a seal the books would balance."""
    names = sealed.names("o")
    changed = [f"UPDATE {L} SET created_at = '2024-01-01 00:00:00.000000' WHERE transaction_id = {{lost_id}}"]
    sealed.forge(changed, names)
    report = sealed.audit()
    assert [(it.invariant, it.what) for it in report.violations] == [("I9", "a row is not what was sealed")]
    assert "block 1, transactions 1 to" in report.violations[0].subject
    assert sealed.audit(goes_on=True).is_clean, "below the mark: an audit of everything finds it"
    sealed.restore()


def test_a_last_hour_that_was_deleted_is_found(sealed: Books) -> None:
    before = sealed.before_new
    for table, rows in before.items():
        if table.name not in ("books_blocks", "books_head", "books_house", "audit_marks", "audited_accounts"):
            sealed.replace(table, rows)
    for goes_on in (False, True):
        report = sealed.audit(goes_on=goes_on)
        assert {it.invariant for it in report.violations} == {"I9"}
        assert any("sealed rows are gone" in it.what for it in report.violations)
    cut = [f"DELETE FROM books_house WHERE block > {sealed.blocks_at_mark}"]
    sealed.forge([f"DELETE FROM books_blocks WHERE number > {sealed.blocks_at_mark}", *cut], {})
    for goes_on in (False, True):
        report = sealed.audit(goes_on=goes_on)
        assert {(it.invariant, it.subject) for it in report.violations} == {("I9", "the head")}
        assert "are left" in report.violations[0].what


def test_a_chain_that_was_made_anew_is_found(sealed: Books) -> None:
    names = sealed.names("o")
    changed = f"UPDATE {L} SET created_at = '2024-01-01 00:00:00.000000' WHERE transaction_id = {{lost_id}}"
    sealed.forge([changed, "DELETE FROM books_house", "DELETE FROM books_blocks", "DELETE FROM books_head"], names)
    sealing.seal(sealed.engine, after_s=0)
    for goes_on in (False, True):
        report = sealed.audit(goes_on=goes_on)
        assert [str(it) for it in report.violations] == [
            f"I9 block {sealed.blocks_at_mark}: is not the one that the last clean audit has met: "
            "the chain was made anew"
        ]


def test_what_was_found_is_found_again(books: Books) -> None:
    """An audit that is not clean leaves the mark where it was."""
    names = books.names("n")
    books.forge(FORGERIES["another result"].statements, names)
    for _ in range(2):
        report = books.audit(goes_on=True)
        assert report.counts["I10"] == 1
        audits.record(books.engine, report, by="tombola.audit")


def test_the_mark_moves_on(books: Books) -> None:
    first = books.audit(goes_on=True)
    assert first.reached is not None
    audits.record(books.engine, first, by="tombola.audit")
    stale = first.reached
    second = books.audit(goes_on=True)
    assert (second.rows, second.after_id, second.is_clean) == (0, first.up_to_id, True)
    assert second.accounts == first.accounts
    audits.record(books.engine, second, by="tombola.audit")
    with books.engine.begin() as connection:
        from tombola.worker.audit import marks

        assert not marks.keep(connection, stale), "another audit has ended meanwhile"
    assert books.audit(goes_on=True).is_clean


def test_another_seed_begins_at_the_first_row(books: Books) -> None:
    from tombola.producers.domain.draw import wheels

    assert audit(books.engine, wheels(SEED[::-1]), Scope(goes_on=True)).is_of_everything


def test_rows_that_are_young_are_met_again(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row may be committed after a row with a higher id: the mark stays below what is younger than the horizon."""
    if books.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    monkeypatch.setattr(parts, "HORIZON_S", 3600.0)
    report = books.audit(goes_on=True)
    assert report.is_clean
    assert report.rows > 0
    assert report.reached is not None
    assert report.reached.mark.transaction_id == report.after_id
    assert report.reached.mark.at > utc_now() - timedelta(seconds=60)
    names = books.names("n")
    books.forge(FORGERIES["a balance raised"].statements, names)
    books.forge(FORGERIES["a charge is gone"].statements, names)
    report = books.audit(goes_on=True)
    assert report.counts["I3"]
    assert report.counts["I4"]
