"""Commands on terminals of all kinds: in ASCII, in latin-1, 80 columns wide; with what strangers wrote on them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from rich.cells import cell_len

from tests import gateways
from tests.consoles import PASSWORD
from tests.processes import PROJECT, House, environment
from tombola.producers.domain.causes import Cause
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.storage import api_keys
from tombola.worker import cli
from tombola.worker.cli import terminal
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.message import Parking
from tombola.worker.deliveries import Delivery
from tombola.worker.operators import actions
from tombola.worker.operators import users as operators

pytestmark = pytest.mark.slow

LONG_KEY = "lottery_req_1795424054123_1c80fef5_694"
LONGEST_KEY = "x" * 64
EMOJI = "🎰 für Jörg … → \ud83c"  # and half a character

# Every command that looks, with what a stranger may have put there in view.
LOOKS = [
    *(["dead-letters", it] for it in ("list", "groups", "forecast", "export")),
    *(["dead-letters", it, "--json"] for it in ("list", "groups", "forecast")),
    *(["dead-letters", "show", "1"], ["dead-letters", "show", "1", "--json"], ["dead-letters", "show", "2"]),
    *(["api-key", "list"], ["api-key", "list", "--json"], ["user", "list"], ["user", "list", "--json"]),
    *(["audit"], ["audit", "--json"], ["doctor"], ["doctor", "--json"], ["--help"], ["dead-letters", "--help"]),
    *(["transactions", LONG_KEY], ["result", LONG_KEY], ["result", LONG_KEY, "--json"], ["account", "show", "1"]),
    *(["dead-letters", "discard", "3", "--yes", "--reason", "für Jörg 🎰"], ["--version"]),
]
# What is no key, typed where one is asked for: an error in one line, or nothing found.
FOREIGN = [
    *(["transactions", "é"], ["result", "é"], ["user", "remove", "é"], ["user", "role", "é", "viewer"]),
    *(["api-key", "revoke", "é"], ["api-key", "add", "é"], ["account", "add", "--asset", "é"]),
    *(["account", "recharge", "--account", "1", "--amount", "1", "--key", "é"], ["account", "add", "--key", "é"]),
    *(["enqueue", "--account", "1", "--key", "é"], ["enqueue", "--account", "1", "--session", "é"]),
    ["enqueue", "--account", "1", "--campaign", "é"],
    ["dead-letters", "show", "1", "--reason\udcff"],
]


@pytest.fixture(scope="module")
def module_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    url = f"sqlite:///{tmp_path_factory.mktemp('terminal')}/ledger.db"
    with House(url, "redis://127.0.0.1:1/0", "redis://127.0.0.1:1/0") as house:
        fill(house)
        yield house


def fill(house: House) -> None:
    """A draw, a key, a user, an action, and dead letters with long keys and emoji."""
    (account_id,) = house.accounts(1)
    gateways.settle(house, DrawRequest(account_id=account_id, request_key=LONG_KEY), store=False)
    api_keys.add(house.engine, "a" * 64)
    operators.add(house.engine, "u" * 64, "viewer", PASSWORD, by="root")
    body = '{"v":1,"request_key":"🎰 für Jörg … →","account_id":6}'.encode()
    error = f"not a draw request: {EMOJI} " + "and so on, " * 20
    asked = DrawRequest(account_id=2**62, request_key=LONGEST_KEY, lottery_session_id="s" * 100)
    try:
        raise ValueError(EMOJI)
    except ValueError as raised:
        parkings = [
            Parking(Delivery(body, 1, 1, {"🎰": EMOJI}), Cause.INVALID, error, None, raised),
            Parking(Delivery(asked.encode(), 1), Cause.FAILED_ALONE, error, asked, raised),
            Parking(Delivery(b"\xff\xfe", 1), Cause.UNPARSABLE, "no text"),
        ]
    parking.park(house.engine, parkings, worker="w" * 100)
    with house.engine.begin() as connection:
        actions.record(connection, operator="ann", action="discard", reason="🎰", count=1, details={})


class Printed(NamedTuple):
    """What a command wrote, and how it ended."""

    status: int
    out: str
    err: str


Tombola = Callable[..., Printed]


@pytest.fixture
def tombola(monkeypatch: pytest.MonkeyPatch) -> Tombola:
    """The command, in this process, on a terminal of some encoding and width (0: none that anybody looks at)."""

    def run(house: House, *arguments: str, encoding: str = "utf-8", columns: int = 0) -> Printed:
        for name, value in house.env.items():
            monkeypatch.setenv(name, value)
        raw = io.BytesIO(), io.BytesIO()
        for name, stream in zip(("stdout", "stderr"), raw, strict=True):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, errors="strict"))
        monkeypatch.setattr(terminal.out, "_width", columns or 200)
        monkeypatch.setattr(sys, "argv", ["tombola", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        sys.stdout.flush()
        sys.stderr.flush()
        code = ended.value.code
        status = code if isinstance(code, int) else 0 if code is None else 1
        return Printed(status, *(stream.getvalue().decode(encoding) for stream in raw))

    return run


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("arguments", LOOKS, ids=" ".join)
def test_any_terminal_will_do(tombola: Tombola, module_house: House, encoding: str, arguments: list[str]) -> None:
    ended = tombola(module_house, *arguments, encoding=encoding)
    assert "Traceback (most" not in ended.err
    assert "UnicodeEncodeError" not in ended.out + ended.err
    assert ended.out
    if "--json" in arguments or "export" in arguments:
        said = [json.loads(line) for line in ended.out.splitlines()]
        if arguments[1] in ("list", "show", "export") and arguments[0] == "dead-letters":
            letter = next(it for it in said if it["id"] == 1)
            assert letter["body"] == '{"v":1,"request_key":"🎰 für Jörg … →","account_id":6}'
            assert "🎰" in letter["headers"]
    if arguments[:2] == ["dead-letters", "show"] and arguments[2] == "1" and "--json" not in arguments:
        shown = {"ascii": "\\U0001f3b0 f\\xfcr J\\xf6rg ... >", "latin-1": "\\U0001f3b0 für Jörg ... >"}
        assert shown.get(encoding, "🎰 für Jörg … →") in ended.out


@pytest.mark.process
def test_a_process_on_a_terminal_in_ascii(module_house: House) -> None:
    """As the shell sees it, with Python's own way of choosing an encoding."""
    for encoding, arguments in (("ascii", ["dead-letters", "show", "1"]), ("latin-1", ["doctor"])):
        done = subprocess.run(
            [sys.executable, "-m", "tombola.worker", *arguments],
            cwd=PROJECT,
            env=environment(module_house.env) | {"PYTHONIOENCODING": encoding, "LANG": "C", "PYTHONUTF8": "0"},
            capture_output=True,
            timeout=60,
        )
        assert b"Traceback (most" not in done.stderr, done.stderr
        assert done.stdout.decode(encoding)


