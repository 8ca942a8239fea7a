"""The state of each request, in `api_idempotency_requests`: this module is the only writer of that table.

                  ┌──► completed   the draw went through, its first result is kept
    accepted ─────┼──► rejected    it was told no, and will be told no again
       ▲          └──► dead        given up, nothing was charged
       └──────────────── │         an operator's replay accepts it again, under the same key

Accepted is a promise: the row is the outbox as well, and the relay publishes it until it is one of the others. A
request that reaches the worker without having been accepted gets its row when it settles. What is settled never
changes; archiving drops only the result's text, which is rebuilt from the ledger, or from the rejection's few columns.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence, Set
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnElement, Connection, Engine, and_, func, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from tombola.producers.domain import keys, operations
from tombola.producers.domain.causes import DeadReason, Status
from tombola.producers.domain.contract import Request, parse_result_head
from tombola.producers.domain.operations.operation import Rejection
from tombola.producers.storage import clock
from tombola.producers.storage.faults import RowsChanged, explain, is_duplicate_key
from tombola.producers.storage.ledger import postings_of_request
from tombola.producers.storage.schema import api_idempotency_requests as table
from tombola.producers.storage.transactions import Transaction, time_text

TAKEN_TRIES_MAX: Final = 5
PUBLISH_ERROR_LENGTH_MAX: Final = 200

_OUTCOME: Final = ("status", "reason", "result", "settled_at", "deliveries", "settled_by")
_REQUEST: Final = ("request_key", "lottery_session_id", "account_id", "campaign", "fingerprint", "created_at")
# As text: the driver takes longer over a time than over all the rest of a row.
_ACCEPTED_AT: Final = "CAST(accepted_at AS CHAR)"
_KNOWN: Final = f"fingerprint, caller, status, result, settled_at, reason, balance_told, {_ACCEPTED_AT}"


class Known(NamedTuple):
    """What is on record of a request; `result` is None while it has none, and once it is archived.

    `accepted_at` is for whoever settles it: those who ask again are told the same as the first time.
    """

    fingerprint: str
    caller: str
    status: str
    result: str | None = None
    settled_at: datetime | None = None
    reason: str | None = None
    balance_told: Decimal | None = None
    accepted_at: datetime | None = None

    @property
    def is_settled(self) -> bool:
        return self.status in (Status.COMPLETED, Status.REJECTED)


class Asked(NamedTuple):
    """A request, and whose it is: the name behind an API key, empty for those who need none."""

    request: Request
    caller: str = ""


class Clash(enum.Enum):
    """What a request cannot have, because it is another one's."""

    KEY_IS_MINE = "the caller has used the key for another request"
    KEY_IS_ANOTHERS = "another caller has used the key"
    SESSION_IS_MINE = "the session is that of another request of the caller's"
    SESSION_IS_ANOTHERS = "the session is another caller's"


class Acceptance(NamedTuple):
    """What came of asking. A conflict says nothing about the request that holds the key.

    `request` is what stands on record: with an alias for a name that another caller holds
    (producers.domain.keys.alias). `clash` says why it is a conflict.
    """

    request: Request
    known: Known | None
    is_new: bool = False
    clash: Clash | None = None

    @property
    def is_conflict(self) -> bool:
        """The key or the session belongs to another request."""
        return self.known is None


class Finished(NamedTuple):
    """A request and what became of it."""

    request: Request
    fingerprint: str
    status: Status
    reason: str | None
    result: str
    is_accepted: bool
    deliveries: int = 1


# ---- accept ----------------------------------------------------------------------------------------------------------


