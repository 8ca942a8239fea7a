"""Movements by operators: `tombola account recharge`, `transfer`, `adjust`, `hold`, `post`, `void`, `holds`.

Each settles at once, in one transaction with its record, and once under one key (worker.movements.settling).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import typer

from tombola.producers.domain import keys
from tombola.producers.domain.contract import Request
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations.adjust import AdjustRequest
from tombola.producers.domain.operations.hold import VALID_S_DEFAULT, HoldRequest
from tombola.producers.domain.operations.post import PostRequest
from tombola.producers.domain.operations.recharge import RechargeRequest
from tombola.producers.domain.operations.transfer import TransferRequest
from tombola.producers.domain.operations.void import VoidRequest
from tombola.worker.cli.base import (
    AccountOption,
    JsonOption,
    ReasonOption,
    YesOption,
    confirm,
    engine_of,
    out,
    print_json,
    print_table,
    shown,
    under_key,
    when,
)
from tombola.worker.cli.shared_options import Command, options_as
from tombola.worker.movements import finding
from tombola.worker.movements.settling import ACTS, Moved, settle
from tombola.worker.operators.actions import shell_operator

CHANNEL: Final = "shell"
ROWS_MAX: Final = 1000

AccountArgument = Annotated[int, typer.Argument(help="The account's id.", metavar="ID", show_default=False)]
AmountArgument = Annotated[str, typer.Argument(help="The amount, such as 5.00.", metavar="AMOUNT", show_default=False)]
HoldArgument = Annotated[str, typer.Argument(help="The key of the hold.", metavar="HOLD", show_default=False)]


class Asked(NamedTuple):
    """What the commands are asked in common: under which key, why, for what outside, and how to talk."""

    key: str = ""
    reference: str = ""
    reason: str = ""
    is_sure: bool = False
    as_json: bool = False


OPTIONS: Final[dict[str, Any]] = {
    "key": Annotated[
        str | None, typer.Option(help="The same command under the same key has one effect. Default: a new key.")
    ],
    "reference": Annotated[str | None, typer.Option(help="A name outside, such as an order's id: 100 characters.")],
    "reason": Annotated[str | None, typer.Option(help="The reason, for the record of operators' actions.")],
    "is_sure": YesOption,
    "as_json": JsonOption,
}


def asking(*names: str) -> Callable[[Command[None]], Command[None]]:
    """Give a command the OPTIONS of these names, as its argument `asked`."""
    return options_as(
        "asked",
        {name: OPTIONS[name] for name in names},
        lambda given: Asked(**{name: value for name, value in given.items() if value is not None}),
    )


account_commands = typer.Typer()


@account_commands.command("recharge")
@asking("key", "reference", "reason", "as_json")
def account_recharge(
    asked: Asked, account: AccountOption, amount: Annotated[str, typer.Option(help="The amount to add.")]
) -> None:
    """Add to an account's balance, once per key."""

    def request(key: str) -> Request:
        return RechargeRequest(
            account_id=account, request_key=key, amount=amount, reference=asked.reference, channel=CHANNEL
        )

    settle_and_tell(request, asked)


@account_commands.command("transfer")
@asking("key", "reference", "reason", "is_sure", "as_json")
def account_transfer(
    asked: Asked,
    account: Annotated[int, typer.Argument(help="The account that pays.", metavar="FROM", show_default=False)],
    to: Annotated[int, typer.Argument(help="The account that receives.", metavar="TO", show_default=False)],
    amount: AmountArgument,
) -> None:
    """Move an amount to another account of the same asset, once per key."""

    def request(key: str) -> Request:
        return TransferRequest(account_id=account, request_key=key, amount=amount, to=to, reference=asked.reference)

    settle_and_tell(request, asked, question=f"Move {amount} from account {account} to account {to}?")


# So that -5.00 is an argument, and no unknown option.
@account_commands.command("adjust", context_settings={"ignore_unknown_options": True})
@asking("key", "reference", "is_sure", "as_json")
def account_adjust(
    asked: Asked,
    account: AccountArgument,
    amount: Annotated[
        str,
        typer.Argument(help="What to add; below zero, such as -5.00: to take.", metavar="AMOUNT", show_default=False),
    ],
    reason: ReasonOption,
) -> None:
    """Correct a balance, upwards or downwards, once per key. The reason stands in the ledger as well."""

    def request(key: str) -> Request:
        return AdjustRequest(
            account_id=account, request_key=key, amount=amount, reference=asked.reference, reason=reason
        )

    settle_and_tell(
        request, asked._replace(reason=reason), question=f"Change the balance of account {account} by {amount}?"
    )


# ---- holds -----------------------------------------------------------------------------------------------------------


