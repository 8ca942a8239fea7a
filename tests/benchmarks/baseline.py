"""The baseline: one Celery task per draw, with the guarantees of worker.settle.batch and no less.

It is meant to be as good as a task per draw gets: a Session per draw with Core statements in it (mapped objects would
only be slower), the accounts' row locked first, dedupe by the consume key under that lock, READ COMMITTED, late acks,
no events, no chatter between workers. Tables, draw and result bytes are tombola's own.

`celery -A tests.benchmarks.baseline worker` finds `app`; its URLs are TOMBOLA_*, like the worker's.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any, Final

import msgspec
from celery import Celery
from sqlalchemy import Engine, insert, select, update
from sqlalchemy.orm import Session

from tombola.producers.domain import keys
from tombola.producers.domain.contract import INSUFFICIENT_BALANCE, DrawRequest
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel
from tombola.producers.domain.operations import draw as operation
from tombola.producers.domain.operations.draw import CONSUME, CONSUME_TYPE, REWARD, REWARD_TYPE
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.ledger import Posting
from tombola.producers.storage.schema import account_asset_balances as accounts
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions

TASK: Final = "baseline.draw"


def make_app(broker_url: str, result_url: str) -> Celery:
    """The Celery app on either side; the broker's own defaults apply where nothing is said."""
    app = Celery("baseline", broker=broker_url, backend=result_url)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_serializer="json",
        accept_content=["json"],
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=True,
        # Without confirms a publish that RabbitMQ never saw would count as queued.
        broker_transport_options={"confirm_publish": True} if broker_url.startswith("amqp") else {},
    )
    return app


app = make_app(os.environ.get("TOMBOLA_BROKER_URL", ""), os.environ.get("TOMBOLA_RESULT_URL", ""))


@cache
def _engine(_pid: int) -> Engine:
    return open_engine(os.environ["TOMBOLA_DATABASE_URL"])


@cache
def _wheel() -> Wheel:
    return Wheel(DEFAULT_CAMPAIGN, bytes.fromhex(os.environ["TOMBOLA_SEED"]))


@app.task(name=TASK, max_retries=5)  # type: ignore[untyped-decorator]
def draw(**fields: Any) -> dict[str, Any]:
    """Settle one draw and return its result, which Celery puts into the result backend."""
    with Session(_engine(os.getpid())) as session:
        text = settle(session, DrawRequest(**fields))
        session.commit()
    result: dict[str, Any] = msgspec.json.decode(text)
    return result


def settle(session: Session, request: DrawRequest) -> str:
    """The draw inside an open transaction; a draw settled before answers with its first result."""
    now, wheel = utc_now(), _wheel()
    balance = session.execute(
        select(accounts.c.balance).where(accounts.c.id == request.account_id).with_for_update()
    ).scalar_one()
    consume_key = keys.derive(request.request_key, CONSUME_TYPE)
    charged = session.execute(
        select(transactions.c.transaction_id).where(transactions.c.idempotency_key == consume_key)
    ).first()
    if charged is not None:
        first: str = session.execute(
            select(requests.c.result).where(requests.c.request_key == request.request_key)
        ).scalar_one()
        return first
    if balance < wheel.campaign.cost:
        raise ValueError(INSUFFICIENT_BALANCE)  # the benchmark's accounts never run dry
    prize = wheel.draw(request.account_id, request.request_key)
    entries: list[Posting] = []
    for entry_type, kind, delta in ((CONSUME_TYPE, CONSUME, -wheel.campaign.cost), (REWARD_TYPE, REWARD, prize.amount)):
        if delta:
            key, after = keys.derive(request.request_key, entry_type), balance + delta
            session_id, asset_code = request.lottery_session_id, wheel.campaign.asset_code
            entries.append(
                Posting(request.account_id, session_id, key, kind, asset_code, delta, balance, after, wheel.notes)
            )
            balance = after
    session.execute(insert(transactions), [_row(entry) | {"created_at": now, "updated_at": now} for entry in entries])
    session.execute(update(accounts).where(accounts.c.id == request.account_id).values(balance=balance, updated_at=now))
    text = operation.result(request, entries).decode()
    session.execute(
        insert(requests).values(
            request_key=request.request_key,
            lottery_session_id=request.lottery_session_id,
            account_id=request.account_id,
            campaign=request.campaign,
            fingerprint=request.fingerprint(),
            status="completed",
            result=text,
            created_at=now,
            settled_at=now,
        )
    )
    return text


def _row(entry: Posting) -> dict[str, Any]:
    return {
        "account_id": entry.account_id,
        "business_id": entry.lottery_session_id,
        "lottery_session_id": entry.lottery_session_id,
        "idempotency_key": entry.idempotency_key,
        "business_type": entry.business_type,
        "asset_code": entry.asset_code,
        "delta_amount": entry.delta,
        "balance_before": entry.before,
        "balance_after": entry.after,
        "notes": entry.notes,
    }