def accept(
    transaction: Transaction, asked: Sequence[Asked], now: datetime, *, publish_at: datetime, is_published: bool
) -> list[Acceptance]:
    """Accept requests inside `transaction`; what is accepted is a promise once that has committed.

    A known request is answered with what is on record of it; one that nobody's name stands for (it came by the broker
    alone) is its caller's from now on. `publish_at` is when the relay shall look after the new ones, `is_published`
    whether the caller publishes them himself, once, after the commit.
    Raises the driver's errors; a conflict other than a taken key asks for the whole transaction again.
    """
    fingerprints = [it.request.fingerprint() for it in asked]
    # Nearly all of them are new: insert first, and look only where a unique constraint objects. SQLite has one writer
    # at a time, so that looking first is certain there, and an insert of many would not be undone as a whole.
    is_careful = transaction.is_sqlite
    for _ in range(TAKEN_TRIES_MAX):
        known = look_up(transaction, [it.request.request_key for it in asked], lock=True) if is_careful else {}
        fresh = [number for number, it in enumerate(asked) if it.request.request_key not in known]
        clashes = _taken_sessions(transaction, asked, fresh) if is_careful else {}
        new: dict[str, tuple[Asked, str]] = {}
        for number in fresh:
            if number not in clashes:
                new.setdefault(asked[number].request.request_key, (asked[number], fingerprints[number]))
        try:
            _insert_accepted(transaction, new, now, publish_at, is_published)
        except Exception as error:
            if not is_duplicate_key(error):
                raise
            is_careful = True
            continue
        unseen = set(new)
        known |= {key: Known(fingerprint, it.caller, Status.ACCEPTED) for key, (it, fingerprint) in new.items()}
        aliases = _aliases_of_nobodys(transaction, asked, known)
        adopted: dict[str, str] = {}
        answers = []
        for number, (it, fingerprint) in enumerate(zip(asked, fingerprints, strict=True)):
            key = it.request.request_key
            clash = clashes.get(number) or clash_of(known[key], fingerprint, it.caller)
            if clash is None and it.caller and not known[key].caller and keys.alias(it.caller, key) in aliases:
                clash = Clash.KEY_IS_ANOTHERS  # the key is the caller's for what stands there under his alias
            if clash is not None:
                answers.append(Acceptance(it.request, None, clash=clash))
                continue
            if it.caller and not known[key].caller:
                adopted[key] = it.caller
                known[key] = known[key]._replace(caller=it.caller)
            answers.append(Acceptance(it.request, known[key], key in unseen))
            unseen.discard(key)  # the second one in this batch is a repeat of the first
        transaction.update(table.name, "request_key", ("caller",), sorted(adopted.items()), where="LENGTH(caller) = 0")
        return answers
    raise RowsChanged("keys were taken by others again and again")


def _aliases_of_nobodys(transaction: Transaction, asked: Sequence[Asked], known: Mapping[str, Known]) -> Set[str]:
    """Those aliases that are on record which callers have for keys that stand for nobody's requests."""
    aliases = [
        keys.alias(it.caller, it.request.request_key)
        for it in asked
        if it.caller and (found := known.get(it.request.request_key)) is not None and not found.caller
    ]
    return look_up(transaction, aliases, lock=True).keys() if aliases else frozenset()


def clash_of(known: Known, fingerprint: str, caller: str) -> Clash | None:
    """What is wrong with asking for that, where `known` is on record under its key.

    Where one of them has no name, the same content is the same request: a shop that has published it past us, and asks
    for it here as well, is not to be charged twice.
    """
    if known.fingerprint == fingerprint and (known.caller == caller or not known.caller or not caller):
        return None
    return Clash.KEY_IS_MINE if known.caller == caller else Clash.KEY_IS_ANOTHERS


def _taken_sessions(transaction: Transaction, asked: Sequence[Asked], fresh: Sequence[int]) -> dict[int, Clash]:
    """Which of these `fresh` ones ask for a session that is another request's, and whose, by their number.

    Locking reads here and above: they see what is there now, whatever the caller's transaction saw when it began.
    """
    if not fresh:
        return {}
    clashes: dict[int, Clash] = {}
    owners = _owners(transaction, [asked[number].request.lottery_session_id for number in fresh], lock=True)
    keys_taken: set[str] = set()
    for number in fresh:
        request, caller = asked[number]
        key, session = request.request_key, request.lottery_session_id
        if key in keys_taken:
            continue  # the first one of that key: this one is its repeat, or another request under the same key
        # One that is its own was accepted since we looked for the key: the insert finds that out.
        owner, owners_caller = owners.setdefault(session, (key, caller))
        if owner != key:
            clashes[number] = Clash.SESSION_IS_MINE if owners_caller == caller else Clash.SESSION_IS_ANOTHERS
        else:
            keys_taken.add(key)
    return clashes


