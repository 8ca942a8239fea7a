"""The folder where embedded mode keeps its state, and the settings that lead other commands there."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import platformdirs

from tombola import migrations
from tombola.producers.domain.books.checkpoints import PrivateKey
from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.domain.receipt_keys import SigningKey
from tombola.producers.settings import HOME_VARIABLE, PREFIX, Settings, settings_in

BOOKS_KEY_NAME: Final = "tombola-up"


@dataclass(frozen=True)
class Home:
    """The folder where embedded mode keeps its state."""

    path: Path

    @classmethod
    def find(cls) -> Home:
        """TOMBOLA_HOME, else a folder in the user's data folder."""
        named = os.environ.get(HOME_VARIABLE)
        return cls(Path(named) if named else platformdirs.user_data_path("tombola"))

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.path / 'tombola.db'}"

    @property
    def up_file(self) -> Path:
        return self.path / "up.json"

    def exists(self) -> bool:
        """Whether the folder holds a database."""
        return (self.path / "tombola.db").exists()

    def settings(self) -> Settings:
        """The settings for commands that work on this folder; without a broker while `tombola up` does not run."""
        values = {
            "database_url": self.database_url,
            "seed": self._secret("seed"),
            "result_secret": self._secret("result_secret"),
            "receipt_key": self._secret("receipt_key", lambda: SigningKey.make().text),
            "books_key": self._secret("books_key", lambda: PrivateKey.make(BOOKS_KEY_NAME).text),
            "webhook_private": "true",  # receivers that are tried out run on this machine, too
        }
        with contextlib.suppress(OSError, ValueError):
            values["broker_url"] = str(json.loads(self.up_file.read_text())["broker_url"])
        return Settings.from_env({PREFIX + name.upper(): value for name, value in values.items()})

    def prepare(self) -> None:
        """Make the folder, and bring its database to this release's schema. Raises ConfigurationError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigurationError(
                f"{self.path} cannot be made ({error.strerror}): name another folder with {HOME_VARIABLE}"
            ) from None
        migrations.upgrade(self.database_url)

    def _secret(self, name: str, make: Callable[[], str] = lambda: secrets.token_hex(32)) -> str:
        """A secret that the first start makes. It is kept: with another seed, for example, draws win other prizes."""
        file = self.path / name
        if not file.exists():
            write_private(file, make())
        return file.read_text().strip()


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner can read; all of the text or none."""
    scratch = file.with_suffix(".new")
    scratch.unlink(missing_ok=True)
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)
    scratch.replace(file)


def settings_from_anywhere() -> Settings:
    """The settings of TOMBOLA_* if one is set, else of embedded mode; raises ConfigurationError without either."""
    if settings_in(os.environ):
        return Settings.from_env()
    home = Home.find()
    if not home.exists():
        raise ConfigurationError("nothing to work against: start `tombola up`, or set the TOMBOLA_* variables")
    return home.settings()
