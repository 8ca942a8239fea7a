"""`make check` runs the tests that need no server: a test that starts one, or a process, has a mark that says so."""

import subprocess
import sys

import pytest

from tests import servers


def test_an_unmarked_test_cannot_start_a_process() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"cannot_start_a_process .*pytest\.mark\.process"):
        subprocess.run([sys.executable, "-c", ""], check=True)


@pytest.fixture
def redis_url() -> str:
    """In place of the one that would start a server: pytest keeps the error of a refused start for later tests."""
    return "redis://nowhere"


def test_an_unmarked_test_cannot_use_a_server(request: pytest.FixtureRequest) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"pytest\.mark\.process"):
        request.getfixturevalue("redis_url")


def test_a_fixture_that_starts_a_server_brings_the_mark(
    request: pytest.FixtureRequest, redis_server: servers.Server
) -> None:
    assert request.node.get_closest_marker("process")


@pytest.mark.process
def test_a_marked_test_may_start_a_process() -> None:
    assert subprocess.run([sys.executable, "-c", ""]).returncode == 0
