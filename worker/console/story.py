"""The story of a draw: everything on record about it, on one timeline. Found by request key or lottery session.

An account has a story, too: its latest draws and its dead letters. Every query uses an index: the time does not depend
on the size of the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, Literal, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Connection, or_, select

from tombola.producers.domain.causes import OPEN_STATES, FulfilmentState, LetterState, Status
from tombola.producers.storage import ledger, requests
from tombola.producers.storage.ledger import Account
from tombola.producers.storage.schema import (
    api_idempotency_requests,
    asset_transactions,
    dead_letters,
    operator_actions,
    replays,
)
from tombola.worker.audit.audits import AUDIT
from tombola.worker.console import movements
from tombola.worker.fulfilments import fulfilments
from tombola.worker.fulfilments.fulfilments import Fulfilment
from tombola.worker.movements.settling import SETTLED_BY
from tombola.worker.operators.actions import Action

# The colour of an event, which leads the eye to what went wrong.
Tone = Literal["plain", "good", "bad", "busy"]

DRAWS_MAX: Final = 50
DEAD_LETTERS_MAX: Final = 50
FULFILMENTS_MAX: Final = 500  # a hundred pulls, and several webhooks
ACTIONS_MAX: Final = 500  # read in search of a dead letter's id
RETRIED_SOON: Final = timedelta(milliseconds=1)

# Without the large columns: the dead letter's own page shows them.
_SUMMARY: Final = [
    column for column in dead_letters.columns if column.name not in ("body", "traceback", "headers", "body_sha256")
]


class Event(NamedTuple):
    """An event of the timeline: `what` in two or three words, `text` with details, `link` to the event's own page."""

    at: datetime
    what: str
    text: str = ""
    tone: Tone = "plain"
    link: str = ""


class SessionSum(NamedTuple):
    """A lottery session in an account's list: the sum of its ledger rows."""

    lottery_session_id: str
    at: datetime
    business_types: tuple[str, ...]
    amount: Decimal
    balance_after: Decimal


class Story(NamedTuple):
    """The story of `query`, which is a draw or another request, an account, or nothing, as `kind` says.

    `fields` are those of the request's own kind. `later` are ledger rows by which other requests took it back or ended
    it: the refund of a draw, the post or the void of a hold.
    """

    query: str
    kind: Literal["draw", "account", "nothing"]
    events: Sequence[Event] = ()
    request: dict[str, Any] | None = None
    lottery_session_id: str | None = None
    ledger_rows: Sequence[dict[str, Any]] = ()
    result: bytes | None = None
    dead_letters: Sequence[Any] = ()
    account: Account | None = None
    account_id: int | None = None
    draws: Sequence[SessionSum] = ()
    fulfilments: Sequence[Fulfilment] = ()
    fields: Sequence[tuple[str, Any]] = ()
    later: Sequence[dict[str, Any]] = ()

    @property
    def is_movement(self) -> bool:
        """Whether the request is of another kind than a draw."""
        return self.request is not None and self.request["kind"] not in (None, "draw")

    @property
    def can_be_refunded(self) -> bool:
        """Whether this is a completed draw that no refund has taken back."""
        is_completed = self.request is not None and self.request["status"] == Status.COMPLETED
        return self.kind == "draw" and is_completed and not self.is_movement and not self.later


def find(connection: Connection, query: str, *, letter_as: Callable[[Any], Any] = lambda row: row) -> Story:
    """The story of a request key, a lottery session or, if `query` is neither, an account id.

    `letter_as` turns a dead letter's row into what the reader can see of it.
    """
    query = query.strip()
    if not query or len(query) > 100 or not query.isascii():
        return Story(query, "nothing")
    story = _of_draw(connection, query, letter_as)
    if story is None and query.isdecimal() and int(query) < 2**63:
        story = _of_account(connection, query, letter_as)
    return story or Story(query, "nothing")


# ---- a draw ----------------------------------------------------------------------------------------------------------


def _of_draw(connection: Connection, query: str, letter_as: Callable[[Any], Any]) -> Story | None:
    request = _request(connection, api_idempotency_requests.c.request_key == query) or _request(
        connection, api_idempotency_requests.c.lottery_session_id == query
    )
    keys = {query} if request is None else {request["request_key"]}
    sessions = {query} if request is None else {request["lottery_session_id"]}
    letters = _letters(connection, keys, sessions)
    if request is None and letters:
        # Without a request's row, a dead letter may name the session of a key, or the key of a session.
        sessions |= {it.lottery_session_id for it in letters if it.lottery_session_id}
        letters = _letters(connection, keys | {it.request_key for it in letters if it.request_key}, sessions)
    letters = [letter_as(it) for it in letters]
    rows = [row for session in sorted(sessions) for row in ledger.session_rows(connection, session)]
    if request is None and not letters and not rows:
        return None
    session = request["lottery_session_id"] if request else next(iter(sorted(sessions - keys)), query)
    state = None if request is None else requests.state_of_session(connection, session)
    account_id = next(
        (it for it in (request and request["account_id"], *[row["account_id"] for row in rows],
                       *[it.account_id for it in letters]) if it is not None),
        None,
    )  # fmt: skip
    delivered = fulfilments.of_sessions(connection, sorted(sessions), rows_max=FULFILMENTS_MAX)
    later = [] if request is None else movements.later_rows(connection, request["request_key"], session)
    events = _request_events(request) + _ledger_events(rows) + _letter_events(letters) + _fulfilment_events(delivered)
    events += _ledger_events(later, is_later=True)
    events += _replay_events(connection, letters)
    return Story(
        query,
        "draw",
        events=sorted(events, key=lambda event: event.at),  # stable: simultaneous events stay in the order above
        request=request,
        lottery_session_id=session,
        ledger_rows=rows,
        result=None if state is None else state.result,
        dead_letters=letters,
        account=None if account_id is None else ledger.find_account(connection, account_id),
        account_id=account_id,
        fulfilments=delivered,
        fields=movements.fields_of(request),
        later=later,
    )


