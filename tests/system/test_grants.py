"""Each process under a database user of its own, with the rights that `tombola grants --sql` prints and no more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pytest
from sqlalchemy import Engine, NullPool, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from typer.testing import CliRunner

from tests import processes
from tests.audits import audited
from tests.books import assert_books, table
from tests.consoles import PASSWORD, Console, Visitor
from tests.gateways import Gateway, gateway
from tests.kept_results import keep_results
from tests.processes import House, wait_for
from tests.receivers import Receiver
from tombola import migrations
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.operations.hold import HoldRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.producers.domain.operations.void import VoidRequest
from tombola.producers.entry import Entry
from tombola.producers.settings import Settings
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.faults import code_of
from tombola.producers.storage.grants import APPEND_ONLY, ROLES, Deployment, Role, statements
from tombola.producers.storage.mysql_connections import connect_by
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.transactions import transaction
from tombola.worker.audit import audits
from tombola.worker.books.sealing import seal
from tombola.worker.books.snapshots import take_once
from tombola.worker.cli import app
from tombola.worker.doctor import examine
from tombola.worker.ledger.old_rows import holds_old_rows
from tombola.worker.ledger.post import busy
from tombola.worker.relay.relay import Relay
from tombola.worker.relay.retention import archive_once, forget_fulfilments

pytestmark = pytest.mark.process

SETTLED_WITHIN_S = 40.0
DENIED = (1142, 1143)
SEALERS: tuple[Role, ...] = ("relay", "worker", "operator")
MANIFEST = """
name = "rich"
title = "Everything that a draw can touch"
asset = "POINT"
cost = { 1 = "2.00" }
limits = { per_account = 1000 }

[[prize]]
code = "phone"
weight = 1
stock = 1000
instead = "five"
grants = [{ asset = "ITEM.PHONE", amount = "1" }, { notify = "phone-won" }]

[[prize]]
code = "coupon"
instead = "five"
weight = 1
grants = [{ asset = "COUPON.TEN", amount = "1", codes = true }]