def owners_of_sessions(transaction: Transaction, sessions: Sequence[str]) -> dict[str, str]:
    """Whose these sessions are: request keys by session id; those of nobody are absent."""
    return {session: key for session, (key, _) in _owners(transaction, sessions).items()}


def _owners(transaction: Transaction, sessions: Sequence[str], *, lock: bool = False) -> dict[str, tuple[str, str]]:
    """Request key and caller of these sessions, by session id; those of nobody are absent."""
    rows = transaction.select(
        f"SELECT lottery_session_id, request_key, caller FROM {table.name} WHERE lottery_session_id IN (??)",
        sorted(sessions),
        lock=lock,
    )
    return {session: (key, caller) for session, key, caller in rows}


def busy(transaction: Transaction, request_keys: Sequence[str], sessions: Sequence[str]) -> set[str]:
    """Which of these requests another open transaction holds, by request key; `sessions` are theirs, in their order.

    Held is a key, or a session, whose row the other one has locked, or has inserted and not committed. See
    Transaction.held for what `transaction` may be.
    """
    held: set[str] = set()
    for index, column, values in (
        ("PRIMARY", "request_key", request_keys),
        ("uk_request_lottery_session_id", "lottery_session_id", sessions),
    ):
        unknown = {value for key, value in zip(request_keys, values, strict=True) if key not in held}
        refused = transaction.held(table.name, index, column, unknown)
        held |= {key for key, value in zip(request_keys, values, strict=True) if value in refused}
    return held


def _insert_accepted(
    transaction: Transaction,
    new: Mapping[str, tuple[Asked, str]],
    now: datetime,
    publish_at: datetime,
    is_published: bool,
) -> None:
    moment, due = time_text(now), time_text(publish_at)
    transaction.insert(
        table.name,
        (*_REQUEST, "status", "caller", "accepted_at", "publish_attempts", "published_at", "publish_at"),
        [
            (
                *_request_values(it.request, fingerprint, moment),
                Status.ACCEPTED,
                it.caller,
                moment,
                1 if is_published else 0,
                moment if is_published else None,
                due,
            )
            # In the order of the keys: two that insert the same ones at once do not wait for each other in a circle.
            for _, (it, fingerprint) in sorted(new.items())
        ],
    )


def _request_values(request: Request, fingerprint: str, moment: str) -> tuple[str | int, ...]:
    return (
        request.request_key,
        request.lottery_session_id,
        request.account_id,
        request.terms,
        fingerprint,
        moment,
    )


# ---- settle ----------------------------------------------------------------------------------------------------------


def look_up(transaction: Transaction, request_keys: Sequence[str], *, lock: bool = False) -> dict[str, Known]:
    """What is on record of these requests, by request key; unknown ones are absent."""
    rows = transaction.select(
        f"SELECT request_key, {_KNOWN} FROM {table.name} WHERE request_key IN (??)",
        sorted(request_keys) if lock else request_keys,
        lock=lock,
    )
    return {
        key: Known(
            fingerprint,
            caller,
            status,
            result,
            None if settled_at is None else transaction.moment(settled_at),
            reason,
            None if balance is None else transaction.amount(balance),
            None if accepted_at is None or lock else datetime.fromisoformat(f"{accepted_at}+00:00"),
        )
        for key, fingerprint, caller, status, result, settled_at, reason, balance, accepted_at in rows
    }


def finish(
    transaction: Transaction, finished: Sequence[Finished], now: datetime, *, settled_by: str | None = None
) -> None:
    """Record outcomes: new rows in one statement, rows accepted before in another."""
    moment = time_text(now)
    transaction.insert(
        table.name,
        # `publish_at` is where the index finds them by age, as it does those that were accepted.
        (*_REQUEST, *_OUTCOME, "publish_at"),
        [
            (
                *_request_values(it.request, it.fingerprint, moment),
                it.status,
                it.reason,
                it.result,
                moment,
                it.deliveries,
                settled_by,
                moment,
            )
            for it in finished
            if not it.is_accepted
        ],
    )
    transaction.update(
        table.name,
        "request_key",
        _OUTCOME,
        [
            (it.request.request_key, it.status, it.reason, it.result, moment, it.deliveries, settled_by)
            for it in finished
            if it.is_accepted
        ],
        # Read without a lock: one that was given up meanwhile is dead, and must not be charged.
        where=f"status = '{Status.ACCEPTED}'",
    )


