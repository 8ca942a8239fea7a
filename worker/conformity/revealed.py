"""Which draws' secrets are known: those of the seed in TOMBOLA_SEED, where a process holds one."""

from __future__ import annotations

from tombola.producers.domain.draw import seed_id_of
from tombola.producers.settings import Settings
from tombola.worker.conformity.tickets import KeyOf


def key_of(settings: Settings) -> KeyOf:
    """The key of a draw by the word after `seed=` in its notes and its campaign; None while it is not known."""
    known = {seed_id_of(settings.seed_bytes): settings.seed_bytes} if settings.has("seed") else {}
    return lambda seed_id, _campaign: known.get(seed_id)