[[prize]]
code = "five"
weight = 1
grants = [{ asset = "POINT", amount = "1.00" }]
"""


NO_CODES_LEFT = 'code = "coupon"\ninstead = "five"\n'


class Users:
    """A deployment whose processes have users of their own; `root` is the house under the server's root."""

    def __init__(self, root: House) -> None:
        self.root = root
        url = make_url(root.env["TOMBOLA_DATABASE_URL"])
        self._urls: dict[str, str] = {}
        for line in statements(ROLES, Deployment(str(url.database))):
            made = re.match(r"CREATE USER '(tombola_(\w+))'@'%' IDENTIFIED BY '([\w-]+)'", line)
            if made:
                mine = url.set(username=made[1], password=made[3])
                self._urls[made[2]] = mine.render_as_string(hide_password=False)
            if line and not line.startswith("--"):
                self.do(line)

    def do(self, statement: str) -> None:
        """Execute a statement as root."""
        with self.root.engine.begin() as connection:
            connection.exec_driver_sql(statement.replace("%", "%%"))

    def env(self, role: Role) -> dict[str, str]:
        return self.root.env | {"TOMBOLA_DATABASE_URL": self._urls[role]}

    def settings(self, role: Role) -> Settings:
        return Settings.from_env(self.env(role))

    def refused(self, role: Role, statement: str) -> int:
        """The server's error for a statement of this user; 0 if it was executed."""
        engine = create_engine(self._urls[role], poolclass=NullPool)
        connect_by(engine)
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql(statement)
        except DBAPIError as error:
            return code_of(error) or -1
        return 0

    @contextmanager
    def shell(self, role: Role) -> Iterator[Any]:
        """`tombola …` under the user of a role."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.env(role).items():
                patch.setenv(name, value)

            def tombola(*arguments: object, **given: Any) -> str:
                ended = CliRunner().invoke(app, [*map(str, arguments)], **given)
                assert ended.exit_code == 0, (ended.output, ended.exception)
                return ended.output

            yield tombola


@pytest.fixture
def users(mariadb_url: str, redis_url: str) -> Iterator[Users]:
    with House(mariadb_url, redis_url, redis_url, **processes.QUICK_CLAIM, TOMBOLA_WEBHOOK_PRIVATE="true") as root:
        made = Users(root)
        yield made
        for role in ROLES:
            made.do(f"DROP USER 'tombola_{role}'@'%'")


def test_every_process_does_its_work_under_its_own_user(users: Users, tmp_path: Any) -> None:
    root = users.root
    manifest, codes = tmp_path / "rich.toml", tmp_path / "codes"
    manifest.write_text(MANIFEST)
    codes.write_text("\n".join(f"CODE-{number}" for number in range(200)))
    with users.shell("operator") as tombola:
        accounts = [_number(tombola("account", "add", "--balance", "1000", "--reason", "new")) for _ in range(3)]
        tombola("account", "recharge", "--account", accounts[0], "--amount", "5", "--key", "gift")
        tombola("campaign", "publish", manifest, "--reason", "Monday", "--yes")
        tombola("campaign", "codes", "load", "rich", "coupon", codes, "--reason", "Monday")
        tombola("campaign", "open", "rich", "--reason", "Monday")
        api_key = tombola("api-key", "add", "shop", "--scope", "draw", "--scope", "read").strip()
        spare = tombola("api-key", "add", "spare", "--expires", "2100-01-01").strip()
        tombola("api-key", "revoke", spare)
        tombola("user", "add", "ann", "--role", "operator", "--password-stdin", input=PASSWORD)
        tombola("user", "add", "eve", "--password-stdin", input=PASSWORD)
        tombola("user", "remove", "eve")
        assert "phone" in tombola("campaign", "show", "rich")
        assert "1005" in tombola("account", "list", "--user", 1)
    headers = {"Authorization": f"Bearer {api_key}"}
    with (
        processes.worker(users.env("worker")) as worker,
        gateway(House(**_house(users, "gateway"))) as door,
    ):
        _draw_through(door, accounts, headers)
        _move_money(root, accounts, worker.log)
        # A draw of a campaign that does not exist is parked, and replayed by an operator of the console.
        root.enqueue([DrawRequest(account_id=accounts[0], request_key="early", campaign="late")])
        wait_for(lambda: root.dead() == 1, within_s=SETTLED_WITHIN_S, what=worker.log)
        _publish_late(users, manifest)
        _operate(users)
        _replay(users)
        _move(users, accounts)
        _expire_a_hold(users, accounts[0])
        wait_for(lambda: _holds(root) == {"posted", "voided"}, within_s=SETTLED_WITHIN_S, what=worker.log)
        wait_for(lambda: "early" in root.results(), within_s=SETTLED_WITHIN_S, what=worker.log)
        assert "1142" not in worker.log()
        assert "denied" not in worker.log()
    _housekeep(users)
    assert_drawn(root)
    _seal(users)
    with users.shell("auditor") as tombola:
        tombola("books", "verify")
        tombola("books", "balance")
        assert "violated" not in tombola("audit")
        _doctor_finds_nothing_forbidden(users)
    _take_snapshots(users)
    with root.engine.connect() as connection:
        last = audits.last(connection)
    assert last is not None
    assert last.is_clean, last


def _number(said: str) -> int:
    match = re.search(r"account (\d+)", said)
    assert match, said
    return int(match[1])


def _house(users: Users, role: Role) -> dict[str, str]:
    env = users.env(role)
    url, broker, results = (env[f"TOMBOLA_{it}_URL"] for it in ("DATABASE", "BROKER", "RESULT"))
    return {"database_url": url, "broker_url": broker, "result_url": results}


def _draw_through(door: Gateway, accounts: list[int], headers: dict[str, str]) -> None:
    for number in range(30):
        body = {"account_id": accounts[number % 3], "campaign": "rich" if number % 2 else "default"}
        assert door.draw(body, f"g-{number}", **headers).status_code == 202
    for number in range(30):
        shown = door.show(f"g-{number}", wait_s=SETTLED_WITHIN_S, headers=headers)
        assert shown.json()["status"] == "completed", shown.text
    for path in ("", "/transactions", "/statement?from=2026-01-01"):
        answer = door.client.get(f"/v1/accounts/{accounts[0]}{path}", headers=headers)
        assert answer.status_code == 200, answer.text
    assert door.client.get("/v1/draws/g-0/transactions", headers=headers).status_code == 200
    assert door.client.get("/v1/campaigns/rich").status_code == 200
    assert door.client.get("/readyz").status_code == 200


def _move_money(root: House, accounts: list[int], log: Callable[[], str]) -> None:
    """A movement of each kind that writes more than ledger rows and balances."""
    one, two, _ = accounts
    hold = HoldRequest(account_id=one, request_key="hold", amount="3.00")
    # A draw that has won a phone, whose unit goes back to stock.
    won = next(it for it in table(root.engine, "asset_transactions") if it["asset_code"] == "ITEM.PHONE")
    key = won["idempotency_key"].partition(":")[0]
    (draw,) = [it for it in table(root.engine, "api_idempotency_requests") if it["request_key"] == key]
    refund = RefundRequest(
        account_id=draw["account_id"], request_key="refund", draw=key, campaign="rich", policy="refuse"
    )
    moved: list[Request] = [
        RechargeRequest(account_id=one, request_key="recharge", amount="9.00", channel="bank"),
        TransferRequest(account_id=one, request_key="transfer", amount="1.00", to=two),
        hold,
        refund,
    ]
    root.publish(*[it.encode() for it in moved])
    wait_for(lambda: "hold" in root.results(), within_s=SETTLED_WITHIN_S, what=log)
    root.publish(VoidRequest(account_id=one, request_key="void", hold="hold").encode())
    done = {it.request_key for it in moved} | {"void"}

    def completed() -> bool:
        rows = table(root.engine, "api_idempotency_requests")
        return done <= {it["request_key"] for it in rows if it["status"] == "completed"}

    wait_for(completed, within_s=SETTLED_WITHIN_S, what=lambda: f"{root.results()}\n{log()[-3000:]}")


def _publish_late(users: Users, manifest: Any) -> None:
    manifest.write_text(
        MANIFEST.replace('"rich"', '"late"').replace(", codes = true", "").replace(NO_CODES_LEFT, 'code = "coupon"\n')
    )
    with users.shell("operator") as tombola:
        tombola("campaign", "publish", manifest, "--reason", "late", "--yes")
        tombola("campaign", "open", "late", "--reason", "late")


def _operate(users: Users) -> None:
    """What else operators do, from shells and in the console; the dead letter is parked again at the end."""
    (letter,) = table(users.root.engine, "dead_letters")
    why = ("--reason", "tried out")
    with users.shell("operator") as tombola:
        tombola("webhook", "add", "far", "https://example.com/hook", "--event", "draw.settled", *why)
        tombola("webhook", "rotate", "far", *why)
        tombola("webhook", "remove", "far", *why, "--yes")
        tombola("campaign", "accounts", "add", "vip", 1, 2, *why)
        tombola("campaign", "accounts", "remove", "vip", 1, *why)
        tombola("campaign", "restock", "rich", "phone", 5, *why)
        tombola("dead-letters", "discard", letter["id"], *why, "--yes")
        tombola("dead-letters", "restore", letter["id"], *why, "--yes")
        tombola("dead-letters", "forecast")
        tombola("enqueue", "--account", 1)
    with Console(users.settings("console")) as console, Visitor(console.url) as ann:
        assert ann.log_in("ann").status_code == 303
        for path, form in (
            ("/webhooks/add", {"name": "near", "url": "https://example.com/hook", "events": "draw.settled"}),
            ("/webhooks/near/rotate", {}),
            ("/webhooks/near/remove", {}),
            ("/campaigns/rich/pause", {}),
            ("/campaigns/rich/open", {}),
            ("/campaigns/rich/restock", {"prize": "phone", "units": "5"}),
            (f"/dead-letters/{letter['id']}/discard", {}),
            (f"/dead-letters/{letter['id']}/restore", {}),
        ):
            assert ann.submit(path, form | {"reason": "tried out"}).status_code in (200, 303), path
    acts = [(it["operator"], it["action"]) for it in table(users.root.engine, "operator_actions")]
    by_ann = [action for operator, action in acts if operator == "ann"]
    assert by_ann == [
        *("login", "webhook add", "webhook rotate", "webhook remove", "campaign pause", "campaign open"),
        *("campaign restock", "discard", "restore"),
    ]


def _replay(users: Users) -> None:
    with Console(users.settings("console")) as console, Visitor(console.url) as ann:
        assert ann.log_in("ann").status_code == 303
        for page in ("/", "/dead-letters?state=all", "/campaigns", "/campaigns/rich", "/accounts/1", "/story?q=early"):
            assert ann.get(page).status_code == 200, page
        for page in ("/actions", "/users", "/webhooks", "/fulfilments", "/replays"):
            assert ann.get(page).status_code == 200, page
        started = ann.submit("/replays", {"reason": "it exists now"})
        assert re.fullmatch(r"/replays/\d+", started.headers["location"]), started.headers
        root = users.root
        wait_for(
            lambda: [it["status"] for it in table(root.engine, "replays")] == ["done"],
            within_s=SETTLED_WITHIN_S,
            what=lambda: str(table(root.engine, "replays")),
        )


def _move(users: Users, accounts: list[int]) -> None:
    """Movements of operators, from a shell and from the console: refunds give stock back, and holds end."""
    first, second, _ = accounts
    rows = table(users.root.engine, "asset_transactions")
    refunded = {row["idempotency_key"].partition(":")[0] for row in rows if row["business_type"] == "refund"}
    won = [row for row in rows if (row["asset_code"], row["delta_amount"]) == ("ITEM.PHONE", 1_00)]
    phone, other, *_ = (row["lottery_session_id"] for row in won if row["lottery_session_id"] not in refunded)
    with users.shell("operator") as tombola:
        tombola("account", "transfer", first, second, "2", "--yes")
        tombola("account", "adjust", first, "-1", "--reason", "a mistake", "--yes")
        for key in ("h1", "h2"):
            tombola("account", "hold", first, "1", "--key", key)
        tombola("account", "post", "h1", "--yes")
        tombola("account", "void", "h2")
        tombola("draw", "refund", phone, "--reason", "a complaint", "--yes")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TOMBOLA_POINTS_VALID_DAYS", "POINT=1")
            assert "expired on 0 of" in tombola("account", "expire")
    with Console(users.settings("console")) as console, Visitor(console.url) as ann:
        assert ann.log_in("ann").status_code == 303
        form = {"session": other, "key": "c1", "policy": "refuse", "reason": "a complaint"}
        ann.submit("/story/refund", form, page=f"/story/refund?session={other}")
        assert "The draw is refunded" in ann.get(f"/story?q={other}").text
        form = {"key": "c2", "amount": "1.00", "reason": "a mistake"}
        ann.submit(f"/accounts/{first}/adjust", form, page=f"/accounts/{first}")
        assert "The balance is adjusted" in ann.get(f"/accounts/{first}").text


def _expire_a_hold(users: Users, account_id: int) -> None:
    with users.shell("operator") as tombola:
        tombola("account", "hold", account_id, "1", "--key", "late")
    users.do("UPDATE account_holds SET expires_at = '2026-01-01' WHERE hold_key = 'late'")
    relay = Relay.from_settings(users.settings("relay"))
    try:
        assert relay.run_once() == 1
    finally:
        relay.close()


def _holds(root: House) -> set[str]:
    return {row["state"] for row in table(root.engine, "account_holds")}


def _housekeep(users: Users) -> None:
    """What relay and beat's tasks do, with the engines of their users."""
    with Receiver() as receiver, users.shell("operator") as tombola:
        tombola("webhook", "add", "shop", receiver.url, "--event", "phone-won", "--reason", "prizes")
        relay = Relay.from_settings(users.settings("relay"))
        assert relay.deliver_once() == len(receiver.received) > 0
        relay.close()
    entry = Entry(users.root.engine, relay_after_s=0)
    for role in ("relay", "worker"):  # with beat, workers relay
        overdue, late = (DrawRequest(account_id=1, request_key=f"{it}-{role}") for it in ("overdue", "late"))
        entry.accept([Submission(overdue), Submission(late)])
        users.do(
            "UPDATE api_idempotency_requests SET accepted_at = accepted_at - INTERVAL 30 DAY "
            f"WHERE request_key = 'late-{role}'"
        )
        relay = Relay.from_settings(users.settings(role))
        try:
            published = relay.run_once()
            assert published == (role == "relay")  # afterwards a message waits in the queue: it overtakes the others
            relay.deliver_once()
        finally:
            relay.close()
        states = {it["request_key"]: it["status"] for it in table(users.root.engine, "api_idempotency_requests")}
        assert states[f"late-{role}"] == "dead"
    entry.close()
    keep_results(users.root.engine)
    engine = open_engine(users.settings("worker").need("database_url"))
    try:
        assert archive_once(engine, older_than_s=-3600) > 0  # as if an hour had passed
        forget_fulfilments(engine, older_than_s=-3600, steps_max=2)
        assert audited(engine, users.root.wheels).obstacles == {}
    finally:
        engine.dispose()


