"""Draws by campaigns in one batch: what is read before and under the locks, and what is written beside the ledger.

    open ─► (accounts are locked) ─► read ─► decide, keep; decide, keep; … ─► write

`open` finds the accounts of possible prizes, which are locked with the others. `read` finds the version of each draw,
reads standings and lists, and locks stock. `keep` takes over what a draw changes; `write` writes it. All of it
is in the batch's transaction: a draw and its units, counters and codes are committed together, or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from datetime import datetime
from decimal import Decimal
from typing import Final

import msgspec

from tombola.producers.domain.campaigns.drawing import plain_prize
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.campaigns.pulls import NEW, Pulled, Standing, plainly_pulled, pull_all
from tombola.producers.domain.campaigns.scene import Bound
from tombola.producers.domain.campaigns.settling import drawing_of
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.domain.draw import NO_SEEDS, DrawKey, Seeds
from tombola.producers.domain.operations.operation import LockedAccount, Needs, Play
from tombola.producers.storage.faults import RowsChanged
from tombola.producers.storage.requests import RequestRecord
from tombola.producers.storage.transactions import Transaction, WhenHeld, time_text
from tombola.worker.campaigns.desk import Desk, Pair
from tombola.worker.campaigns.units import PrizeName, Units

_ENOUGH: Final = 1 << 62  # units, while it is only counted how many are wanted

_decode = msgspec.json.Decoder(Standing).decode
_encode = msgspec.json.Encoder().encode


class BatchScene:
    """The scene of one batch (producers.domain.campaigns.scene). Without `is_locking` it reads only: for forecasts."""

    def __init__(self, desk: Desk, now: datetime, *, is_locking: bool = True) -> None:
        self._desk = desk
        self._seeds = NO_SEEDS
        self._now = now
        self._is_locking = is_locking
        self._bounds: dict[str, Bound] = {}
        self._versions: dict[tuple[str, str | None], tuple[Odds, bool] | None] = {}  # by campaign and odds hash
        self._asset_codes: dict[str, Set[str]] = {}  # by campaign
        self._foreseen: dict[str, tuple[DrawRequest, Standing, Pulled]] = {}  # by request key
        self._prize_accounts: dict[Pair, int] = {}
        self._accounts: Mapping[int, LockedAccount] = {}
        self._standings: dict[str, Standing] = {}
        self._stored: set[str] = set()  # standing keys with a row
        self._moved: set[str] = set()
        self._lists: dict[str, set[int]] = {}
        self._units = Units(is_locking=is_locking)
        self._pools: dict[PrizeName, list[str]] = {}
        self._handed_out: dict[str, str] = {}  # ledger keys, by code
        self._seen_codes: set[str] = set()

    # ---- before the locks ----

    def open(self, transaction: Transaction, draws: Sequence[Request], needs: Sequence[Needs]) -> list[Needs]:
        """Find the accounts of possible prizes; return the needs with them. A forecast calls it for each part."""
        self._transaction = transaction
        self._asset_codes = {
            campaign: self._desk.asset_codes(campaign) for campaign in {need.campaign for need in needs} if campaign
        }
        if self._desk.seed is None or not any(self._asset_codes.values()):
            return list(needs)
        pairs = {
            (draw.account_id, asset_code)
            for draw, need in zip(draws, needs, strict=True)
            for asset_code in self._asset_codes.get(need.campaign, ())
        }
        found = self._desk.prize_accounts(transaction, pairs, self._now, makes=self._is_locking)
        self._prize_accounts |= found
        return [
            need._replace(
                accounts=(
                    *need.accounts,
                    *(
                        found[pair]
                        for asset_code in self._asset_codes.get(need.campaign, ())
                        if (pair := (draw.account_id, asset_code)) in found
                    ),
                )
            )
            for draw, need in zip(draws, needs, strict=True)
        ]

    # ---- under the locks ----

    def read(
        self,
        draws: Sequence[Request],
        accounts: Mapping[int, LockedAccount],
        known: Mapping[str, RequestRecord],
        seeds: Seeds = NO_SEEDS,
    ) -> None:
        """Read what `draws` depend on. `accounts` are locked; `known` are the draws' own rows, with their odds.
        `seeds` are what they are drawn under.

        Raises RowsChanged when a draw is bound to a version whose prizes go to accounts that are not locked.
        """
        self._accounts = accounts
        self._seeds = seeds
        fresh = [
            (draw, bound)
            for draw in draws
            if isinstance(draw, DrawRequest)
            and ((record := known.get(draw.request_key)) is None or not record.is_settled)
            and (bound := self._bind(draw, record)) is not None
            and draw.account_id in accounts
        ]
        self._read_standings(fresh)
        self._read_lists(fresh)
        self._reserve(fresh)

    def _bind(self, draw: DrawRequest, record: RequestRecord | None) -> Bound | None:
        """The version of a draw; None for a draw of the built-in campaign, and of an unknown one."""
        if draw.campaign not in self._asset_codes:
            return None
        odds_hash = None if record is None else record.odds_hash
        moment = self._now if record is None or record.created_at is None else record.created_at
        key = (draw.campaign, odds_hash)
        if key not in self._versions:
            self._versions[key] = found = self._desk.version(*key)
            if found is not None and not set(found[0].asset_codes) <= self._asset_codes[draw.campaign]:
                self._desk.meet(found[0])
                if self._is_locking:
                    raise RowsChanged(f"a draw of {draw.campaign} is bound to a version with other assets")
        version = self._versions[key]
        if version is None:
            return None
        bound = Bound(version[0], moment, version[1])
        # The first one counts: a later request under the same key is another campaign's, and refused.
        self._bounds.setdefault(draw.request_key, bound)
        return bound

    def _read_standings(self, fresh: Sequence[tuple[DrawRequest, Bound]]) -> None:
        keys = {_standing_key(it.account_id, it.campaign) for it, bound in fresh if bound.odds.has_counters}
        unread = sorted(keys - self._standings.keys())
        if unread:
            statement = "SELECT standing_key, standing FROM campaign_accounts WHERE standing_key IN (??)"
            self._standings |= {key: _decode(text) for key, text in self._transaction.select(statement, unread)}
            self._stored |= self._standings.keys()

    def _read_lists(self, fresh: Sequence[tuple[DrawRequest, Bound]]) -> None:
        asked: dict[str, set[int]] = {}
        for draw, bound in fresh:
            for name in filter(None, (bound.odds.deny, bound.odds.allow)):
                asked.setdefault(name, set()).add(draw.account_id)
        for name, account_ids in asked.items():
            rows = self._transaction.select(
                # A list's name has no quote: producers.domain.campaigns.checks.
                f"SELECT account_id FROM account_lists WHERE account_id IN (??) AND name = '{name}'",
                sorted(account_ids),
            )
            self._lists.setdefault(name, set()).update(account_id for (account_id,) in rows)

    def _reserve(self, fresh: Sequence[tuple[DrawRequest, Bound]]) -> None:
        """Lock the stock that these draws want if all of them draw, and if there is enough for all."""
        if self._desk.seed is None:
            return
        wanted: Counter[PrizeName] = Counter()
        standings: dict[str, Standing] = {}
        for draw, (odds, moment, is_open) in fresh:
            pulls = draw.pulls or 1
            if not odds.has_stock or not is_open or pulls not in odds.cost:
                continue
            key = self.draw_key(draw.request_key, odds.name)
            assert key is not None
            if pulls == 1 and not odds.has_counters:
                nonce = draw.client_nonce.encode()
                pulled = plainly_pulled(plain_prize(key.key, odds, draw.account_id, draw.request_key, nonce))
                self._foreseen[draw.request_key] = (draw, NEW, pulled)
                for code in pulled.taken:
                    wanted[PrizeName(odds.name, code)] += 1
                continue
            name = _standing_key(draw.account_id, odds.name) if odds.has_counters else ""
            standing = (standings.get(name) or self._standings.get(name, NEW)) if name else NEW
            pulled = pull_all(odds, drawing_of(draw, odds, key.key), pulls, standing, moment, lambda _code: _ENOUGH)
            standings[name] = pulled.after
            self._foreseen[draw.request_key] = (draw, standing, pulled)
            for code, units in pulled.taken.items():
                wanted[PrizeName(odds.name, code)] += units
        if wanted:
            self._units.reserve(self._transaction, wanted)

    # ---- for decisions (producers.domain.campaigns.scene) ----

    def draw_key(self, request_key: str, campaign: str) -> DrawKey | None:
        seed = self._seeds.others.get(request_key, self._seeds.of_now)
        return self._desk.master_key if seed is None else seed.key_of(campaign)

    def bound(self, request_key: str, campaign: str) -> Bound | None:
        found = self._bounds.get(request_key)
        return found if found is None or found.odds.name == campaign else None

    def standing(self, account_id: int, campaign: str) -> Standing:
        return self._standings.get(_standing_key(account_id, campaign), NEW) if self._standings else NEW

    def foreseen(self, request: DrawRequest, standing: Standing) -> Pulled | None:
        found = self._foreseen.get(request.request_key)
        # Another request under the same key, which is refused, draws something else.
        if found is None or (found[0] is not request and found[0] != request):
            return None
        if found[1] is not standing and found[1] != standing:
            return None
        name, pulled = self._bounds[request.request_key].odds.name, found[2]
        for code, units in pulled.taken.items():
            if self.units(name, code) < units:
                return None
        return pulled

    def is_listed(self, name: str, account_id: int) -> bool:
        return account_id in self._lists.get(name, ())

    def units(self, campaign: str, code: str) -> int:
        return self._units.left(self._transaction, PrizeName(campaign, code))

    def prize_account(self, account_id: int, asset_code: str) -> int:
        """As the protocol says. Raises RowsChanged for an account that is gone since it was looked up."""
        pair = (account_id, asset_code)
        found = self._prize_accounts.get(pair)
        if found is None or found not in self._accounts:
            self._desk.forget_accounts([pair])
            raise RowsChanged(f"account {account_id} has no account for prizes in {asset_code}")
        return found

    def codes(self, campaign: str, code: str, count: int) -> Sequence[str]:
        """As the protocol says. Raises RowsChanged where other batches hold too many codes of the pool."""
        prize = PrizeName(campaign, code)
        pool = self._pools.setdefault(prize, [])
        if len(pool) < count:
            limit = len(self._seen_codes) + count
            rows = self._transaction.select(
                f"SELECT code FROM campaign_codes WHERE campaign IN (??) AND prize = '{code}' AND taken_by IS NULL "
                f"LIMIT {limit}",
                [campaign],
                lock=self._is_locking,
                when_held=WhenHeld.SKIP,
            )
            new = [it for (it,) in rows if it not in self._seen_codes]
            self._seen_codes.update(new)
            pool += new
        if len(pool) < count:
            raise RowsChanged(f"the pool of prize {code} of {campaign} has fewer codes than units")
        return [pool.pop() for _ in range(count)]

    # ---- what draws change ----

    def keep(self, draw: Request, play: Play) -> None:
        """Take over what a draw that settles changes. Raises RowsChanged where its units are gone."""
        if play.pulled is None:
            return
        for code, units in play.pulled.taken.items():
            if units:
                self._units.take(self._transaction, PrizeName(play.campaign, code), units)
        if play.has_counters:
            key = _standing_key(draw.account_id, play.campaign)
            self._standings[key] = play.pulled.after
            self._moved.add(key)
        if play.codes:
            self._handed_out |= play.codes

    def write(self) -> None:
        """Write counters, codes and stock: a statement each, two for counters of accounts that are new.

        Raises RowsChanged where units were taken by other batches meanwhile.
        """
        transaction, moment = self._transaction, time_text(self._now)
        rows = [(key, _encode(self._standings[key]).decode()) for key in sorted(self._moved)]
        transaction.insert(
            "campaign_accounts",
            ("standing_key", "standing", "account_id", "campaign", "updated_at"),
            [(key, text, *_parts(key), moment) for key, text in rows if key not in self._stored],
        )
        transaction.update(
            "campaign_accounts",
            "standing_key",
            ("standing", "updated_at"),
            [(key, text, moment) for key, text in rows if key in self._stored],
        )
        transaction.update("campaign_codes", "code", ("taken_by",), sorted(self._handed_out.items()))
        self._units.write(transaction)

    def make_up_accounts(self, draws: Sequence[Request]) -> dict[int, LockedAccount]:
        """For a forecast: accounts of prizes that do not exist yet, under negative ids."""
        made: dict[int, LockedAccount] = {}
        for draw in draws:
            bound = self._bounds.get(draw.request_key)
            for asset_code in () if bound is None else bound.odds.asset_codes:
                pair = (draw.account_id, asset_code)
                if pair not in self._prize_accounts:
                    self._prize_accounts[pair] = -1 - len(self._prize_accounts)
                    made[self._prize_accounts[pair]] = LockedAccount(asset_code, Decimal("0.00"))
        return made


def _standing_key(account_id: int, campaign: str) -> str:
    return f"{account_id}/{campaign}"


def _parts(key: str) -> tuple[int, str]:
    account_id, _, campaign = key.partition("/")
    return int(account_id), campaign
