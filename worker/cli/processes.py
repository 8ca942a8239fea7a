"""The long-running commands: `tombola up`, relay, gateway, console.

Each imports its modules when it starts: each needs other libraries.
"""

from __future__ import annotations

import logging
import signal
import threading
from importlib.metadata import version
from typing import Annotated

import typer
from rich.markup import escape

from tombola.producers.domain.errors import DrawError
from tombola.producers.storage.engines import open_engine
from tombola.worker.cli.base import out, settings_with, until_interrupted
from tombola.worker.embedded import running as embedded
from tombola.worker.embedded.home import Home
from tombola.worker.embedded.running import CONSOLE_PORT, CONSOLE_USER, GATEWAY_PORT

log = logging.getLogger(__name__)

app = typer.Typer()


@app.command()
def up(
    draws: Annotated[int, typer.Option(help="How many sample draws to send.", min=0, max=10_000_000)] = 20_000,
    port: Annotated[int, typer.Option(help="The gateway's port, if it is free.", min=1, max=65535)] = GATEWAY_PORT,
    leave: Annotated[bool, typer.Option("--exit", help="End after the summary instead of staying up.")] = False,
) -> None:
    """Run everything on this machine: SQLite, a private Redis, worker, relay, gateway, console; sample draws, an audit.

    Needs no server and no settings. State is kept in the user's data folder (or TOMBOLA_HOME).
    """
    from tombola.producers.client import DrawClient
    from tombola.worker.embedded import sample, sample_campaigns

    home = Home.find()
    with until_interrupted() as interrupted, embedded.run(home, port=port) as running:
        engine = open_engine(running.settings.need("database_url"))
        parts = ", ".join(["SQLite", running.redis_name, *(f"a {part.name}" for part in running.parts)])
        out.print(f"[bold]tombola[/] {version('tombola')}  {parts}")
        out.print(f"state and logs in {home.path}\n")
        if running.notice:
            out.print(f"[yellow]{escape(running.notice)}[/]\n")
        sample.open_accounts(engine)
        sample_campaigns.publish_and_open(engine)
        balanced = True
        if draws:
            with DrawClient.from_settings(running.settings) as client:
                summary = sample.run(engine, client, draws, out)
            balanced = sample.show(summary, engine, running.settings, out)
        if leave:
            raise typer.Exit(0 if balanced else 1)
        out.print(f"\nRunning. A page that draws: {running.gateway_url}/  (the API: {running.gateway_url}/docs)")
        out.print(f"The operators' console: {running.console_url}/  (user {CONSOLE_USER}, ", end="")
        if running.password is None:
            out.print("password as printed at the first start)")
        else:
            out.print(f"password [bold]{escape(running.password)}[/], printed only once)")
        out.print("From a second terminal (in this checkout: .venv/bin/tombola):\n")
        for line in ("enqueue --account 6", "account add --balance 100", "audit"):
            out.print(f"    tombola {line}")
        out.print("\nCtrl-C stops everything.")
        while not interrupted.wait(1):
            if (part := running.ended()) is not None:
                raise DrawError(f"the {part.name} ended unexpectedly: see {part.log}")
    out.print("\nStopped. Settled draws are kept for the next start.")


@app.command()
def relay(
    once: Annotated[bool, typer.Option("--once", help="Publish and deliver what is due now, then end.")] = False,
) -> None:
    """Publish accepted draws again that did not settle in time; deliver to webhooks. Any number of relays can run."""
    from tombola.producers.brokers.redis_clients import refuse_unsupported
    from tombola.producers.telemetry.logs import set_up_logging
    from tombola.worker.relay.relay import Relay

    settings = settings_with("database_url", "broker_url")
    refuse_unsupported(settings.need("broker_url"))
    relaying = Relay.from_settings(settings)
    try:
        if once:
            out.print(f"{relaying.run_once():,} overdue requests published")
            if delivered := relaying.deliver_once():
                out.print(f"{delivered:,} fulfilments delivered")
            return
        set_up_logging(settings.log_format)
        stopping = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopping.set())
        log.info("relaying")
        relaying.run(stopping)
    finally:
        relaying.close()


@app.command()
def gateway(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.", min=0, max=65535)] = 8000,
    processes: Annotated[int, typer.Option(help="How many processes share the port.", min=1, max=64)] = 1,
) -> None:
    """Serve the HTTP API for web frontends."""
    from tombola.producers.brokers.redis_clients import refuse_unsupported
    from tombola.producers.gateway.serve import serve

    # Here, a missing setting is one line; in the processes it would be a traceback from each.
    settings = settings_with("database_url", "broker_url", "result_url")
    refuse_unsupported(settings.need("broker_url"), settings.need("result_url"))
    serve(host=host, port=port, processes=processes)


@app.command()
def console(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.", min=0, max=65535)] = CONSOLE_PORT,
) -> None:
    """Serve the operators' pages: live figures, dead letters, replays, stories of draws. First: `tombola user add`."""
    from tombola.worker.console.serve import serve

    serve(settings_with("database_url", "broker_url", "result_url"), host=host, port=port)
