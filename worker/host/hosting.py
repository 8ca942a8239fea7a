"""Keeps Celery's consumer of tasks alive, and its faults away from the draws.

worker.settle.consumer settles draws in a thread of its own. A process that can settle must not end because a task is
garbage, a queue is gone, or a server gives an answer that Celery does not expect.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import click
from amqp.exceptions import PreconditionFailed, RecoverableConnectionError
from celery import bootsteps, signals
from celery.exceptions import CPendingDeprecationWarning, InvalidTaskError, NotRegistered
from celery.utils.nodenames import gethostname, nodename
from celery.worker.consumer import Consumer
from celery.worker.state import active_requests, maybe_shutdown, reserved_requests, task_ready
from click.core import ParameterSource

from tombola.worker.host.task_queues import SHOP_QUEUE, SHOPS, DeadTasks, ListChannel, shown

log = logging.getLogger(__name__)

PAUSE_S_MAX: Final = 30.0
STEADY_S: Final = 60.0  # an error after so long a time is the first of a new series
DELIVERIES_MAX: Final = 20
SUSPECTED_MAX: Final = 3  # how often a task may be in hand at an error that is no connection's
SUSPECTS_MAX: Final = 1000
LOOK_EVERY_S: Final = 5.0


class TaskConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer, which begins anew after any error, and sets aside any message that cannot be handled."""

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]
        # 28 queues that delay tasks with an ETA on a quorum queue; no task of ours has an ETA.
        default_steps = tuple(step for step in Consumer.Blueprint.default_steps if "delayed_delivery" not in step)

    def __init__(self, *args: Any, **options: Any) -> None:
        # Workers need no gossip with each other: one queue less to fail, one second less to start.
        asked = options.get("worker_options") or {}
        options["worker_options"] = {**asked, "without_gossip": True, "without_mingle": True}
        super().__init__(*args, **options)
        # With Redis, kombu takes any KeyError for a lost connection, and reconnects at once, for ever.
        self.connection_errors = tuple(it for it in self.conninfo.connection_errors if it is not KeyError)
        # A warning at each lost connection about a default that is right here: a running task goes on.
        warnings.filterwarnings(
            "ignore", message=r"\s*In Celery 5.1 we introduced", category=CPendingDeprecationWarning
        )
        self._dead = DeadTasks(self.app)
        self._suspects: Counter[str] = Counter()
        if self.controller is not None:
            # Celery calls this with a slot of the pool, perhaps long after the message arrived.
            self.controller._process_task = self._execute

    def start(self) -> None:
        failures = 0
        while True:
            began = time.monotonic()
            try:
                super().start()
                return
            except Exception as error:  # a shutdown is a SystemExit
                failures = 1 if time.monotonic() - began > STEADY_S else failures + 1
                pause_s = min(PAUSE_S_MAX, 2.0 ** (failures - 1))
                log.error(
                    "housekeeping begins anew in %g s, draws go on: %s: %s", pause_s, type(error).__name__, shown(error)
                )
                log.debug("what happened to housekeeping", exc_info=True)
                self._suspect(error)
                self._tear_down(error)
            _pause(pause_s)

    def shutdown(self) -> None:
        super().shutdown()
        self._dead.close()

    def _tear_down(self, error: Exception) -> None:
        """Tear down as Celery does after a lost connection."""
        try:
            if self.connection:
                self.on_connection_error_after_connected(error)
            self.on_close()
            self._cancel_connection_timer_entries()
            self.blueprint.restart(self)
        except Exception:
            log.exception("housekeeping did not stop in order")

    def _suspect(self, error: Exception) -> None:
        """Suspect the tasks in hand of an error that is no connection's: a task in hand each time is set aside."""
        if isinstance(error, (*self.connection_errors, *self.channel_errors)):
            return
        if len(self._suspects) > SUSPECTS_MAX:
            self._suspects.clear()
        self._suspects.update(str(request.id) for request in {*active_requests, *reserved_requests})

    # ---- messages ----

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        handle = super().create_task_handler(*args, **options)

        def on_message(message: Any) -> None:
            try:
                self._check(message)
                handle(message)
            except Exception as error:
                # If the connection has failed, setting aside fails as well, and the message is delivered again.
                self.set_aside(message, error)

        return on_message

    def _check(self, message: Any) -> None:
        """Raise InvalidTaskError, or the error of a wrong type, for a message that Celery would never finish."""
        if self._suspects[str(message.headers.get("id"))] >= SUSPECTED_MAX:
            raise InvalidTaskError(f"housekeeping broke {SUSPECTED_MAX} times while this was in hand")
        for limit_s in message.headers.get("timelimit") or ():
            float(limit_s or 0)
        if isinstance(message.channel, ListChannel):
            return
        if message.headers.get("eta"):
            # In hand until its time, the task would hold up all others.
            raise InvalidTaskError("a task with an eta or a countdown: send it when it is due")
        deliveries = message.headers.get("x-delivery-count")
        if isinstance(deliveries, int) and deliveries > DELIVERIES_MAX:
            raise InvalidTaskError(f"delivered {deliveries} times, and never done")

    def _execute(self, request: Any) -> None:
        """Hand `request` to the pool, as WorkController does. If that fails, free the slot."""
        try:
            request.execute_using_pool(self.pool)
        except Exception as error:  # also for a revoked task
            with suppress(Exception):
                task_ready(request)
            self.controller._quick_release()
            self.set_aside(request.message, error)

    def set_aside(self, message: Any, error: Exception) -> None:
        """Put `message` on the queue of dead tasks, for an operator, and ack it; only log it if it is acked already."""
        why = f"{type(error).__name__}: {error}"
        if getattr(message, "acknowledged", False):
            log.error("a task was handled, but not to its end: %s", shown(why))
            return
        if isinstance(message.channel, ListChannel):
            message.channel.set_aside(message.channel.raw(message), why)
        else:
            log.error("a task is set aside: %s: %s", shown(why), shown(message.body or ""))
            self._dead.put(message, why)
        message.ack()

    def on_unknown_message(self, body: Any, message: Any) -> None:
        # "undecodable" is set by our connections for properties that cannot be decoded: producers.brokers.rabbitmq.
        self.set_aside(message, InvalidTaskError(message.properties.get("undecodable") or "it names no task"))

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self.set_aside(message, exc)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self.set_aside(message, exc)

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        name = str(message.headers.get("task"))
        self.set_aside(message, NotRegistered(name))
        try:
            self.app.backend.mark_as_failure(message.headers["id"], NotRegistered(name))
        except Exception as error:
            log.warning("the sender of the unknown task %s gets no failure: %s", shown(name), shown(error))


