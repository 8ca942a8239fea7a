"""The check of fulfilments: do they reach the webhooks, is one dead, does a notification lack a webhook?"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection

from tombola.producers.settings import Settings
from tombola.producers.storage import clock
from tombola.worker.doctor.checks import Facts, Verdict, ok, warn
from tombola.worker.fulfilments import fulfilments

OLDEST_WARN_S: Final = 900.0


def look_at_fulfilments(connection: Connection, _settings: Settings, _found: Facts) -> Verdict:
    """Warns of dead ones, then of old ones, then of notifications that no webhook subscribes to."""
    counts = fulfilments.counts(connection)
    age_s = 0.0 if counts.oldest_at is None else (clock.now(connection) - counts.oldest_at).total_seconds()
    if counts.dead:
        return warn(
            f"{counts.dead:,} are dead, {counts.pending:,} pending",
            "see why: tombola fulfilment list --state dead; when the receiver works: tombola fulfilment replay",
        )
    if age_s > OLDEST_WARN_S:
        return warn(
            f"{counts.pending:,} pending, the oldest for {age_s:,.0f} s",
            "see what the receiver answers: tombola fulfilment list --state pending; a relay must be running",
        )
    if counts.without_webhook:
        return warn(
            f"{counts.without_webhook:,} notifications wait for a webhook",
            "subscribe one to them: tombola webhook add",
        )
    return ok(f"{counts.pending:,} pending, the oldest for {age_s:,.0f} s" if counts.pending else "none waits")
