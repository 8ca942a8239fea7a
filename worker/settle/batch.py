"""THE transaction: settle a batch of draws so that each is charged once, however often it is delivered.

    lock the accounts ─► read what is settled ─► decide ─► post ─► move balances ─► finish requests ─► commit

Draws by operators' campaigns also read and write their stock, counters and codes there (worker.campaigns.scene).
Requests of other kinds may read rows of earlier requests (worker.ledger.earlier), and change holds and stock
(worker.ledger.changes).

Results are put after the commit, and messages acked after that (worker.settle.consumer). What a request needs, does and
answers is said by its operation (producers.domain.operations); nearly all requests are draws, and called so below. One
request key belongs to one account, so two deliveries of a request meet at that account's lock, and the second delivery
finds the first one's row. The unique constraints on `idempotency_key` and `request_key` prove this: when a constraint
objects, the whole transaction runs again (worker.settle.tries).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from datetime import datetime
from types import MappingProxyType
from typing import Final, NamedTuple

from tombola.producers.domain import operations
from tombola.producers.domain.contract import Request
from tombola.producers.storage import requests
from tombola.producers.storage.transactions import Transaction
from tombola.worker.campaigns.scene import BatchScene
from tombola.worker.fulfilments import subscriptions
from tombola.worker.ledger import changes, earlier
from tombola.worker.ledger import post as ledger
from tombola.worker.seeds.binding import UNBOUND
from tombola.worker.settle.answers import Answer, Deferred, Repeat
from tombola.worker.settle.book import Book
from tombola.worker.settle.rules import Rules


class Handling(NamedTuple):
    """For the record: the worker that settles, and the delivery counts above 1, by request key."""

    by: str | None = None
    redelivered: Mapping[str, int] = MappingProxyType({})


UNTOLD: Final = Handling()


def settle_in(
    open_transaction: Transaction,
    draws: Sequence[Request],
    rules: Rules,
    now: datetime,
    handling: Handling = UNTOLD,
    *,
    has_patience: bool = True,
    is_careful: bool = False,
) -> list[Answer | Repeat]:
    """Settle `draws` inside `open_transaction`; return an answer for each, in their order.

    The caller commits; nothing is visible before that. With `has_patience`, raises the driver's error when the accounts
    cannot be locked within `rules.lock_wait_s`; without, draws of accounts that another transaction holds are deferred.
    When a draw names the lottery session of another request, the insert raises; with `is_careful` the draw is refused.
    """
    # Before the locks: what is computed here keeps no other transaction waiting.
    fingerprints = [draw.fingerprint() for draw in draws]
    needs = [operations.operation_of(draw).needs(draw, rules.wheels) for draw in draws]
    scene = None
    if rules.desk is not None and any(need.campaign for need in needs):
        scene = BatchScene(rules.desk, now)
        needs = scene.open(open_transaction, draws, needs)
    reads_earlier = earlier.is_asked(needs)
    if reads_earlier:
        needs = earlier.widened(needs, earlier.rows_of(open_transaction, (key for it in needs for key in it.rows_of)))
    account_ids = {account_id for need in needs for account_id in need.accounts}

    held: Set[int] = frozenset()
    if has_patience:
        accounts = ledger.lock_accounts(open_transaction, account_ids, wait_s_max=rules.lock_wait_s)
    else:
        accounts, held = ledger.lock_free_accounts(open_transaction, account_ids)
    free = [draw for draw, need in zip(draws, needs, strict=True) if held.isdisjoint(need.accounts)] if held else draws
    if not free:
        return [_account_held(draw) for draw in draws]

    # Read under the locks: what another worker has settled is visible from here on, and cannot change any more.
    known = requests.look_up(open_transaction, [draw.request_key for draw in free], with_odds=scene is not None)
    bound = UNBOUND if rules.seeds is None else rules.seeds.bind(open_transaction, free, known, now)
    if scene is not None:
        drawn = [it for it in free if it.request_key not in bound.seedless] if bound.seedless else free
        scene.read(drawn, accounts, known, bound.seeds)
    book = Book(accounts, known, rules, now, handling.redelivered, scene=scene, bound=bound)
    has_listeners = rules.subscriptions is not None and not rules.subscriptions.is_empty
    book.subscriptions = rules.subscriptions if has_listeners or scene is not None else None
    if is_careful:
        book.owners = requests.owners_of_sessions(open_transaction, [draw.lottery_session_id for draw in free])
    book.read_ledger(open_transaction, free)
    if reads_earlier:
        book.read_earlier(open_transaction, needs)

    answers = [
        book.answer(draw, fingerprint) if held.isdisjoint(need.accounts) else _account_held(draw)
        for draw, need, fingerprint in zip(draws, needs, fingerprints, strict=True)
    ]
    ledger.post(open_transaction, book.postings, now)
    ledger.move(open_transaction, book.moved, now)
    subscriptions.insert(open_transaction, book.fulfilments, now)
    requests.finish(open_transaction, book.finished, now, settled_by=handling.by)
    changes.write(open_transaction, book.changes, now)
    if scene is not None:
        scene.write()  # last: stock is what batches of all accounts share
    return answers


def _account_held(draw: Request) -> Deferred:
    return Deferred(draw, "another transaction holds its account", is_account_held=True)
