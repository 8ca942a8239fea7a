"""The schema's history, for Alembic; `alembic upgrade head` runs it from a clone, `upgrade()` from an installed wheel.

A revision is frozen once released: it spells its column types out, so that a later change of
producers.storage.database does not change what an old revision builds. A change of the schema is a revision of its
own, in two steps where workers of the previous release go on writing meanwhile: expand before the deploy, contract
after it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy import Connection, Engine, inspect, text

from tombola.producers.domain.errors import ConfigurationError

if TYPE_CHECKING:
    # Alembic takes longer to import than all of ours: workers only ask for the revision.
    from alembic.config import Config

VERSION_TABLE: Final = "alembic_version"

# The name of the lock that one upgrade, or one step of `tombola legacy`, holds at a time. Names are the whole server's,
# and at most 64 characters long. SHA2 alone is built in everywhere: MySQL 9 has no SHA1 and no MD5 any more.
TURN_LOCK = "CONCAT('tombola_', SHA2(DATABASE(), 224))"


def upgrade(engine_or_url: Engine | str, revision: str = "head") -> None:
    """Bring the schema to `revision`.

    An engine keeps its own timeouts; with a URL a statement may take as long as a large table needs.
    Raises ConfigurationError with one sentence that says why not.
    """
    from alembic import command
    from alembic.util import CommandError

    try:
        command.upgrade(alembic_config(engine_or_url), revision)
    except CommandError as error:
        raise ConfigurationError(str(error)) from error


def head_revision() -> str:
    """The newest revision that this release brings."""
    return _revisions()[-1]


def current_revision(connection: Connection) -> str | None:
    """The revision that this database is at; None if it was never migrated."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found: str | None = connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
    return found


def alembic_config(engine_or_url: Engine | str | None = None) -> Config:
    """What alembic.command's functions take. It finds the scripts beside this file, whatever the working directory.

    Without an engine or a URL the database is TOMBOLA_DATABASE_URL's.
    """
    from alembic.config import Config

    config = Config()
    # A ConfigParser holds the options: a % in a folder's name would begin an interpolation.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["engine_or_url"] = engine_or_url
    return config


def knows(revision: str) -> bool:
    """Whether this release brings `revision`; one it does not know was made by a newer release."""
    return revision in _revisions()


@cache
def _revisions() -> tuple[str, ...]:
    """From the first to the newest: their files' names begin with them."""
    return tuple(sorted(file.name.partition("_")[0] for file in (Path(__file__).parent / "versions").glob("[0-9]*.py")))
