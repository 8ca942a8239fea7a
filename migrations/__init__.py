"""The schema's history: `tombola migrate` brings a database to its newest revision, in a checkout also `alembic`.

A revision is frozen once released: it spells its column types out, so that a later change of
producers.storage.column_types does not change what an old revision builds. Each change of the schema is a new revision,
or two where workers of the previous release write meanwhile: expand before the deploy, contract after it. MySQL and
MariaDB commit each statement that changes a table by itself, so the steps of a revision look first
(migrations.repeatable): a revision that was interrupted can be run again.
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
    # Alembic takes longer to import than all of tombola, and workers only read the revision.
    from alembic.config import Config

# Not Alembic's default `alembic_version`: in a shop's database that table is the shop's history.
VERSION_TABLE: Final = "tombola_version"
BASE: Final = "base"  # before the first revision

# The name of the lock that an upgrade, or a step of `tombola legacy`, holds. Names are shared by all databases of a
# server, and have at most 64 characters. Only SHA2 is built in everywhere: MySQL 9 has no SHA1 and no MD5.
TURN_LOCK = "CONCAT('tombola_', SHA2(DATABASE(), 224))"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Position:
    """A database's position in the history; `pending` are the titles of the revisions still to be run, by revision."""

    revision: str | None
    newest: str
    pending: dict[str, str] = field(default_factory=dict)


def upgrade(engine_or_url: Engine | str, revision: str = "head", *, say: Say | None = None) -> None:
    """Bring the schema to `revision`, and `say` each revision on the way.

    An engine keeps its own timeouts; with a URL a statement may take as long as a large table needs.
    Raises ConfigurationError with the reason in one sentence.
    """
    from alembic import command

    _run(command.upgrade, alembic_config(engine_or_url, say=say), revision)


def downgrade(engine_or_url: Engine | str, revision: str, *, say: Say | None = None) -> None:
    """Take the schema back to `revision`, or to `base`; never drops rows that the older schema cannot hold.

    Raises ConfigurationError with the reason in one sentence.
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
    """The SQL from `start` to the newest revision, for the kind of database in `url`; does not connect."""
    from alembic import command

    refuse_unknown(start)
    return _script(command.upgrade, url, "head" if start == BASE else f"{start}:head")


def downgrade_script(url: str, revision: str, *, start: str) -> str:
    """The SQL from `start` back to `revision`; does not connect, and so checks no row."""
    from alembic import command

    refuse_unknown(start)
    refuse_unknown(revision)
    return _script(command.downgrade, url, f"{start}:{revision}")


def position(connection: Connection) -> Position:
    """The position of this database; at a revision of a newer release nothing is pending."""
    from alembic.script import ScriptDirectory

    at = current_revision(connection)
    scripts = ScriptDirectory.from_config(alembic_config())
    left = [it for it in _revisions() if at is None or it > at] if at is None or knows(at) else []
    return Position(at, head_revision(), {it: str(scripts.get_revision(it).doc) for it in left})


def head_revision() -> str:
    """The newest revision of this release."""
    return _revisions()[-1]


def current_revision(connection: Connection) -> str | None:
    """The revision of this database; None if it was never migrated."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    return found


def alembic_config(engine_or_url: Engine | str | None = None, *, say: Say | None = None) -> Config:
    """The argument of alembic.command's functions. The scripts are those beside this file, in any working directory.

    Without an engine or a URL the database is the one in TOMBOLA_DATABASE_URL.
    """
    from alembic.config import Config

    config = Config()
    # A ConfigParser holds the options: a % in a folder's name would begin an interpolation.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["engine_or_url"] = engine_or_url
    config.attributes["say"] = say
    return config


def knows(revision: str) -> bool:
    """Whether this release has `revision`; an unknown revision is from a newer release."""
    return revision in _revisions()


@cache
def _revisions() -> tuple[str, ...]:
    """All revisions, the first one first: the names of their files begin with them."""
    return tuple(sorted(file.name.partition("_")[0] for file in (Path(__file__).parent / "versions").glob("[0-9]*.py")))


def refuse_unknown(revision: str) -> None:
    if revision != BASE and not knows(revision):
        first, newest = _revisions()[0], head_revision()
        raise ConfigurationError(
            f"there is no revision {revision}: this release has {first} to {newest}, and `{BASE}` is before all of them"
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
