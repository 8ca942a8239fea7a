"""What a worker knows of operators' campaigns between its batches: the versions, the seed, the accounts of prizes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Set
from datetime import datetime
from typing import Any, Final

from cachetools import LRUCache
from sqlalchemy import Engine

from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.draw import DrawKey, seed_id_of
from tombola.producers.storage.campaigns import Campaigns, CampaignState
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.faults import is_duplicate_key
from tombola.producers.storage.transactions import Transaction, time_text, transaction

PRIZE_ACCOUNTS_MAX: Final = 100_000  # remembered
TRIES_MAX: Final = 5

Pair = tuple[int, str]  # the account that pays, and the asset of a prize


class Desk:
    """Shared by all lanes of a worker. `seed` is the master seed, None where it is unknown: then no prize is drawn.

    `master_key` is for draws that no epoch binds.
    """

    def __init__(self, engine: Engine, seed: bytes | None) -> None:
        self.seed = seed
        self.master_key = None if seed is None else DrawKey(seed, seed_id_of(seed))
        self.campaigns = Campaigns(engine)
        self._engine = engine
        self._lock = threading.Lock()
        self._accounts: LRUCache[Pair, int] = LRUCache(PRIZE_ACCOUNTS_MAX)
        self._met: dict[str, frozenset[str]] = {}

    def version(self, campaign: str, odds_hash: str | None) -> tuple[Odds, bool] | None:
        """The version of a request: the one that it was accepted under, else the live one; None if there is none.

        The second value says whether the campaign takes requests; accepted ones were taken at the door.
        """
        if odds_hash is not None:
            odds = self.campaigns.version(odds_hash)
            return None if odds is None else (odds, True)
        found = self.campaigns.find(campaign)
        if found is None or found.odds is None:
            return None
        return found.odds, found.state is CampaignState.OPEN

    def asset_codes(self, campaign: str) -> Set[str]:
        """The assets, other than the campaign's own, of the prizes of its live version and of others met so far."""
        found = self.campaigns.find(campaign)
        live = () if found is None or found.odds is None else found.odds.asset_codes
        with self._lock:
            return self._met.get(campaign, frozenset()).union(live)

    def meet(self, odds: Odds) -> None:
        """Remember the assets of a version that is not live: requests that were accepted under it are under way."""
        with self._lock:
            self._met[odds.name] = self._met.get(odds.name, frozenset()).union(odds.asset_codes)

    def prize_accounts(
        self, open_transaction: Transaction, pairs: Iterable[Pair], now: datetime, *, makes: bool = True
    ) -> dict[Pair, int]:
        """The accounts of the users of these accounts in these assets; pairs without a user are not in the result.

        With `makes`, missing accounts are made: in a transaction of their own, as `open_transaction` may hold no lock
        that another batch waits for. SQLite has one writer, so there they are made in `open_transaction`.
        """
        wanted = set(pairs)
        with self._lock:
            found: dict[Pair, int] = {pair: self._accounts[pair] for pair in wanted if pair in self._accounts}
        for _ in range(TRIES_MAX):
            unknown = wanted - found.keys()
            if not unknown:
                break
            known, missing = self._read(open_transaction, unknown)
            found |= known
            if not missing or not makes:
                break
            self._make(open_transaction, missing, now)
        with self._lock:
            self._accounts.update(found)
        return found

    def forget_accounts(self, pairs: Iterable[Pair]) -> None:
        """Read the accounts of these pairs again: they are gone."""
        with self._lock:
            for pair in pairs:
                self._accounts.pop(pair, None)

    def _read(self, transaction: Transaction, pairs: set[Pair]) -> tuple[dict[Pair, int], set[tuple[int, str]]]:
        """The accounts of these pairs, and the users and assets without an account."""
        payers = {payer for payer, _ in pairs}
        rows = _in_chunks(transaction, "SELECT id, user_id FROM account_asset_balances WHERE id IN (??)", payers)
        users: dict[int, int] = dict(rows)
        accounts = {
            (user_id, asset_code): account_id
            for account_id, user_id, asset_code in _in_chunks(
                transaction,
                "SELECT id, user_id, asset_code FROM account_asset_balances WHERE user_id IN (??)",
                set(users.values()),
            )
        }
        wanted = {(payer, asset_code): (users[payer], asset_code) for payer, asset_code in pairs if payer in users}
        known = {pair: accounts[owner] for pair, owner in wanted.items() if owner in accounts}
        return known, set(wanted.values()) - accounts.keys()

    def _make(self, open_transaction: Transaction, owners: set[tuple[int, str]], now: datetime) -> None:
        if open_transaction.is_sqlite:
            _insert(open_transaction, owners, now)
            return
        try:
            with transaction(self._engine) as own:
                _insert(own, owners, now)
        except Exception as error:
            if not is_duplicate_key(error):  # another batch made one of them: read again
                raise


def _in_chunks(transaction: Transaction, statement: str, keys: set[int]) -> list[Any]:
    return [row for some in chunks(sorted(keys)) for row in transaction.select(statement, some)]


def _insert(transaction: Transaction, owners: Iterable[tuple[int, str]], now: datetime) -> None:
    moment, nothing = time_text(now), 0 if transaction.is_sqlite else "0.00"
    transaction.insert(
        "account_asset_balances",
        ("user_id", "asset_code", "balance", "created_at"),
        [(user_id, asset_code, nothing, moment) for user_id, asset_code in sorted(owners)],
        copies={"updated_at": "created_at"},
    )