def _seal(users: Users) -> None:
    for role in SEALERS:
        with users.shell("operator") as tombola:
            tombola("account", "recharge", "--account", 1, "--amount", "1")
        engine = open_engine(users.settings(role).need("database_url"))
        wait_for(partial(_seals, engine), within_s=SETTLED_WITHIN_S, what=lambda: "nothing is sealed")
        engine.dispose()


def _seals(engine: Engine) -> bool:
    return seal(engine, after_s=0.1) > 0


def _take_snapshots(users: Users) -> None:
    users.do("UPDATE books_blocks SET sealed_at = sealed_at - INTERVAL 2 DAY")
    for role in SEALERS:
        engine = open_engine(users.settings(role).need("database_url"))
        assert take_once(engine)
        engine.dispose()
        users.do("DELETE FROM books_snapshots")


def assert_drawn(root: House) -> None:
    """Every kind of row was written, so that every right was used."""
    assert {it["taken_by"] is None for it in table(root.engine, "campaign_codes")} == {True, False}
    assert {"ITEM.PHONE", "COUPON.TEN"} <= {it["asset_code"] for it in table(root.engine, "asset_transactions")}
    assert table(root.engine, "campaign_accounts")
    assert [it["state"] for it in table(root.engine, "dead_letters")] == ["settled", "parked", "parked"]


