"""I12: every operator action is on record. What moved money or keys is compared with `operator_actions`, both ways.

Books of older releases hold recharges, accounts and API keys without a record. So only ledger rows with the note
ON_RECORD (worker.ledger.accounts) are looked up in the record. What the record names must exist in any case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, exists, func, select

from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.campaigns.record import read_draw_notes
from tombola.producers.domain.errors import DrawError, InvalidRequest
from tombola.producers.domain.operations.draw import CONSUME_TYPE
from tombola.producers.domain.operations.recharge import RECHARGE
from tombola.producers.domain.operations.refund import REFUND_TYPE
from tombola.producers.storage.api_keys import NO_BOUNDS, Bounds
from tombola.producers.storage.campaigns import CampaignState
from tombola.producers.storage.chunks import IN_LIST_MAX, chunks
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import (
    api_keys,
    campaign_stock_changes,
    campaign_versions,
    campaigns,
    dead_letters,
    operator_actions,
    operators,
    replays,
    webhooks,
)
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.worker.audit.by_operators import check_movements
from tombola.worker.audit.report import Violation
from tombola.worker.audit.stored import Unreadable, amount_of, stored
from tombola.worker.campaigns.versions import stock_changes
from tombola.worker.ledger.accounts import ACCOUNT_ADD, ACCOUNT_RECHARGE, ON_RECORD
from tombola.worker.ledger.changes import REFUND
from tombola.worker.ledger.old_rows import OldRows
from tombola.worker.operators.actions import USER_ADD, USER_REMOVE, USER_ROLE

API_KEY_ADD: Final = "api-key add"
API_KEY_REVOKE: Final = "api-key revoke"
WEBHOOK_ADD: Final = "webhook add"
WEBHOOK_REMOVE: Final = "webhook remove"
PUBLISH: Final = "campaign publish"
RESTOCK: Final = "campaign restock"
CODES_LOAD: Final = "campaign codes load"
STATES: Final = {
    "campaign open": CampaignState.OPEN,
    "campaign pause": CampaignState.PAUSED,
    "campaign close": CampaignState.CLOSED,
}
ID_MAX: Final = 2**63 - 1
UNREADABLE: Final = "its details cannot be read"

Found = tuple[str, str]  # the subject, and what is wrong with it


def check_record(connection: Connection) -> Iterator[Violation]:
    """What is missing from the record, and what the record says that is not so; without recharges."""
    for check in (_replays, check_movements, _api_keys, _users, _webhooks, _campaigns, _stock):
        for subject, what in check(connection):
            yield Violation("I12", subject, what)


class Recharges:
    """Recharges by operators: the same account and amount in the ledger and on record, once each.

    A recharge that no request has made is on record, unless it is older than the first one on record: older releases
    put none there. The record is read from above the action `after_id`; ledger rows that are older than it are looked
    up by their keys.
    """

    def __init__(self, after_id: int, old: OldRows) -> None:
        self._read_up_to = after_id
        self._old = old
        self._recorded: dict[str, tuple[int, str]] = {}
        self._first_id: int | None = None

    def check_rows(self, connection: Connection, after_id: int, up_to_id: int) -> Iterator[Violation]:
        """Look up the recharges among these ledger rows in the record."""
        ids = transactions.c.transaction_id
        rows = connection.execute(
            select(
                transactions.c.idempotency_key,
                transactions.c.account_id,
                stored(transactions.c.delta_amount),
            ).where(ids > after_id, ids <= up_to_id, transactions.c.notes == ON_RECORD)
        ).all()
        if rows:
            yield from self._read(connection)  # a row and its action are committed together
        for key, account_id, value in rows:
            said, is_so = self._recorded.pop(key, None), (account_id, _told(connection, value))
            if said is None:
                yield Violation("I12", f"recharge {key}", "it is not on record")
            elif said != is_so:
                what = f"is {is_so[1]} to account {account_id}, on record are {said[1]} to account {said[0]}"
                yield Violation("I12", f"recharge {key}", what)
        for key, account_id, value in self._without_record(connection, after_id, up_to_id):
            what = f"{_told(connection, value)} to account {account_id}: neither a request nor an operator made it"
            yield Violation("I12", f"recharge {key}", what)

    def _without_record(self, connection: Connection, after_id: int, up_to_id: int) -> Sequence[Any]:
        """The recharges among these ledger rows that neither a request nor, by its notes, an operator has made."""
        row = transactions.c
        if self._first_id is None:
            first = next(
                (it for _, _, it in recorded(connection, ACCOUNT_ADD, ACCOUNT_RECHARGE) if it and it.get("key")), {}
            )
            query = select(row.transaction_id).where(row.idempotency_key == str(first.get("key")))
            self._first_id = connection.execute(query).scalar() or ID_MAX
        is_requested = exists().where(requests.c.lottery_session_id == row.lottery_session_id)
        return connection.execute(
            select(row.idempotency_key, row.account_id, stored(row.delta_amount)).where(
                row.transaction_id > max(after_id, self._first_id),
                row.transaction_id <= up_to_id,
                row.business_type == RECHARGE,
                func.coalesce(row.notes, "") != ON_RECORD,
                ~is_requested,
                self._old.new_rows(),
            )
        ).all()

    def check_rest(self, connection: Connection) -> Iterator[Violation]:
        """Look up in the ledger what the record says of recharges that `check_rows` has not met."""
        yield from self._read(connection)
        for some in chunks(sorted(self._recorded)):
            key = transactions.c.idempotency_key
            query = select(key, transactions.c.account_id, stored(transactions.c.delta_amount), transactions.c.notes)
            found = {row.idempotency_key: row for row in connection.execute(query.where(key.in_(some)))}
            for name in some:
                (account_id, amount), row = self._recorded[name], found.get(name)
                is_so = None if row is None else (row.account_id, _told(connection, row.delta_amount))
                if row is None or is_so != (account_id, amount) or row.notes != ON_RECORD:
                    what = f"{amount} to account {account_id} are on record, and not in the ledger"
                    yield Violation("I12", f"recharge {name}", what)

    def _read(self, connection: Connection) -> Iterator[Violation]:
        """Read the actions that have come since."""
        for id, _, details in recorded(connection, ACCOUNT_ADD, ACCOUNT_RECHARGE, after_id=self._read_up_to):
            self._read_up_to = id
            if details is None:
                yield Violation("I12", f"action {id}", UNREADABLE)
            elif details.get("key"):  # an account that was opened with nothing has no row
                self._recorded[str(details["key"])] = (details.get("account_id", 0), str(details.get("amount")))


def _told(connection: Connection, value: Any) -> str:
    """An amount as the record tells it."""
    try:
        return str(amount_of(connection, value))
    except Unreadable as error:
        return str(error)


def _replays(connection: Connection) -> Iterator[Found]:
    """A dead letter that was replayed names its replay, whose begin and end are on record."""
    begun = {row.id: row.ended_at for row in connection.execute(select(replays.c.id, replays.c.ended_at))}
    recorded: dict[str, set[int | None]] = {}
    for action, replay_id in connection.execute(
        select(operator_actions.c.action, operator_actions.c.replay_id).where(operator_actions.c.replay_id.is_not(None))
    ):
        recorded.setdefault(action, set()).add(replay_id)
    for replay_id, ended_at in begun.items():
        if replay_id not in recorded.get("replay", ()):
            yield f"replay {replay_id}", "its begin is not on record"
        if ended_at is not None and replay_id not in recorded.get("replay ended", ()):
            yield f"replay {replay_id}", "its end is not on record"
    named = connection.execute(
        select(dead_letters.c.replay_id).where(dead_letters.c.replay_id.is_not(None)).distinct()
    ).scalars()
    for replay_id in named:
        if replay_id not in begun:
            yield f"replay {replay_id}", "dead letters name it, and it does not exist"


def _api_keys(connection: Connection) -> Iterator[Found]:
    """An API key that was made on record exists and may do what is on record; one that was revoked is revoked."""
    columns = ("key_id", "revoked_at", "scopes", "expires_at", "accounts", "user_prefix")
    keys = {row.key_id: row for row in connection.execute(select(*[api_keys.c[name] for name in columns]))}
    for id, action, details in recorded(connection, API_KEY_ADD, API_KEY_REVOKE):
        key_id = (details or {}).get("key_id")
        if details is None:
            yield f"action {id}", UNREADABLE
        elif key_id not in keys:
            yield f"API key {key_id}", "is on record, and gone"
        elif action == API_KEY_REVOKE and keys[key_id].revoked_at is None:
            yield f"API key {key_id}", "was revoked on record, and is valid again"
        # Older releases recorded no scopes.
        elif action == API_KEY_ADD and "scopes" in details and not _is_as_recorded(keys[key_id], details):
            yield f"API key {key_id}", "may do other things than on record: its scopes, accounts or end were changed"


def _is_as_recorded(key: Any, details: dict[str, Any]) -> bool:
    try:
        bounds = Bounds.parse(key.accounts, key.user_prefix)
    except InvalidRequest:
        return False
    has = (key.scopes, "" if key.expires_at is None else key.expires_at.isoformat(), str(bounds))
    return has == (details["scopes"], details.get("expires_at", ""), details.get("for", str(NO_BOUNDS)))


def _users(connection: Connection) -> Iterator[Found]:
    """The users of the console are those that were added on record and not removed, each in the last role on record."""
    roles: dict[str, str] = {}
    for id, action, details in recorded(connection, USER_ADD, USER_ROLE, USER_REMOVE):
        name, role = (details or {}).get("name"), (details or {}).get("role")
        if not isinstance(name, str):
            yield f"action {id}", UNREADABLE
        elif action == USER_REMOVE:
            roles.pop(name, None)
        else:
            roles[name] = str(role)
    there = {row.name: row.role for row in connection.execute(select(operators.c.name, operators.c.role))}
    for name in sorted(there.keys() | roles.keys()):
        if name not in roles:
            yield f"user {name}", "is not on record"
        elif name not in there:
            yield f"user {name}", "is on record, and gone"
        elif there[name] != roles[name]:
            yield f"user {name}", f"is {there[name]}, on record {roles[name]}"


def _webhooks(connection: Connection) -> Iterator[Found]:
    """Each webhook is as its last action on record has left it."""
    last: dict[str, tuple[str, dict[str, Any]]] = {}
    for id, action, details in recorded(connection, WEBHOOK_ADD, WEBHOOK_REMOVE):
        if details is None:
            yield f"action {id}", UNREADABLE
        else:
            last[str(details.get("webhook"))] = (action, details)
    columns = [webhooks.c[name] for name in ("name", "url", "events", "campaign", "removed_at")]
    for row in connection.execute(select(*columns)):
        action, details = last.pop(row.name, ("", {}))
        if not action:
            yield f"webhook {row.name}", "it is not on record"
        elif (row.removed_at is None) != (action == WEBHOOK_ADD):
            is_so = "is live" if row.removed_at is None else "is removed"
            yield f"webhook {row.name}", f"{is_so}, the last action on record is {action!r}"
        elif row.url != details.get("url"):
            yield f"webhook {row.name}", f"leads to {row.url}, on record to {details.get('url')}"
        elif action == WEBHOOK_ADD and not _is_subscribed(row, details):
            yield f"webhook {row.name}", "gets other events than the record says"
    for name in last:
        yield f"webhook {name}", "is on record, and gone"


def _is_subscribed(row: Any, details: dict[str, Any]) -> bool:
    return _decoded(row.events) == details.get("events") and (row.campaign or "") == (details.get("campaign") or "")


def _campaigns(connection: Connection) -> Iterator[Found]:
    """Each version was published on record; the live version and the state of each campaign are the last on record."""
    published: set[str] = set()
    live: dict[str, str] = {}
    states: dict[str, str] = {}
    for id, action, details in recorded(connection, PUBLISH, *STATES):
        if details is None:
            yield f"action {id}", UNREADABLE
            continue
        name, odds_hash = str(details.get("campaign")), str(details.get("odds_hash"))
        if action == PUBLISH:
            published.add(odds_hash)
            live[name] = odds_hash
        else:
            states[name] = STATES[action]
    for row in connection.execute(
        select(campaign_versions.c.campaign, campaign_versions.c.version, campaign_versions.c.odds_hash)
    ):
        if row.odds_hash not in published:
            yield f"version {row.version} of {row.campaign}", "its publication is not on record"
    for name, state, live_hash in connection.execute(
        select(campaigns.c.name, campaigns.c.state, campaigns.c.live_hash)
    ):
        if live_hash != live.get(name):
            yield f"campaign {name}", f"is drawn by {live_hash}, on record is {live.get(name)}"
        if state != states.get(name, CampaignState.DRAFT):
            yield f"campaign {name}", f"is {state}, on record {states.get(name, CampaignState.DRAFT)}"


def _stock(connection: Connection) -> Iterator[Found]:
    """Stock has changed by what was published, restocked and loaded on record, and by what refunds gave back."""
    on_record: Counter[tuple[str, str]] = Counter()
    live: dict[str, Odds] = {}
    for _, action, details in recorded(connection, PUBLISH, RESTOCK, CODES_LOAD):
        name, prize = str((details or {}).get("campaign")), str((details or {}).get("prize"))
        if details is None:
            continue  # _campaigns says so
        if action == PUBLISH:
            odds = _version(connection, str(details.get("odds_hash")))
            if odds is None:
                yield f"campaign {name}", f"version {details.get('odds_hash')} was published on record, and is gone"
                continue
            for changed, units in stock_changes(live.get(name), odds):
                on_record[name, changed.code] += units
            live[name] = odds
        else:
            told = details.get("units" if action == RESTOCK else "codes")
            on_record[name, prize] += told if isinstance(told, int) else 0
    changed_by = _changed(connection)
    for campaign, code in sorted(on_record.keys() | changed_by.keys()):
        said, is_so = on_record[campaign, code], changed_by[campaign, code]
        if said != is_so:
            yield f"prize {code} of {campaign}", f"{is_so:,} units came into stock, {said:,} are on record"
    yield from _units_back(connection)


def _changed(connection: Connection) -> Counter[tuple[str, str]]:
    """The units that came into stock by operators, by campaign and prize."""
    table = campaign_stock_changes.c
    rows = connection.execute(
        select(table.campaign, table.prize, func.sum(table.units))
        .where(table.operator != REFUND)
        .group_by(table.campaign, table.prize)
    )
    return Counter({(campaign, prize): int(units) for campaign, prize, units in rows})


def _units_back(connection: Connection) -> Iterator[Found]:
    """Units came back only by the refund of a draw that had won them."""
    table = campaign_stock_changes.c
    rows = connection.execute(
        select(table.reason, table.campaign, table.prize, func.sum(table.units))
        .where(table.operator == REFUND)
        .group_by(table.reason, table.campaign, table.prize)
        .order_by(table.reason)
    ).all()
    key = transactions.c.idempotency_key
    for some in chunks(rows, IN_LIST_MAX // 2):
        names = [f"{draw}:{entry}" for draw in {row.reason for row in some} for entry in (CONSUME_TYPE, REFUND_TYPE)]
        query = select(key, transactions.c.notes).where(key.in_(names))
        notes = {name: told or "" for name, told in connection.execute(query)}
        for draw, campaign, prize, units in some:
            told = f"{int(units):,} units came back from {draw}, which"
            won = _prizes(notes.get(f"{draw}:{CONSUME_TYPE}", "")).count(prize)
            if f"{draw}:{REFUND_TYPE}" not in notes:
                yield f"prize {prize} of {campaign}", f"{told} was not refunded"
            elif not 0 < units <= won:
                yield f"prize {prize} of {campaign}", f"{told} won {won}"


def _prizes(notes: str) -> Sequence[str]:
    try:
        return read_draw_notes(notes).prizes
    except DrawError:
        return ()


def _version(connection: Connection, odds_hash: str) -> Odds | None:
    text = connection.execute(
        select(campaign_versions.c.manifest).where(campaign_versions.c.odds_hash == odds_hash)
    ).scalar()
    try:
        return None if text is None else manifest.restore(text.encode())
    except (DrawError, ValueError):  # check_manifests says so
        return None


def recorded(
    connection: Connection, *actions: str, after_id: int = 0
) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """Id, name and details of these actions, the oldest first; details None where they are no JSON object."""
    rows = connection.execute(
        select(operator_actions.c.id, operator_actions.c.action, operator_actions.c.details)
        .where(operator_actions.c.action.in_(actions), operator_actions.c.id > after_id)
        .order_by(operator_actions.c.id)
    )
    for id, action, details in rows:
        said = _decoded(details)
        yield id, action, said if isinstance(said, dict) else None


def _decoded(text: Any) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, TypeError):
        return None