def _pause(duration_s: float) -> None:
    """Sleep; raise Celery's shutdown as soon as this worker is to stop."""
    deadline = time.monotonic() + duration_s
    while time.monotonic() < deadline:
        maybe_shutdown()
        time.sleep(0.1)


class ShopQueueStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """On RabbitMQ, consumes the classic queue that shops declare, over a channel of its own.

    A classic queue is gone while its node is down. Then it is tried again every few seconds, and our own queue is
    consumed meanwhile.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        self._tasks: Any = None
        self._look: Any = None
        super().__init__(consumer, **options)

    def include_if(self, consumer: Any) -> bool:
        with consumer.app.connection_for_read() as connection:
            return bool(connection.transport.driver_type == "amqp")

    def start(self, consumer: Any) -> None:
        self._try(consumer)
        self._look = consumer.timer.call_repeatedly(LOOK_EVERY_S, self._look_after, (consumer,))

    def stop(self, consumer: Any) -> None:
        if self._look is not None:
            self._look.cancel()
        tasks, self._tasks, self._look = self._tasks, None, None
        if tasks is not None and consumer.connection is not None:
            with suppress(Exception):
                tasks.channel.close()

    def _try(self, consumer: Any) -> None:
        try:
            self._tasks = self._consume(consumer)
        except consumer.channel_errors as error:
            log.warning("the queue %s is tried again in %g s: %s", SHOPS, LOOK_EVERY_S, shown(error))

    @staticmethod
    def _consume(consumer: Any) -> Any:
        channel = consumer.connection.channel()
        try:
            SHOP_QUEUE(channel).declare()
        except PreconditionFailed:
            # The queue exists with other arguments, by a shop's or an operator's choice: consume it as it is.
            channel = consumer.connection.channel()
        channel.basic_qos(0, consumer.initial_prefetch_count, False)
        tasks = consumer.app.amqp.TaskConsumer(
            channel, queues=[SHOP_QUEUE], auto_declare=False, on_decode_error=consumer.on_decode_error
        )
        tasks.on_message = consumer.create_task_handler()
        tasks.consume()
        return tasks

    def _look_after(self, consumer: Any) -> None:
        if self._tasks is None:
            self._try(consumer)
        for tasks in (self._tasks, consumer.task_consumer):
            if tasks is not None and not set(tasks._active_tags.values()) <= set(tasks.channel.callbacks):
                # RabbitMQ tells Celery of a deleted queue, but not within the first tenth of a second.
                raise RecoverableConnectionError("a queue is no longer consumed")


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _name_node(instance: Any, **_options: Any) -> None:
    """Give each process a node name of its own, unless the command line has one: equal names disturb each other."""
    context = click.get_current_context(silent=True)
    if context is not None and context.get_parameter_source("hostname") is ParameterSource.DEFAULT:
        instance.hostname = nodename(f"celery-{os.getpid()}-{secrets.token_hex(2)}", gethostname())
