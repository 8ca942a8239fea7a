"""Opening an account: one transaction with its first recharge, and with its row in the record of actions.

An act under a key happens once. So the caller who has lost the outcome repeats the act, and gets it.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Engine, func, insert, select, update

from tombola.producers.domain import keys
from tombola.producers.domain.errors import IdempotencyKeyReused, InvalidRequest
from tombola.producers.domain.money import AMOUNT_MAX, CENT
from tombola.producers.domain.operations.recharge import RECHARGE
from tombola.producers.storage import clock
from tombola.producers.storage.accounts import check_asset_code, insert_empty
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.operators import actions
from tombola.worker.operators.once import once

# The type in the derived key of an opening's ledger row. No request's row has this type.
OPENING_TYPE: Final = "opening"
# The names of the acts on record, and the notes of ledger rows that are on record: older releases left notes empty.
ACCOUNT_ADD: Final = "account add"
ACCOUNT_RECHARGE: Final = "account recharge"
ON_RECORD: Final = "on record"


class Opened(NamedTuple):
    """The outcome of an opening, also when it was made earlier. `balance` is what the account began with."""

    account_id: int
    user_id: int
    asset_code: str
    balance: Decimal
    is_repeat: bool = False


def add(
    engine: Engine,
    *,
    user_id: int | None = None,
    asset_code: str = "POINT",
    balance: Decimal = Decimal(0),
    key: str | None = None,
    by: str | None = None,
    reason: str = "",
) -> Opened:
    """Open an account and recharge it with `balance`, in one transaction: the account's chain begins at zero.

    `user_id` None takes the next free number. With a `key`, the opening has a ledger row whatever the balance, and a
    repeat changes nothing and gets the first outcome. `by` is the operator, for the record. Raises InvalidRequest for
    an invalid asset code or balance, or if the user has an account in this asset; IdempotencyKeyReused if the key
    belongs to another opening; ServiceUnavailable or ConfigurationError when the database cannot be used: then the same
    call with the same key finds out what has happened.
    """
    check_asset_code(asset_code)
    if balance:
        _check_amount(balance)
    row_key = None if key is None else keys.derive(key, OPENING_TYPE)

    def act(connection: Connection) -> Opened:
        if row_key is not None and (known := _row_of(connection, row_key)) is not None:
            account = connection.execute(select(accounts).where(accounts.c.id == known.account_id)).one()
            asked = (account.user_id if user_id is None else user_id, asset_code, balance)
            if (account.user_id, known.asset_code, known.delta_amount) != asked:
                raise _is_reused(key)
            return Opened(account.id, account.user_id, known.asset_code, known.delta_amount, is_repeat=True)
        user = user_id or (connection.execute(select(func.max(accounts.c.user_id))).scalar_one() or 0) + 1
        mine = (accounts.c.user_id == user) & (accounts.c.asset_code == asset_code)
        if user_id is not None and connection.execute(select(accounts.c.id).where(mine)).first() is not None:
            raise InvalidRequest(f"user {user} has a {asset_code} account already")
        insert_empty(connection, user, asset_code, clock.now(connection))
        account = connection.execute(select(accounts).where(mine)).one()
        opening_key = row_key or (keys.make_standalone_key(RECHARGE, account.id) if balance else None)
        if opening_key is not None:
            _pay_in(connection, account, balance, opening_key, by=by)
        _record(connection, ACCOUNT_ADD, by, reason, _details(account.id, opening_key, balance) | {"user_id": user})
        return Opened(account.id, user, asset_code, balance)

    return once(engine, act)


def open_account(engine: Engine, *, user_id: int, asset_code: str = "POINT", balance: Decimal = Decimal(0)) -> int:
    """Open an account as `add` does, without a record; return its id."""
    return add(engine, user_id=user_id, asset_code=asset_code, balance=balance).account_id


def _check_amount(amount: Decimal) -> None:
    if not 0 < amount <= AMOUNT_MAX or amount != amount.quantize(CENT):
        raise InvalidRequest(f"an amount is above 0, at most {AMOUNT_MAX:,} and has two decimals at most: {amount}")


def _row_of(connection: Connection, row_key: str) -> Any:
    """The ledger row under this key, or None."""
    return connection.execute(select(transactions).where(transactions.c.idempotency_key == row_key)).first()


def _is_reused(key: str | None) -> IdempotencyKeyReused:
    return IdempotencyKeyReused(f"the key {key} was used for another act: nothing is changed")


def _pay_in(connection: Connection, account: Any, amount: Decimal, row_key: str, *, by: str | None) -> Decimal:
    """Post a recharge of a locked account and move its balance; return the new balance."""
    after: Decimal = account.balance + amount
    if after > AMOUNT_MAX:
        raise InvalidRequest(f"account {account.id} would hold more than {AMOUNT_MAX:,}")
    now = clock.now(connection)
    connection.execute(
        insert(transactions).values(
            account_id=account.id,
            business_id=row_key,
            lottery_session_id=row_key,
            idempotency_key=row_key,
            business_type=RECHARGE,
            asset_code=account.asset_code,
            delta_amount=amount,
            balance_before=account.balance,
            balance_after=after,
            notes=None if by is None else ON_RECORD,
            created_at=now,
            updated_at=now,
        )
    )
    connection.execute(update(accounts).where(accounts.c.id == account.id).values(balance=after, updated_at=now))
    return after


def _details(account_id: int, row_key: str | None, amount: Decimal) -> dict[str, Any]:
    return {"account_id": account_id, "key": row_key, "amount": f"{amount:.2f}"}


def _record(connection: Connection, action: str, by: str | None, reason: str, details: dict[str, Any]) -> None:
    if by is not None:
        actions.record(connection, operator=by, action=action, reason=reason, count=1, details=details)