def _request(connection: Connection, condition: ColumnElement[bool]) -> dict[str, Any] | None:
    row = connection.execute(select(api_idempotency_requests).where(condition)).mappings().first()
    return None if row is None else dict(row)


def _letters(connection: Connection, keys: set[str], sessions: set[str]) -> list[Any]:
    """Dead letters of a draw, the oldest first. Two queries: for an OR, databases often use neither index."""
    found: dict[int, Any] = {}
    for condition in (
        dead_letters.c.request_key.in_(sorted(keys)),
        dead_letters.c.lottery_session_id.in_(sorted(sessions)),
    ):
        for row in connection.execute(select(*_SUMMARY).where(condition).limit(DEAD_LETTERS_MAX)):
            found[row.id] = row
    # Edited copies and originals, which may name another key or session.
    originals = {row.edited_from for row in found.values() if row.edited_from is not None}
    for condition in (dead_letters.c.id.in_(originals - found.keys()), dead_letters.c.edited_from.in_(list(found))):
        for row in connection.execute(select(*_SUMMARY).where(condition).limit(DEAD_LETTERS_MAX)):
            found[row.id] = row
    return [found[id] for id in sorted(found)]


def _request_events(request: dict[str, Any] | None) -> list[Event]:
    if request is None:
        return []
    events = []
    by = f"by {request['caller']}" if request["caller"] else "by a caller without an API key"
    if request["accepted_at"] is None:
        without = "settled at once, without an accept"
        if not str(request["settled_by"]).startswith(SETTLED_BY):
            without = "published by another producer, without an accept"
        events.append(Event(request["created_at"], "first seen", without))
    else:
        again = request["accepted_at"] - request["created_at"] > RETRIED_SOON
        campaign = f", campaign {request['campaign']}" if request["campaign"] else ""
        first = Event(request["created_at"], "accepted", f"{by}{campaign}", "good")
        events.append(first)
        if again:
            events.append(Event(request["accepted_at"], "accepted again", "revived by a replay", "busy"))
    if request["published_at"] is not None:
        attempts = request["publish_attempts"]
        text = (
            "the first attempt" if attempts == 1 else f"attempt {attempts}, the latest; earlier ones are not on record"
        )
        events.append(Event(request["published_at"], "published", text))
    if request["settled_at"] is not None:
        events.append(_settled(request))
    return events


def _settled(request: dict[str, Any]) -> Event:
    parts = [request["reason"] or ""]
    if request["settled_by"]:
        parts.append(f"by {request['settled_by']}")
    if request["deliveries"]:
        parts.append("at the first delivery" if request["deliveries"] == 1 else f"at delivery {request['deliveries']}")
    tone: Tone = "good" if request["status"] == Status.COMPLETED else "bad"
    return Event(request["settled_at"], request["status"], ", ".join(filter(None, parts)), tone)


def _ledger_events(rows: Sequence[dict[str, Any]], *, is_later: bool = False) -> list[Event]:
    """The ledger rows; those of later requests lead to the stories of these."""
    return [
        Event(
            row["created_at"],
            row["business_type"].replace("_", " "),
            f"{row['delta_amount']:+.2f} {row['asset_code']}, account {row['account_id']}: "
            f"{row['balance_before']:.2f} → {row['balance_after']:.2f}",
            "busy" if is_later else "good",
            f"/story?q={row['lottery_session_id']}" if is_later else "",
        )
        for row in rows
    ]


def _letter_events(letters: Sequence[Any]) -> list[Event]:
    events = []
    for it in letters:
        name, link = f"dead letter {it.id}", f"/dead-letters/{it.id}"
        if it.edited_from is not None:
            events.append(Event(it.first_parked_at, "edited", f"{name} is a copy of {it.edited_from}", "busy", link))
        else:
            by = f" by {it.worker}" if it.worker and it.times_parked == 1 else ""
            why = f" ({it.cause}: {it.error})" if it.times_parked == 1 else ""
            events.append(Event(it.first_parked_at, "parked", f"{name}{by}{why}", "bad", link))
        if it.times_parked > 1 and it.last_parked_at > it.first_parked_at:
            by = f" by {it.worker}" if it.worker else ""
            text = f"{name}, {it.times_parked} times so far{by} ({it.cause}: {it.error})"
            events.append(Event(it.last_parked_at, "parked again", text, "bad", link))
        if it.state_at is not None and it.state not in OPEN_STATES:
            tone: Tone = "good" if it.state == LetterState.SETTLED else "busy"
            events.append(Event(it.state_at, it.state, name, tone, link))
    return events


