"""Keys: the owner's formats, no two alike, in the order they were made, and no derived key that reads in two ways."""

import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tombola.producers.domain import keys
from tombola.producers.domain.errors import DrawError, InvalidKey, InvalidRequest

# ARCHITECTURE, Identifiers: a timestamp has 13 digits from 2001 to 2286.
REQUEST_KEY = re.compile(r"lottery_req_(?P<ms>[0-9]{13})_(?P<hex>[0-9a-f]{8})_(?P<seq>[0-9]{3})")
SESSION_ID = re.compile(r"lottery_tx_(?P<ms>[0-9]{13})_(?P<hex>[0-9a-f]{6})_(?P<seq>[0-9]{3})")
STANDALONE_KEY = re.compile(r"recharge_42_(?P<ms>[0-9]{13})_(?P<hex>[0-9a-f]{6})")

THREADS = 8
PROCESSES = 8
KEYS = 1_000_000

MAKERS: dict[str, tuple[Callable[[], str], re.Pattern[str]]] = {
    "request key": (keys.make_request_key, REQUEST_KEY),
    "session id": (keys.make_session_id, SESSION_ID),
    "standalone key": (lambda: keys.make_standalone_key("recharge", 42), STANDALONE_KEY),
}
each_maker = pytest.mark.parametrize(("make", "form"), MAKERS.values(), ids=MAKERS)

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


# ---- made keys -------------------------------------------------------------------------------------------------------


@each_maker
def test_the_formats_are_the_owners(make: Callable[[], str], form: re.Pattern[str]) -> None:
    before_ms = time.time_ns() // 1_000_000
    made = [make() for _ in range(1000)]
    after_ms = time.time_ns() // 1_000_000
    for key in made:
        parts = form.fullmatch(key)
        assert parts is not None, key
        # A second's tolerance: a test before this one may have driven the clock a little ahead.
        assert before_ms <= int(parts["ms"]) <= after_ms + 1000


def test_a_made_key_is_one_that_we_accept() -> None:
    assert keys.check_request_key(keys.make_request_key())
    assert keys.check_session_id(keys.make_session_id())


def test_the_sequence_counts_every_key() -> None:
    for make, form in (MAKERS["request key"], MAKERS["session id"]):
        found = [form.fullmatch(make()) for _ in range(1500)]
        sequence = [int(parts["seq"]) for parts in found if parts]
        assert all(after == (before + 1) % 1000 for before, after in itertools.pairwise(sequence))


def test_keys_are_not_predictable_from_the_one_before() -> None:
    """With the time and the sequence known, what is left to guess must not be a constant step."""
    parts = [REQUEST_KEY.fullmatch(keys.make_request_key()) for _ in range(200)]
    steps = {
        int(after["hex"], 16) - int(before["hex"], 16)
        for before, after in itertools.pairwise(parts)
        if before and after
    }
    assert len(steps) > 150


@each_maker
def test_keys_sort_in_the_order_they_were_made(make: Callable[[], str], form: re.Pattern[str]) -> None:
    made = [make() for _ in range(20_000)]
    # the standalone key has no sequence, the others sort before they come to it
    assert all(before < after for before, after in itertools.pairwise(made))


@pytest.mark.slow
def test_a_million_keys_of_eight_threads_hold_no_duplicate() -> None:
    each = KEYS // THREADS
    barrier = threading.Barrier(THREADS)

    def make_many() -> list[str]:
        barrier.wait()
        return [keys.make_request_key() for _ in range(each)]

    with ThreadPoolExecutor(THREADS) as pool:
        lots = [future.result() for future in [pool.submit(make_many) for _ in range(THREADS)]]
    assert len({key for lot in lots for key in lot}) == KEYS
    for lot in lots:
        assert all(before < after for before, after in itertools.pairwise(lot))


