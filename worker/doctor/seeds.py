"""The checks of the seeds: does this process have the right ones, is an epoch open, are secrets revealed in time?"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

from sqlalchemy import Connection, select

from tombola.producers.domain.draw import CAMPAIGNS, seed_id_of
from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.domain.operations.draw import CONSUME
from tombola.producers.domain.seeds import parse_epoch_name
from tombola.producers.settings import Settings
from tombola.producers.storage import clock
from tombola.producers.storage.schema import api_idempotency_requests as requests
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import campaign_versions
from tombola.producers.storage.seeds import all_chains
from tombola.worker.doctor.checks import CannotLook, Facts, Verdict, fail, ok, warn
from tombola.worker.seeds.binding import seed_noted
from tombola.worker.seeds.masters import Masters
from tombola.worker.seeds.standing import standings

LAST_ROWS: Final = 1000
ENDS_SOON: Final = timedelta(days=30)
REVEAL_SPARE: Final = timedelta(days=1)  # requests time out within a day


def look_at_last_draw(connection: Connection, settings: Settings, _found: Facts) -> Verdict:
    """Whether the newest charge was drawn with a seed of ours and our odds, by the notes of its row."""
    row = _last_charge(connection)
    if row is None:
        return ok("nothing was drawn lately")
    odds_hash, name = _odds_noted(row.notes), seed_noted(row.notes)
    if settings.seeds and not _is_ours(connection, Masters(settings.seeds), name):
        return fail(
            f"the last draw was made with seed {name or 'unknown'}, which TOMBOLA_SEED here does not have",
            "set TOMBOLA_SEED to the workers' value, or restart workers that have another one: their draws wait until "
            "a worker has their seed",
        )
    campaign = CAMPAIGNS.get(row.campaign)
    if campaign is None and not _is_version(connection, odds_hash):
        return warn(f"the last draw was of campaign {row.campaign}, unknown here", "upgrade tombola here, too")
    if campaign is not None and odds_hash != campaign.odds_hash:
        return fail(
            f"the last draw of campaign {row.campaign} had other odds than this release has",
            "a campaign never changes: give new odds a new name",
        )
    if not settings.seeds:
        raise CannotLook("skipped: no seed here")
    return ok(f"the last draw was made with ours ({name})")


def _last_charge(connection: Connection) -> Any:
    # Among the newest rows: a charge further back is too old to matter.
    newest = select(transactions).order_by(transactions.c.transaction_id.desc()).limit(LAST_ROWS).subquery()
    return connection.execute(
        select(newest.c.notes, requests.c.campaign)
        .join(requests, requests.c.lottery_session_id == newest.c.lottery_session_id)
        .where(newest.c.business_type == CONSUME)
        .order_by(newest.c.transaction_id.desc())
        .limit(1)
    ).first()


def _is_ours(connection: Connection, masters: Masters, name: str) -> bool:
    try:
        number = parse_epoch_name(name).chain
    except InvalidRequest:
        return any(seed_id_of(it) == name for it in masters.seeds)
    return any(it.chain == number and masters.of_chain(it) is not None for it in all_chains(connection))


def _odds_noted(notes: str | None) -> str:
    return (notes or "").removeprefix("odds=").partition(" ")[0]


def _is_version(connection: Connection, odds_hash: str) -> bool:
    """Whether an operator's campaign has or had these odds."""
    query = select(campaign_versions.c.version).where(campaign_versions.c.odds_hash == odds_hash)
    return connection.execute(query).first() is not None


def look_at_epochs(connection: Connection, _settings: Settings, _found: Facts) -> Verdict:
    """Fails where no epoch is open, warns before the last chain ends."""
    now = clock.now(connection)
    found = standings(connection, now)
    if not found:
        return warn("no chain of seed epochs has begun", "start a worker: it begins the first one")
    rotate = "put a new seed first in TOMBOLA_SEED of all workers, restart them, and run `tombola seed rotate`"
    last = found[-1]
    is_open = next((it.open for it in found if it.open is not None), None)
    if is_open is None:
        return fail("no epoch is open: nothing is drawn", rotate)
    if last.ends_at is not None and last.ends_at - now < ENDS_SOON:
        return warn(f"chain {last.chain.chain} ends at {last.ends_at:%Y-%m-%d %H:%M} UTC", rotate)
    return ok(f"epoch {is_open.name} is open")


def look_at_revealing(connection: Connection, settings: Settings, _found: Facts) -> Verdict:
    """Warns where an epoch that is long over is secret still."""
    now = clock.now(connection)
    late_at = now - timedelta(seconds=settings.seed_reveal_after_s) - REVEAL_SPARE
    found = standings(connection, now)
    for it in found:
        epoch = it.oldest_secret
        if epoch is not None and epoch.closes_at is not None and epoch.closes_at < late_at:
            return warn(
                f"epoch {epoch.name} was over at {epoch.closes_at:%Y-%m-%d %H:%M} UTC, and is not revealed",
                "start beat and a worker, or run `tombola seed reveal` where the seed is: it says what keeps it secret",
            )
    return ok(f"{sum(it.revealed for it in found):,} epochs are revealed")
