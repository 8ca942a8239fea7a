"""`tombola proof`: the proof of a draw, which strangers verify without tombola."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tombola.producers.domain.errors import InvalidRequest, SessionNotFound
from tombola.producers.proofs import Proofs, books_key_of
from tombola.producers.receipts import Receipts
from tombola.producers.storage import requests
from tombola.worker.cli.base import engine_of, out, settings_with

app = typer.Typer()


@app.command()
def proof(
    session: Annotated[str, typer.Argument(help="The lottery session id.")],
    file: Annotated[Path | None, typer.Option("--out", help="Write to this file; default: print it.")] = None,
) -> None:
    """Write the proof of a draw, as it stands: verify.py, verify.js and the page /verify check it offline.

    It has receipts where TOMBOLA_RECEIPT_KEY is set, and the public key of the sealed books where TOMBOLA_BOOKS_KEY is.
    """
    settings = settings_with("database_url")
    engine = engine_of(settings)
    proofs = Proofs(Receipts.from_settings(settings, engine), books_key_of(settings))
    if not session.isascii():  # MariaDB raises an error when it compares other text with an ASCII column
        raise SessionNotFound(f"no request has the lottery session {session}")
    with engine.connect().execution_options(read_only=True) as connection:
        state = requests.state_of_session(connection, session)
    if state is None:
        raise SessionNotFound(f"no request has the lottery session {session}")
    with engine.connect().execution_options(read_only=True) as connection:
        body = proofs.of(connection, state).encode()
    if file is None:
        typer.echo(body)
        return
    try:
        file.write_bytes(body)
    except OSError as error:
        raise InvalidRequest(f"{file} cannot be written: {error.strerror}") from None
    out.print(f"wrote {file}: check it with verify.py, or at /verify of a gateway")
