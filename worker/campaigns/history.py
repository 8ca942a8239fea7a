"""Reading what was done to campaigns: which there are, their versions, and the acts on record."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final, NamedTuple

import msgspec
from sqlalchemy import Connection, func, select

from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.errors import CampaignNotFound
from tombola.producers.storage.campaigns import CampaignState
from tombola.producers.storage.schema import campaign_versions as versions
from tombola.producers.storage.schema import campaigns as table
from tombola.producers.storage.schema import operator_actions
from tombola.worker.operators.actions import Action

VERSIONS_MAX: Final = 200
ACTS_SEARCHED_MAX: Final = 10_000  # the newest rows of the record: it has no index by campaign
ACTS_MAX: Final = 50


class Standing(NamedTuple):
    """A campaign as it stands: `odds_hash` and `version` are the live version's, None for a draft without one.

    `changed_at` is when its state or its live version last changed.
    """

    name: str
    state: CampaignState
    odds_hash: str | None
    version: int | None
    changed_at: datetime


class Version(NamedTuple):
    """A version that was published."""

    version: int
    odds_hash: str
    created_by: str
    created_at: datetime


def standings(connection: Connection) -> list[Standing]:
    """All campaigns, by name."""
    return _standings(connection)


def standing(connection: Connection, name: str) -> Standing:
    """The campaign of that name. Raises CampaignNotFound."""
    found = _standings(connection, name) if name.isascii() else []  # MariaDB compares the column with ASCII alone
    if not found:
        raise CampaignNotFound(f"there is no campaign {name!r:.80}")
    return found[0]


def _standings(connection: Connection, name: str | None = None) -> list[Standing]:
    query = (
        select(table.c.name, table.c.state, table.c.live_hash, versions.c.version, table.c.updated_at)
        .outerjoin(versions, versions.c.odds_hash == table.c.live_hash)
        .order_by(table.c.name)
    )
    if name is not None:
        query = query.where(table.c.name == name)
    return [
        Standing(row.name, CampaignState(row.state), row.live_hash, row.version, row.updated_at)
        for row in connection.execute(query)
    ]


def versions_of(connection: Connection, name: str) -> Sequence[Version]:
    """The newest VERSIONS_MAX versions of a campaign, newest first."""
    query = (
        select(versions.c.version, versions.c.odds_hash, versions.c.created_by, versions.c.created_at)
        .where(versions.c.campaign == name)
        .order_by(versions.c.version.desc())
        .limit(VERSIONS_MAX)
    )
    return [Version(*row) for row in connection.execute(query)]


def version_of(connection: Connection, name: str, version: int) -> Odds:
    """A version of a campaign, by its number. Raises CampaignNotFound."""
    text = connection.execute(
        select(versions.c.manifest).where(versions.c.campaign == name, versions.c.version == version)
    ).scalar()
    if text is None:
        raise CampaignNotFound(f"campaign {name!r:.80} has no version {version}")
    return manifest.restore(text.encode())


def acts_on(connection: Connection, name: str) -> list[Action]:
    """The newest acts on a campaign, up to ACTS_MAX, among the newest ACTS_SEARCHED_MAX rows of the record."""
    newest = connection.execute(select(func.max(operator_actions.c.id))).scalar() or 0
    query = (
        select(operator_actions)
        .where(operator_actions.c.id > newest - ACTS_SEARCHED_MAX, operator_actions.c.action.like("campaign %"))
        .order_by(operator_actions.c.id.desc())
    )
    found: list[Action] = []
    for row in connection.execute(query):
        details = msgspec.json.decode(row.details)
        if details.get("campaign") == name and len(found) < ACTS_MAX:
            found.append(Action(**{**row._mapping, "details": details}))
    return found
