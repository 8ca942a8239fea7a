"""Logins to the console that take no time."""

from collections.abc import Iterator

import pytest

from tests.consoles import quick_hashes


@pytest.fixture(scope="package", autouse=True)
def hash_quickly() -> Iterator[None]:
    with quick_hashes():
        yield
