"""`tombola grants`: what the database user of each process may do."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from sqlalchemy.engine import make_url

from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.settings import Settings, settings_in
from tombola.producers.storage import grants as privileges
from tombola.worker.cli.base import print_table

app = typer.Typer()


@app.command()
def grants(
    sql: Annotated[bool, typer.Option("--sql", help="Print SQL that makes the users, with new passwords.")] = False,
    role: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this role: {', '.join(privileges.ROLES)}. May be repeated. Default: all."),
    ] = None,
    database: Annotated[
        str, typer.Option(help="The database's name.", show_default="that of TOMBOLA_DATABASE_URL, else tombola")
    ] = "",
    server: Annotated[str, typer.Option(help="mariadb or mysql.")] = "mariadb",
    host: Annotated[str, typer.Option(help="Where the users may log in from.")] = "%",
    existing: Annotated[bool, typer.Option("--existing", help="The users exist: print their grants alone.")] = False,
    legacy: Annotated[bool, typer.Option("--legacy", help="The ledger was old code's: `tombola legacy`.")] = False,
) -> None:
    """Show what the database user of each process needs, and no more; connects to nothing."""
    roles = privileges.checked_roles(role or ())
    known = next((it for it in privileges.SERVERS if it == server), None)
    if known is None:
        raise InvalidRequest(f"a server is {' or '.join(privileges.SERVERS)}, not {server!r:.40}")
    where = privileges.Deployment(database or _database(), known, host, legacy)
    if sql:
        typer.echo("\n".join(privileges.statements(roles, where, are_new=not existing)), nl=False)
        return
    rows = [(it, of_what, what) for it in roles for what, of_what in privileges.grants_of(it, where)]
    print_table(["role", "on", "may"], rows)


def _database() -> str:
    url = Settings.from_env().database_url.get_secret_value() if settings_in(os.environ) else ""
    return "tombola" if not url or url.startswith("sqlite") else make_url(url).database or "tombola"
