"""Checks of the settings: values that Settings cannot refuse, because each is right somewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from tombola.producers.brokers.registry import RABBITMQ
from tombola.producers.domain.draw import seed_id_of
from tombola.producers.settings import Settings
from tombola.worker.doctor.checks import Check, Verdict, attempt, ok, skip, warn

MARGIN_WARN_S: Final = 1.0


def examine_settings(settings: Settings) -> Iterator[Check]:
    """Every check that needs no server."""
    for name, look in LOOKS:
        yield attempt(name, lambda look=look: look(settings))  # type: ignore[misc]


def _seed(settings: Settings) -> Verdict:
    if not settings.seeds:
        return skip("TOMBOLA_SEED is not set here: only workers need it (openssl rand -hex 32 makes one)")
    return ok("SHA-256 " + ", ".join(f"{seed_id_of(it)}…" for it in settings.seeds))


def _result_secret(settings: Settings) -> Verdict:
    if not settings.result_secret_bytes:
        return warn(
            "results are not sealed",
            "set TOMBOLA_RESULT_SECRET everywhere: without it, anyone who can write to Redis can forge results",
        )
    return ok("results are sealed")


def _message_secret(settings: Settings) -> Verdict:
    if settings.keyring.secrets:
        return ok("messages are signed")
    if settings.accepted_only:
        return ok("messages are not signed: only what is accepted in the database is drawn")
    return warn(
        "messages are not signed, and need not be accepted",
        "set TOMBOLA_MESSAGE_SECRET everywhere, or TOMBOLA_ACCEPTED_ONLY=true for the workers: "
        "without either, anyone who can write to the broker can draw from any account",
    )


def _remote_control(settings: Settings) -> Verdict:
    if not settings.has_remote_control:
        return ok("off")
    if settings.database_url.get_secret_value().startswith("sqlite"):
        return skip("on; skipped: SQLite")
    return warn(
        "on: anyone who can write to the broker can stop the workers",
        "set TOMBOLA_REMOTE_CONTROL=false in production, unless you need `celery inspect`",
    )


def _claim_time(settings: Settings) -> Verdict:
    batch_s = settings.batch_time_s_max
    if settings.broker_kind is RABBITMQ:
        return ok(f"a batch takes {batch_s:g} s at most; RabbitMQ's consumer_timeout is 30 min, unless you changed it")
    margin_s = settings.claim_after_s - batch_s
    found = f"claimed after {settings.claim_after_s:g} s, a batch takes {batch_s:g} s at most: {margin_s:g} s to spare"
    if margin_s < MARGIN_WARN_S:
        return warn(
            found, f"set TOMBOLA_CLAIM_AFTER_S to {batch_s + 2 * MARGIN_WARN_S:g}: otherwise a pause looks like a death"
        )
    return ok(found)


LOOKS: Final[tuple[tuple[str, Callable[[Settings], Verdict]], ...]] = (
    ("seed", _seed),
    ("result secret", _result_secret),
    ("message secret", _message_secret),
    ("remote control", _remote_control),
    ("claim time", _claim_time),
)
