"""Open an account, with what it is given at its opening: the account and an accepted recharge, in one transaction.

A user has one account of an asset. So an opening needs no key of its own: a repeat finds the account. The recharge has
a request key, and belongs to the opening alone: an account that exists is given nothing by another one.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Final, NamedTuple

from sqlalchemy import Connection

from tombola.producers.domain.errors import DrawError, IdempotencyKeyReused
from tombola.producers.domain.money import parse_amount
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.entry import Entry
from tombola.producers.storage import accounts, clock
from tombola.producers.storage.faults import explain
from tombola.producers.storage.requests import Acceptance, Submission
from tombola.producers.storage.transactions import again_after_conflicts

TRIES_MAX: Final = 5


class Opening(NamedTuple):
    """An account to open for a user; `amount` is text with up to two decimals. An empty `key` is made."""

    user_id: int
    asset_code: str
    amount: str | Decimal = "0"
    key: str = ""
    reference: str = ""
    caller: str = ""

    def check(self) -> None:
        """Raise InvalidRequest if it cannot be opened, whatever the database has."""
        accounts.check_owner(self.user_id, self.asset_code)
        if self.has_amount:
            self.recharge(1)

    @property
    def has_amount(self) -> bool:
        """Whether the account is given something. Raises InvalidRequest for what is no amount."""
        return self.amount not in ("0", "0.0", "0.00", Decimal(0)) and bool(parse_amount(self.amount))

    def recharge(self, account_id: int) -> Submission:
        """The request that gives the account its amount. Raises InvalidRequest or InvalidKey."""
        request = RechargeRequest(
            account_id=account_id,
            request_key=self.key,
            amount=str(parse_amount(self.amount)),
            reference=self.reference,
        )
        return Submission(request, self.caller)


class Opened(NamedTuple):
    """The account. `recharge` is the answer to its recharge: None without one, and where another opening came first."""

    account_id: int
    is_new: bool
    recharge: Acceptance | None = None


def open_account(entry: Entry, opening: Opening) -> Opened:
    """Open an account in a transaction of its own. The calling code publishes a new recharge once, now.

    Raises InvalidRequest or InvalidKey; IdempotencyKeyReused if the key belongs to another request; ServiceUnavailable
    or ConfigurationError when the database cannot be used: the same call again finds out what has happened.
    """
    try:
        return again_after_conflicts(
            entry.engine,
            lambda connection: open_account_in(entry, connection, opening, is_published=True),
            tries_max=TRIES_MAX,
        )
    except DrawError:
        raise
    except Exception as error:
        raise explain(error) from error


def open_account_in(entry: Entry, connection: Connection, opening: Opening, *, is_published: bool = False) -> Opened:
    """Open an account inside a transaction of the application; the relay publishes its recharge after the commit.

    Raises what `open_account` raises, before anything is written but for IdempotencyKeyReused, and the driver's errors:
    after one of these the application must roll its transaction back.
    """
    opening.check()
    account_id = accounts.find_id(connection, opening.user_id, opening.asset_code)
    is_new = account_id is None
    if account_id is None:
        account_id = accounts.insert_empty(connection, opening.user_id, opening.asset_code, clock.now(connection))
    if not opening.has_amount:
        return Opened(account_id, is_new)
    asked = opening.recharge(account_id)
    if is_new:
        answer: Acceptance | None = entry.accept_with(connection, asked, is_published=is_published)
    else:
        answer = entry.find_known(asked, connection=connection)
    if answer is not None and answer.is_conflict:
        raise IdempotencyKeyReused
    return Opened(account_id, is_new, answer)
