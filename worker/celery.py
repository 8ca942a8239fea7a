"""The Celery app: `celery -A tombola.worker worker` consumes draws, and runs the housekeeping tasks.

Celery is the host: it brings the process, its signals, logging, beat and inspect. Draws do not pass through Celery's
tasks but through worker.settle.consumer, which starts as a bootstep. worker.host has the queues of tasks
(task_queues), their consumer (hosting) and the tasks themselves. Nothing here connects at import.
"""

from __future__ import annotations

import gc
import logging
from typing import Any, Final

import click
from celery import Celery, bootsteps, signals
from celery.schedules import crontab
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError

from tombola import migrations
from tombola.migrations.legacy import status as legacy
from tombola.producers.brokers.rabbitmq import open_amqp
from tombola.producers.brokers.redis_clients import open_redis
from tombola.producers.brokers.registry import REDIS, kind_of
from tombola.producers.brokers.streams import declare_group
from tombola.producers.domain.draw import wheels
from tombola.producers.domain.errors import ConfigurationError, DrawError, ServiceUnavailable
from tombola.producers.settings import Settings
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.faults import explain
from tombola.producers.telemetry import metrics, tracing
from tombola.producers.telemetry.logs import set_up_logging
from tombola.producers.telemetry.pulse import Pulse
from tombola.worker.host import tasks
from tombola.worker.host.hosting import ShopQueueStep, TaskConsumer
from tombola.worker.host.task_queues import SHOP_QUEUE, TASK_QUEUE, TASKS, TaskAMQP
from tombola.worker.ledger.old_rows import OldDraws
from tombola.worker.seeds.chains import begin_first, check_seeds
from tombola.worker.seeds.masters import Masters
from tombola.worker.settle.consumer import DATABASE_TIMEOUT_S, Consumer

log = logging.getLogger(__name__)

RELAY_EVERY_S: Final = 5.0
ARCHIVE_EVERY_S: Final = 600.0
EXPIRE_EVERY_S: Final = 300.0  # nothing to do but in the first minutes of a month
REVEAL_EVERY_S: Final = 300.0
SEAL_EVERY_S: Final = 1.0
GARBAGE_LOOK_EVERY: Final = 50_000  # container objects
AUDIT_AT_HOUR: Final = 2  # 02:30 UTC
CONFORMITY_AT_HOUR: Final = 4  # 04:30 UTC, after the audits


class Misconfigured(ConfigurationError, click.ClickException):
    """A ConfigurationError that the `celery` command prints as one line, exiting with 1."""

    def __init__(self, message: str) -> None:
        click.ClickException.__init__(self, message)


class DrawsApp(Celery):  # type: ignore[misc]
    """A Celery app with the settings that it was made with."""

    amqp_cls = TaskAMQP
    draw_settings: Settings


def make_app(settings: Settings) -> DrawsApp:
    """The Celery app for `settings`; raises ConfigurationError when a setting that workers and beat need is missing."""
    settings.need("database_url")
    broker_url = settings.need("broker_url")
    is_redis = kind_of(broker_url) is REDIS
    app = DrawsApp("tombola")
    app.draw_settings = settings
    app.conf.update(
        broker_url=broker_url,
        broker_connection_max_retries=None,  # for ever: draws do not depend on this connection
        result_backend=settings.need("result_url"),
        result_expires=settings.result_ttl_s,
        task_default_queue=TASKS,
        # On RabbitMQ, ShopQueueStep consumes SHOP_QUEUE.
        task_queues=[TASK_QUEUE, SHOP_QUEUE] if is_redis else [TASK_QUEUE],
        worker_consumer=TaskConsumer,
        # JSON for tasks and for results: with the serializer alone, pickle would still be accepted.
        accept_content=["json"],
        result_accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        # Without reject_on_worker_lost, a task whose process is killed is acked, in spite of acks_late.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_enable_prefetch_count_reduction=False,  # the count is 1 already
        worker_concurrency=1,  # the pool runs only housekeeping and `tombola.draw`; draws scale by processes
        worker_enable_remote_control=settings.has_remote_control,
        worker_hijack_root_logger=True,
        broker_connection_retry_on_startup=True,
        timezone="UTC",
        beat_schedule={
            "forget-consumers": {"task": "tombola.forget_consumers", "schedule": tasks.CONSUMER_IDLE_S_MAX},
            # By the clock: an interval of 24 hours would begin anew whenever beat starts without its schedule file.
            "audit": {"task": "tombola.audit", "schedule": crontab(hour=AUDIT_AT_HOUR, minute=30)},
            "audit-everything": {
                "task": "tombola.audit",
                "schedule": crontab(hour=AUDIT_AT_HOUR + 1, minute=30, day_of_week="sunday"),
                "kwargs": {"everything": True},
            },
            "conformity": {"task": "tombola.conformity", "schedule": crontab(hour=CONFORMITY_AT_HOUR, minute=30)},
            # A relay task that is still queued when the next one comes is dropped.
            "relay": {"task": "tombola.relay", "schedule": RELAY_EVERY_S, "options": {"expires": RELAY_EVERY_S}},
            "archive": {"task": "tombola.archive", "schedule": ARCHIVE_EVERY_S},
            "expire": {"task": "tombola.expire", "schedule": EXPIRE_EVERY_S, "options": {"expires": EXPIRE_EVERY_S}},
            "reveal-seeds": {
                "task": "tombola.reveal_seeds",
                "schedule": REVEAL_EVERY_S,
                "options": {"expires": REVEAL_EVERY_S},
            },
            "seal": {"task": "tombola.seal", "schedule": SEAL_EVERY_S, "options": {"expires": SEAL_EVERY_S}},
        },
    )
    app.steps["worker"].add(DrawsStep)
    app.steps["consumer"].add(ShopQueueStep)
    tasks.register(app)
    return app


class DrawsStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Starts the consumer with the worker. The consumer stops before the pool: first no more deliveries."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **_options: Any) -> None:
        self._settings: Settings = worker.app.draw_settings
        self._engine = open_engine(
            self._settings.need("database_url"),
            lock_wait_s=self._settings.lock_wait_s,
            read_timeout_s=DATABASE_TIMEOUT_S,
        )
        try:
            self._settings.need("seed")
            check(self._settings, self._engine)
            prepare_seeds(self._settings, self._engine)
        except DrawError as error:
            raise Misconfigured(str(error)) from None
        self._old_draws = OldDraws.of(self._engine)
        # Forked children must not share a connection with this process.
        self._engine.dispose()

    def start(self, worker: Any) -> None:
        tracing.set_up("worker")
        metrics.serve(self._settings)
        self._pulse = Pulse.open(self._settings, "worker")
        self._consumer = Consumer.open(
            self._settings, self._engine, wheels(self._settings.seed_bytes), self._pulse, old_draws=self._old_draws
        )
        # A batch's objects live until its end and then go by their counts. The collector's default would look at them
        # twenty times a batch, and at all that the imports left: a fifth of a draw's time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE_LOOK_EVERY)
        self._consumer.start()
        log.info("consuming draws, up to %d at a time", self._settings.batch_size_max)

    def stop(self, worker: Any) -> None:
        if not self._consumer.stop(timeout_s=self._settings.batch_time_s_max + 5):
            log.error("a batch was still under way at shutdown: its draws are delivered again")
        if self._pulse is not None:
            self._pulse.stop()

    terminate = stop


def prepare_seeds(settings: Settings, engine: Engine) -> None:
    """Begin the first chain of seed epochs if there is none; raises ConfigurationError if this worker cannot draw."""
    masters = Masters(settings.seeds)
    begin_first(engine, masters)
    check_seeds(engine, masters)


def check(settings: Settings, engine: Engine) -> None:
    """Check that this worker can work; raises ConfigurationError or ServiceUnavailable with the cure.

    Logs a warning when the database is not durable.
    """
    try:
        with engine.connect().execution_options(read_only=True) as connection:
            at, head = migrations.current_revision(connection), migrations.head_revision()
            if at is None and legacy.is_legacy(connection):
                raise ConfigurationError("asset_transactions is old code's: start with `tombola legacy inspect`")
            if at is None or (at != head and migrations.knows(at)):
                raise ConfigurationError(
                    f"the database is at revision {at or 'none'}, this release needs {head}: run `tombola migrate`"
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
        if kind_of(url) is REDIS:
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


def _app_from_env() -> DrawsApp:
    try:
        return make_app(Settings.from_env())
    except ConfigurationError as error:
        if click.get_current_context(silent=True) is not None:
            # Under a command line: `celery` would print an error at import with its whole traceback.
            click.echo(f"Error: {error}", err=True)
            raise SystemExit(1) from None
        raise Misconfigured(str(error)) from None


app = _app_from_env()


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _set_up_logging(loglevel: int | str | None = None, logfile: str | None = None, **_options: Any) -> None:
    """Our logs in place of Celery's, at --loglevel and to --logfile: in workers, their pools, and beat."""
    set_up_logging(app.draw_settings.log_format, level=loglevel or logging.WARNING, file=logfile)


@signals.beat_init.connect  # type: ignore[untyped-decorator]
@signals.beat_embedded_init.connect  # type: ignore[untyped-decorator]
def _show_pulse_of_beat(**_options: Any) -> None:
    """Show a pulse of beat: as beat only sends tasks, its absence would show only after the night."""
    Pulse.open(app.draw_settings, "beat")
