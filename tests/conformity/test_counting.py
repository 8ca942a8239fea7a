"""Counting on a ledger: every draw once, by state, hour, caller and account; and the report that reads it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, func, select, update
from typer.testing import CliRunner

from tests.books.conftest import seal_all
from tests.campaigns.shops import SEED, Shop, open_shop
from tombola.producers.domain.campaigns.built_in import DEFAULT_ODDS
from tombola.producers.domain.campaigns.record import read_draw_notes
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import CampaignNotFound
from tombola.producers.settings import Settings
from tombola.producers.storage import clock
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import asset_transactions as transactions
from tombola.producers.storage.schema import books_blocks, conformity_accounts, conformity_counts, conformity_parts
from tombola.worker.books import head
from tombola.worker.books.sealer import Sealer
from tombola.worker.cli import app
from tombola.worker.conformity import counting, nightly, reading, revealed
from tombola.worker.conformity.report import ALPHA, Period, Report

pytestmark = pytest.mark.slow

NARROW = """
name = "narrow"
asset = "POINT"
cost = { 1 = "1.00", 10 = "9.00" }
[[prize]]
code = "star"
weight = 10
stock = 2
instead = "five"
grants = [{ asset = "ITEM.STAR", amount = "1" }]
[[prize]]
code = "five"
weight = 20
grants = [{ asset = "POINT", amount = "1.00" }]
[[prize]]
code = "nothing"
weight = 70
[[tier]]
name = "vip"
spent_from = "30.00"
weights = { star = 20, nothing = 60 }
[[guarantee]]
name = "ssr"
prizes = ["star", "five"]
hard_at = 5
"""


@pytest.fixture
def shop(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.setattr(head, "SEEN_EVERY", timedelta(0))
    with open_shop(database_url) as shop:
        yield shop


def settings_of(shop: Shop, **env: str) -> Settings:
    url = shop.engine.url.render_as_string(hide_password=False)
    return Settings.from_env({"TOMBOLA_DATABASE_URL": url} | env)


def play(shop: Shop, *, of_default: int = 30, tens: int = 12, prefix: str = "d") -> None:
    """Draws of the built-in campaign by two callers, and ten-pulls of `narrow` by two accounts."""
    ids = [shop.account(user=user) for user in (1, 2)] if prefix == "d" else [1, 2]
    asked = [
        DrawRequest(account_id=ids[number % 2], request_key=f"{prefix}{number:04}") for number in range(of_default)
    ]
    for at, it in enumerate(asked):
        shop.entry.accept([Submission(it, caller="shop" if at % 3 else "")])
    shop.settle(*asked)
    for number in range(tens):
        shop.draw(
            DrawRequest(account_id=ids[number % 2], request_key=f"{prefix}t{number}", campaign="narrow", pulls=10)
        )


def rows_of(engine: Engine, table: Any) -> list[Any]:
    with engine.connect().execution_options(read_only=True) as connection:
        return list(connection.execute(select(table)))


def reported(shop: Shop, campaign: str, **options: Any) -> Report:
    secrets = revealed.secrets_of(shop.engine, settings_of(shop, TOMBOLA_SEED=SEED.hex()))
    return reading.report_on(shop.engine, campaign, secrets=secrets, **options)


def test_every_draw_is_counted_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    odds = shop.publish(NARROW)
    play(shop)
    seal_all(shop.engine, rows_max=20)
    monkeypatch.setattr(counting, "ROWS_MAX", 40)
    assert counting.count(shop.engine) == 30 + 12
    assert counting.count(shop.engine) == 0
    parts = sorted(rows_of(shop.engine, conformity_parts))
    assert len(parts) > 1
    assert sum(it.draws for it in parts) == 42
    assert [it.unreadable for it in parts] == [0] * len(parts)
    assert [it.first_block for it in parts] == [1, *(it.block + 1 for it in parts[:-1])]
    play(shop, of_default=5, tens=0, prefix="more")
    seal_all(shop.engine)
    assert counting.count(shop.engine) == 5
    # The same from the ledger itself, row by row.
    drawn: Counter[tuple[str, str]] = Counter()
    for row in rows_of(shop.engine, transactions):
        if row.business_type == "lottery_consume" and "prizes=" in row.notes:
            notes = read_draw_notes(row.notes)
            gone = dict(reversed(notes.gone))
            drawn.update((notes.odds_hash, gone.get(at, code)) for at, code in enumerate(notes.prizes, 1))
        elif row.business_type == "lottery_consume":
            drawn[DEFAULT_ODDS.odds_hash, "any"] += 1
        elif row.business_type == "lottery_reward" and "prize=" not in row.notes:
            drawn[DEFAULT_ODDS.odds_hash, "5.00"] += 1
    drawn[DEFAULT_ODDS.odds_hash, "0.00"] = (
        drawn.pop((DEFAULT_ODDS.odds_hash, "any")) - drawn[DEFAULT_ODDS.odds_hash, "5.00"]
    )
    counted: Counter[tuple[str, str]] = Counter()
    for row in rows_of(shop.engine, conformity_counts):
        counted[row.odds_hash, row.drawn] += row.pulls
    assert counted == drawn
    assert sum(counted[odds.odds_hash, code] for code in odds.by_code) == 120
    accounts: Counter[tuple[str, int]] = Counter()
    for row in rows_of(shop.engine, conformity_accounts):
        accounts[row.odds_hash, row.account_id] += row.pulls
    assert accounts == {
        **{(odds.odds_hash, id): 60 for id in (1, 2)},
        **{(DEFAULT_ODDS.odds_hash, 1): 18, (DEFAULT_ODDS.odds_hash, 2): 17},
    }


def test_a_report_reads_what_was_counted(shop: Shop) -> None:
    odds = shop.publish(NARROW)
    play(shop)
    seal_all(shop.engine)
    counting.count(shop.engine)
    found = reported(shop, "default")
    (version,) = found.versions
    assert (version.number, version.examined.pulls, version.accounts, found.block) == (0, 30, 2, 1)
    assert {key: it.pulls for key, it in version.examined.groups["caller"].items()} == {"none": 10, "shop": 20}
    assert sum(it.pulls for it in version.examined.groups["cohort"].values()) == 30
    assert version.tickets is not None
    assert (len(version.tickets.places), version.tickets.unknown, version.tickets.other) == (30, 0, 0)
    (version,) = reported(shop, "narrow").versions
    assert (version.number, version.odds_hash, version.examined.pulls) == (1, odds.odds_hash, 120)
    assert version.examined.groups["tier"].keys() == {"none", "vip"}
    assert sum(it.sums.expected for it in version.examined.prizes) == pytest.approx(120)
    star = next(it for it in version.examined.prizes if it.code == "star")
    assert star.sums.wins > 2  # more tickets said so than there are units
    assert version.tickets is not None
    assert (len(version.tickets.places), version.tickets.other) == (120, 0)
    assert not found.deviations
    without = reading.report_on(shop.engine, "narrow", secrets=revealed.secrets_of(shop.engine, settings_of(shop)))
    assert without.versions[0].tickets is not None
    assert without.versions[0].tickets.unknown == 12
    with pytest.raises(CampaignNotFound):
        reading.report_on(shop.engine, "summer")


def test_a_report_of_a_period(shop: Shop) -> None:
    shop.publish(NARROW)
    play(shop, of_default=10, tens=0)
    with shop.engine.begin() as connection:
        yesterday = clock.now(connection) - timedelta(days=1)
        connection.execute(update(transactions).values(created_at=yesterday))
    play(shop, of_default=4, tens=0, prefix="today")
    seal_all(shop.engine)
    counting.count(shop.engine)
    midnight = reading.day(yesterday + timedelta(days=1))
    assert reported(shop, "default").pulls == 14
    assert reported(shop, "default", period=Period(midnight)).pulls == 4
    assert reported(shop, "default", period=Period(None, midnight)).pulls == 10
    (version,) = reported(shop, "default", period=Period(midnight - timedelta(days=1), midnight)).versions
    assert sum(it.luck.pulls for it in version.luckiest) == 10
    assert reported(shop, "default", period=Period(midnight + timedelta(days=1))).versions == []


def test_two_processes_count_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.publish(NARROW)
    play(shop)
    seal_all(shop.engine, rows_max=10)
    monkeypatch.setattr(counting, "ROWS_MAX", 10)
    both, failures = threading.Barrier(3), []

    def run() -> None:
        versions = counting.Versions(shop.engine)
        both.wait()
        try:
            for _ in range(60):
                counting.count_once(shop.engine, versions)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for it in threads:
        it.start()
    for it in threads:
        it.join()
    assert failures == []
    counting.count(shop.engine)
    with shop.engine.connect().execution_options(read_only=True) as connection:
        assert connection.execute(select(func.sum(conformity_counts.c.pulls))).scalar_one() == 150
        assert connection.execute(select(func.sum(conformity_accounts.c.pulls))).scalar_one() == 150


def test_charges_that_say_no_draw_are_counted_as_such(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "SEEN_EVERY", timedelta(0))
    with open_shop(database_url, balances=False) as shop:
        shop.publish(NARROW)
        play(shop, of_default=3, tens=2)
        with shop.engine.begin() as connection:
            notes = select(transactions.c.notes).where(transactions.c.idempotency_key == "dt0:consume")
            said = connection.execute(notes).scalar_one()
            for key, forged in (
                ("dt0:consume", f"odds={'0' * 64} {said.partition(' ')[2]}"),
                ("dt1:consume", said.replace("prizes=", "prizes=pear,")),
            ):
                row = transactions.c.idempotency_key == key
                connection.execute(update(transactions).where(row).values(notes=forged))
        seal_all(shop.engine)
        assert counting.count(shop.engine) == 5
        found = reported(shop, "default")
        assert (found.pulls, found.unreadable) == (3, 2)
        assert reported(shop, "narrow").versions == []


def test_the_sealer_counts_past_days_alone(shop: Shop) -> None:
    shop.publish(NARROW)
    play(shop)
    seal_all(shop.engine)
    sealer = Sealer(shop.engine, settings_of(shop))
    sealer.run_once()
    assert rows_of(shop.engine, conformity_parts) == []
    with shop.engine.begin() as connection:
        before = connection.execute(select(books_blocks.c.sealed_at)).scalar_one()
        connection.execute(update(books_blocks).values(sealed_at=before - timedelta(days=1)))
    sealer.run_once()  # looks again after a minute
    assert rows_of(shop.engine, conformity_parts) == []
    Sealer(shop.engine, settings_of(shop)).run_once()
    (part,) = rows_of(shop.engine, conformity_parts)
    assert part.draws == 42


# ---- every night -----------------------------------------------------------------------------------------------------


def test_the_nights_reports_are_on_record(shop: Shop) -> None:
    shop.publish(NARROW)
    play(shop)
    seal_all(shop.engine)
    with shop.engine.connect().execution_options(read_only=True) as connection:
        assert nightly.last(connection) is None
    reports = nightly.examine(shop.engine, settings_of(shop))
    assert [it.campaign for it in reports] == ["default", "narrow"]
    assert {it.alpha for it in reports} == {ALPHA / 365}
    nightly.record(shop.engine, reports, by="tombola.conformity")
    with shop.engine.connect().execution_options(read_only=True) as connection:
        last = nightly.last(connection)
    assert last is not None
    assert (last.campaigns, last.deviations, last.deviating) == (2, 0, ())
    assert str(last) == "the draws of 2 campaigns are as their odds say"


def test_an_insider_is_on_record_in_the_morning(shop: Shop) -> None:
    """One who knows the seed, and sends only keys that win."""
    wheel = shop.rules.wheels["default"]
    id = shop.account(user=1)
    keys = [f"k{number}" for number in range(200) if wheel.draw(id, f"k{number}").amount][:40]
    shop.draw(*(DrawRequest(account_id=id, request_key=key) for key in keys))
    assert shop.violations() == []  # the audit has nothing to say
    seal_all(shop.engine)
    reports = nightly.examine(shop.engine, settings_of(shop))
    nightly.record(shop.engine, reports, by="tombola.conformity")
    with shop.engine.connect().execution_options(read_only=True) as connection:
        last = nightly.last(connection)
    assert last is not None
    assert last.deviating == ("default",)
    assert last.deviations >= 2
    assert any(f"account {id}: 40 of 40 pulls" in it for it in reports[0].deviations)
    assert "deviations: default" in str(last)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_from_a_shell(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TOMBOLA_SEED": SEED.hex(), "TOMBOLA_BROKER_URL": "redis://127.0.0.1:1/0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", shop.engine.url.render_as_string(hide_password=False))
    run = CliRunner().invoke
    shop.publish(NARROW)
    play(shop)
    said = run(app, ["campaign", "conformity", "narrow"])
    assert said.exit_code == 0, said.output
    assert "No draw of this campaign is sealed and counted" in said.output
    seal_all(shop.engine)
    said = run(app, ["campaign", "conformity", "narrow"])
    assert said.exit_code == 0, said.output
    for it in ("120 pulls", "star (win)", "the luckiest accounts", "Tickets of 120 pulls", "as the odds say"):
        assert it in said.output, said.output
    said = run(app, ["campaign", "conformity", "default", "--json"])
    assert said.exit_code == 0, said.output
    told = json.loads(said.output)
    assert (told["conforms"], told["versions"][0]["pulls"], told["alpha"]) == (True, 30, ALPHA)
    said = run(app, ["campaign", "conformity", "default", "--until", "2020-01-01"])
    assert "No draw of this campaign" in said.output
    said = run(app, ["campaign", "conformity", "summer"])
    assert said.exit_code == 1
    assert "summer" in str(said.exception)


def test_all_names_fit(shop: Shop) -> None:
    """The longest names that a manifest may have, and many counters."""
    text = NARROW.replace("narrow", "n" * 40).replace("star", "s" * 40).replace("vip", "v" * 40)
    odds = shop.publish(text)
    id = shop.account(user=1)
    for number in range(5):
        shop.draw(DrawRequest(account_id=id, request_key=f"{number}", campaign=odds.name, pulls=10))
    seal_all(shop.engine)
    assert counting.count(shop.engine) == 5
    assert reported(shop, odds.name).pulls == 50
