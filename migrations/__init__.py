"""The schema's history: `tombola migrate` brings a database to its newest revision, in a checkout also `alembic`.

A revision is frozen once released: it spells its column types out, so that a later change of
producers.storage.column_types does not change what an old revision builds. A change of the schema is a revision of its
own, in two steps where workers of the previous release go on writing meanwhile: expand before the deploy, contract
after it. MySQL and MariaDB commit each statement that changes a table by itself: a revision is made of steps that look
first (migrations.repeatable), so that one that broke off half-way is run again.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, Engine, inspect, text

from tombola.producers.domain.errors import ConfigurationError

if TYPE_CHECKING:
    # Alembic takes longer to import than all of ours: workers only ask for the revision.
    from alembic.config import Config

# Not Alembic's own `alembic_version`: in a shop's database that is the shop's history.
VERSION_TABLE: Final = "tombola_version"
BASE: Final = "base"  # before the first revision

# The name of the lock that one upgrade, or one step of `tombola legacy`, holds at a time. Names are the whole server's,
# and at most 64 characters long. SHA2 alone is built in everywhere: MySQL 9 has no SHA1 and no MD5 any more.
TURN_LOCK = "CONCAT('tombola_', SHA2(DATABASE(), 224))"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a database is in the history; `pending` are the revisions still to be run, each with its title."""

    revision: str | None
    newest: str
    pending: dict[str, str] = field(default_factory=dict)


def upgrade(engine_or_url: Engine | str, revision: str = "head", *, say: Say | None = None) -> None:
    """Bring the schema to `revision`, and `say` each revision on the way.

    An engine keeps its own timeouts; with a URL a statement may take as long as a large table needs.
    Raises ConfigurationError with one sentence that says why not.
    """
    from alembic import command

    _run(command.upgrade, alembic_config(engine_or_url, say=say), revision)


def downgrade(engine_or_url: Engine | str, revision: str, *, say: Say | None = None) -> None:
    """Take the schema back to `revision`, or to `base`; rows that the older schema cannot hold are not dropped.

    Raises ConfigurationError with one sentence that says why not.
    """
    from alembic import command

    refuse_unknown(revision)
    try:
        _run(command.downgrade, alembic_config(engine_or_url, say=say), revision)
    except ConfigurationError as error:
        if "not a valid downgrade target" not in str(error):
            raise
        raise ConfigurationError(f"the database is at a revision before {revision}, or at none") from None


def upgrade_script(url: str, *, start: str = BASE) -> str:
    """The SQL from `start` to the newest revision, for the kind of database in `url`; nothing is connected to."""
    from alembic import command

    refuse_unknown(start)
    return _script(command.upgrade, url, "head" if start == BASE else f"{start}:head")


def downgrade_script(url: str, revision: str, *, start: str) -> str:
    """The SQL from `start` back to `revision`; nothing is connected to, so no row is looked at either."""
    from alembic import command

    refuse_unknown(start)
    refuse_unknown(revision)
    return _script(command.downgrade, url, f"{start}:{revision}")


def position(connection: Connection) -> Position:
    """Where this database is; a revision that a newer release made has nothing pending."""
    from alembic.script import ScriptDirectory

    at = current_revision(connection)
    scripts = ScriptDirectory.from_config(alembic_config())
    left = [it for it in _revisions() if at is None or it > at] if at is None or knows(at) else []
    return Position(at, head_revision(), {it: str(scripts.get_revision(it).doc) for it in left})


def head_revision() -> str:
    """The newest revision that this release brings."""
    return _revisions()[-1]


def current_revision(connection: Connection) -> str | None:
    """The revision that this database is at; None if it was never migrated."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    return found


def alembic_config(engine_or_url: Engine | str | None = None, *, say: Say | None = None) -> Config:
    """What alembic.command's functions take. It finds the scripts beside this file, whatever the working directory.

    Without an engine or a URL the database is TOMBOLA_DATABASE_URL's.
    """
    from alembic.config import Config

    config = Config()
    # A ConfigParser holds the options: a % in a folder's name would begin an interpolation.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["engine_or_url"] = engine_or_url
    config.attributes["say"] = say
    return config


def knows(revision: str) -> bool:
    """Whether this release brings `revision`; one it does not know was made by a newer release."""
    return revision in _revisions()


@cache
def _revisions() -> tuple[str, ...]:
    """From the first to the newest: their files' names begin with them."""
    return tuple(sorted(file.name.partition("_")[0] for file in (Path(__file__).parent / "versions").glob("[0-9]*.py")))


def refuse_unknown(revision: str) -> None:
    if revision != BASE and not knows(revision):
        first, newest = _revisions()[0], head_revision()
        raise ConfigurationError(
            f"there is no revision {revision}: this release brings {first} to {newest}, and `{BASE}` is before them all"
        )


def _script(run: Callable[..., None], url: str, revisions: str) -> str:
    config = alembic_config(url)
    config.output_buffer = written = io.StringIO()
    _run(run, config, revisions, sql=True)
    return written.getvalue()


def _run(run: Callable[..., None], config: Config, *arguments: str, sql: bool = False) -> None:
    from alembic.util import CommandError

    try:
        run(config, *arguments, sql=sql)
    except CommandError as error:
        raise ConfigurationError(str(error)) from error
