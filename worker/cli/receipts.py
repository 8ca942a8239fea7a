"""`tombola receipt`: the receipt of a draw; `tombola receipt-key`: the keys that sign receipts."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from tombola.producers.domain.errors import InvalidRequest, ReceiptNotFound, SessionNotFound
from tombola.producers.domain.receipt_keys import KID_LENGTH, SigningKey, jwk_set
from tombola.producers.domain.receipts import parse
from tombola.producers.receipts import Receipts
from tombola.producers.storage import receipt_keys, requests
from tombola.worker.cli.base import JsonOption, engine_of, out, print_json, print_table, settings_with, when

app = typer.Typer()
key_app = typer.Typer(help="Make, list and end the keys that sign receipts.", no_args_is_help=True)
app.add_typer(key_app, name="receipt-key")


@app.command()
def receipt(
    session: Annotated[str, typer.Argument(help="The lottery session id.")],
    as_json: JsonOption = False,
) -> None:
    """Print the signed receipt of a draw: of its acceptance, and once it has settled of its result."""
    settings = settings_with("database_url")
    engine = engine_of(settings)
    receipts = Receipts.from_settings(settings, engine)
    if not receipts:
        raise ReceiptNotFound("no key signs receipts here: set TOMBOLA_RECEIPT_KEY")
    state = None
    if session.isascii():  # MariaDB raises an error when it compares other text with an ASCII column
        with engine.connect().execution_options(read_only=True) as connection:
            state = requests.state_of_session(connection, session)
    if state is None:
        raise SessionNotFound(f"no request has the lottery session {session}")
    receipts.learn(state.seed_epoch)
    signed = receipts.sign(state)
    if as_json:
        parsed = parse(signed)
        print_json(msgspec.json.encode({"kid": parsed.kid, "payload": parsed.receipt, "jws": signed}))
    else:
        typer.echo(signed)


@key_app.command("make")
def make() -> None:
    """Make a key that signs receipts, and print it for TOMBOLA_RECEIPT_KEY. It is listed when a gateway starts with it.

    To replace a key, set both with a comma, the new one first; leave the old one away when all gateways have both.
    """
    typer.echo(f"TOMBOLA_RECEIPT_KEY={SigningKey.make().text}")


@key_app.command("list")
def list_all(as_json: JsonOption = False) -> None:
    """List the public keys that ever signed receipts. With --json, as the JWK Set that gateways serve."""
    with engine_of().connect().execution_options(read_only=True) as connection:
        keys = receipt_keys.list_keys(connection)
    if as_json:
        print_json(jwk_set(keys))
        return
    rows = [
        (it.kid, it.raw.hex(), when(it.valid_from), "" if it.valid_until is None else when(it.valid_until))
        for it in keys
    ]
    print_table(["key", "public key", "signs from", "until"], rows)


@key_app.command("end")
def end(kid: Annotated[str, typer.Argument(help="The key's id, as listed.", metavar="KEY")]) -> None:
    """End a key that has left all settings: receipts of later moments are not valid under it.

    Gateways with a newer key end the keys that they have no more; this is for a key without a successor.
    """
    if not kid.isascii() or len(kid) != KID_LENGTH:
        raise InvalidRequest(f"a key's id has {KID_LENGTH} hex digits: `tombola receipt-key list` shows them")
    with engine_of().begin() as connection:
        if not receipt_keys.end(connection, kid):
            raise InvalidRequest(f"no key {kid} signs: `tombola receipt-key list` shows the keys")
    out.print(f"ended {kid}")
