"""The Celery app: `celery -A worker worker` consumes draws, and runs the housekeeping tasks.

Celery is the host. It brings the process, its signals, logging, beat and inspect; draws themselves do not pass through
its task machinery but through worker.consumer, started as a bootstep. Nothing here connects at import.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any, Final

import click
from celery import Celery, Task, bootsteps, signals
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

import migrations
from migrations.legacy import status as legacy
from producers import metrics, tracing
from producers.broker import declare_group, open_amqp, open_redis
from producers.contract import DrawRequest
from producers.database import explain, open_engine
from producers.draw import Wheel, wheels
from producers.errors import ConfigurationError, DrawError, InvalidRequest, ServiceUnavailable
from producers.logs import set_up_logging
from producers.outbox import archive_once
from producers.pulse import Pulse
from producers.results import ResultStore, StoredResult
from producers.settings import Settings
from worker import batch
from worker.batch import Deferred, Refused
from worker.consumer import Consumer
from worker.deliveries.streams import forget_consumers
from worker.ledger import holds_old_rows
from worker.relay import open_relay

log = logging.getLogger(__name__)

CONSUMER_IDLE_S_MAX: Final = 3600
RETRY_S_MAX: Final = 30
RELAY_EVERY_S: Final = 5.0
ARCHIVE_EVERY_S: Final = 600.0
ARCHIVE_STEPS_MAX: Final = 200


class Misconfigured(ConfigurationError, click.ClickException):
    """A ConfigurationError that the `celery` command prints as one line, and exits with 1."""

    def __init__(self, message: str) -> None:
        click.ClickException.__init__(self, message)


class DrawsApp(Celery):  # type: ignore[misc]
    """A Celery app that knows the settings it was made with."""

    draw_settings: Settings


def make_app(settings: Settings) -> DrawsApp:
    """The Celery app for `settings`; raises ConfigurationError when one that workers need is missing."""
    settings.need("database_url")
    settings.seed_bytes  # noqa: B018 - raises when there is none
    app = DrawsApp("tombola")
    app.draw_settings = settings
    app.conf.update(
        broker_url=settings.need("broker_url"),
        result_backend=settings.need("result_url"),
        result_expires=settings.result_ttl_s,
        task_default_queue="tombola",
        # JSON for tasks and for results: setting the serializer alone leaves pickle open.
        accept_content=["json"],
        result_accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        # A task whose process is killed is acked otherwise, acks_late or not.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_concurrency=1,  # the pool runs only housekeeping and `tombola.draw`; draws scale by processes
        worker_enable_remote_control=settings.remote_control,
        worker_hijack_root_logger=True,
        broker_connection_retry_on_startup=True,
        timezone="UTC",
        beat_schedule={
            "forget-consumers": {"task": "tombola.forget_consumers", "schedule": CONSUMER_IDLE_S_MAX},
            "audit": {"task": "tombola.audit", "schedule": 24 * 3600},
            # One that waits for longer than the next one comes is late enough to be left out.
            "relay": {"task": "tombola.relay", "schedule": RELAY_EVERY_S, "options": {"expires": RELAY_EVERY_S}},
            "archive": {"task": "tombola.archive", "schedule": ARCHIVE_EVERY_S},
        },
    )
    app.steps["worker"].add(DrawsStep)
    # It stores its result itself; a caller that waits must hear of a refusal all the same.
    app.task(
        draw, name="tombola.draw", bind=True, max_retries=None, ignore_result=True, store_errors_even_if_ignored=True
    )
    app.task(run_audit, name="tombola.audit", bind=True)
    app.task(run_forget_consumers, name="tombola.forget_consumers", bind=True)
    app.task(run_relay, name="tombola.relay", bind=True)
    app.task(run_archive, name="tombola.archive", bind=True)
    return app


def wheels_of(settings: Settings) -> dict[str, Wheel]:
    """Every campaign this release knows, under the deployment's seed."""
    return wheels(settings.seed_bytes)


class DrawsStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Starts the consumer with the worker. It stops before the pool: first no more deliveries, then the rest."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **_options: Any) -> None:
        self._settings: Settings = worker.app.draw_settings
        self._engine = open_engine(self._settings.need("database_url"), lock_wait_s=self._settings.lock_wait_s)
        logging.getLogger("alembic").setLevel(logging.WARNING)  # it greets whoever asks for the revision
        try:
            check(self._settings, self._engine)
        except DrawError as error:
            raise Misconfigured(str(error)) from None
        self._is_legacy = holds_old_rows(self._engine)
        # Forked children must not share a connection with us.
        self._engine.dispose()

    def start(self, worker: Any) -> None:
        tracing.set_up("worker")
        metrics.serve(self._settings)
        self._pulse = Pulse.open(self._settings, "worker")
        self._consumer = Consumer.open(
            self._settings, self._engine, wheels_of(self._settings), self._pulse, is_legacy=self._is_legacy
        )
        self._consumer.start()
        log.info("consuming draws, up to %d at a time", self._settings.batch_size_max)

    def stop(self, worker: Any) -> None:
        if not self._consumer.stop(timeout_s=self._settings.batch_time_s_max + 5):
            log.error("a batch was still under way at shutdown: its draws are delivered again")
        if self._pulse is not None:
            self._pulse.stop()

    terminate = stop


