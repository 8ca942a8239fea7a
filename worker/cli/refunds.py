"""`tombola draw refund`: take back a draw."""

from __future__ import annotations

from typing import Annotated

import typer

from tombola.producers.domain.contract import MovementResult
from tombola.producers.domain.errors import MovementRejected
from tombola.producers.domain.operations.refund import RefundRequest
from tombola.worker.cli.base import JsonOption, OnceOption, ReasonOption, YesOption, engine_of, out, shown, under_key
from tombola.worker.cli.movements import make_sure, new_key, tell
from tombola.worker.movements.finding import find_draw
from tombola.worker.movements.settling import foretell, settle, why_rejected
from tombola.worker.operators.actions import checked_reason, shell_operator

app = typer.Typer()
draw_app = typer.Typer(help="Refund a draw.", no_args_is_help=True)
app.add_typer(draw_app, name="draw")


@draw_app.callback()
def draw() -> None:
    """Refund a draw. Draws are made by `tombola enqueue`."""


@draw_app.command("refund")
def draw_refund(
    session: Annotated[str, typer.Argument(help="The draw's lottery session, or its request key.", metavar="SESSION")],
    reason: ReasonOption,
    policy: Annotated[
        str,
        typer.Option(
            help="Where a prize is spent: refuse, or write_off to collect what is there. charge_only collects nothing."
        ),
    ] = "refuse",
    key: OnceOption = "",
    is_sure: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Return the cost of a draw and collect its prizes, once per draw. Says first what it would do."""
    engine = engine_of()
    with engine.connect().execution_options(read_only=True) as connection:
        found = find_draw(connection, session)
    request = RefundRequest(
        account_id=found.account_id,
        request_key=key or new_key("refund"),
        draw=found.request_key,
        campaign=found.campaign,
        policy=policy,
        reason=checked_reason(reason),
    )
    if not is_sure:
        foretold = foretell(engine, request)
        if foretold.result.status == "rejected" and not foretold.is_repeat:
            raise MovementRejected(f"it would be rejected, {why_rejected(foretold.result)}", foretold.result.reason)
        if not as_json and not foretold.is_repeat:
            _show(foretold.result)
        make_sure(f"Refund draw {found.request_key}?", is_sure=foretold.is_repeat, as_json=as_json)
    with under_key(request.request_key):
        moved = settle(engine, request, operator=shell_operator(), reason=reason)
    tell(moved, as_json=as_json)


def _show(result: MovementResult) -> None:
    out.print("A refund now:")
    for row in result.transactions:
        out.print(shown(f"  {row.business_type:<15} {row.delta_amount:>10} {row.asset_code}"))
    out.print(f"account {result.account_id} would hold {result.balance_after}")
