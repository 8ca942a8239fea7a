"""The rehearsal: settling without locks and without writing, for forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal

from tombola.producers.domain import operations
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.operations.operation import LockedAccount
from tombola.producers.storage import requests
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.ledger import Posting
from tombola.producers.storage.requests import RequestRecord
from tombola.producers.storage.transactions import Transaction
from tombola.worker.campaigns.scene import BatchScene
from tombola.worker.ledger import earlier
from tombola.worker.ledger import post as ledger
from tombola.worker.settle.answers import Answer, Repeat
from tombola.worker.settle.book import Book
from tombola.worker.settle.rules import Rules


class Rehearsal:
    """The transaction's own book, read without locks; its balances run on from batch to batch.

    A dead request counts as accepted, because a replay accepts it again.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._accounts: dict[int, LockedAccount] = {}
        self._seen: dict[str, RequestRecord] = {}
        self._owners: dict[str, str] = {}
        self._charged: dict[str, dict[str, Decimal]] = {}
        self._scene: BatchScene | None = None
        self._made: dict[str, list[Posting]] = {}  # what requests other than draws would have written, by ledger key

    def answers(self, open_transaction: Transaction, draws: Sequence[Request]) -> list[Answer | Repeat]:
        """What `settle_in` would answer. `open_transaction` may be read-only. Raises the driver's errors."""
        if not draws:
            return []
        needs = [operations.operation_of(draw).needs(draw, self._rules.wheels) for draw in draws]
        scene = None
        if self._rules.desk is not None and any(need.campaign for need in needs):
            scene = self._scene = self._scene or BatchScene(self._rules.desk, utc_now(), is_locking=False)
            needs = scene.open(open_transaction, draws, needs)
        rows = earlier.rows_of(open_transaction, (key for need in needs for key in need.rows_of))
        for key in rows:
            rows[key] += self._made.get(key, ())
        needs = earlier.widened(needs, rows)
        unread = {account_id for need in needs for account_id in need.accounts} - self._accounts.keys()
        if unread:
            self._accounts |= ledger.lock_accounts(open_transaction, unread, lock=False)
        known = {
            key: it._replace(status=Status.ACCEPTED, reason=None) if it.status == Status.DEAD else it
            for key, it in requests.look_up(
                open_transaction, [draw.request_key for draw in draws], with_odds=scene is not None
            ).items()
        }
        self._owners |= requests.owners_of_sessions(open_transaction, [draw.lottery_session_id for draw in draws])
        if scene is not None:
            scene.read(draws, self._accounts, known)
            self._accounts |= scene.make_up_accounts(draws)
        book = Book(self._accounts, self._seen | known, self._rules, utc_now(), owners=self._owners, scene=scene)
        book.rows.update(rows)
        book.lifetimes.update(earlier.lifetimes(open_transaction, needs))
        book.read_ledger(open_transaction, draws)
        answers = [book.answer(draw, draw.fingerprint()) for draw in draws]
        self._charged = {}
        owners = {draw.lottery_session_id: draw for draw in draws}
        for it in book.postings:
            owner = owners[it.lottery_session_id]
            if it.delta < 0:
                charged = self._charged.setdefault(owner.request_key, {})
                charged[it.asset_code] = charged.get(it.asset_code, Decimal(0)) - it.delta
            if not isinstance(owner, DrawRequest):
                self._made.setdefault(it.ledger_key, []).append(it)
        # From here on another request under one of these keys is a conflict, as it would be after a commit.
        self._seen |= {it.request.request_key: book.known[it.request.request_key] for it in book.finished}
        return answers

    def charged(self, request_key: str | None) -> Mapping[str, Decimal]:
        """The amounts that the request would be charged, by asset code; empty if it is not in the last batch."""
        return self._charged.get(request_key or "", {})
