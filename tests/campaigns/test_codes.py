"""Pools of codes: what a file may hold, whole or not at all, and never a unit without a code."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select, update
from typer.testing import CliRunner

from tests.domain.test_manifest import WINTER
from tests.ledgers import migrated
from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.odds import SHARDS, Odds
from tombola.producers.domain.errors import CampaignNotFound, InvalidRequest
from tombola.producers.storage.engines import open_engine
from tombola.producers.storage.schema import campaign_codes, campaign_stock
from tombola.worker.campaigns import codes, stock, versions
from tombola.worker.cli import app
from tombola.worker.operators import actions

ODDS = manifest.parse(WINTER)
COUPON = '{ asset = "COUPON.10", amount = "1", codes = true }'
BY = {"operator": "ann", "reason": "for Monday"}
BAD = "a code is 1 to 100 printable ASCII characters without blanks"


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    made = open_engine(database_url)
    migrated(made)
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", database_url)
    publish(made, ODDS)
    yield made
    made.dispose()


def publish(engine: Engine, odds: Odds) -> None:
    versions.publish(engine, odds, bounds=versions.Bounds(), **BY)


def load(engine: Engine, raw: bytes, prize: str = "coupon", campaign: str = ODDS.name) -> int:
    return codes.load(engine, campaign, prize, codes.read(raw), **BY)


def pool(engine: Engine, name: str = ODDS.name) -> list[stock.Pool]:
    with engine.connect().execution_options(read_only=True) as connection:
        return stock.pools(connection, name)


def left(engine: Engine) -> int:
    with engine.connect().execution_options(read_only=True) as connection:
        return stock.left(connection, ODDS.name).get("coupon", 0)


# ---- a file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        *(b"A\nB", b"A\nB\n", b"A\r\nB\r\n", b"\nA\n\nB\n\n", codecs.BOM_UTF8 + b"A\nB\n"),
        pytest.param(b"A\nB".replace(b"B", b"B" * 100), id="a code of 100 characters"),
    ],
)
def test_a_code_a_line(raw: bytes) -> None:
    assert [code[0] for code in codes.read(raw)] == ["A", "B"]


def test_every_printable_character_but_the_blank_is_part_of_a_code() -> None:
    code = "".join(map(chr, range(33, 127)))
    assert list(codes.read(code.encode())) == [code]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "no code in this file"),
        (b"\n\r\n\n", "no code in this file"),
        (b"A\nB C\n", f"line 2: {BAD}"),
        (b"A \n", f"line 1: {BAD}"),
        (b"A\n\tB", f"line 2: {BAD}"),
        (b"A\nB\x00", f"line 2: {BAD}"),
        (b"A\n" + "Ü".encode(), f"line 2: {BAD}"),
        (b"A\n\xff\xfe", f"line 2: {BAD}"),
        (b"A" * 101, f"line 1: {BAD}"),
        (b"A\n\nB\nA\n", "line 4: A stands in line 1 already"),
        ("A\nB\n".encode("utf-16"), f"line 1: {BAD}"),
        (b"A\rB\r", f"line 1: {BAD}"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(raw: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest) as failure:
        codes.read(raw)
    assert said in str(failure.value)


def test_the_first_mistakes_are_named_and_the_others_counted() -> None:
    with pytest.raises(InvalidRequest) as failure:
        codes.read(b"A B\n" * 25)
    assert "line 10: " in str(failure.value)
    assert "line 11: " not in str(failure.value)
    assert str(failure.value).endswith("; and 15 more")


def test_a_file_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "CODES_MAX", 2)
    assert len(codes.read(b"A\nB\n")) == 2
    with pytest.raises(InvalidRequest, match="at most 2 codes, this one has 3"):
        codes.read(b"A\nB\nC\n")


# ---- the pool --------------------------------------------------------------------------------------------------------


def test_codes_are_stock(engine: Engine) -> None:
    assert left(engine) == 0
    assert load(engine, b"A\nB\nC\n") == 3
    assert load(engine, b"D\n") == 4
    assert pool(engine) == [stock.Pool("coupon", 4, 0)]
    with engine.connect().execution_options(read_only=True) as connection:
        assert stock.published(connection, ODDS.name)["coupon"] == 4
        (last, first, _) = actions.recent(connection, rows_max=3)
    assert (first.action, first.count, first.reason) == ("campaign codes load", 3, "for Monday")
    assert last.details == {"campaign": ODDS.name, "prize": "coupon", "codes": 1, "left": 4}
    assert "A" not in str(first.details.values())  # whoever reads the record must not find a code


def test_codes_that_were_handed_out_are_counted(engine: Engine) -> None:
    load(engine, b"A\nB\nC\n")
    with engine.begin() as connection:
        connection.execute(update(campaign_codes).where(campaign_codes.c.code == "B").values(taken_by="key:coupon"))
    assert pool(engine) == [stock.Pool("coupon", 3, 1)]
    assert pool(engine)[0].free == 2


def test_however_many_there_are_they_stand_in_all_shards(engine: Engine) -> None:
    """Settling knows the rows from the manifest, and the manifest does not know how many codes there are."""
    assert ODDS.by_code["coupon"].shards == SHARDS
    load(engine, b"A\nB\nC\n")
    with engine.connect().execution_options(read_only=True) as connection:
        rows = connection.execute(
            select(campaign_stock.c.stock_key, campaign_stock.c.units).where(campaign_stock.c.prize == "coupon")
        )
        units = {row.stock_key: row.units for row in rows}
    assert set(units) == {stock.stock_key(ODDS.name, "coupon", shard) for shard in range(SHARDS)}
    assert sorted(units.values()) == [0] * 5 + [1] * 3


def test_more_codes_than_one_statement_holds(engine: Engine) -> None:
    many = 2 * codes.ROWS_MAX + 1
    assert load(engine, b"\n".join(b"CODE-%06d" % number for number in range(many))) == many
    assert pool(engine) == [stock.Pool("coupon", many, 0)]


def test_a_code_is_loaded_once_ever(engine: Engine) -> None:
    load(engine, b"A\nB\nC\n")
    publish(engine, manifest.parse(WINTER.replace("winter-2026", "spring")))
    for campaign in (ODDS.name, "spring"):
        with pytest.raises(InvalidRequest) as failure:
            load(engine, b"X\nB\nY\nA\n", campaign=campaign)
        assert str(failure.value) == (
            "no code was loaded: line 2: B was loaded before, for coupon of winter-2026; "
            "line 4: A was loaded before, for coupon of winter-2026"
        )
    assert load(engine, b"a\nX\n") == 5  # codes differ by case
    assert pool(engine, "spring") == []


def test_nothing_is_loaded_by_halves(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> int:
        raise RuntimeError("half-way")

    monkeypatch.setattr(stock, "change", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        load(engine, b"A\nB\n")
    assert pool(engine) == []


def test_two_who_load_the_same_file_at_the_same_time_load_it_once(engine: Engine) -> None:
    raw = b"\n".join(b"CODE-%04d" % number for number in range(2_000))

    def one() -> str:
        try:
            return str(load(engine, raw))
        except InvalidRequest as refused:
            return "refused" if "loaded before" in str(refused) else str(refused)

    with ThreadPoolExecutor(2) as threads:
        outcomes = sorted(it.result() for it in [threads.submit(one), threads.submit(one)])
    assert outcomes == ["2000", "refused"]
    assert left(engine) == 2000


@pytest.mark.parametrize("prize", ["phone", "five", "car", "é"])
def test_only_a_prize_with_codes_takes_codes(engine: Engine, prize: str) -> None:
    with pytest.raises(InvalidRequest, match="codes = true"):
        load(engine, b"A\n", prize)
    with pytest.raises(CampaignNotFound):
        load(engine, b"A\n", campaign="other")
    with pytest.raises(InvalidRequest, match="say why"):
        codes.load(engine, ODDS.name, "coupon", {"A": 1}, operator="ann", reason="")
    assert pool(engine) == []


# ---- versions --------------------------------------------------------------------------------------------------------


def test_a_new_version_leaves_the_pool_alone(engine: Engine) -> None:
    load(engine, b"A\nB\n")
    publish(engine, manifest.parse(WINTER.replace("weight = 999", "weight = 900")))
    assert left(engine) == 2
    assert load(engine, b"C\n") == 3


def test_units_without_codes_never_become_units_of_a_prize_with_codes(engine: Engine) -> None:
    """A winner of such a unit would get no code."""
    plain = WINTER.replace(COUPON, '{ asset = "COUPON.10", amount = "1" }')
    stocked = manifest.parse(plain.replace("weight = 999", "weight = 999\nstock = 5").replace("winter-2026", "spring"))
    publish(engine, stocked)
    with pytest.raises(InvalidRequest, match="units without codes"):
        publish(engine, manifest.parse(WINTER.replace("winter-2026", "spring")))


def test_codes_are_not_given_away_as_plain_units(engine: Engine) -> None:
    load(engine, b"A\nB\n")
    plain = WINTER.replace(COUPON, '{ asset = "COUPON.10", amount = "1" }')
    with pytest.raises(InvalidRequest, match="handed out codes"):
        publish(engine, manifest.parse(plain.replace("weight = 999", "weight = 999\nstock = 5")))
    assert left(engine) == 2


# ---- commands --------------------------------------------------------------------------------------------------------


def tombola(*arguments: object, ends_with: int = 0) -> str:
    ended = CliRunner().invoke(app, ["campaign", "codes", *map(str, arguments)])
    assert ended.exit_code == ends_with, (ended.output, ended.exception)
    return ended.output


def test_from_a_shell(engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "codes.txt"
    file.write_bytes(b"A\nB\n")

    assert '"loaded":0' in tombola("show", ODDS.name, "--json")  # it waits for its codes
    said = tombola("load", ODDS.name, "coupon", file, "--reason", "from the printer")
    assert said == "2 codes loaded; coupon of winter-2026: 2 units left\n"
    assert tombola("show", ODDS.name, "--json") == '[{"prize":"coupon","loaded":2,"handed_out":0,"free":2}]\n'
    assert tombola("show", ODDS.name).split()[-4:] == ["coupon", "2", "0", "2"]
    with engine.connect().execution_options(read_only=True) as connection:
        assert connection.execute(select(func.count()).select_from(campaign_codes)).scalar_one() == 2