def give_up(connection: Connection, request_key: str, fingerprint: str, reason: str) -> bool:
    """accepted → dead, if that very request was accepted; whether it was."""
    return bool(
        connection.execute(
            update(table)
            .where(
                table.c.request_key == request_key,
                table.c.status == Status.ACCEPTED,
                table.c.fingerprint == fingerprint,
            )
            .values(status=Status.DEAD, reason=reason)
        ).rowcount
    )


def give_up_all(connection: Connection, given_up: Sequence[Request], reason: str) -> None:
    """accepted → dead for those of these very requests that were accepted."""
    if not given_up:
        return
    # A fingerprint covers its key: whoever has one of each has them both.
    connection.execute(
        update(table)
        .where(
            table.c.request_key.in_(sorted({it.request_key for it in given_up})),
            table.c.fingerprint.in_(sorted({it.fingerprint() for it in given_up})),
            table.c.status == Status.ACCEPTED,
        )
        .values(status=Status.DEAD, reason=reason)
    )


def revive(
    connection: Connection,
    request_keys: Sequence[str],
    now: datetime,
    *,
    publish_at: datetime | None = None,
    is_published: bool = False,
) -> int:
    """dead → accepted, for an operator's replay; return how many were dead.

    As with `accept`: the relay looks after them from `publish_at` on (default: now), `is_published` says that the
    caller publishes them himself, once, after the commit.
    """
    return connection.execute(
        update(table)
        .where(table.c.request_key.in_(request_keys), table.c.status == Status.DEAD)
        .values(
            status=Status.ACCEPTED,
            reason=None,
            publish_attempts=1 if is_published else 0,
            publish_error=None,
            published_at=now if is_published else None,
            publish_at=publish_at or now,
            accepted_at=now,  # its time begins anew, or it would be timed out at once
        )
    ).rowcount


# ---- the outbox ------------------------------------------------------------------------------------------------------


def is_any_overdue(connection: Connection, now: datetime) -> bool:
    """Whether the relay has anything to look at."""
    return connection.execute(select(table.c.request_key).where(_is_overdue(now)).limit(1)).first() is not None


def last_settled_publish(connection: Connection) -> datetime | None:
    """The latest publish among those that settled after their first one; None if that cannot be told.

    A queue is first in, first out: what was published well before that, and has not settled, is in no queue.
    """
    moments = [
        connection.execute(
            select(table.c.published_at)
            .where(table.c.status == status, table.c.publish_at.is_not(None), table.c.publish_attempts == 1)
            .order_by(table.c.publish_at.desc())
            .limit(1)
        ).scalar()
        for status in (Status.COMPLETED, Status.REJECTED)  # one by one, each along the index
    ]
    return max((moment for moment in moments if moment is not None), default=None)


def overtaken_before(connection: Connection, after_s: float) -> datetime | None:
    """A request published before this moment, and not settled, is in no queue; None: that cannot be told of any."""
    settled_up_to = last_settled_publish(connection)
    return None if settled_up_to is None else settled_up_to - timedelta(seconds=after_s)


class Lease(NamedTuple):
    """What one pass of the relay took: `due` is to be published, `dead` was given up."""

    due: list[Request]
    dead: list[Request]