def _doctor_finds_nothing_forbidden(users: Users) -> None:
    for role in ROLES:
        found = {check.name: check for check in examine(users.settings(role))}["privileges"]
        if role == "migrator":
            assert found.status == "warn"
            assert "DELETE asset_transactions" in found.found
            assert "UPDATE operator_actions" in found.found
        else:
            assert found.status == "ok", found


def test_what_a_user_does_not_need_is_refused(users: Users) -> None:
    users.root.accounts(1)
    for role in (it for it in ROLES if it != "migrator"):
        for name in APPEND_ONLY:
            assert users.refused(role, f"DELETE FROM {name} WHERE 1 = 0") in DENIED, (role, name)
            assert users.refused(role, f"TRUNCATE TABLE {name}") in DENIED, (role, name)
        for statement in (
            "UPDATE asset_transactions SET notes = 'x' WHERE 1 = 0",
            "UPDATE asset_transactions SET delta_amount = 1 WHERE 1 = 0",
            "UPDATE operator_actions SET reason = 'x' WHERE 1 = 0",
            "UPDATE books_blocks SET hash = 'x' WHERE 1 = 0",
            "UPDATE api_idempotency_requests SET account_id = 1 WHERE 1 = 0",
            "DELETE FROM api_idempotency_requests WHERE 1 = 0",
            "DELETE FROM account_asset_balances WHERE 1 = 0",
            "UPDATE account_asset_balances SET user_id = 1 WHERE 1 = 0",
            "ALTER TABLE asset_transactions ADD COLUMN x INT",
            "DROP TABLE operator_actions",
            "CREATE TABLE x (x INT)",
            "CREATE TRIGGER x BEFORE INSERT ON asset_transactions FOR EACH ROW SET NEW.notes = 'x'",
        ):
            assert users.refused(role, statement) in (*DENIED, 1044), (role, statement)
    raise_balance = "UPDATE account_asset_balances SET balance = 1000000 WHERE 1 = 0"
    moved = [role for role in ROLES if users.refused(role, raise_balance) == 0]
    assert moved == ["worker", "console", "operator", "migrator"]
    posted = "INSERT INTO asset_transactions (transaction_id) SELECT 1 FROM account_asset_balances WHERE 1 = 0"
    for role in ("gateway", "relay", "auditor"):
        assert users.refused(cast(Role, role), posted) in DENIED
    for role, secret in (
        ("worker", "SELECT secret_sha256 FROM api_keys"),
        ("worker", "SELECT password_hash FROM operators"),
        ("gateway", "SELECT secret FROM webhooks"),
        ("gateway", "SELECT password_hash FROM operators"),
        ("relay", "SELECT secret_sha256 FROM api_keys"),
        ("console", "SELECT secret_sha256 FROM api_keys"),
        ("auditor", "SELECT secret_sha256 FROM api_keys"),
        ("auditor", "SELECT secret FROM webhooks"),
    ):
        assert users.refused(cast(Role, role), secret) in DENIED, (role, secret)


