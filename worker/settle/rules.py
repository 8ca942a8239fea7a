"""What never changes between the batches of a worker: made once, at its start."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Engine

from tombola.producers.domain.draw import Wheels, seed_of
from tombola.producers.settings import Settings
from tombola.worker.campaigns.desk import Desk
from tombola.worker.fulfilments.subscriptions import Subscriptions
from tombola.worker.ledger.old_rows import OldDraws
from tombola.worker.seeds.binding import EpochSeeds
from tombola.worker.seeds.masters import Masters


class Rules(NamedTuple):
    """How a worker settles.

    `old_draws` are the draws that old code has charged, in a legacy ledger: they are not charged again. With
    `accepted_only` a draw is charged only if it is on record as accepted, with the same content. A batch gets up to
    `tries_max` transactions as a whole; each waits up to `lock_wait_s` for its locks. `desk` knows the campaigns of
    operators; without it only the built-in campaign is known. `subscriptions` know which webhooks hear of a draw.
    `seeds` are those of epochs; without them, and before the first epoch, draws are drawn by `wheels` as they are.
    """

    wheels: Wheels
    tries_max: int = 3
    lock_wait_s: float = 1.0
    old_draws: OldDraws | None = None
    accepted_only: bool = False
    desk: Desk | None = None
    subscriptions: Subscriptions | None = None
    seeds: EpochSeeds | None = None

    @classmethod
    def of(cls, settings: Settings, engine: Engine, wheels: Wheels, old_draws: OldDraws | None = None) -> Rules:
        """The rules in `settings` on the ledger of `engine`; `wheels` are the built-in campaigns under the seed."""
        desk = Desk(engine, seed_of(wheels))
        return cls(
            wheels,
            settings.tries_max,
            settings.lock_wait_s,
            old_draws,
            settings.accepted_only,
            desk,
            Subscriptions(engine),
            EpochSeeds(engine, Masters(settings.seeds)),
        )