def lease(
    connection: Connection,
    now: datetime,
    *,
    rows_max: int,
    tries_max: int,
    delay_after: Callable[[int], timedelta],
    published_before: datetime | None,
) -> Lease:
    """Take up to `rows_max` overdue requests: those with tries left are put off and returned, the others are dead.

    Nobody else takes them before `delay_after(attempts)`, so a relay that dies now costs time and nothing else.
    Of those that were published, only the ones from before `published_before`; None takes them all.
    """
    condition = _is_overdue(now)
    if published_before is not None:
        condition = and_(condition, or_(table.c.published_at.is_(None), table.c.published_at < published_before))
        # Mostly none has been overtaken: that is not worth a lock on every row of a backlog.
        if connection.execute(select(table.c.request_key).where(condition).limit(1)).first() is None:
            return Lease([], [])
    rows = connection.execute(
        select(
            table.c.request_key, table.c.lottery_session_id, table.c.account_id, table.c.campaign,
            table.c.publish_attempts,
        )
        .where(condition)
        .order_by(table.c.publish_at)
        .limit(rows_max)
        .with_for_update(skip_locked=True)
    ).all()  # fmt: skip
    dead = [request_of(row) for row in rows if row.publish_attempts >= tries_max]
    _mark_dead(connection, dead, DeadReason.NEVER_SETTLED)
    due = [row for row in rows if row.publish_attempts < tries_max]
    for attempts in {row.publish_attempts for row in due}:
        keys = [row.request_key for row in due if row.publish_attempts == attempts]
        connection.execute(
            update(table)
            .where(table.c.request_key.in_(keys))
            .values(
                publish_attempts=attempts + 1,
                publish_error=None,
                published_at=now,
                publish_at=now + delay_after(attempts + 1),
            )
        )
    return Lease([request_of(row) for row in due], dead)


def put_off(connection: Connection, request_keys: Sequence[str], error: str, publish_at: datetime) -> None:
    """The broker did not take these: that was no attempt, and says nothing against them."""
    connection.execute(
        update(table)
        .where(table.c.request_key.in_(request_keys), table.c.status == Status.ACCEPTED)
        .values(
            publish_attempts=table.c.publish_attempts - 1,
            publish_error=error[:PUBLISH_ERROR_LENGTH_MAX],
            published_at=None,
            publish_at=publish_at,
        )
    )


def try_writing(engine: Engine) -> None:
    """Write nothing, in the way in which a settled request is written.

    Raises ServiceUnavailable or ConfigurationError when the database cannot be used for that: away, read-only.
    """
    try:
        with engine.begin() as connection:
            connection.execute(update(table).where(table.c.request_key == "").values(status=Status.DEAD))
    except SQLAlchemyError as error:
        raise explain(error) from error


def postpone(engine: Engine, request_keys: Sequence[str], delay: timedelta) -> None:
    """Let the relay leave these alone for so long: a worker has them in hand. Locked rows are skipped.

    Raises the driver's errors.
    """
    if not request_keys:
        return
    with engine.begin() as connection:
        free = connection.execute(
            select(table.c.request_key)
            .where(table.c.request_key.in_(request_keys), table.c.status == Status.ACCEPTED)
            .with_for_update(skip_locked=True)
        ).scalars()
        connection.execute(
            update(table).where(table.c.request_key.in_(list(free))).values(publish_at=clock.now(connection) + delay)
        )


def time_out(connection: Connection, accepted_before: datetime, *, rows_max: int) -> list[Request]:
    """accepted → dead for what was accepted too long ago, whatever the reason; return them."""
    rows = connection.execute(
        select(table.c.request_key, table.c.lottery_session_id, table.c.account_id, table.c.campaign)
        .where(table.c.status == Status.ACCEPTED, table.c.accepted_at < accepted_before)
        .limit(rows_max)
        .with_for_update(skip_locked=True)
    ).all()
    dead = [request_of(row) for row in rows]
    _mark_dead(connection, dead, DeadReason.TIMED_OUT)
    return dead


def states_of_sessions(connection: Connection, lottery_session_ids: Sequence[str]) -> dict[str, State]:
    """How those of these sessions stand that are under way no longer, by session id; at most 500 at once.

    An archived result is not rebuilt: state_of_session does that.
    """
    rows = connection.execute(
        select(table).where(table.c.lottery_session_id.in_(lottery_session_ids), table.c.status != Status.ACCEPTED)
    )
    return {
        row.lottery_session_id: State(
            request_of(row),
            row.caller,
            row.status,
            row.reason,
            None if row.result is None else row.result.encode(),
            row.settled_at,
        )
        for row in rows
    }


