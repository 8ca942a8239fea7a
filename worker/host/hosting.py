"""What keeps Celery's consumer of tasks alive, and its trouble away from the draws.

Draws are settled by worker.settle.consumer in a thread of its own; a process that can settle must not end because a
task is garbage, a queue is gone, or a server answers what Celery does not expect.
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
STEADY_S: Final = 60.0  # one that went well for so long is not the last one's continuation
DELIVERIES_MAX: Final = 20
SUSPECTED_MAX: Final = 3  # times that a task may be in hand while something breaks that is no connection
SUSPECTS_MAX: Final = 1000
LOOK_EVERY_S: Final = 5.0


class TaskConsumer(Consumer):  # type: ignore[misc]
    """Celery's consumer, which begins anew after any error, and sets aside any message that it cannot handle."""

    class Blueprint(Consumer.Blueprint):  # type: ignore[misc]
        # 28 queues to hold back tasks with an ETA on a quorum queue; no task of ours has one.
        default_steps = tuple(step for step in Consumer.Blueprint.default_steps if "delayed_delivery" not in step)

    def __init__(self, *args: Any, **options: Any) -> None:
        # Workers need nothing of each other: one queue less to fail, one second less to start.
        asked = options.get("worker_options") or {}
        options["worker_options"] = {**asked, "without_gossip": True, "without_mingle": True}
        super().__init__(*args, **options)
        # With Redis kombu takes any KeyError for a lost connection, to be opened again at once and for ever.
        self.connection_errors = tuple(it for it in self.conninfo.connection_errors if it is not KeyError)
        # Said at each lost connection, and about what is right here: a task that runs is left to run.
        warnings.filterwarnings(
            "ignore", message=r"\s*In Celery 5.1 we introduced", category=CPendingDeprecationWarning
        )
        self._dead = DeadTasks(self.app)
        self._suspects: Counter[str] = Counter()
        if self.controller is not None:
            # Called with a slot of the pool in hand, perhaps long after its message came.
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
        """As Celery does it after the errors that it knows."""
        try:
            if self.connection:
                self.on_connection_error_after_connected(error)
            self.on_close()
            self._cancel_connection_timer_entries()
            self.blueprint.restart(self)
        except Exception:
            log.exception("housekeeping did not stop in order")

    def _suspect(self, error: Exception) -> None:
        """Some errors come from a task in hand, by a detour: a task that is there each time is set aside in the end."""
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
                # If the connection is what failed, setting aside fails as well, and the message comes again.
                self.set_aside(message, error)

        return on_message

    def _check(self, message: Any) -> None:
        """Raise for what Celery would take and never be done with: InvalidTaskError, or what wrong types raise."""
        if self._suspects[str(message.headers.get("id"))] >= SUSPECTED_MAX:
            raise InvalidTaskError(f"housekeeping broke {SUSPECTED_MAX} times while this was in hand")
        for limit_s in message.headers.get("timelimit") or ():
            float(limit_s or 0)
        if isinstance(message.channel, ListChannel):
            return
        if message.headers.get("eta"):
            # Held in hand until then, it would keep all others back.
            raise InvalidTaskError("a task with an eta or a countdown: send it when it is due")
        deliveries = message.headers.get("x-delivery-count")
        if isinstance(deliveries, int) and deliveries > DELIVERIES_MAX:
            raise InvalidTaskError(f"delivered {deliveries} times, and never done")

    def _execute(self, request: Any) -> None:
        """Hand `request` to the pool, as WorkController does. The slot is free again if that fails."""
        try:
            request.execute_using_pool(self.pool)
        except Exception as error:  # one that was revoked as well
            with suppress(Exception):
                task_ready(request)
            self.controller._quick_release()
            self.set_aside(request.message, error)

    def set_aside(self, message: Any, error: Exception) -> None:
        """Put `message` where an operator finds it, and ack it, unless that is done."""
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
        # What says so is a connection that takes properties which cannot be decoded: producers.brokers.rabbitmq.
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
            log.warning("the sender of %s is not told: %s", shown(name), shown(error))


def _pause(duration_s: float) -> None:
    """Sleep, unless this worker is to stop: then that is raised."""
    deadline = time.monotonic() + duration_s
    while time.monotonic() < deadline:
        maybe_shutdown()
        time.sleep(0.1)


class ShopQueueStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """On RabbitMQ, consumes the classic queue that shops declare, over a channel of its own.

    A classic queue is gone while its node is: then it is tried again every few seconds, and ours is consumed meanwhile.
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
            # It is there in another shape, as a shop or an operator wants it: also good.
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
                # Celery hears that a queue was deleted, but not in its first tenth of a second.
                raise RecoverableConnectionError("a queue is no longer consumed")


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _name_node(instance: Any, **_options: Any) -> None:
    """A node name per process, unless the command line says one: two of the same name get in each other's way."""
    context = click.get_current_context(silent=True)
    if context is not None and context.get_parameter_source("hostname") is ParameterSource.DEFAULT:
        instance.hostname = nodename(f"celery-{os.getpid()}-{secrets.token_hex(2)}", gethostname())
