"""The sealer: seals, signs the head, writes it outside, takes snapshots, counts draws.

It runs once a second, as Celery's task or in a relay.

Any number of sealers may run. One without a key leaves signing to the others, and one without a folder the writing.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from pathlib import Path
from typing import Final

from sqlalchemy import Engine

from tombola.producers.domain.books.checkpoints import PrivateKey
from tombola.producers.domain.errors import ConfigurationError, DrawError, InvalidRequest
from tombola.producers.settings import Settings
from tombola.producers.storage import books
from tombola.producers.storage.engines import open_engine
from tombola.worker.books import anchors, snapshots
from tombola.worker.books.sealing import seal
from tombola.worker.conformity import counting

log = logging.getLogger(__name__)

EVERY_S: Final = 1.0
RUN_S_MAX: Final = 0.5  # a run that catches up leaves the other half of a second to everything else
SNAPSHOT_EVERY_S: Final = 60.0
COUNT_EVERY_S: Final = 60.0
BACKOFF_S_MAX: Final = 30.0


class Sealer:
    """Seals the books of one deployment, and remembers what this process has written outside."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        """Raises ConfigurationError where TOMBOLA_BOOKS_KEY is no key."""
        self._engine = engine
        self._settings = settings
        self._key = signing_key(settings)
        self._folder = Path(settings.books_anchor) if settings.books_anchor else None
        self._anchored: str | None = None
        self._versions = counting.Versions(engine)
        self._next_anchor = self._next_snapshot = self._next_count = 0.0

    @classmethod
    def from_settings(cls, settings: Settings) -> Sealer:
        """A sealer with an engine of its own; it connects at first use. Raises as the constructor does."""
        return cls(open_engine(settings.need("database_url"), lock_wait_s=settings.lock_wait_s), settings)

    def run_once(self, *, time_s_max: float | None = RUN_S_MAX) -> int:
        """Seal what is below the horizon, for `time_s_max` at most; return how many rows were sealed.

        Raises AnchorConflict, ServiceUnavailable, ConfigurationError or InternalError.
        """
        sealed = seal(self._engine, after_s=self._settings.sealed_after_s, time_s_max=time_s_max)
        if self._key is not None:
            anchors.sign_once(self._engine, self._key, every_s=self._settings.books_anchor_every_s)
        if time.monotonic() >= self._next_snapshot and not snapshots.take_once(self._engine):
            self._next_snapshot = time.monotonic() + SNAPSHOT_EVERY_S
        if self._folder is not None and time.monotonic() >= self._next_anchor:
            # A folder that cannot be written is not tried every second.
            self._next_anchor = time.monotonic() + self._settings.books_anchor_every_s
            self._anchor(self._folder)
            self._next_anchor = 0.0
        if time.monotonic() >= self._next_count:
            # Past days alone, a part at a time, so that no sealing waits for it by day.
            is_done = counting.count_once(self._engine, self._versions, past_days=True) is None
            self._next_count = time.monotonic() + (COUNT_EVERY_S if is_done else 0.0)
        return sealed

    def _anchor(self, folder: Path) -> None:
        with self._engine.connect().execution_options(read_only=True) as connection:
            note = books.latest_checkpoint(connection)
        if note is None or note == self._anchored:
            return
        if anchors.write(folder, note):
            anchors.remember_anchored(self._engine)
        self._anchored = note

    def run(self, stopping: threading.Event) -> None:
        """Seal every second until `stopping` is set. No error ends this loop: it logs the error, and goes on."""
        failures = 0
        while not stopping.is_set():
            try:
                self.run_once()
                failures = 0
            except Exception as error:  # our own bugs as well: unsealed rows can be changed unnoticed
                failures += 1
                mistake = None if isinstance(error, DrawError) else error
                log.warning("%s; sealing is tried again (%d)", error, failures, exc_info=mistake)
            pause_s = EVERY_S if not failures else min(BACKOFF_S_MAX, 2.0 ** min(failures, 10)) * random.uniform(0.5, 1)
            stopping.wait(pause_s)

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()


def signing_key(settings: Settings) -> PrivateKey | None:
    """The key in TOMBOLA_BOOKS_KEY; None where none is set. Raises ConfigurationError where it is no key."""
    text = settings.books_key.get_secret_value()
    try:
        return PrivateKey.read(text) if text else None
    except InvalidRequest as error:
        raise ConfigurationError(f"TOMBOLA_BOOKS_KEY: {error}") from None
