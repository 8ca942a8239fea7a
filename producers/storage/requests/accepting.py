"""Accept requests: one row each, which is a promise once its transaction has committed."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence, Set
from datetime import datetime
from typing import Final, NamedTuple

from tombola.producers.domain import keys
from tombola.producers.domain.causes import Status
from tombola.producers.domain.contract import DrawRequest, Request
from tombola.producers.storage.faults import RowsChanged, is_duplicate_key
from tombola.producers.storage.requests.records import (
    EPOCH_COLUMN,
    REQUEST_COLUMNS,
    RequestRecord,
    kind_columns,
    kind_values,
    look_up,
    request_values,
)
from tombola.producers.storage.schema import api_idempotency_requests as table
from tombola.producers.storage.transactions import Transaction, time_text

TAKEN_TRIES_MAX: Final = 5


class Submission(NamedTuple):
    """A request and its caller: the name behind an API key, empty where no API key is needed.

    `odds_hash` is the version of its campaign that the request is drawn by; None for the built-in campaign.
    """

    request: Request
    caller: str = ""
    odds_hash: str | None = None


class Clash(enum.Enum):
    """Why a submission is refused: its key or its session belongs to another request."""

    KEY_IS_MINE = "the caller has used the key for another request"
    KEY_IS_ANOTHERS = "another caller has used the key"
    SESSION_IS_MINE = "another request of the caller has the session"
    SESSION_IS_ANOTHERS = "a request of another caller has the session"


class Acceptance(NamedTuple):
    """The answer to a submission. A conflict discloses nothing about the request that holds the key.

    `request` is the request as its row has it: under an alias where another caller holds its name
    (producers.domain.keys.alias). `record` is None in a conflict, and `clash` says why.
    """

    request: Request
    record: RequestRecord | None
    is_new: bool = False
    clash: Clash | None = None

    @property
    def is_conflict(self) -> bool:
        """Whether the key or the session belongs to another request."""
        return self.record is None


def accept(
    transaction: Transaction,
    submissions: Sequence[Submission],
    now: datetime,
    *,
    publish_at: datetime,
    is_published: bool,
    seed_epoch: int | None = None,
) -> list[Acceptance]:
    """Accept requests inside `transaction`, and answer each submission in order; the commit makes them a promise.

    A request with a row is answered with that row. A row without a caller (its message came by the broker alone) gets
    the caller of the submission. The relay publishes new requests from `publish_at` on; `is_published` says that the
    calling code publishes them once, after the commit. New draws bind to the epoch of `now`, `seed_epoch`; without one
    they bind when they settle.
    Raises the driver's errors; after a conflict other than a taken key the whole transaction must run again.
    """
    fingerprints = [it.request.fingerprint() for it in submissions]
    # Nearly all requests are new: insert first, and read only where a unique constraint objects. SQLite has one writer
    # at a time, so reading first is safe there, and SQLite would not undo an insert of many rows as a whole.
    is_careful = transaction.is_sqlite
    for _ in range(TAKEN_TRIES_MAX):
        keys_asked = [it.request.request_key for it in submissions]
        records = look_up(transaction, keys_asked, lock=True, with_odds=True) if is_careful else {}
        fresh = [number for number, it in enumerate(submissions) if it.request.request_key not in records]
        clashes = _taken_sessions(transaction, submissions, fresh) if is_careful else {}
        new: dict[str, tuple[Submission, str]] = {}
        for number in fresh:
            if number not in clashes:
                new.setdefault(submissions[number].request.request_key, (submissions[number], fingerprints[number]))
        try:
            _insert_accepted(transaction, new, now, publish_at, is_published, seed_epoch)
        except Exception as error:
            if not is_duplicate_key(error):
                raise
            is_careful = True
            continue
        unseen = set(new)
        records |= {
            key: RequestRecord(
                fingerprint,
                it.caller,
                Status.ACCEPTED,
                accepted_at=now,
                created_at=now,
                odds_hash=it.odds_hash,
                seed_epoch=seed_epoch if isinstance(it.request, DrawRequest) else None,
            )
            for key, (it, fingerprint) in new.items()
        }
        aliases = set(_aliases_of_unowned(transaction, submissions, records))
        adopted: dict[str, str] = {}
        answers = []
        for number, (it, fingerprint) in enumerate(zip(submissions, fingerprints, strict=True)):
            key = it.request.request_key
            clash = clashes.get(number) or clash_of(records[key], fingerprint, it.caller)
            if clash is None and it.caller and not records[key].caller and keys.alias(it.caller, key) in aliases:
                clash = Clash.KEY_IS_ANOTHERS  # for this caller the key names the request under the caller's alias
            if clash is not None:
                if clash is Clash.KEY_IS_ANOTHERS and it.caller:
                    aliases.add(keys.alias(it.caller, key))  # from here on in this batch, too
                answers.append(Acceptance(it.request, None, clash=clash))
                continue
            if it.caller and not records[key].caller:
                adopted[key] = it.caller
                records[key] = records[key]._replace(caller=it.caller)
            answers.append(Acceptance(it.request, records[key], key in unseen))
            unseen.discard(key)  # a second submission of one key in this batch is a repeat of the first
        transaction.update(table.name, "request_key", ("caller",), sorted(adopted.items()), where="LENGTH(caller) = 0")
        return answers
    raise RowsChanged(f"other transactions took keys of this batch {TAKEN_TRIES_MAX} times")


def _aliases_of_unowned(
    transaction: Transaction, submissions: Sequence[Submission], records: Mapping[str, RequestRecord]
) -> Set[str]:
    """The aliases with a row, among the callers' aliases for keys whose own rows have no caller."""
    aliases = [
        keys.alias(it.caller, it.request.request_key)
        for it in submissions
        if it.caller and (found := records.get(it.request.request_key)) is not None and not found.caller
    ]
    return look_up(transaction, aliases, lock=True).keys() if aliases else frozenset()


