"""`tombola webhook`: which events go to which URL. `tombola fulfilment`: what was delivered, and replaying the rest."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
import typer

from tombola.producers.domain.causes import FulfilmentState
from tombola.producers.domain.errors import InvalidRequest, ServiceUnavailable
from tombola.worker.cli.base import (
    JsonOption,
    ReasonOption,
    YesOption,
    confirm,
    engine_of,
    out,
    print_json,
    print_table,
    settings_with,
    when,
)
from tombola.worker.fulfilments import fulfilments, webhooks
from tombola.worker.fulfilments.fulfilments import Selection
from tombola.worker.operators.actions import shell_operator

app = typer.Typer()
webhook_app = typer.Typer(help="Subscribe URLs to events of draws.", no_args_is_help=True)
fulfilment_app = typer.Typer(help="Look at what goes to webhooks; replay what is dead.", no_args_is_help=True)
app.add_typer(webhook_app, name="webhook")
app.add_typer(fulfilment_app, name="fulfilment")

NameArgument = Annotated[str, typer.Argument(help="The webhook's name.", metavar="NAME", show_default=False)]


# ---- webhooks --------------------------------------------------------------------------------------------------------


@webhook_app.command("add")
def webhook_add(
    name: NameArgument,
    url: Annotated[str, typer.Argument(help="Where its events are posted: https://…", metavar="URL")],
    event: Annotated[
        list[str],
        typer.Option(
            help="draw.settled, grant.item, grant.coupon, a notification's name, or * for all but draw.settled. "
            "May be repeated."
        ),
    ],
    reason: ReasonOption,
    campaign: Annotated[str, typer.Option(help="Only of this campaign; default: of all.", show_default=False)] = "",
) -> None:
    """Add a webhook. Prints its secret, which is shown only once."""
    settings = settings_with("database_url")
    wanted = webhooks.Wanted(name, url, tuple(event), campaign)
    typer.echo(
        webhooks.add(
            engine_of(settings),
            wanted,
            is_private_allowed=settings.webhook_private,
            operator=shell_operator(),
            reason=reason,
        )
    )


@webhook_app.command("list")
def webhook_list(as_json: JsonOption = False) -> None:
    """List the webhooks, without their secrets."""
    with engine_of().connect().execution_options(read_only=True) as connection:
        found = webhooks.list_all(connection)
    if as_json:
        print_json(msgspec.json.encode([it._asdict() for it in found]))
        return
    rows = [
        (
            it.name,
            it.url,
            ", ".join(it.events),
            it.campaign or "all",
            when(it.created_at),
            "" if it.removed_at is None else when(it.removed_at),
        )
        for it in found
    ]
    print_table(["webhook", "url", "events", "campaign", "added", "removed"], rows)


@webhook_app.command("rotate")
def webhook_rotate(name: NameArgument, reason: ReasonOption) -> None:
    """Make a new secret, and print it once. For 24 hours messages are signed by the former one as well."""
    typer.echo(webhooks.rotate(engine_of(), name, operator=shell_operator(), reason=reason))


@webhook_app.command("remove")
def webhook_remove(name: NameArgument, reason: ReasonOption, is_sure: YesOption = False) -> None:
    """Send nothing more to a webhook. What is pending for it becomes dead."""
    if not is_sure:
        confirm(f"Remove webhook {name}?")
    webhooks.remove(engine_of(), name, operator=shell_operator(), reason=reason)
    out.print(f"{name} is removed")


@webhook_app.command("test")
def webhook_test(name: NameArgument) -> None:
    """Post a signed event `webhook.test` once, and say what the receiver answered. Exit code 1 unless it took it."""
    from tombola.worker.fulfilments.trial import post_trial

    settings = settings_with("database_url")
    with engine_of(settings).connect().execution_options(read_only=True) as connection:
        signer = webhooks.find_live(connection, name)
    outcome = asyncio.run(
        post_trial(signer, is_private_allowed=settings.webhook_private, timeout_s=settings.webhook_timeout_s)
    )
    if outcome.error is not None:
        raise ServiceUnavailable(f"{signer.webhook.url}: {outcome.error}")
    out.print(f"{signer.webhook.url} took it: {outcome.status}")


# ---- fulfilments -----------------------------------------------------------------------------------------------------

StateOption = Annotated[FulfilmentState | None, typer.Option(help="Only in this state.", show_default=False)]
WebhookOption = Annotated[str | None, typer.Option(help="Only of this webhook.", metavar="NAME", show_default=False)]
EventOption = Annotated[str | None, typer.Option(help="Only this event.", show_default=False)]
SessionOption = Annotated[str | None, typer.Option(help="Only of this lottery session.", show_default=False)]


@fulfilment_app.command("list")
def fulfilment_list(
    state: StateOption = None,
    webhook: WebhookOption = None,
    event: EventOption = None,
    session: SessionOption = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many to list.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List fulfilments, the latest first."""
    selection = Selection(state=state, webhook=webhook, event=event, lottery_session_id=session)
    with engine_of().connect().execution_options(read_only=True) as connection:
        found = fulfilments.some(connection, selection, rows_max=limit)
    if as_json:
        for it in found:
            print_json(msgspec.json.encode(it._asdict()))
        return
    rows = [
        (it.id, it.state, it.webhook or "none yet", it.event, it.account_id, it.idempotency_key, it.attempts, it.error)
        for it in found
    ]
    print_table(["id", "state", "webhook", "event", "account", "key", "attempts", "error"], rows, is_prose=True)


@fulfilment_app.command("replay")
def fulfilment_replay(
    reason: ReasonOption,
    ids: Annotated[list[int] | None, typer.Argument(help="Ids of dead fulfilments.", show_default=False)] = None,
    webhook: WebhookOption = None,
    event: EventOption = None,
    is_all: Annotated[bool, typer.Option("--all", help="All that are dead.")] = False,
) -> None:
    """Deliver dead fulfilments again, under their own keys. Up to 10,000 at once, the oldest first."""
    if not (ids or webhook or event or is_all):
        raise InvalidRequest("say which: ids, --webhook, --event, or --all")
    selection = Selection(ids=tuple(ids or ()), webhook=webhook, event=event)
    count = fulfilments.replay(engine_of(), selection, operator=shell_operator(), reason=reason)
    out.print(f"{count:,} fulfilments are pending again: a relay delivers them")