@pytest.mark.parametrize(
    "arguments",
    [it for it in LOOKS if not {"--json", "export", "doctor", "show", "discard", "--help"} & set(it)],
    ids=" ".join,
)
def test_80_columns_are_enough(tombola: Tombola, module_house: House, arguments: list[str]) -> None:
    """No line is broken by the terminal, and what will be copied is whole."""
    ended = tombola(module_house, *arguments, columns=80)
    lines = ended.out.splitlines()
    assert max(map(cell_len, lines)) <= 80 or "audit" in arguments, ended.out
    if arguments == ["dead-letters", "list"]:
        assert LONGEST_KEY in ended.out
        assert str(2**62) in ended.out
    if arguments == ["transactions", LONG_KEY]:
        assert f"{LONG_KEY}:consume" in ended.out
    if arguments == ["api-key", "list"]:
        assert "a" * 64 in ended.out


def test_a_table_is_a_table_where_it_fits(tombola: Tombola, module_house: House) -> None:
    wide = tombola(module_house, "dead-letters", "list", columns=300).out.splitlines()
    assert wide[0].split()[:4] == ["id", "state", "cause", "account"]
    assert len([it for it in wide if LONGEST_KEY in it and str(2**62) in it and "failed alone" in it]) == 1


def test_where_nobody_looks_a_row_is_a_line(
    tombola: Tombola, module_house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    (row,) = [it for it in tombola(module_house, "dead-letters", "list").out.splitlines() if LONGEST_KEY in it]
    assert str(2**62) in row
    monkeypatch.setattr(terminal, "PIPE_WIDTH", 90)  # as if keys were longer still
    (row,) = [
        it for it in tombola(module_house, "dead-letters", "list", columns=90).out.splitlines() if LONGEST_KEY in it
    ]
    assert str(2**62) in row


def test_what_is_no_key_is_refused_in_a_sentence(tombola: Tombola, mariadb_url: str, redis_url: str) -> None:
    """MariaDB refuses to compare a column of ASCII with anything else: that is no outage, and no mistake of ours."""
    with House(mariadb_url, redis_url, redis_url) as house:
        house.accounts(1)
        for arguments in FOREIGN:
            ended = tombola(house, *arguments)
            assert (ended.status, ended.out) == (1, ""), (arguments, ended)
            assert "collation" not in ended.err, (arguments, ended)
            assert "Traceback" not in ended.err, (arguments, ended)
            assert len(ended.err.strip().splitlines()) == 1, (arguments, ended)
        for filtered in ("--key", "--group"):
            assert tombola(house, "dead-letters", "list", filtered, "é").out.endswith("0 of 0\n")