def clash_of(record: RequestRecord, fingerprint: str, caller: str) -> Clash | None:
    """Why a submission with that fingerprint and caller cannot be answered with `record`; None where it can.

    Where the row or the submission has no caller, equal content is the same request: a shop that has published a
    request past the gateway, and submits the request there as well, must not be charged twice.
    """
    if record.fingerprint == fingerprint and (record.caller == caller or not record.caller or not caller):
        return None
    return Clash.KEY_IS_MINE if record.caller == caller else Clash.KEY_IS_ANOTHERS


def _taken_sessions(
    transaction: Transaction, submissions: Sequence[Submission], fresh: Sequence[int]
) -> dict[int, Clash]:
    """The clashes of those of the `fresh` submissions whose session another request has, by index.

    The read locks, here and in `accept`: a locking read sees the rows of now, whatever the transaction saw before.
    """
    if not fresh:
        return {}
    clashes: dict[int, Clash] = {}
    owners = _owners(transaction, [submissions[number].request.lottery_session_id for number in fresh], lock=True)
    keys_taken: set[str] = set()
    for number in fresh:
        request, caller = submissions[number].request, submissions[number].caller
        key, session = request.request_key, request.lottery_session_id
        if key in keys_taken:
            continue  # not the first submission of its key: a repeat, or another request under the same key
        # A session owned by this very key means that the key was accepted since it was read: the insert finds that out.
        owner, owners_caller = owners.setdefault(session, (key, caller))
        if owner != key:
            clashes[number] = Clash.SESSION_IS_MINE if owners_caller == caller else Clash.SESSION_IS_ANOTHERS
        else:
            keys_taken.add(key)
    return clashes


def owners_of_sessions(transaction: Transaction, sessions: Sequence[str]) -> dict[str, str]:
    """The request keys that these sessions belong to, by session id; an unknown session is not in the result."""
    return {session: key for session, (key, _) in _owners(transaction, sessions).items()}


def _owners(transaction: Transaction, sessions: Sequence[str], *, lock: bool = False) -> dict[str, tuple[str, str]]:
    """Request key and caller of these sessions, by session id; an unknown session is not in the result."""
    rows = transaction.select(
        f"SELECT lottery_session_id, request_key, caller FROM {table.name} WHERE lottery_session_id IN (??)",
        sorted(sessions),
        lock=lock,
        index="uk_request_lottery_session_id",
    )
    return {session: (key, caller) for session, key, caller in rows}


def busy(transaction: Transaction, request_keys: Sequence[str], sessions: Sequence[str]) -> set[str]:
    """The request keys that another open transaction holds; `sessions[i]` is the session of `request_keys[i]`.

    A request is held while another transaction has locked a row with its key or its session, or has inserted such a
    row and not committed. See Transaction.held for what `transaction` may be.
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
    new: Mapping[str, tuple[Submission, str]],
    now: datetime,
    publish_at: datetime,
    is_published: bool,
    seed_epoch: int | None,
) -> None:
    moment, due = time_text(now), time_text(publish_at)
    kind = kind_columns(it.request for it, _ in new.values())
    bound = ("odds_hash",) if any(it.odds_hash is not None for it, _ in new.values()) else ()
    epoch = () if seed_epoch is None else EPOCH_COLUMN
    columns = (*REQUEST_COLUMNS, "status", "caller", "accepted_at", "publish_attempts", "published_at", "publish_at")
    transaction.insert(
        table.name,
        (*columns, *kind, *bound, *epoch),
        [
            (
                *request_values(it.request, fingerprint, moment),
                Status.ACCEPTED,
                it.caller,
                moment,
                1 if is_published else 0,
                moment if is_published else None,
                due,
                *kind_values(it.request, kind),
                *((it.odds_hash,) if bound else ()),
                *((seed_epoch if isinstance(it.request, DrawRequest) else None,) if epoch else ()),
            )
            # In the order of the keys: two transactions that insert the same keys at once do not deadlock.
            for _, (it, fingerprint) in sorted(new.items())
        ],
    )
