"""`tombola api-key`: the API keys of the gateway's callers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
import typer
from sqlalchemy import Connection

from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.keys import make_act_key
from tombola.producers.domain.moments import parse_moment
from tombola.producers.storage import api_keys
from tombola.worker.audit.on_record import API_KEY_ADD, API_KEY_REVOKE
from tombola.worker.cli.base import (
    JsonOption,
    OnceOption,
    OptionalReasonOption,
    engine_of,
    out,
    print_json,
    print_table,
    under_key,
)
from tombola.worker.operators.actions import Act, act_once

app = typer.Typer()
api_key_app = typer.Typer(help="Add, list and revoke API keys of the gateway's callers.", no_args_is_help=True)
app.add_typer(api_key_app, name="api-key")


@api_key_app.command("add")
def api_key_add(
    caller: Annotated[str, typer.Argument(help="The caller; request keys and sessions belong to a caller.")],
    accounts: Annotated[str, typer.Option(help="Only for these accounts, such as 6,7,100-199.")] = "",
    user_prefix: Annotated[
        str, typer.Option(help="Only for accounts of users whose id begins with this, such as 42.")
    ] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="What the key may do: draw, read or money. May be repeated. Default: draw and read."),
    ] = None,
    expires: Annotated[
        str, typer.Option(help="Refuse the key from then on: 2027-01-31 (from its beginning on, in UTC), or a time.")
    ] = "",
    key: OnceOption = "",
    reason: OptionalReasonOption = "",
) -> None:
    """Make an API key, for all accounts or for the given ones. The key is shown only once."""
    bounds = api_keys.Bounds.parse(accounts, user_prefix)
    scopes = api_keys.checked_scopes(scope or ())
    expires_at = parse_moment(expires) if expires else None
    asked = {"caller": caller, "scopes": api_keys.scopes_text(scopes)}
    if expires_at is not None:
        asked["expires_at"] = expires_at.isoformat()
    if not bounds.are_none:
        asked["for"] = str(bounds)
    made: list[str] = []

    def make(connection: Connection) -> Mapping[str, str]:
        made[:] = [api_keys.add(connection, caller, bounds, scopes=scopes, expires_at=expires_at)]
        return {"key_id": api_keys.id_of(made[0])}

    with under_key(key or make_act_key("api_key_add")) as once:
        done = act_once(engine_of(), Act.of(API_KEY_ADD, asked, reason=reason, key=once), make)
    if done.is_repeat:
        shown = f"{api_keys.PREFIX}_{done.details['key_id']}_…"
        out.print(f"{shown} was made before under this key, and shown then; nothing was done")
    else:
        typer.echo(made[0])


@api_key_app.command("list")
def api_key_list(as_json: JsonOption = False) -> None:
    """List the API keys, without their secrets."""
    found = api_keys.list_all(engine_of())
    if as_json:
        print_json(msgspec.json.encode([key._asdict() for key in found]))
        return
    rows = [
        (
            f"{api_keys.PREFIX}_{key.key_id}_…",
            key.caller,
            f"{key.created_at:%Y-%m-%d %H:%M}",
            "" if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M}",
            "" if key.revoked_at is None else f"{key.revoked_at:%Y-%m-%d %H:%M}",
            key.scopes,
            str(key.bounds),
        )
        for key in found
    ]
    print_table(["key", "caller", "made", "expires", "revoked", "scopes", "for accounts"], rows)


@api_key_app.command("revoke")
def api_key_revoke(
    api_key: Annotated[str, typer.Argument(help="The key, or its id as listed.", metavar="KEY")],
    key: OnceOption = "",
    reason: OptionalReasonOption = "",
) -> None:
    """Revoke a key; gateways refuse it within seconds."""
    if not api_key.isascii():  # MariaDB raises an error when it compares other text with an ASCII column
        raise InvalidRequest(f"there is no API key {api_key}: `tombola api-key list` shows them")
    key_id = api_keys.id_of(api_key)

    def revoke(connection: Connection) -> Mapping[str, str] | None:
        caller = api_keys.revoke(connection, key_id)
        return None if caller is None else {"caller": caller}

    with under_key(key or make_act_key("api_key_revoke")) as once:
        act_once(engine_of(), Act.of(API_KEY_REVOKE, {"key_id": key_id}, reason=reason, key=once), revoke)
    out.print(f"revoked {key_id}")
