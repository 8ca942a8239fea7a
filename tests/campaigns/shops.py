"""A shop with operators' campaigns, without a broker: publish, accept, settle, audit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal

from sqlalchemy import Engine

from tests.audits import audited
from tests.ledgers import migrated
from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.contract import DrawRequest, DrawResult, Request, parse_result
from tombola.producers.domain.draw import wheels
from tombola.producers.entry import Entry
from tombola.producers.storage.campaigns import CampaignState
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.requests import Acceptance, Submission
from tombola.worker.campaigns import versions
from tombola.worker.campaigns.desk import Desk
from tombola.worker.ledger.accounts import open_account
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Answer, Settled
from tombola.worker.settle.rules import Rules

SEED = bytes(range(32))
WHEELS = wheels(SEED)
BY = {"operator": "ann", "reason": "for Monday"}
LOCK_WAIT_S = 10


class Shop:
    """A ledger with campaigns; `engine` is shared by its door and its worker."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.entry = Entry(engine, relay_after_s=60)
        self.desk = Desk(engine, SEED)
        self.rules = Rules(WHEELS, 5, lock_wait_s=LOCK_WAIT_S, desk=self.desk)

    def publish(self, text: str, *, is_open: bool = True) -> Odds:
        """Publish a manifest and open its campaign; the door and the worker see it at once."""
        odds = manifest.parse(text)
        bounds = versions.Bounds(return_max=1_000_000.0)
        versions.publish(self.engine, odds, bounds=bounds, **BY)
        if is_open:
            self.move(odds.name, CampaignState.OPEN)
        self.look()
        return odds

    def move(self, name: str, state: CampaignState) -> None:
        """Open, pause or close a campaign."""
        versions.move(self.engine, name, state, **BY)
        self.look()

    def look(self) -> None:
        """Let the door and the worker see at once what a second would show them."""
        self.entry.campaigns.refresh_now()
        self.desk.campaigns.refresh_now()

    def account(self, balance: str = "1000.00", *, user: int, asset: str = "POINT") -> int:
        """A new account."""
        return open_account(self.engine, user_id=user, asset_code=asset, balance=Decimal(balance))

    def accept(self, *draws: DrawRequest) -> list[Acceptance]:
        """Accept draws as a gateway does; raises for one that is refused."""
        return self.entry.accept([Submission(it) for it in draws])

    def settle(self, *draws: Request) -> list[Answer]:
        """Settle draws, or requests of other kinds, in one batch."""
        return tries.settle(self.engine, draws, self.rules, sleep=lambda _: None)

    def draw(self, *draws: DrawRequest) -> list[DrawResult]:
        """Accept and settle draws in one batch; return their results."""
        self.accept(*draws)
        return self.results(self.settle(*draws))

    def results(self, answers: Iterable[Answer]) -> list[DrawResult]:
        """The results of draws that have settled."""
        found = list(answers)
        assert all(isinstance(it, Settled) for it in found), found
        return [parse_result(it.result) for it in found if isinstance(it, Settled)]

    def violations(self) -> list[str]:
        """What the audit finds."""
        report = audited(self.engine, WHEELS)
        assert not report.obstacles, report.obstacles
        return [str(it) for it in report.violations]


@contextmanager
def open_shop(database: Engine | str, *, balances: bool = True) -> Iterator[Shop]:
    """A shop on a new ledger; the books balance at its end, unless the test says that they do not."""
    engine = open_engine(database, lock_wait_s=LOCK_WAIT_S) if isinstance(database, str) else database
    migrated(engine)
    shop = Shop(engine)
    try:
        yield shop
        found = shop.violations() if balances else []
        assert found == [], found
    finally:
        shop.entry.close()