def check(settings: Settings, engine: Engine) -> None:
    """Say what would keep this worker from working: raises ConfigurationError or ServiceUnavailable with the cure."""
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            at, head = migrations.current_revision(connection), migrations.head_revision()
            if at is None and legacy.is_legacy(connection):
                raise ConfigurationError("asset_transactions is old code's: start with `tombola legacy inspect`")
            if at is None or (at != head and migrations.knows(at)):
                raise ConfigurationError(
                    f"the database is at revision {at or 'none'}, this release needs {head}: run `alembic upgrade head`"
                )
            if why := legacy.why_workers_must_wait(connection):
                raise ConfigurationError(why)
            if engine.dialect.name != "sqlite":
                durable = connection.execute(text("SELECT @@innodb_flush_log_at_trx_commit")).scalar_one()
                if int(durable) != 1:
                    log.warning(
                        "innodb_flush_log_at_trx_commit is %s: a power cut can undo draws whose results were shown. "
                        "Set it to 1.",
                        durable,
                    )
    except SQLAlchemyError as error:
        raise explain(error) from error
    for name in ("broker_url", "result_url"):
        url = settings.need(name)
        if url.startswith("redis"):
            client = open_redis(url, timeout_s=5)
            try:
                client.ping()
                if name == "broker_url":
                    declare_group(client)
            except Exception as error:
                raise ServiceUnavailable(
                    f"TOMBOLA_{name.upper()}: Redis does not answer as it should: {error}"
                ) from None
            finally:
                client.close()
        else:
            open_amqp(url).release()


# ---- tasks: on Celery's own queue ------------------------------------------------------------------------------------


@cache
def _engine_of_process(url: str, lock_wait_s: int, _pid: int) -> Engine:
    return open_engine(url, lock_wait_s=lock_wait_s)


def _engine(settings: Settings) -> Engine:
    return _engine_of_process(settings.need("database_url"), settings.lock_wait_s, os.getpid())


@cache
def _is_legacy(engine: Engine) -> bool:
    return holds_old_rows(engine)


def draw(task: Task, **fields: Any) -> dict[str, Any]:
    """`tombola.draw`: settle one draw, for shops that call `send_task` with a DrawRequest's fields as kwargs.

    The same transaction as the consumer's. The result is stored under the lottery session id, as for every draw, and
    under the task id if that is another one. Raises InvalidRequest for what is no draw.
    """
    settings: Settings = task.app.draw_settings
    fields.pop("v", None)
    try:
        request = DrawRequest(**fields)
    except TypeError as error:
        raise InvalidRequest(f"not a draw request: {error}") from None
    try:
        engine = _engine(settings)
        (answer,) = batch.settle(
            engine, [request], wheels_of(settings), tries_max=settings.tries_max, is_legacy=_is_legacy(engine)
        )
        if isinstance(answer, Deferred):
            raise ServiceUnavailable(answer.error)
        if isinstance(answer, Refused):
            raise InvalidRequest(f"{answer.cause}: {answer.error}")
        store = ResultStore.from_settings(settings)
        ids = {request.lottery_session_id, task.request.id or request.lottery_session_id}
        store.put([StoredResult(task_id, answer.result, answer.settled_at) for task_id in sorted(ids)])
        store.close()
    except ServiceUnavailable as error:
        raise task.retry(exc=error, countdown=min(RETRY_S_MAX, 2**task.request.retries)) from error
    return {"lottery_session_id": request.lottery_session_id, "reason": answer.reason}


def run_audit(task: Task) -> dict[str, Any]:
    """`tombola.audit`: prove the invariants; how each stands, violations and what was not looked at logged."""
    from worker import audit

    settings: Settings = task.app.draw_settings
    report = audit.audit(_engine(settings), wheels_of(settings))
    for violation in report.violations:
        log.error("audit: %s", violation)
    for invariant, state in report.states.items():
        if state != "holds":
            count, why = report.counts[invariant], report.obstacles.get(invariant, "")
            log.error("audit: %s is %s (%d violations) %s", invariant, state, count, why)
    return report.told()


def run_relay(task: Task) -> int:
    """`tombola.relay`: publish what was accepted and never came through; the same as `tombola relay --once`."""
    relay = open_relay(task.app.draw_settings)
    try:
        return relay.run_once()
    finally:
        relay.close()


def run_archive(task: Task) -> int:
    """`tombola.archive`: drop the kept results of requests that settled long ago, in small steps; how many."""
    settings: Settings = task.app.draw_settings
    archived = 0
    for _ in range(ARCHIVE_STEPS_MAX if settings.retention_days else 0):
        count = archive_once(_engine(settings), older_than_s=settings.retention_days * 86_400)
        archived += count
        if not count:
            break
    return archived


def run_forget_consumers(task: Task) -> int:
    """`tombola.forget_consumers`: drop what the Stream's group remembers of processes that are long gone."""
    url = task.app.draw_settings.need("broker_url")
    if not url.startswith("redis"):
        return 0
    client = open_redis(url)
    try:
        return forget_consumers(client, idle_s=CONSUMER_IDLE_S_MAX)
    finally:
        client.close()


def _app_from_env() -> DrawsApp:
    try:
        return make_app(Settings.from_env())
    except ConfigurationError as error:
        if click.get_current_context(silent=True) is not None:
            # Under a command line: what is raised while it imports us, `celery` prints with its whole traceback.
            click.echo(f"Error: {error}", err=True)
            raise SystemExit(1) from None
        raise Misconfigured(str(error)) from None


app = _app_from_env()


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _set_up_logging(loglevel: int | str | None = None, logfile: str | None = None, **_options: Any) -> None:
    """In place of Celery's own, at --loglevel and to --logfile: in workers, their pools, and beat."""
    set_up_logging(app.draw_settings.log_format, level=loglevel or logging.WARNING, file=logfile)