def _make_many(count: int) -> list[str]:
    return [keys.make_request_key() for _ in range(count)]


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.slow
def test_a_million_keys_of_eight_processes_hold_no_duplicate() -> None:
    keys.make_request_key()  # so that the children have a state to inherit
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        lots = pool.map(_make_many, [KEYS // PROCESSES] * PROCESSES, chunksize=1)
    assert len({key for lot in lots for key in lot}) == KEYS


def test_session_ids_of_a_process_hold_no_duplicate() -> None:
    """Six hex digits are few: it is the order within a process that keeps them apart."""
    with ThreadPoolExecutor(THREADS) as pool:
        lots = list(pool.map(lambda _: [keys.make_session_id() for _ in range(25_000)], range(THREADS)))
    assert len({key for lot in lots for key in lot}) == THREADS * 25_000


# ---- forks -----------------------------------------------------------------------------------------------------------


def _in_child(work: Callable[[], str]) -> str:
    """What `work` returns in a forked child; it has five seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)
            os.write(writing, work().encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    return said


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_does_not_repeat_its_parents_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in the same millisecond, where the parent's state would give all of them the same next key."""
    now_ns = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    keys.make_request_key()
    made = [_in_child(lambda: " ".join(_make_many(50))).split() for _ in range(10)]
    made.append(_make_many(50))
    every = [key for lot in made for key in lot]
    assert len(every) == 11 * 50
    assert len(set(every)) == len(every)
    # neither the random part nor the sequence is the parent's
    assert len({key.split("_")[3] for key in every}) == len(every)
    assert len({lot[0][-3:] for lot in made}) > 1


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_fork_while_another_thread_makes_a_key_does_not_hang_the_child() -> None:
    with keys._request_clock._lock:
        said = _in_child(keys.make_request_key)
    assert REQUEST_KEY.fullmatch(said), "the child hung on a lock that its parent's thread held"


# ---- clocks ----------------------------------------------------------------------------------------------------------


@each_maker
def test_a_clock_that_goes_back_makes_no_key_twice(
    make: Callable[[], str], form: re.Pattern[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = time.time_ns()
    # half of the time an hour back, as with two time servers that disagree
    jumps = itertools.cycle([0, -3_600_000_000_000])
    monkeypatch.setattr(time, "time_ns", lambda: now_ns + next(jumps))
    made = [make() for _ in range(10_000)]
    assert len(set(made)) == len(made)
    assert made == sorted(made)


def test_a_clock_that_stands_still_is_overtaken_by_little(monkeypatch: pytest.MonkeyPatch) -> None:
    made_last = REQUEST_KEY.fullmatch(keys.make_request_key())
    assert made_last
    now_ns = (int(made_last["ms"]) + 1) * 1_000_000
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    made = _make_many(300_000)
    assert made == sorted(set(made))
    last = REQUEST_KEY.fullmatch(made[-1])
    assert last
    # 300,000 in one millisecond are a hundred times what a process can make; 20 ms ahead is nothing.
    assert int(last["ms"]) - now_ns // 1_000_000 <= 20


# ---- checked keys ----------------------------------------------------------------------------------------------------

REFUSED = {
    "empty": "",
    "colon": "a:consume",
    "only a colon": ":",
    "newline at the end": "abc\n",
    "newline inside": "a\nb",
    "blank": "a b",
    "blank at the end": "abc ",
    "NUL": "a\x00",
    "arabic digit": "٣",
    "fullwidth letter": "Ａ",
    "e with acute": "é",
    "kelvin sign, which lower() makes a k": "\u212a",
    "lone surrogate": "\ud800",
    "slash": "a/b",
    "quote": "a'b",
    "percent": "a%b",
    "backslash": "a\\b",
}


@pytest.mark.parametrize("key", REFUSED.values(), ids=REFUSED)
def test_what_could_be_misread_is_no_key(key: str) -> None:
    for check in (keys.check_request_key, keys.check_session_id):
        with pytest.raises(InvalidKey):
            check(key)
    with pytest.raises(InvalidKey):
        keys.derive(key, "consume")


def test_the_alphabet_is_the_documented_one() -> None:
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
    for character in map(chr, range(0x250)):
        if character in allowed:
            assert keys.check_request_key(character) == keys.check_session_id(character) == character
        else:
            with pytest.raises(InvalidKey):
                keys.check_request_key(character)


def test_lengths_fit_the_columns() -> None:
    assert keys.check_request_key("k" * 64)
    assert keys.check_session_id("s" * 100)
    with pytest.raises(InvalidKey, match="at most 64 characters, this one has 65"):
        keys.check_request_key("k" * 65)
    with pytest.raises(InvalidKey, match="at most 100 characters, this one has 101"):
        keys.check_session_id("s" * 101)
    assert len(keys.derive("k" * 64, "t" * 35)) == keys.DERIVED_KEY_LENGTH_MAX == 100
    with pytest.raises(InvalidKey):
        keys.derive("k" * 65, "t")
    with pytest.raises(InvalidKey):
        keys.derive("k", "t" * 36)


@pytest.mark.parametrize(
    "entry_type", ["", "Consume", "1st", "_x", "con sume", "con:sume", "con-sume", "consume\n", "cönsume", "consume٣"]
)
def test_an_entry_type_is_an_identifier(entry_type: str) -> None:
    with pytest.raises(InvalidKey):
        keys.derive("k", entry_type)
    with pytest.raises(InvalidKey):
        keys.make_standalone_key(entry_type, 1)


@pytest.mark.parametrize("account_id", [0, -1])
def test_a_standalone_key_names_an_account(account_id: int) -> None:
    with pytest.raises(InvalidKey, match="positive"):
        keys.make_standalone_key("recharge", account_id)


def test_a_standalone_key_fits_its_column() -> None:
    assert len(keys.make_standalone_key("t" * 35, 2**63 - 1)) <= keys.DERIVED_KEY_LENGTH_MAX


def test_the_reason_is_told_without_the_whole_key() -> None:
    with pytest.raises(InvalidKey, match=r"must not be empty"):
        keys.check_request_key("")
    with pytest.raises(InvalidKey, match=r"this one holds '\\n', ':'"):
        keys.check_request_key("a:b\n")
    with pytest.raises(InvalidKey) as refused:
        keys.check_request_key("\x1b[31m" + "é" * 10_000)
    assert len(str(refused.value)) < 200
    assert "\x1b" not in str(refused.value)
    assert issubclass(InvalidKey, InvalidRequest)
    assert issubclass(InvalidRequest, DrawError)


request_keys = st.from_regex(r"\A[A-Za-z0-9._-]{1,64}\Z")
entry_types = st.from_regex(r"\A[a-z][a-z0-9_]{0,34}\Z")


@given(request_keys, entry_types)
def test_a_derived_key_reads_in_one_way(request_key: str, entry_type: str) -> None:
    derived = keys.derive(request_key, entry_type)
    assert derived.split(":") == [request_key, entry_type]
    assert len(derived) <= keys.DERIVED_KEY_LENGTH_MAX
    with pytest.raises(InvalidKey):
        keys.check_request_key(derived)


@given(request_keys, entry_types, request_keys, entry_types)
def test_different_entries_have_different_keys(one: str, one_type: str, other: str, other_type: str) -> None:
    same = (one, one_type) == (other, other_type)
    assert (keys.derive(one, one_type) == keys.derive(other, other_type)) == same


@given(st.text(max_size=110))
def test_a_key_is_accepted_as_it_is_or_not_at_all(text: str) -> None:
    fits = re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text, re.ASCII) is not None
    if fits:
        assert keys.check_request_key(text) == text
    else:
        with pytest.raises(InvalidKey):
            keys.check_request_key(text)


@given(request_keys)
def test_a_session_id_may_be_any_request_key(request_key: str) -> None:
    assert keys.check_request_key(request_key) == keys.check_session_id(request_key) == request_key
