"""Each process seals, or reads the books, with the rights that `tombola grants --sql` gives its user."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import pytest
from sqlalchemy import text

from tests.processes import House
from tests.system.test_grants import DENIED, Users
from tombola.producers.domain.books.checkpoints import PrivateKey
from tombola.producers.storage import books
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.grants import ROLES, Role
from tombola.worker.books import anchors, head, sealing, snapshots
from tombola.worker.books.balance import trial_balance
from tombola.worker.books.standing import standing
from tombola.worker.books.verification import check_blocks
from tombola.worker.ledger import accounts

pytestmark = pytest.mark.process

SEALERS: tuple[Role, ...] = ("worker", "relay", "operator")
READERS: tuple[Role, ...] = ("console", "auditor")


def test_every_role_does_its_part(mariadb_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SEEN_EVERY", timedelta(0))
    key = PrivateKey.make("shop.example/books")
    with House(mariadb_url, redis_url, redis_url) as root:
        users = Users(root)
        try:
            for number, role in enumerate(SEALERS, 1):
                accounts.add(root.engine, user_id=number, balance=Decimal(10))
                engine = open_engine(users.settings(role).need("database_url"))
                assert sealing.seal(engine, after_s=0) == 1, role
                assert anchors.sign_once(engine, key, every_s=0), role
                anchors.remember_anchored(engine)
                users.do("UPDATE books_blocks SET sealed_at = sealed_at - INTERVAL 1 DAY")
                assert snapshots.take_once(engine), role
                engine.dispose()
            for role in READERS:
                engine = open_engine(users.settings(role).need("database_url"))
                assert trial_balance(engine).wrong == []
                assert list(check_blocks(engine)) == []
                with engine.connect().execution_options(read_only=True) as connection:
                    assert standing(connection).blocks == len(SEALERS)
                engine.dispose()
            engine = open_engine(users.settings("gateway").need("database_url"))
            with engine.connect().execution_options(read_only=True) as connection:
                assert books.latest_checkpoint(connection)
            engine.dispose()
            for role in ROLES:
                for table in ("books_blocks", "books_house"):
                    if role != "migrator":
                        assert users.refused(role, f"DELETE FROM {table}") in DENIED
            with root.engine.connect() as connection:
                assert connection.execute(text("SELECT COUNT(*) FROM books_blocks")).scalar_one() == len(SEALERS)
        finally:
            for role in ROLES:
                users.do(f"DROP USER 'tombola_{role}'@'%'")
