"""Webhooks: which events go to which URL. Operators add, rotate and remove them, each with a reason and on record.

Processes read the live webhooks once a second (Subscriptions, the relay): a change holds from a second later on. The
secret is returned when it is made, and by no other function than `live`, with which the relay signs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import Connection, Engine, func, insert, select, update

from tombola.producers.domain.contract import CAMPAIGN_DEFAULT
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage import clock
from tombola.producers.storage.schema import campaigns
from tombola.producers.storage.schema import webhooks as table
from tombola.worker.fulfilments.addresses import checked_url
from tombola.worker.fulfilments.events import DRAW_SETTLED, EVERY, checked_events
from tombola.worker.fulfilments.signatures import make_secret
from tombola.worker.operators import actions
from tombola.worker.operators.once import once

LIVE_MAX: Final = 20  # each draw writes a row for each webhook that subscribes to it
EVENTS_LENGTH_MAX: Final = 255
FORMER_SECRET_TIME: Final = timedelta(hours=24)
_is_name = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}").fullmatch


class Webhook(NamedTuple):
    """A webhook as it is listed, without its secrets. `campaign` None is all campaigns.

    Until `former_until` messages are signed by the former secret as well.
    """

    name: str
    url: str
    events: tuple[str, ...]
    campaign: str | None
    former_until: datetime | None
    created_by: str
    created_at: datetime
    removed_at: datetime | None

    def takes(self, event: str, campaign: str) -> bool:
        """Whether it subscribes to this event of this campaign. `*` are all events except `draw.settled`."""
        return takes(self.events, self.campaign, event, campaign)


def takes(events: Sequence[str], own_campaign: str | None, event: str, campaign: str) -> bool:
    """Whether a webhook with `events`, of `own_campaign` or of all (None), takes an event of `campaign`."""
    if own_campaign is not None and own_campaign != campaign:
        return False
    return event in events or (event != DRAW_SETTLED and EVERY in events)


class Signer(NamedTuple):
    """A live webhook, and the secrets that sign what is sent to it: one, or two while a secret is rotated."""

    webhook: Webhook
    secrets: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Signer({self.webhook.name!r})"


# ---- what operators do -----------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """A webhook to add. `campaign` empty is all campaigns."""

    name: str
    url: str
    events: tuple[str, ...]
    campaign: str = ""


def add(engine: Engine, wanted: Wanted, *, is_private_allowed: bool, operator: str, reason: str) -> str:
    """Add a webhook, or add a removed one again; return its secret, which is shown this once and never again.

    Raises InvalidRequest for a name that is taken or is none, a URL that is not allowed (see addresses), an event or a
    campaign that cannot be, and more than LIVE_MAX webhooks; ServiceUnavailable or ConfigurationError when the database
    cannot be used.
    """
    why = actions.checked_reason(reason)
    if not _is_name(wanted.name):
        raise InvalidRequest(
            f"a webhook's name is 1 to 64 characters of A-Z a-z 0-9 . _ and -, and begins with a letter or a digit: "
            f"{wanted.name!r:.80}"
        )
    checked_url(wanted.url, is_private_allowed=is_private_allowed)
    events = checked_events(wanted.events)
    told = msgspec.json.encode(events).decode()
    if len(told) > EVENTS_LENGTH_MAX:
        raise InvalidRequest(f"the events of one webhook take at most {EVENTS_LENGTH_MAX} characters: add a second one")
    secret = make_secret()

    def act(connection: Connection) -> str:
        now = clock.now(connection)
        row = _locked(connection, wanted.name)
        if row is not None and row.removed_at is None:
            raise InvalidRequest(f"there is a webhook {wanted.name} already: remove it first, or choose another name")
        if _count_live(connection) >= LIVE_MAX:
            raise InvalidRequest(f"there are {LIVE_MAX} webhooks, and may be no more: remove one first")
        _check_campaign(connection, wanted.campaign)
        values = {
            "url": wanted.url,
            "secret": secret,
            "events": told,
            "campaign": wanted.campaign or None,
            "former_secret": None,
            "former_until": None,
            "created_by": operator[:100],
            "created_at": now,
            "removed_at": None,
        }
        if row is None:
            connection.execute(insert(table).values(name=wanted.name, **values))
        else:
            connection.execute(update(table).where(table.c.name == wanted.name).values(**values))
        details = {"webhook": wanted.name, "url": wanted.url, "events": events, "campaign": wanted.campaign}
        actions.record(connection, operator=operator, action="webhook add", reason=why, count=1, details=details)
        return secret

    return once(engine, act)


def rotate(engine: Engine, name: str, *, operator: str, reason: str) -> str:
    """Make a new secret for a webhook; return it, which is shown this once. The former one signs for 24 hours more.

    Raises InvalidRequest for a webhook that is not live; ServiceUnavailable or ConfigurationError when the database
    cannot be used.
    """
    why = actions.checked_reason(reason)
    secret = make_secret()

    def act(connection: Connection) -> str:
        row = _live(connection, name)
        until = clock.now(connection) + FORMER_SECRET_TIME
        connection.execute(
            update(table)
            .where(table.c.name == name)
            .values(secret=secret, former_secret=row.secret, former_until=until)
        )
        details = {"webhook": name, "former_until": until.isoformat(timespec="seconds")}
        actions.record(connection, operator=operator, action="webhook rotate", reason=why, count=1, details=details)
        return secret

    return once(engine, act)


def remove(engine: Engine, name: str, *, operator: str, reason: str) -> None:
    """Send nothing more to a webhook. What is still pending for it becomes dead, and can be replayed if it is added
    again under the same name.

    Raises InvalidRequest for a webhook that is not live; ServiceUnavailable or ConfigurationError when the database
    cannot be used.
    """
    why = actions.checked_reason(reason)

    def act(connection: Connection) -> None:
        row = _live(connection, name)
        connection.execute(
            update(table)
            .where(table.c.name == name)
            .values(removed_at=clock.now(connection), secret="", former_secret=None, former_until=None)
        )
        details = {"webhook": name, "url": row.url}
        actions.record(connection, operator=operator, action="webhook remove", reason=why, count=1, details=details)

    once(engine, act)


# ---- rows ------------------------------------------------------------------------------------------------------------

_LISTED: Final = [table.c[name] for name in Webhook._fields]


def list_all(connection: Connection) -> list[Webhook]:
    """All webhooks by name, removed ones among them."""
    return [_webhook(row) for row in connection.execute(select(*_LISTED).order_by(table.c.name))]


def live(connection: Connection) -> list[Signer]:
    """The live webhooks with their secrets, the oldest first."""
    now = clock.now(connection)
    query = select(table).where(table.c.removed_at.is_(None)).order_by(table.c.created_at, table.c.name).limit(LIVE_MAX)
    return [
        Signer(
            _webhook(row),
            (row.secret, row.former_secret)
            if row.former_secret is not None and row.former_until > now
            else (row.secret,),
        )
        for row in connection.execute(query)
    ]


def find_live(connection: Connection, name: str) -> Signer:
    """The live webhook of that name. Raises InvalidRequest if there is none."""
    found = next((it for it in live(connection) if it.webhook.name == name), None)
    if found is None:
        raise InvalidRequest(f"there is no webhook {name!r:.80}: `tombola webhook list` shows them")
    return found


def _webhook(row: Any) -> Webhook:
    values = {name: getattr(row, name) for name in Webhook._fields}
    return Webhook(**values | {"events": tuple(msgspec.json.decode(row.events))})


def _locked(connection: Connection, name: str) -> Any:
    return connection.execute(select(table).where(table.c.name == name).with_for_update()).first()


def _live(connection: Connection, name: str) -> Any:
    row = _locked(connection, name) if _is_name(name) else None
    if row is None or row.removed_at is not None:
        raise InvalidRequest(f"there is no webhook {name!r:.80}: `tombola webhook list` shows them")
    return row


def _count_live(connection: Connection) -> int:
    query = select(func.count()).select_from(table).where(table.c.removed_at.is_(None))
    return int(connection.execute(query).scalar_one())


def _check_campaign(connection: Connection, name: str) -> None:
    if name in ("", CAMPAIGN_DEFAULT):
        return
    is_known = name.isascii() and connection.execute(select(campaigns.c.name).where(campaigns.c.name == name)).first()
    if not is_known:
        raise InvalidRequest(f"there is no campaign {name!r:.80}: `tombola campaign list` shows them")
