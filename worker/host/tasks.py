"""Celery's tasks: `tombola.draw`, for shops that call `send_task`, and the housekeeping that beat sends.

A task runs again whenever its message is delivered again: after a kill or a lost connection, or when a sender sends it
twice. So every task must have the same effect when it runs twice; a draw has, under one request key.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final, TypeVar

from celery import Celery, Task
from sqlalchemy import Engine

from tombola.producers.brokers.redis_clients import open_redis
from tombola.producers.brokers.registry import REDIS, kind_of
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import wheels
from tombola.producers.domain.errors import DrawError, InvalidRequest, ServiceUnavailable
from tombola.producers.domain.keys import check_request_key
from tombola.producers.domain.signatures import SIGNATURE
from tombola.producers.results import ResultStore, StoredResult
from tombola.producers.settings import Settings
from tombola.producers.storage.engines import open_engine
from tombola.worker.books.sealer import Sealer
from tombola.worker.conformity import nightly
from tombola.worker.deliveries.streams import forget_consumers
from tombola.worker.ledger.old_rows import OldDraws
from tombola.worker.movements import expiry
from tombola.worker.relay.fulfilling import Fulfilling
from tombola.worker.relay.relay import Relay
from tombola.worker.relay.retention import archive_once, forget_fulfilments
from tombola.worker.seeds.masters import Masters
from tombola.worker.seeds.revealing import reveal_due
from tombola.worker.settle import tries
from tombola.worker.settle.answers import Deferred, Refused, Settled
from tombola.worker.settle.rules import Rules

log = logging.getLogger(__name__)

# Not Celery's own retry: that is a new message with an ETA, which a quorum queue cannot delay. The pool has one
# process, so other tasks wait during these pauses.
SETTLE_PAUSES_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0)
PUT_PAUSES_S: Final = (0.1, 0.4, 1.5)
CONSUMER_IDLE_S_MAX: Final = 3600
ARCHIVE_STEPS_MAX: Final = 200
EXPIRE_S_MAX: Final = 60.0  # of one task, of each asset: the pool's one process has other tasks as well

T = TypeVar("T")


def register(app: Celery) -> None:
    """Make these the tasks of `app`."""
    # A draw stores its result itself; Celery stores a refusal, for a caller that waits.
    app.task(draw, name="tombola.draw", bind=True, ignore_result=True, store_errors_even_if_ignored=True)
    app.task(run_audit, name="tombola.audit", bind=True)
    app.task(run_forget_consumers, name="tombola.forget_consumers", bind=True)
    app.task(run_relay, name="tombola.relay", bind=True)
    app.task(run_archive, name="tombola.archive", bind=True)
    app.task(run_expire, name="tombola.expire", bind=True)
    app.task(run_reveal_seeds, name="tombola.reveal_seeds", bind=True)
    app.task(run_conformity, name="tombola.conformity", bind=True)
    app.task(run_seal, name="tombola.seal", bind=True, ignore_result=True)  # every second: a result would be a write


@cache
def _engine_of_process(url: str, lock_wait_s: int, _pid: int) -> Engine:
    return open_engine(url, lock_wait_s=lock_wait_s)


def _engine(settings: Settings) -> Engine:
    return _engine_of_process(settings.need("database_url"), settings.lock_wait_s, os.getpid())


def draw(task: Task, **fields: Any) -> dict[str, Any]:
    """`tombola.draw`: settle one draw, for shops that call `send_task` with a DrawRequest's fields as kwargs.

    The transaction is the consumer's. Without a request_key the task's id is the key: however often the message is
    delivered, it is one draw. With TOMBOLA_MESSAGE_SECRET the task takes a further keyword, `signature`
    (producers.domain.signatures). The result is stored under the lottery session id, as for every draw, and under the
    task id if that differs. Raises InvalidRequest for a request that is invalid or not signed (nothing is charged), and
    ServiceUnavailable when the database did not answer for about 15 s: the draw may have happened, and a call with the
    same key finds out.
    """
    settings: Settings = task.app.draw_settings
    signature = fields.pop(SIGNATURE, None)
    request = _request(fields, task.request.id)
    settings.keyring.check(request, signature)
    answer = _settle(_engine(settings), _rules_of_process(task.app, os.getpid()), request)
    _put(settings, answer, {request.lottery_session_id, task.request.id or request.lottery_session_id})
    return {"lottery_session_id": request.lottery_session_id, "reason": answer.reason}


def _request(fields: dict[str, Any], task_id: Any) -> DrawRequest:
    fields.pop("v", None)
    if not fields.get("request_key"):
        try:
            # Not a key made here: each run of the task would be a draw of its own.
            fields["request_key"] = check_request_key(task_id if isinstance(task_id, str) else "")
        except InvalidRequest as error:
            raise InvalidRequest(f"without a request_key the task's id is the key, but: {error}") from None
    try:
        return DrawRequest(**fields)
    except TypeError as error:
        raise InvalidRequest(f"not a draw request: {error}") from None


@cache
def _rules_of_process(app: Celery, _pid: int) -> Rules:
    settings: Settings = app.draw_settings
    engine = _engine(settings)
    return Rules.of(settings, engine, wheels(settings.seed_bytes), OldDraws.of(engine))


def _settle(engine: Engine, rules: Rules, request: DrawRequest) -> Settled:
    def settle_once() -> Settled:
        (answer,) = tries.settle(engine, [request], rules)
        if isinstance(answer, Deferred):
            raise ServiceUnavailable(answer.error)
        if isinstance(answer, Refused):
            raise InvalidRequest(f"{answer.cause}: {answer.error}")
        return answer

    return _persist(settle_once, SETTLE_PAUSES_S)


def _put(settings: Settings, answer: Settled, ids: set[str]) -> None:
    """Put the result. When the store stays away, only log it: the draw has happened, and its result can be rebuilt."""
    results = [StoredResult(task_id, answer.result, answer.settled_at) for task_id in sorted(ids)]
    store = ResultStore.from_settings(settings)
    try:
        _persist(lambda: store.put(results), PUT_PAUSES_S)
    except ServiceUnavailable as error:
        log.warning("tombola.draw: the result was not put, it is rebuilt at the next request for it: %s", error)
    finally:
        store.close()


def _persist(step: Callable[[], T], pauses_s: Sequence[float]) -> T:
    """The result of `step`, which is repeated after each pause while it raises ServiceUnavailable; raises the last."""
    for pause_s in pauses_s:
        try:
            return step()
        except ServiceUnavailable as error:
            log.warning("tombola.draw: once more in %g s: %s", pause_s, error)
            time.sleep(pause_s)
    return step()


def run_audit(task: Task, everything: bool = False) -> dict[str, Any]:
    """`tombola.audit`: prove the invariants, and put the audit on record. It goes on from the last clean audit.

    With `everything` it begins at the first row.
    Violations, and invariants that do not hold or were not examined, are logged as well.
    """
    from tombola.worker.audit import audit, audits

    settings: Settings = task.app.draw_settings
    report = audit.audit_by(settings, _engine(settings), everything=everything)
    try:
        audits.record(_engine(settings), report, by=task.name)
    except DrawError as error:  # the alert rules notice the missing record
        log.error("this audit is not on record: %s", error)
    for violation in report.violations:
        log.error("audit: %s", violation)
    for invariant, state in report.states.items():
        if state in ("violated", "not looked at"):
            count, why = report.counts[invariant], report.obstacles.get(invariant, "")
            log.error("audit: %s is %s (%d violations) %s", invariant, state, count, why)
    return report.as_json()


def run_relay(task: Task) -> int:
    """`tombola.relay`: publish overdue requests again, as `tombola relay --once` does; return how many.

    Fulfilments are delivered meanwhile and afterwards, in a thread of this process.
    """
    settings: Settings = task.app.draw_settings
    _deliver_beside(settings)
    relay = Relay.from_settings(settings)
    try:
        return relay.run_once()
    finally:
        relay.close()


_delivering = threading.Lock()


def _deliver_beside(settings: Settings) -> None:
    """Deliver the fulfilments that are due, in a thread: a receiver that hangs must not hold up the pool's one process.

    Does nothing while the thread of an earlier call still delivers.
    """
    if not _delivering.acquire(blocking=False):
        return

    def deliver() -> None:
        fulfilling = Fulfilling.from_settings(settings)
        try:
            fulfilling.run_once()
        except DrawError as error:
            log.warning("tombola.relay: fulfilments are delivered later: %s", error)
        finally:
            fulfilling.close()
            _delivering.release()

    threading.Thread(target=deliver, name="fulfilments", daemon=True).start()


def run_archive(task: Task) -> int:
    """`tombola.archive`: archive requests that settled long ago, in small steps; return how many.

    Fulfilments that were delivered as long ago are deleted.
    """
    settings: Settings = task.app.draw_settings
    if settings.retention_days:
        forget_fulfilments(
            _engine(settings), older_than_s=settings.retention_days * 86_400, steps_max=ARCHIVE_STEPS_MAX
        )
    archived = 0
    for _ in range(ARCHIVE_STEPS_MAX if settings.retention_days else 0):
        count = archive_once(_engine(settings), older_than_s=settings.retention_days * 86_400)
        archived += count
        if not count:
            break
    return archived


def run_expire(task: Task) -> int:
    """`tombola.expire`: take the points that expire this month, by TOMBOLA_POINTS_VALID_DAYS; return how many accounts.

    A task that is cut short, by its time or by a kill, is gone on with by the next one. A month that is on record as
    done is left alone.
    """
    settings: Settings = task.app.draw_settings
    expired = 0
    for asset_code, valid_days in settings.points_valid_days:
        done = expiry.go_on(_engine(settings), asset_code, valid_days, by=task.name, time_s_max=EXPIRE_S_MAX)
        expired += 0 if done is None else done.expired
    return expired


def run_reveal_seeds(task: Task) -> list[str]:
    """`tombola.reveal_seeds`: reveal the secrets of epochs that are over; return the names of these epochs."""
    settings: Settings = task.app.draw_settings
    revealed = reveal_due(_engine(settings), Masters(settings.seeds), after_s=settings.seed_reveal_after_s)
    for name in revealed:
        log.info("the secret of epoch %s is public: its draws can be verified", name)
    return [str(name) for name in revealed]


def run_conformity(task: Task) -> dict[str, list[str]]:
    """`tombola.conformity`: report on every campaign's draws, on record; return what deviates, by campaign.

    Deviations are logged as well.
    """
    settings: Settings = task.app.draw_settings
    reports = nightly.examine(_engine(settings), settings)
    try:
        nightly.record(_engine(settings), reports, by=task.name)
    except DrawError as error:  # the alert rules notice the missing record
        log.error("these conformity reports are not on record: %s", error)
    for report in reports:
        for deviation in report.deviations:
            log.error("conformity: campaign %s, %s", report.campaign, deviation)
    return {report.campaign: report.deviations for report in reports}


def run_seal(task: Task) -> int:
    """`tombola.seal`: seal ledger rows, sign the head and write it outside; return how many rows were sealed."""
    return _sealer_of_process(task.app, os.getpid()).run_once()


@cache
def _sealer_of_process(app: Celery, _pid: int) -> Sealer:
    return Sealer.from_settings(app.draw_settings)


def run_forget_consumers(task: Task) -> int:
    """`tombola.forget_consumers`: delete the Stream's consumers of processes that ended long ago; return how many."""
    url = task.app.draw_settings.need("broker_url")
    if kind_of(url) is not REDIS:
        return 0
    client = open_redis(url)
    try:
        return forget_consumers(client, idle_s=CONSUMER_IDLE_S_MAX)
    finally:
        client.close()
