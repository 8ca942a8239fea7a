"""`tombola dead-letters`, as somebody types it: what it prints, what it refuses, and how it ends."""

import base64
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from sqlalchemy import func, select, update

from tests.books import assert_books
from tests.processes import PROJECT, House, draws, environment
from tests.processes import wait_for as wait_until
from tombola.producers.domain.causes import Cause, LetterState
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.storage.clock import utc_now
from tombola.producers.storage.schema import dead_letters, replays
from tombola.worker import cli
from tombola.worker.dead_letters import parking
from tombola.worker.dead_letters.message import Parking
from tombola.worker.deliveries import Delivery
from tombola.worker.operators import actions
from tombola.worker.replays import replay
from tombola.worker.settle.consumer import Consumer


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    def refuses(self, *words: str, status: int = 1) -> None:
        """It said in one line why not, and did nothing else."""
        assert self.status == status, self
        assert self.out == "", self
        assert "Traceback" not in self.err, self
        said = [line for line in self.err.splitlines() if line.strip(" ╭─╮╰╯│")]
        assert len(said) == 1 or status == 2, self
        for word in words:
            assert word in " ".join(self.err.split()), self


Tombola = Callable[..., Ended]


@pytest.fixture
def house(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    with House(database_url, redis_url, redis_url) as house:
        for name, value in house.env.items():
            monkeypatch.setenv(name, value)
        yield house


@pytest.fixture
def tombola(house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tombola:
    """The command, in this process: `tombola("list", "--json")`."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["tombola", "dead-letters", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0 if code is None else 1, said.out, said.err)

    return run


@pytest.fixture
def at_work(house: House) -> Iterator[Consumer]:
    consumer = Consumer.open(house.settings, house.engine, house.wheels)
    consumer.start()
    yield consumer
    assert consumer.stop(timeout_s=20)


def park(house: House, *parkings: Parking) -> list[int]:
    """Their ids, in their order."""
    parking.park(house.engine, parkings, worker="host:1")
    with house.engine.connect().execution_options(read_only=True) as connection:
        rows = connection.execute(select(dead_letters.c.body_sha256, dead_letters.c.id))
        ids = {row.body_sha256: row.id for row in rows}
    return [ids[it.sha256] for it in parkings]


def good(
    draw: DrawRequest, cause: str = Cause.UNKNOWN_CAMPAIGN, error: str = "there is no campaign 'x' here"
) -> Parking:
    return Parking(Delivery(draw.encode(), 1), cause, error, draw)


def bad(body: bytes, cause: str = Cause.UNPARSABLE, error: str = "not a JSON object: truncated") -> Parking:
    return Parking(Delivery(body, 1), cause, error)


def change(house: House, dead_letter: int, **values: Any) -> None:
    with house.engine.begin() as connection:
        connection.execute(update(dead_letters).where(dead_letters.c.id == dead_letter).values(**values))


def states(house: House) -> dict[str, int]:
    with house.engine.connect().execution_options(read_only=True) as connection:
        rows = connection.execute(select(dead_letters.c.state, func.count()).group_by(dead_letters.c.state))
        return {state: int(number) for state, number in rows}


def recorded(house: House) -> list[tuple[str, int, str]]:
    with house.engine.connect().execution_options(read_only=True) as connection:
        return [(it.action, it.count, it.reason) for it in actions.recent(connection, rows_max=100)]


# ---- look ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(house: House) -> list[int]:
    """Six of them, no two alike."""
    ids = park(
        house,
        good(DrawRequest(account_id=6, request_key="k1")),
        good(DrawRequest(account_id=6, request_key="k2")),
        good(DrawRequest(account_id=7, request_key="k3"), Cause.TOO_MANY_DELIVERIES, "delivered 6 times"),
        bad(b"\xff junk"),
        good(DrawRequest(account_id=8, request_key="k5")),
        good(DrawRequest(account_id=9, request_key="k6")),
    )
    change(house, ids[4], state=LetterState.PARKED_AGAIN)
    change(house, ids[5], state=LetterState.DISCARDED)
    change(house, ids[0], last_parked_at=utc_now() - timedelta(hours=3))
    return ids


def test_list_shows_the_open_ones_the_latest_first(tombola: Tombola, shelf: list[int]) -> None:
    ended = tombola("list")
    assert ended.status == 0
    rows = [line.split() for line in ended.out.splitlines()]
    assert rows[0][:3] == ["id", "state", "cause"]
    assert [row[0] for row in rows[1:-1]] == [str(it) for it in reversed(shelf[:5])]
    assert ended.out.splitlines()[-1] == "5 of 5"
    assert tombola("list", "--limit", 2).out.splitlines()[-1] == "2 of 5"


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (["--cause", "unknown campaign"], [4, 1, 0]),
        (["--cause", "unparsable"], [3]),
        (["--account", "6"], [1, 0]),
        (["--key", "k3"], [2]),
        (["--older", "2h"], [0]),
        (["--newer", "2h"], [4, 3, 2, 1]),
        (["--older", "1d"], []),
        (["--newer", "1.5d"], [4, 3, 2, 1, 0]),
        (["--newer", "90m", "--account", "6"], [1]),
        (["--state", "parked again"], [4]),
        (["--state", "discarded"], [5]),
        (["--state", "discarded", "--state", "parked again"], [5, 4]),
        (["--state", "all"], [5, 4, 3, 2, 1, 0]),
        (["--state", "settled"], []),
        (["--limit", "1"], [4]),
    ],
)
def test_list_filters(tombola: Tombola, shelf: list[int], filters: list[str], found: list[int]) -> None:
    ended = tombola("list", "--json", *filters)
    assert ended.status == 0, ended
    assert [it["id"] for it in ended.lines] == [shelf[number] for number in found]


def test_a_group_began_when_the_first_of_it_was_parked_first(tombola: Tombola, house: House, shelf: list[int]) -> None:
    first = utc_now() - timedelta(days=9)
    change(house, shelf[0], first_parked_at=first, times_parked=2)
    group = json.loads(tombola("groups", "--json").out)[0]
    assert group["first_parked_at"] == first.isoformat().replace("+00:00", "Z")
    assert f"{first:%Y-%m-%d %H:%M:%S}" in tombola("groups").out


def test_list_of_one_group(tombola: Tombola, shelf: list[int]) -> None:
    (group,) = {it["group_id"] for it in tombola("list", "--json", "--cause", "unparsable").lines}
    assert [it["id"] for it in tombola("list", "--json", "--group", group).lines] == [shelf[3]]
    assert tombola("list", "--json", "--group", "0" * 16).lines == []


def test_json_has_all_of_it_and_bodies_byte_for_byte(tombola: Tombola, shelf: list[int]) -> None:
    (it,) = tombola("list", "--json", "--cause", "unparsable").lines
    assert base64.b64decode(it["body_base64"]) == b"\xff junk"
    assert it["body"] == "\\xff junk"
    assert it.keys() == {column.name for column in dead_letters.columns} | {"body_base64"}


def test_groups_count_the_largest_first(tombola: Tombola, shelf: list[int]) -> None:
    (said,) = [json.loads(tombola("groups", "--json").out)]
    assert [it["count"] for it in said] == [3, 1, 1]
    assert said[0]["cause"] == "unknown campaign"
    assert {it["cause"] for it in said} == {"unknown campaign", "too many deliveries", "unparsable"}
    assert said[1]["group_id"] < said[2]["group_id"]
    shown = tombola("groups")
    assert shown.out.splitlines()[-1] == "5 in 3 groups"
    assert said[0]["group_id"] in shown.out
    assert "there is no campaign 'x' here" in shown.out
    assert tombola("groups", "--state", "all", "--account", 9).out.splitlines()[-1] == "1 in 1 groups"


def test_show_says_everything(tombola: Tombola, house: House, shelf: list[int]) -> None:
    said = tombola("show", shelf[0]).out
    for word in ("parked", "unknown campaign", "there is no campaign", "k1", '"account_id":6', "host:1", "draws"):
        assert word in said
    (it,) = tombola("show", shelf[0], "--json").lines
    assert (it["id"], it["request_key"]) == (shelf[0], "k1")
    error = ValueError("lost")
    (failed,) = park(
        house,
        Parking(Delivery(b"x" * 70_000, 1, 1, {"origin": "gen1"}), "failed alone", "ValueError: lost", None, error),
    )
    said = tombola("show", failed).out
    assert "(the first 65,536)" in said
    assert "ValueError: lost" in said.partition("traceback:")[2]
    assert '{"origin":"gen1"}' in said


MARKUP = b'{"v":1,"request_key":"[/]","lottery_session_id":"[/red]","account_id":6}'
HOSTILE = "\x1b[2J\x1b]0;owned\x07 [bold]b[/bold] [/] \u202e"


def test_what_strangers_wrote_is_shown_and_not_obeyed(tombola: Tombola, house: House) -> None:
    """Neither by the terminal nor by the library that draws the tables."""
    error = "not a draw request: [/b] \x1b[31m"
    it, with_key = park(house, bad(HOSTILE.encode(), "invalid", error), bad(MARKUP, "invalid", error))
    for command in (("list",), ("groups",), ("show", it), ("show", with_key), ("forecast",)):
        ended = tombola(*command)
        assert ended.status == 0, ended
        assert all(character.isprintable() or character == "\n" for character in ended.out), repr(ended.out)
    assert "[/]" in tombola("list").out
    assert "\\x1b[2J" in tombola("show", it).out
    assert "[bold]b[/bold]" in tombola("show", it).out
    assert tombola("show", it, "--json").lines[0]["body"] == HOSTILE


def test_export_writes_a_line_each(tombola: Tombola, shelf: list[int], tmp_path: Path) -> None:
    assert [it["id"] for it in tombola("export").lines] == list(reversed(shelf[:5]))
    file = tmp_path / "dead.jsonl"
    ended = tombola("export", "--state", "all", "--to", file)
    assert (ended.status, ended.out) == (0, f"6 dead letters written to {file}\n")
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [it["id"] for it in written] == list(reversed(shelf))
    tombola("export", "--to", file).refuses(str(file), "exists")
    assert len(file.read_text().splitlines()) == 6
    tombola("export", "--to", tmp_path / "no" / "where").refuses("cannot be written")


# ---- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "--state", "gone"], ["there is no state 'gone'", "parked again"]),
        (["list", "--cause", "bad"], ["there is no cause 'bad'", "unparsable"]),
        (["groups", "--cause", "bad"], ["there is no cause 'bad'"]),
        (["list", "--account", str(2**64)], ["an id is at most"]),
        (["list", "--older", "99999999d"], ["an age is at most"]),
        (["forecast", str(2**64)], ["an id is at most"]),
        (["show", "4711"], ["there is no dead letter 4711"]),
        (["show", str(2**64)], ["there is no dead letter"]),
        (["edit", "4711", "--reason", "r", "--body", "{}"], ["there is no dead letter 4711"]),
        (["replay", "--reason", "r"], ["nothing to replay"]),
        (["replay", "--reason", "r", "--json"], ["add --yes"]),
    ],
)
def test_what_cannot_be_done_is_one_line(tombola: Tombola, arguments: list[str], words: list[str]) -> None:
    ended = tombola(*arguments)
    if arguments[0] == "replay" and "--json" not in arguments:
        ended = tombola(*arguments, "--yes", "--json")
    ended.refuses(*words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--older", "soon"],
        ["list", "--newer", "-1h"],
        ["list", "--limit", "0"],
        ["show", "seventeen"],
        ["show"],
        ["replay", "--yes"],
        ["replay", "--reason", "r", "--canary", "0"],
        ["replay", "--reason", "r", "--rate", "0"],
        ["replay", "--reason", "r", "--limit", "0"],
        ["discard", "--yes"],
        ["restore", "--yes"],
        ["edit", "1"],
        ["bury"],
    ],
)
def test_wrong_usage_is_said_with_exit_code_2(tombola: Tombola, arguments: list[str]) -> None:
    tombola(*arguments).refuses("Usage:", f"dead-letters {arguments[0] if arguments[0] != 'bury' else ''}", status=2)


@pytest.mark.parametrize("command", ["replay", "discard", "restore"])
def test_a_blank_reason_is_none(tombola: Tombola, house: House, command: str) -> None:
    (it,) = park(house, good(DrawRequest(account_id=6, request_key="k1")))
    change(house, it, state=LetterState.DISCARDED if command == "restore" else LetterState.PARKED)
    before = states(house)
    ended = tombola(command, "--yes", "--reason", "  ")
    assert (ended.status, states(house)) == (1, before)
    assert "say why" in ended.err
    assert recorded(house) == []


def test_help_ends_with_examples(tombola: Tombola) -> None:
    for arguments in ((), ("replay",)):
        said = click.unstyle(tombola(*arguments, "--help").out).rstrip()
        examples = said.partition("Examples:")[2].splitlines()[1:]
        assert len(examples) >= 3
        assert all(line.strip().startswith("tombola dead-letters ") for line in examples), said


def test_every_example_is_a_command_that_there_is(tombola: Tombola) -> None:
    said = tombola("--help").out + tombola("replay", "--help").out
    for command in re.findall(r"tombola dead-letters (\S+)", said):
        if command not in ("[OPTIONS]",):
            assert tombola(command, "--help").status == 0, command


# ---- foretell and replay ---------------------------------------------------------------------------------------------


def test_forecast_says_what_a_replay_would_do_and_writes_nothing(tombola: Tombola, house: House) -> None:
    asked = draws(house.accounts(2), 3)
    park(house, *[good(draw) for draw in asked], bad(b"junk"), good(DrawRequest(account_id=4711, request_key="nobody")))
    said = tombola("forecast").out
    assert "Of 5 selected dead letters" in said
    assert "3  would be charged: 3.00 POINT" in said
    assert "1  still cannot be parsed" in said
    assert "1 × ACCOUNT_NOT_FOUND" in said
    assert "Prizes are not known before a draw settles" in said
    told = json.loads(tombola("forecast", "--json").out)
    assert told["counts"] == {"would charge": 3, "cannot be parsed": 1, "would be rejected": 1}
    assert [it["outcome"] for it in told["lines"]] == [
        "would charge", "would charge", "would charge", "cannot be parsed", "would be rejected",
    ]  # fmt: skip
    assert told["charged"] == {"POINT": "3.00"}
    assert json.loads(tombola("forecast", "--json", "--limit", 2).out)["counts"] == {"would charge": 2}
    assert states(house) == {LetterState.PARKED: 5}
    assert recorded(house) == []


def test_a_forecast_gives_a_reason_in_its_own_words(tombola: Tombola, house: House) -> None:
    (account_id,) = house.accounts(1)

    def of_campaign(key: str, campaign: str) -> Parking:
        return good(DrawRequest(account_id=account_id, request_key=key, campaign=campaign))

    alike = park(house, of_campaign("k1", "spring"), of_campaign("k2", "spring"))
    said = tombola("forecast").out
    assert "2 × there is no campaign 'spring' here" in said
    assert "'#'" not in said
    park(house, of_campaign("k3", "summer"))
    assert "3 × such as: there is no campaign 'spring' here" in tombola("forecast").out
    told = json.loads(tombola("forecast", "--json", *alike).out)
    assert told["reasons"] == {"unknown campaign: there is no campaign 'spring' here": 2}


def test_replay_prints_the_forecast_and_asks(tombola: Tombola, house: House) -> None:
    park(house, good(draws(house.accounts(1), 1)[0]))
    ended = tombola("replay", "--reason", "rolled back")
    assert ended.status == 1
    assert "1  would be charged" in ended.out
    (error,) = (line for line in ended.err.splitlines() if line)
    assert error == "error: no terminal to ask for confirmation on: add --yes"
    assert (states(house), recorded(house)) == ({LetterState.PARKED: 1}, [])


def test_replay_can_be_declined_and_confirmed(
    tombola: Tombola, house: House, at_work: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    park(house, good(draws(house.accounts(1), 1)[0]))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter([False, True])
    monkeypatch.setattr("typer.confirm", lambda _question: next(answers))
    ended = tombola("replay", "--reason", "rolled back")
    assert (ended.status, states(house), recorded(house)) == (1, {LetterState.PARKED: 1}, [])
    assert "Nothing was done." in ended.out
    assert tombola("replay", "--reason", "rolled back").status == 0
    assert states(house) == {LetterState.SETTLED: 1}


def test_replaying_what_is_hopeless_is_asked_twice_and_begins_with_a_few(
    tombola: Tombola, house: House, at_work: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (account_id,) = house.accounts(1)
    lost = [DrawRequest(account_id=account_id, request_key=f"k{it}", campaign="spring") for it in range(12)]
    park(house, *[good(draw) for draw in lost])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []

    def answering(*answers: bool) -> Ended:
        asked.clear()
        left = iter(answers)

        def confirm(question: str) -> bool:
            asked.append(question)
            return next(left)

        monkeypatch.setattr("typer.confirm", confirm)
        return tombola("replay", "--reason", "is it there?")

    ended = answering(True, False)
    assert asked == ["Replay them?", "12 of 12 would stay parked, or be parked again. Replay anyway?"]
    assert (ended.status, states(house), recorded(house)) == (1, {LetterState.PARKED: 12}, [])
    assert "The first 10 are sent before the others" in ended.out
    ended = answering(True, True)
    assert ended.status == 1
    assert "stopped: 10 sent, 0 settled, 10 parked again" in ended.out
    assert states(house) == {LetterState.PARKED_AGAIN: 10, LetterState.PARKED: 2}
    # Most of them decide.
    park(house, *[good(draw) for draw in draws([account_id], 13)])
    answering(False)
    assert asked == ["Replay them?"]


def test_replay_settles_what_is_selected_and_says_how_it_went(
    tombola: Tombola, house: House, at_work: Consumer
) -> None:
    asked = draws(house.accounts(3), 12)
    ids = park(house, *[good(draw) for draw in asked])
    ended = tombola("replay", *ids[:2], "--yes", "--reason", "two first")
    assert ended.status == 0, ended
    assert "done: 2 sent, 2 settled, 0 parked again, 0 left parked" in ended.out
    ended = tombola("replay", "--yes", "--json", "--limit", 4, "--reason", "some")
    assert (ended.status, ended.lines[0]["settled"], ended.lines[0]["status"]) == (0, 4, "done")
    ended = tombola("replay", "--yes", "--json", "--canary", 2, "--rate", 1000, "--reason", "the rest")
    assert (ended.status, ended.lines[0]["settled"]) == (0, 6)
    assert states(house) == {LetterState.SETTLED: 12}
    assert recorded(house) == [
        ("replay ended", 6, "the rest"), ("replay", 6, "the rest"),
        ("replay ended", 4, "some"), ("replay", 4, "some"),
        ("replay ended", 2, "two first"), ("replay", 2, "two first"),
    ]  # fmt: skip
    assert_books(house.engine)


def test_replay_of_what_cannot_all_settle_has_exit_code_1(tombola: Tombola, house: House, at_work: Consumer) -> None:
    park(house, good(draws(house.accounts(1), 1)[0]), bad(b"junk"))
    ended = tombola("replay", "--yes", "--reason", "try")
    assert ended.status == 1
    assert "1 sent, 1 settled, 0 parked again, 1 left parked" in ended.out
    assert states(house) == {LetterState.SETTLED: 1, LetterState.PARKED: 1}


def start(house: House, *arguments: str) -> subprocess.Popen[str]:
    """The command as a process, with nobody at its terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "tombola.worker", "dead-letters", *arguments],
        cwd=PROJECT,
        env=environment(house.env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_nobody_to_ask_as_a_process(house: House) -> None:
    park(house, good(draws(house.accounts(1), 1)[0]))
    process = start(house, "replay", "--reason", "r")
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "error: no terminal to ask for confirmation on: add --yes\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_and_the_rest_stays_parked(house: House, at_work: Consumer, number: signal.Signals) -> None:
    park(house, *[good(draw) for draw in draws(house.accounts(3), 300)])
    process = start(house, "replay", "--yes", "--rate", "40", "--reason", "slowly")
    try:
        wait_until(
            lambda: states(house).get(LetterState.SETTLED, 0) + states(house).get(LetterState.REPLAYING, 0) >= 20,
            within_s=40,
            what=lambda: f"{states(house)}, {process.poll()}",
        )
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1, err
    assert "Traceback" not in out + err
    assert "stopped where it was run" in out
    after = states(house)
    assert after.keys() == {LetterState.SETTLED, LetterState.PARKED}
    assert 20 <= after[LetterState.SETTLED] < 150  # it kept to its rate until the end
    assert [(action, reason) for action, _, reason in recorded(house)] == [
        ("replay ended", "slowly"),
        ("replay", "slowly"),
    ]
    with house.engine.connect().execution_options(read_only=True) as connection:
        run = connection.execute(select(replays)).one()
    assert (run.status, run.sent, run.settled) == ("stopped", after[LetterState.SETTLED], after[LetterState.SETTLED])
    assert_books(house.engine)


def test_however_slow_it_goes_it_heeds_a_stop_from_elsewhere(house: House, at_work: Consumer) -> None:
    park(house, *[good(draw) for draw in draws(house.accounts(1), 5)])
    process = start(house, "replay", "--yes", "--json", "--rate", "0.02", "--reason", "one in 50 s")
    try:
        wait_until(lambda: states(house).get(LetterState.SETTLED, 0) == 1, within_s=40, what=lambda: str(states(house)))
        with house.engine.connect().execution_options(read_only=True) as connection:
            (before,) = replay.recent(connection, 2)
        replay.ask_to_stop(house.engine, before.id, operator="grace")
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert json.loads(out)["stopped_because"] == "stopped by grace", err
    assert states(house) == {LetterState.SETTLED: 1, LetterState.PARKED: 4}


# ---- edit, discard, restore ------------------------------------------------------------------------------------------


def test_edit_makes_a_copy_to_replay(tombola: Tombola, house: House, at_work: Consumer) -> None:
    (account,) = house.accounts(1)
    body = b'{"v":1,"request_key":"k1","account_id":%d,"campain":"default"}' % account
    (original,) = park(house, bad(body, "invalid", "unknown field"))
    right = f'{{"v":1,"request_key":"k1","account_id":{account},"campaign":"default"}}'
    ended = tombola("edit", original, "--reason", "a typo", "--body", f" {right}\n")
    assert ended.status == 0, ended
    copy = int(re.findall(r"dead letter (\d+) is the edited copy", ended.out)[0])
    assert f"tombola dead-letters replay {copy} --reason" in ended.out
    assert tombola("show", original, "--json").lines[0]["state"] == LetterState.PARKED
    assert tombola("show", copy, "--json").lines[0]["edited_from"] == original
    assert re.search(rf"edited copies +{copy}\n", re.sub(" +\n", "\n", tombola("show", original).out))
    assert tombola("replay", copy, "--yes", "--reason", "a typo").status == 0
    assert states(house) == {LetterState.SETTLED: 2}
    tombola("edit", original, "--reason", "again", "--body", right).refuses("settled meanwhile")
    assert recorded(house)[-1] == ("edit", 1, "a typo")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('{"v":1,"request_key":"k2","account_id":6}', "request_key cannot be edited"),
        ('{"v":1,"request_key":"k1","account_id":7}', "account_id cannot be edited"),
        ('{"v":1,"request_key":"k1"', "not a JSON object"),
        ("", "not a JSON object"),
    ],
)
def test_an_edit_that_is_refused_is_one_line(tombola: Tombola, house: House, body: str, why: str) -> None:
    original_body = b'{"v":1,"request_key":"k1","account_id":6,"campain":"x"}'
    (original,) = park(house, bad(original_body, "invalid", "unknown field"))
    tombola("edit", original, "--reason", "r", "--body", body).refuses(why)
    assert states(house) == {LetterState.PARKED: 1}


