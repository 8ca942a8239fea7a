"""The operators' console for tests, served by a thread of this process, and an HTTP client for its pages."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import httpx
import jinja2
import pytest
import uvicorn
from argon2 import PasswordHasher
from jinja2.bccache import Bucket

from tests import processes, servers
from tombola.producers.settings import Settings
from tombola.worker.console.serve import configured
from tombola.worker.operators import users

PASSWORD = "correct horse battery"


@contextmanager
def quick_hashes() -> Iterator[None]:
    """Hash passwords in a millisecond: the hash that users get takes a tenth of a second of CPU, on purpose."""
    hasher = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(users, "_hasher", lambda: hasher)
        patch.setattr(users, "_hash_for_unknown", functools.cache(lambda: hasher.hash(PASSWORD * 2)))
        yield


class Compiled(jinja2.BytecodeCache):
    """Compiled templates, for all consoles of this process: compiling them anew takes most of a short test."""

    kept: ClassVar[dict[str, bytes]] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        if bucket.key in self.kept:
            bucket.bytecode_from_string(self.kept[bucket.key])

    def dump_bytecode(self, bucket: Bucket) -> None:
        self.kept[bucket.key] = bucket.bytecode_to_string()


class Console:
    """A console under `settings`, on its own port."""

    def __init__(self, settings: Settings) -> None:
        self.port = servers._free_port()
        with pytest.MonkeyPatch.context() as patch:
            made = jinja2.Environment.__init__
            patch.setattr(jinja2.Environment, "__init__", functools.partialmethod(made, bytecode_cache=Compiled()))
            self._server = uvicorn.Server(configured(settings, servers.HOST, self.port))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://{servers.HOST}:{self.port}"

    def __enter__(self) -> Console:
        self._thread.start()
        processes.wait_for(lambda: self._server.started, within_s=20, what=lambda: "the console did not start")
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)


class Visitor(httpx.Client):
    """An HTTP client that keeps cookies, follows no redirects, and fills in forms."""

    def __init__(self, url: str) -> None:
        super().__init__(base_url=url, timeout=30, verify=False)  # it needs no certificates: reading them takes 30 ms

    def token(self, page: str) -> str:
        """The CSRF token in a page's forms."""
        found = re.search(r'name="csrftoken" value="([0-9a-f]{64})"', self.get(page).text)
        assert found, f"{page} has no form"
        return found[1]

    def submit(self, path: str, form: dict[str, Any], *, page: str = "/", **headers: str) -> httpx.Response:
        """Post a form with the token of `page`."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.post(path, data={"csrftoken": self.token(page), **form}, headers=names)

    def log_in(self, name: str, password: str = PASSWORD, *, query: str = "", **headers: str) -> httpx.Response:
        form = {"username": name, "password": password}
        return self.submit(f"/login{query}", form, page="/login", **headers)
