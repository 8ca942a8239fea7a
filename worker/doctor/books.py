"""The checks of the sealed books: are ledger rows sealed in time, and does the head go outside?"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection

from tombola.producers.settings import Settings
from tombola.producers.storage import clock
from tombola.worker.books.standing import LAG_S_MAX, standing
from tombola.worker.doctor.checks import CannotLook, Facts, Verdict, fail, ok, warn
from tombola.worker.ledger.old_rows import may_still_change

ANCHOR_SPARE_S: Final = 600.0  # beside the time between two checkpoints


def look_at_sealing(connection: Connection, settings: Settings, _found: Facts) -> Verdict:
    """Fails where rows wait for longer than LAG_S_MAX beside the time that they have to wait."""
    if may_still_change(connection):
        raise CannotLook("skipped: sealing begins after `tombola legacy contract`")
    found = standing(connection)
    if found.lag_s > LAG_S_MAX + settings.sealed_after_s:
        return fail(
            f"the oldest ledger row that is not sealed is {found.lag_s:,.0f} s old",
            "start `tombola relay`, or beat and a worker; `tombola books seal` seals at once, and says what is wrong",
        )
    return ok(f"{found.blocks:,} blocks, the oldest row that is not sealed is {found.lag_s:,.0f} s old")


def look_at_anchors(connection: Connection, settings: Settings, _found: Facts) -> Verdict:
    """Warns where no head was signed, or none was written outside for a long time."""
    found = standing(connection)
    if not found.signed:
        return warn(
            "no head was signed: a ledger that was rewritten as a whole would not be found",
            "make a key with `tombola books key`, and set TOMBOLA_BOOKS_KEY and TOMBOLA_BOOKS_ANCHOR",
        )
    if found.anchored_at is None:
        return warn("no checkpoint was written outside", "set TOMBOLA_BOOKS_ANCHOR, for relays or workers")
    age_s = (clock.now(connection) - found.anchored_at).total_seconds()
    if found.signed < found.blocks and age_s > settings.books_anchor_every_s + ANCHOR_SPARE_S:
        return warn(
            f"the last checkpoint was written outside {age_s:,.0f} s ago, and blocks were sealed since",
            "see in the log of relay and workers what keeps the sealer from writing to TOMBOLA_BOOKS_ANCHOR",
        )
    return ok(f"{found.signed:,} blocks are signed, the last checkpoint was written outside {age_s:,.0f} s ago")
