"""Points expire by month: those earned longer than their validity before the month begins, and not spent.

    expire(engine, Expiry("POINT", Month.parse("2026-11"), valid_days=365), by="tombola.expire")

The moment until which points must have been earned follows from month and validity, not from the clock of the run; so
does the key of each account's request, and a run that is repeated takes nothing again.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple, Self

import msgspec
from sqlalchemy import Connection, Engine, select

from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import parse_movement_result
from tombola.producers.domain.errors import InternalError, InvalidKey, InvalidRequest
from tombola.producers.domain.keys import EXPIRY_PREFIX, check_request_key
from tombola.producers.domain.operations.expire import ExpireRequest, due_of
from tombola.producers.domain.operations.operation import Needs
from tombola.producers.storage import clock
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import operator_actions
from tombola.producers.storage.transactions import Transaction, transaction
from tombola.producers.telemetry.fields import about
from tombola.worker.ledger import earlier
from tombola.worker.ledger.post import lock_accounts
from tombola.worker.movements.settling import movement_rules
from tombola.worker.operators import actions
from tombola.worker.operators.once import explained, once
from tombola.worker.settle.answers import Answer, Deferred, Refused, Repeat, Settled
from tombola.worker.settle.batch import Handling, settle_in
from tombola.worker.settle.rules import Rules

log = logging.getLogger(__name__)

ACCOUNTS_MAX: Final = 500  # looked at in one transaction
BATCH_MAX: Final = 50  # settled in one: under their locks, all rows of these accounts are added up
ASSET_HASH_LENGTH: Final = 16
ACT: Final = "account expire"  # on record

_is_month = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])").fullmatch


class Month(NamedTuple):
    """A calendar month in UTC."""

    year: int
    month: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The month of `2026-11`. Raises InvalidRequest for any other text."""
        match = _is_month(text)
        if match is None or match[1] < "1970":
            raise InvalidRequest(f"a month is written as 2026-11, not {text!r:.40}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, moment: datetime) -> Self:
        """The month of this moment."""
        in_utc = moment.astimezone(UTC)
        return cls(in_utc.year, in_utc.month)

    @property
    def begins(self) -> datetime:
        return datetime(self.year, self.month, 1, tzinfo=UTC)

    def __str__(self) -> str:
        return f"{self.year:04d}-{self.month:02d}"


class Expiry(NamedTuple):
    """One month's expiry of one asset, whose points are valid for `valid_days`."""

    asset_code: str
    month: Month
    valid_days: int

    @property
    def until(self) -> datetime:
        """Points that were earned before this moment, and not spent, expire."""
        return self.month.begins - timedelta(days=self.valid_days)

    def request(self, account_id: int) -> ExpireRequest:
        """The request that takes what is due from an account: in one month always the same one."""
        key = self._key(self.asset_code, account_id)
        try:
            check_request_key(key)
        except InvalidKey:  # too long
            key = self._key(hashlib.sha256(self.asset_code.encode()).hexdigest()[:ASSET_HASH_LENGTH], account_id)
        return ExpireRequest(account_id=account_id, request_key=key, until=self.until.isoformat())

    def _key(self, asset: str, account_id: int) -> str:
        return f"{EXPIRY_PREFIX}{asset}-{account_id}-{self.month.year:04d}{self.month.month:02d}"


@dataclass(slots=True)
class Expired:
    """What a run has done so far, by numbers of accounts; `amount` is the sum of what has expired, or would.

    `repeated` had settled under this month's key before. `held`: another transaction held the account; a later run
    takes what is due. `refused`: the month's key belongs to a request with another validity, or the database refuses
    the row; the log says which. `after_id` is the last account of the last whole page; `is_through` says that all
    accounts were looked at.
    """

    looked_at: int = 0
    due: int = 0
    expired: int = 0
    amount: Decimal = field(default_factory=Decimal)
    repeated: int = 0
    held: int = 0
    refused: int = 0
    after_id: int = 0
    is_through: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left for a later run."""
        return self.is_through and not self.held


def expire(
    engine: Engine,
    expiry: Expiry,
    *,
    by: str,
    reason: str = "",
    begin: Expired | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Expired], None] = lambda _: None,
) -> Expired:
    """Take what is due in this month from all accounts of the asset, and put the run on record.

    `begin` is where an earlier run was stopped. `is_stopped` is asked between pages of accounts: then the run ends
    early. Raises InvalidRequest before the month has begun; ServiceUnavailable or ConfigurationError when the database
    cannot be used: what has expired until then is kept, and the run is not on record.
    """
    done = begin or Expired()
    rules = movement_rules(engine)
    for due in _pages(engine, expiry, done, is_stopped):
        for some in chunks([request for request, _ in due], BATCH_MAX):
            for answer in _settle(engine, some, rules, by):
                _count(done, answer)
        on_progress(done)
    _record(engine, expiry, done, by=by, reason=reason)
    return done


def foretell(
    engine: Engine,
    expiry: Expiry,
    *,
    is_stopped: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Expired], None] = lambda _: None,
) -> Expired:
    """What `expire` would take now: `due` and `amount`. Writes nothing."""
    done = Expired()
    for due in _pages(engine, expiry, done, is_stopped):
        done.amount += sum((amount for _, amount in due), Decimal(0))
        on_progress(done)
    return done


def go_on(engine: Engine, asset_code: str, valid_days: int, *, by: str, time_s_max: float) -> Expired | None:
    """Expire the present month's points where the last run on record ended, for up to `time_s_max`.

    None where a run on record was whole. Raises as `expire` does.
    """
    ends_at = time.monotonic() + time_s_max
    with explained(), engine.connect().execution_options(read_only=True) as connection:
        expiry = Expiry(asset_code, Month.of(clock.now(connection)), valid_days)
        last = _last_on_record(connection, expiry)
    is_through, held = last.get("is_through", True), last.get("held", 0)
    if last and is_through and not held:
        return None
    # What was held before the stop is looked at again once all other accounts were.
    begin = Expired() if is_through else Expired(after_id=last["after_id"], held=held)
    return expire(engine, expiry, by=by, begin=begin, is_stopped=lambda: time.monotonic() >= ends_at)


# ---- what is due -----------------------------------------------------------------------------------------------------

Due = tuple[ExpireRequest, Decimal]  # and the amount


def _pages(engine: Engine, expiry: Expiry, done: Expired, is_stopped: Callable[[], bool]) -> Iterator[list[Due]]:
    """What is due, by pages of accounts, each read without locks. Counts in `done` what it looks at."""
    with explained(), engine.connect().execution_options(read_only=True) as connection:
        now = clock.now(connection)
    if now < expiry.month.begins:
        raise InvalidRequest(f"points of {expiry.month} are not due before {expiry.month.begins:%Y-%m-%d}")
    while not is_stopped():
        with explained():
            ids = _accounts(engine, expiry.asset_code, done.after_id)
            due = _due(engine, expiry, ids) if ids else []
        done.looked_at += len(ids)
        done.due += len(due)
        if due:
            yield due
        if len(ids) < ACCOUNTS_MAX:
            done.is_through = True
            return
        done.after_id = ids[-1]


def _accounts(engine: Engine, asset_code: str, after_id: int) -> list[int]:
    with engine.connect().execution_options(read_only=True) as connection:
        found = connection.execute(
            select(accounts.c.id)
            .where(accounts.c.id > after_id, accounts.c.asset_code == asset_code, accounts.c.balance > 0)
            .order_by(accounts.c.id)
            .limit(ACCOUNTS_MAX)
        )
        return list(found.scalars())


def _due(engine: Engine, expiry: Expiry, ids: Sequence[int]) -> list[Due]:
    found: list[Due] = []
    requests = {account_id: expiry.request(account_id) for account_id in ids}
    until = requests[ids[0]].stored_until
    with transaction(engine, read_only=True) as reading:
        lifetimes = earlier.lifetimes(reading, [Needs((account_id,), earned_until=until) for account_id in ids])
        balances = lock_accounts(reading, ids, lock=False)
    for account_id, account in balances.items():
        amount = due_of(lifetimes[account_id, until], account.balance)
        if amount:
            found.append((requests[account_id], amount))
    return found


# ---- settling --------------------------------------------------------------------------------------------------------


def _settle(engine: Engine, requests: Sequence[ExpireRequest], rules: Rules, by: str) -> list[Answer | Repeat]:
    """Settle these in one transaction, without waiting for accounts that others hold.

    Where the database refuses a row, such as by a trigger, they settle one by one.
    """

    def act(connection: Connection) -> list[Answer | Repeat]:
        return settle_in(
            Transaction.joining(connection),
            requests,
            rules,
            clock.now(connection),
            Handling(by),
            has_patience=False,
            is_careful=True,
        )

    try:
        return once(engine, act)
    except InternalError as error:
        if len(requests) == 1:
            return [Refused(requests[0], Cause.FAILED_ALONE, str(error), error)]
        return [answer for it in requests for answer in _settle(engine, [it], rules, by)]


def _count(done: Expired, answer: Answer | Repeat) -> None:
    if isinstance(answer, Deferred):
        done.held += 1
    elif isinstance(answer, Repeat):
        done.repeated += 1
    elif not isinstance(answer, Settled):
        done.refused += 1
        log.error("account %d: %s", answer.request.account_id, answer.error, extra=about(answer.request))
    elif answer.is_repeat:
        done.repeated += 1
    elif not answer.is_rejected:  # spent since it was looked at: nothing is due any more
        (row,) = parse_movement_result(answer.result).transactions
        done.expired += 1
        done.amount -= Decimal(row.delta_amount)


# ---- the record ------------------------------------------------------------------------------------------------------


def _record(engine: Engine, expiry: Expiry, done: Expired, *, by: str, reason: str) -> None:
    details = {
        "asset": expiry.asset_code,
        "month": str(expiry.month),
        "valid_days": expiry.valid_days,
        "until": expiry.until.isoformat(),
        **asdict(done),
        "amount": f"{done.amount:.2f}",
    }
    once(
        engine,
        lambda connection: actions.record(
            connection, operator=by, action=ACT, reason=reason, count=done.expired, details=details
        ),
    )


def _last_on_record(connection: Connection, expiry: Expiry) -> dict[str, Any]:
    """The details of the last run of this asset and month; empty without one."""
    rows = connection.execute(
        select(operator_actions.c.details)
        .where(operator_actions.c.action == ACT, operator_actions.c.at >= expiry.month.begins)
        .order_by(operator_actions.c.id.desc())
    )
    for (text,) in rows:
        details: dict[str, Any] = msgspec.json.decode(text)
        if (details["asset"], details["month"]) == (expiry.asset_code, str(expiry.month)):
            return details
    return {}