def test_a_user_without_update_may_lock_what_it_must_lock(users: Users) -> None:
    """On MySQL that takes LOCK TABLES: `tombola grants --server mysql`."""
    (account,) = users.root.accounts(1)
    engine = open_engine(users.settings("worker").need("database_url"), lock_wait_s=1)
    asked = DrawRequest(account_id=account, request_key="held")
    with transaction(engine) as probe:
        assert busy(probe, [asked]) == set()
    with transaction(users.root.engine) as holding, transaction(engine) as probe:
        holding.select("SELECT 1 FROM asset_transactions WHERE account_id IN (??)", [account], lock=True)
        held = f"SELECT idempotency_key FROM asset_transactions WHERE account_id = {account}"
        with users.root.engine.connect() as connection:
            (key,) = connection.execute(text(held)).scalars()
        assert probe.held("asset_transactions", "uk_idempotency_key", "idempotency_key", [key]) == {key}
    engine.dispose()


def test_a_legacy_ledger_is_never_overlooked(users: Users) -> None:
    """A user who cannot read legacy_migration sees that it exists: a worker refuses to start, and charges nothing."""
    engine = open_engine(users.settings("worker").need("database_url"))
    assert not holds_old_rows(engine)
    users.do("CREATE TABLE legacy_migration (step VARCHAR(32) NOT NULL, status VARCHAR(16) NOT NULL)")
    assert holds_old_rows(engine)
    engine.dispose()
    failed = processes.failed_start(users.env("worker"))
    assert failed.returncode != 0
    assert "legacy_migration" in failed.stderr + failed.stdout


def test_the_doctor_warns_of_one_column_as_well(users: Users) -> None:
    users.do(f"GRANT UPDATE (notes) ON `{users.root.engine.url.database}`.asset_transactions TO 'tombola_relay'@'%'")
    found = {check.name: check for check in examine(users.settings("relay"))}["privileges"]
    assert found.status == "warn"
    assert "may UPDATE (notes) asset_transactions" in found.found
    assert "tombola grants" in found.cure


def test_the_migrator_builds_and_takes_down(mariadb_url: str, redis_url: str) -> None:
    with House(mariadb_url, redis_url, redis_url) as root:
        users = Users(root)
        try:
            engine = open_engine(users.settings("migrator").need("database_url"))
            for name in table_names(root):
                users.do(f"DROP TABLE {name}")
            migrations.upgrade(engine)
            root.accounts(1, balance=5)
            assert_books(root.engine)
            engine.dispose()
        finally:
            for role in ROLES:
                users.do(f"DROP USER 'tombola_{role}'@'%'")


def table_names(root: House) -> list[str]:
    with root.engine.connect() as connection:
        found = connection.execute(text("SHOW TABLES")).scalars().all()
    return sorted(found, key=lambda it: it == "account_asset_balances")  # the ledger refers to it: last