def oldest_accepted(connection: Connection) -> datetime | None:
    """When the oldest of the requests under way was accepted; None while there is none."""
    oldest: datetime | None = connection.execute(
        select(func.min(table.c.accepted_at)).where(table.c.status == Status.ACCEPTED)
    ).scalar()
    return oldest


def count_accepted_once(connection: Connection) -> int:
    """count_accepted at its cheapest: whether the table can be read at all."""
    return count_accepted(connection, count_max=1)


def count_accepted(connection: Connection, *, count_max: int) -> int:
    """How many requests are under way, counted no further than `count_max`."""
    some = select(table.c.request_key).where(table.c.status == Status.ACCEPTED).limit(count_max).subquery()
    return int(connection.execute(select(func.count()).select_from(some)).scalar_one())


def count_accepted_by_caller(connection: Connection) -> dict[str, int]:
    """How many requests each caller has under way; those with none are not in it. Reads the row of each of them."""
    rows = connection.execute(
        select(table.c.caller, func.count()).where(table.c.status == Status.ACCEPTED).group_by(table.c.caller)
    )
    return {str(caller): int(count) for caller, count in rows}


def _is_overdue(now: datetime) -> ColumnElement[bool]:
    return and_(table.c.status == Status.ACCEPTED, table.c.publish_at <= now)


def _mark_dead(connection: Connection, dead: Sequence[Request], reason: str) -> None:
    if dead:
        keys = [request.request_key for request in dead]
        connection.execute(update(table).where(table.c.request_key.in_(keys)).values(status=Status.DEAD, reason=reason))


# ---- look, and archive -----------------------------------------------------------------------------------------------


class State(NamedTuple):
    """A session as it stands: `result` are the first result's bytes, None while there is none."""

    request: Request
    caller: str
    status: str
    reason: str | None
    result: bytes | None
    settled_at: datetime | None


def state_of_session(connection: Connection, lottery_session_id: str) -> State | None:
    """How the draw of this session stands; None for a session that nobody has asked for."""
    row = connection.execute(select(table).where(table.c.lottery_session_id == lottery_session_id)).first()
    if row is None:
        return None
    request = request_of(row)
    body = None if row.result is None else row.result.encode()
    if body is None and row.status == Status.COMPLETED:
        rows = postings_of_request(connection, lottery_session_id, request.request_key)
        body = operations.operation_of(request).result(request, rows)
    elif body is None and row.status == Status.REJECTED:
        body = operations.operation_of(request).result(request, Rejection(row.reason, row.balance_told))
    return State(request, row.caller, row.status, row.reason, body, row.settled_at)


def archive(connection: Connection, settled_before: datetime, *, rows_max: int) -> int:
    """Drop the results' text of up to `rows_max` requests settled before then; return how many.

    Everything that an answer is rebuilt from stays: for ever in the ledger, and in the few columns of a rejection.
    """
    rows = connection.execute(
        select(table.c.request_key, table.c.status, table.c.result)
        .where(
            table.c.status.in_((Status.COMPLETED, Status.REJECTED)),
            table.c.settled_at < settled_before,
            # The index leads to the oldest ones; without a time they were archived already.
            table.c.publish_at < settled_before,
        )
        .limit(rows_max)
        .with_for_update(skip_locked=True)
    ).all()
    kept = {
        row.request_key: parse_result_head(row.result.encode()).balance_after
        for row in rows
        if row.status == Status.REJECTED
    }
    for balance in set(kept.values()):
        keys = [key for key, told in kept.items() if told == balance]
        connection.execute(
            update(table)
            .where(table.c.request_key.in_(keys))
            .values(result=None, publish_at=None, balance_told=None if balance is None else Decimal(balance))
        )
    keys = [row.request_key for row in rows if row.status == Status.COMPLETED]
    if keys:
        connection.execute(update(table).where(table.c.request_key.in_(keys)).values(result=None, publish_at=None))
    return len(rows)


def request_of(row: Any) -> Request:
    """The request that a row of the table stands for."""
    return operations.restore(row.request_key, row.lottery_session_id, row.account_id, row.campaign)