def test_edit_opens_the_editor(tombola: Tombola, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    (original,) = park(house, bad(b'{"v":1,"request_key":"k1","account_id":6,"campain":"x"}', "invalid", "unknown"))
    monkeypatch.setattr("click.edit", lambda text, **_: text.replace('"campain":"x"', '"campaign":"default"'))
    assert tombola("edit", original, "--reason", "a typo").status == 0
    monkeypatch.setattr("click.edit", lambda text, **_: None)
    tombola("edit", original, "--reason", "a typo").refuses("the editor saved nothing")


def test_discard_asks_and_restore_brings_back(tombola: Tombola, house: House) -> None:
    ids = park(house, *[good(DrawRequest(account_id=6, request_key=f"k{number}")) for number in range(4)])
    change(house, ids[0], state=LetterState.PARKED_AGAIN)
    tombola("discard", ids[1], "--reason", "noise").refuses("no terminal to ask for confirmation on: add --yes")
    ended = tombola("discard", *ids[:3], "--reason", "noise", "--yes")
    assert (ended.status, ended.out) == (0, "3 dead letters discarded\n")
    assert states(house) == {LetterState.DISCARDED: 3, LetterState.PARKED: 1}
    ended = tombola("restore", "--reason", "they were real", "--yes", "--account", 6)
    assert (ended.status, ended.out) == (0, "3 dead letters restored\n")
    assert states(house) == {LetterState.PARKED: 4}
    assert tombola("discard", "--cause", "unparsable", "--reason", "none", "--yes").out == "0 dead letters discarded\n"
    assert recorded(house) == [("discard", 0, "none"), ("restore", 3, "they were real"), ("discard", 3, "noise")]
    with house.engine.connect().execution_options(read_only=True) as connection:
        assert {it.operator.partition(":")[0] for it in actions.recent(connection, rows_max=10)} == {"shell"}