@account_commands.command("hold")
@asking("key", "reference", "reason", "as_json")
def account_hold(
    asked: Asked,
    account: AccountArgument,
    amount: AmountArgument,
    valid_s: Annotated[int, typer.Option(help="Seconds after which an open hold is voided.")] = VALID_S_DEFAULT,
) -> None:
    """Set an amount aside for a trade, once per key. The key is the name of the hold."""

    def request(key: str) -> Request:
        return HoldRequest(
            account_id=account, request_key=key, amount=amount, valid_s=valid_s, reference=asked.reference
        )

    settle_and_tell(request, asked)


@account_commands.command("post")
@asking("key", "reference", "reason", "is_sure", "as_json")
def account_post(
    asked: Asked,
    hold: HoldArgument,
    amount: Annotated[str, typer.Option(help="How much is paid; default: all of the hold.", show_default=False)] = "",
    to: Annotated[
        int | None, typer.Option(help="The account that is paid; default: the house.", metavar="ID", show_default=False)
    ] = None,
) -> None:
    """End a hold with a payment of all of it, or of a part: the rest returns to the account."""
    found = _hold(hold)

    def request(key: str) -> Request:
        return PostRequest(
            account_id=found.account_id, request_key=key, hold=hold, amount=amount, to=to, reference=asked.reference
        )

    receiver = "the house" if to is None else f"account {to}"
    settle_and_tell(
        request, asked, question=f"Pay {amount or found.amount} of account {found.account_id} to {receiver}?"
    )


@account_commands.command("void")
@asking("key", "reason", "as_json")
def account_void(asked: Asked, hold: HoldArgument) -> None:
    """End a hold without a payment: its amount returns to the account."""
    found = _hold(hold)

    def request(key: str) -> Request:
        return VoidRequest(account_id=found.account_id, request_key=key, hold=hold, reason=asked.reason)

    settle_and_tell(request, asked)


@account_commands.command("holds")
def account_holds(
    account: AccountArgument,
    is_all: Annotated[bool, typer.Option("--all", help="Also those that have ended, the latest first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List the open holds of an account."""
    with engine_of().connect().execution_options(read_only=True) as connection:
        found = finding.holds_of(connection, account, rows_max=ROWS_MAX, open_only=not is_all)
    if as_json:
        print_json(msgspec.json.encode([it._asdict() for it in found]))
        return
    rows = [
        (it.hold_key, it.state, f"{it.amount:.2f}", it.asset_code, when(it.created_at), when(it.expires_at))
        for it in found
    ]
    print_table(["hold", "state", "amount", "asset", "opened", "expires"], rows)


def _hold(hold: str) -> finding.Hold:
    with engine_of().connect().execution_options(read_only=True) as connection:
        return finding.find_hold(connection, hold)


# ---- shared by the commands ------------------------------------------------------------------------------------------


def new_key(kind: str) -> str:
    """A new key for an act of this kind."""
    return keys.make_act_key(ACTS[kind].replace(" ", "_"))


def make_sure(question: str, *, is_sure: bool, as_json: bool) -> None:
    """Ask for confirmation unless `is_sure`. Raises as `confirm` does, and InvalidRequest with --json."""
    if is_sure:
        return
    if as_json:
        raise InvalidRequest("--json asks for no confirmation: add --yes")
    confirm(question)


def settle_and_tell(request: Callable[[str], Request], asked: Asked, *, question: str = "") -> None:
    """Settle the movement that `request` makes for a key, and print the outcome. A `question` is asked before that."""
    wanted = request(asked.key)
    if not asked.key:
        wanted = request(new_key(wanted.kind))
    if question:
        make_sure(question, is_sure=asked.is_sure, as_json=asked.as_json)
    with under_key(wanted.request_key):
        moved = settle(engine_of(), wanted, operator=shell_operator(), reason=asked.reason)
    tell(moved, as_json=asked.as_json)


def tell(moved: Moved, *, as_json: bool) -> None:
    """Print the outcome, its ledger rows, and the key under which a repeat has no effect."""
    request, result = moved.request, moved.result
    if as_json:
        said = {"request_key": request.request_key, "is_repeat": moved.is_repeat, "result": result}
        print_json(msgspec.json.encode(said))
        return
    if moved.is_repeat:
        out.print(
            f"account {result.account_id}: done before under this key, balance {result.balance_after} then; "
            "nothing was done now"
        )
    else:
        out.print(f"account {result.account_id}: balance {result.balance_after}")
    for row in result.transactions:
        out.print(shown(f"  {row.business_type:<15} {row.delta_amount:>10} {row.asset_code}  {row.idempotency_key}"))
    out.print(f"key {request.request_key}")