def _fulfilment_events(found: Sequence[Fulfilment]) -> list[Event]:
    """The end of each fulfilment, or that it is still under way: earlier attempts are not on record."""
    events = []
    for it in found:
        link = f"/fulfilments?session={it.lottery_session_id}"
        to = f"to webhook {it.webhook}" if it.webhook else "and no webhook has subscribed yet"
        tries = "at the first attempt" if it.attempts == 1 else f"after {it.attempts} attempts"
        if it.state == FulfilmentState.PENDING:
            failed = f", {it.attempts} failed so far: {it.error}" if it.error else ""
            events.append(Event(it.created_at, f"{it.event} pending", f"{to}{failed}", "busy", link))
        elif it.ended_at is not None:
            tone: Tone = "good" if it.state == FulfilmentState.DELIVERED else "bad"
            why = f": {it.error}" if it.state == FulfilmentState.DEAD else ""
            events.append(Event(it.ended_at, f"{it.event} {it.state}", f"{to} {tries}{why}", tone, link))
    return events


def _replay_events(connection: Connection, letters: Sequence[Any]) -> list[Event]:
    """Operators' actions on these dead letters: the last replay of each, and other actions that name one of them."""
    if not letters:
        return []
    events = []
    ids = {it.replay_id for it in letters if it.replay_id is not None}
    for row in connection.execute(select(replays).where(replays.c.id.in_(sorted(ids)))) if ids else ():
        link = f"/replays/{row.id}"
        events.append(Event(row.started_at, f"replay {row.id}", f"by {row.operator}: {row.reason}", "busy", link))
        if row.ended_at is not None:
            why = f": {row.stopped_because}" if row.stopped_because else ""
            events.append(
                Event(row.ended_at, f"replay {row.id} {row.status}", f"{row.settled} settled{why}", link=link)
            )
    for action in _actions_about(connection, {it.id for it in letters}, min(it.first_parked_at for it in letters)):
        if action.replay_id is None:
            events.append(Event(action.at, action.action, f"by {action.operator}: {action.reason}", "busy"))
    return events


def _actions_about(connection: Connection, ids: set[int], since: datetime) -> list[Action]:
    """Those of the latest actions that name one of these dead letters."""
    query = (
        select(operator_actions)
        .where(operator_actions.c.at >= since, or_(operator_actions.c.action.not_in(("login", "user add", AUDIT))))
        .order_by(operator_actions.c.id.desc())
        .limit(ACTIONS_MAX)
    )
    found = []
    for row in connection.execute(query):
        details = msgspec.json.decode(row.details)
        if _numbers(details) & ids:
            found.append(Action(**{**row._mapping, "details": details}))
    return found


def _numbers(details: Any) -> set[int]:
    """The ids of dead letters in an action's details, at any depth."""
    if isinstance(details, dict):
        named = set()
        for name, value in details.items():
            if isinstance(value, dict):
                named |= _numbers(value)
            elif name in ("id", "ids", "copy", "copy_id", "edited_from", "original"):
                named |= {it for it in (value if isinstance(value, list) else [value]) if isinstance(it, int)}
        return named
    return set()


# ---- an account ------------------------------------------------------------------------------------------------------


def _of_account(connection: Connection, query: str, letter_as: Callable[[Any], Any]) -> Story | None:
    account_id = int(query)
    account = ledger.find_account(connection, account_id)
    letters = connection.execute(
        select(*_SUMMARY)
        .where(dead_letters.c.account_id == account_id)
        .order_by(dead_letters.c.id.desc())
        .limit(DEAD_LETTERS_MAX)
    ).all()
    if account is None and not letters:
        return None
    return Story(
        query,
        "account",
        account=account,
        account_id=account_id,
        draws=_draws(connection, account_id),
        dead_letters=[letter_as(it) for it in letters],
    )


def _draws(connection: Connection, account_id: int) -> list[SessionSum]:
    """The latest sessions in an account's ledger, newest first. Rejected draws have no ledger rows."""
    table = asset_transactions
    # Ordered by the index's columns only; the few rows of one moment are sorted below.
    rows = connection.execute(
        select(table)
        .where(table.c.account_id == account_id)
        .order_by(table.c.created_at.desc())
        .limit(2 * DRAWS_MAX + 1)
    ).all()
    by_session: dict[str, list[Any]] = {}
    for row in rows:
        by_session.setdefault(row.lottery_session_id, []).append(row)
    return [
        SessionSum(
            session,
            mine[0].created_at,
            tuple(row.business_type for row in sorted(mine, key=lambda row: row.transaction_id)),
            sum((row.delta_amount for row in mine), Decimal(0)),
            max(mine, key=lambda row: row.transaction_id).balance_after,
        )
        for session, mine in list(by_session.items())[:DRAWS_MAX]
    ]
