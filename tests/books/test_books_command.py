"""`tombola books`: what it prints, what it finds, and its exit codes; and the sealer that writes outside."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from tests.books.conftest import Draw, seal_all
from tests.books.test_exporting import Beancount
from tests.ledgers import migrated
from tests.processes import SEED, wait_for
from tombola.producers.domain.books.checkpoints import PrivateKey
from tombola.producers.domain.errors import ConfigurationError, InvalidRequest
from tombola.producers.settings import Settings
from tombola.producers.storage import books
from tombola.producers.storage.engines import open_engine
from tombola.worker import cli
from tombola.worker.books import reconciling
from tombola.worker.books.anchors import AnchorConflict, check_anchors
from tombola.worker.books.balance import trial_balance
from tombola.worker.books.reconciling import Payment, reconcile
from tombola.worker.books.sealer import Sealer
from tombola.worker.ledger import accounts

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tombola(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `tombola books …`: exit code, stdout, stderr."""
    monkeypatch.setenv("TOMBOLA_DATABASE_URL", engine.url.render_as_string(hide_password=False))
    monkeypatch.setenv("TOMBOLA_SEED", SEED)
    monkeypatch.setenv("TOMBOLA_BROKER_URL", "redis://127.0.0.1:1/0")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tombola", "books", *words])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as ended:
            printed = capsys.readouterr()
            return int(ended.code or 0), printed.out, printed.err
        printed = capsys.readouterr()
        return 0, printed.out, printed.err

    return run


# ---- balance ---------------------------------------------------------------------------------------------------------


def test_the_trial_balance_adds_up_to_zero(engine: Engine, draw: Draw, tombola: Command) -> None:
    draw(20)
    seal_all(engine)
    draw(5)
    code, printed, _ = tombola("balance", "--json")
    told = json.loads(printed)
    assert (code, told["balances"], told["wrong"]) == (0, True, [])
    (asset,) = told["assets"]
    assert (asset["asset_code"], asset["accounts"], asset["difference"]) == ("POINT", 2, "0.00")
    assert asset["house"]["house/issued/stripe"] == {"sealed": "-60.00", "unsealed": "0.00"}
    assert Decimal(asset["house"]["house/default/sales"]["unsealed"]) > 0
    assert told["unsealed_rows"] >= 5
    found = trial_balance(engine).assets[0]
    assert found.issued == 200
    assert found.breakage == 0
    assert found.users == found.issued - found.sold + found.paid_out
    code, printed, _ = tombola("balance")
    assert code == 0
    assert re.search(r"together +0\.00", printed)
    assert "Users and house add up to zero." in printed


@pytest.mark.parametrize(
    ("statement", "wrong"),
    [
        ("UPDATE account_asset_balances SET balance = balance + 700 WHERE id = 1", "users and house together are"),
        ("UPDATE account_asset_balances SET balance = 0 WHERE id = 2", "POINT: users and house together are"),
        ("DELETE FROM asset_transactions WHERE transaction_id = (SELECT x FROM (SELECT MAX(transaction_id) AS x FROM "
         "asset_transactions WHERE delta_amount <> 0) AS y)", "POINT: users and house together are"),
        ("UPDATE asset_transactions SET business_type = 'gift' WHERE transaction_id = (SELECT x FROM (SELECT "
         "MAX(transaction_id) AS x FROM asset_transactions) AS y)", "house/unknown stands at"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_said(engine: Engine, draw: Draw, tombola: Command, statement: str, wrong: str) -> None:
    draw(20)
    seal_all(engine)
    draw(5)
    with engine.begin() as connection:
        connection.execute(text(statement))
    code, printed, _ = tombola("balance")
    assert code == 1
    assert wrong in printed
    assert "Users and house add up" not in printed


def test_an_empty_ledger_balances(engine: Engine, tombola: Command) -> None:
    code, printed, _ = tombola("balance")
    assert (code, "0 blocks are sealed" in printed) == (0, True)
    assert tombola("verify")[0] == 0
    assert tombola("export")[:2] == (0, "")


# ---- verify, key, seal -----------------------------------------------------------------------------------------------


def test_a_key_is_printed_once_and_signs(tombola: Command) -> None:
    code, printed, _ = tombola("key", "shop.example/books")
    assert code == 0
    private = re.search(r"^TOMBOLA_BOOKS_KEY=(\S+)$", printed, re.MULTILINE)
    public = re.search(r"^public key: (\S+)$", printed, re.MULTILINE)
    assert private
    assert public
    assert PrivateKey.read(private[1]).public.text == public[1]
    assert tombola("key", "two words")[0] == 1


def test_verify_tells_anchored_from_unanchored(
    engine: Engine, draw: Draw, tombola: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, folder = PrivateKey.make("shop.example/books"), tmp_path / "outside"
    folder.mkdir()
    url = engine.url.render_as_string(hide_password=False)
    env = {"TOMBOLA_DATABASE_URL": url, "TOMBOLA_BOOKS_KEY": key.text, "TOMBOLA_BOOKS_ANCHOR": str(folder)}
    sealer = Sealer(engine, Settings.from_env(env))
    draw(6)
    seal_all(engine)
    sealer.run_once()
    draw(6)
    seal_all(engine)
    sealer.run_once()  # it has signed a moment ago
    assert [it.name for it in folder.iterdir()] == ["000000000001.checkpoint"]
    code, printed, _ = tombola("verify", "--against", str(folder), "--key", key.public.text)
    assert code == 0
    assert "2 blocks are what they were sealed from." in printed
    assert "Blocks 1 to 1 are anchored by 1 checkpoints." in printed
    assert "Blocks 2 to 2 are not anchored." in printed
    told = json.loads(tombola("verify", "--against", str(folder), "--key", key.public.text, "--json")[1])
    assert told == {
        **{"is_clean": True, "blocks": 2, "tampered": []},
        "anchored": {"blocks": 2, "upto": 1, "checkpoints": 1, "wrong": []},
    }
    code, printed, error = tombola("verify", "--against", str(folder))
    assert (code, "say with --key which public key" in error) == (1, True)
    monkeypatch.setenv("TOMBOLA_BOOKS_KEY", key.text)
    assert tombola("verify", "--against", str(folder))[0] == 0
    other = PrivateKey.make(key.name).public.text
    code, printed, _ = tombola("verify", "--against", str(folder), "--key", other)
    assert (code, "nothing is anchored" in printed) == (1, True)
    with engine.begin() as connection:
        connection.execute(text("UPDATE asset_transactions SET notes = 'x' WHERE transaction_id = 1"))
    code, printed, _ = tombola("verify")
    assert (code, "block 1, transactions 1 to" in printed) == (1, True)
    assert "2 blocks are what they were sealed from." not in printed
    code, printed, _ = tombola("verify", "--json")
    assert (code, json.loads(printed)["tampered"][0]["block"]) == (1, 1)
    assert tombola("verify", "--from", "2")[0] == 0


def test_seal_seals_what_is_old_enough(engine: Engine, draw: Draw, tombola: Command) -> None:
    draw(4)
    code, printed, _ = tombola("seal")
    assert code == 0
    if engine.dialect.name == "sqlite":
        assert re.search(r"^\d+ ledger rows sealed; the last block is 1$", printed, re.MULTILINE)
    else:  # a minute later
        assert "0 ledger rows sealed; the last block is none" in printed


# ---- the sealer ------------------------------------------------------------------------------------------------------


def sealer_of(engine: Engine, **env: str) -> Sealer:
    url = engine.url.render_as_string(hide_password=False)
    return Sealer(engine, Settings.from_env({"TOMBOLA_DATABASE_URL": url} | env))


def test_two_sealers_write_one_file(engine: Engine, draw: Draw, tmp_path: Path) -> None:
    key = PrivateKey.make("shop.example/books")
    env = {"TOMBOLA_BOOKS_KEY": key.text, "TOMBOLA_BOOKS_ANCHOR": str(tmp_path)}
    draw(4)
    seal_all(engine)
    for it in (sealer_of(engine, **env), sealer_of(engine, **env)):
        it.run_once()
        it.run_once()
    assert len(list(tmp_path.glob("*.checkpoint"))) == 1
    assert not check_anchors(engine, tmp_path, [key.public]).wrong


def test_a_folder_that_is_gone_stops_no_sealing(engine: Engine, draw: Draw, tmp_path: Path) -> None:
    key = PrivateKey.make("shop.example/books")
    sealer = sealer_of(
        engine,
        TOMBOLA_BOOKS_KEY=key.text, TOMBOLA_BOOKS_ANCHOR=str(tmp_path / "gone"), TOMBOLA_BOOKS_ANCHOR_EVERY_S="1",
    )  # fmt: skip
    draw(4)
    seal_all(engine)
    with pytest.raises(ConfigurationError, match="TOMBOLA_BOOKS_ANCHOR cannot be used"):
        sealer.run_once()
    sealer.run_once()  # not at every second
    (tmp_path / "gone").mkdir()
    time.sleep(1)
    sealer.run_once()
    assert len(list((tmp_path / "gone").iterdir())) == 1


def test_a_sealer_says_when_the_database_was_rolled_back(engine: Engine, draw: Draw, tmp_path: Path) -> None:
    key = PrivateKey.make("shop.example/books")
    (tmp_path / "000000000099.checkpoint").write_text(key.sign(99, b"x" * 32))
    draw(4)
    seal_all(engine)
    with pytest.raises(AnchorConflict, match="a checkpoint of 99 is in"):
        sealer_of(engine, TOMBOLA_BOOKS_KEY=key.text, TOMBOLA_BOOKS_ANCHOR=str(tmp_path)).run_once()


def test_a_key_that_is_none_is_told_at_the_start(engine: Engine) -> None:
    with pytest.raises(ConfigurationError, match="TOMBOLA_BOOKS_KEY: not an Ed25519 key") as refusal:
        sealer_of(engine, TOMBOLA_BOOKS_KEY="PRIVATE+KEY+secretsecret")
    assert "secretsecret" not in str(refusal.value)
    with pytest.raises(ConfigurationError, match=r"TOMBOLA_BOOKS_KEY: a private key begins with") as refusal:
        sealer_of(engine, TOMBOLA_BOOKS_KEY="secretsecret")
    assert "secretsecret" not in str(refusal.value)


def test_a_sealer_seals_until_it_is_stopped(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/ledger.db")
    migrated(engine)
    sealer, stopping = sealer_of(engine), threading.Event()
    running = threading.Thread(target=sealer.run, args=(stopping,))
    running.start()
    try:
        accounts.add(engine, user_id=1, balance=Decimal(10))

        def is_sealed() -> bool:
            with engine.connect().execution_options(read_only=True) as connection:
                return books.last_sealed(connection) is not None

        wait_for(is_sealed, within_s=10, what=lambda: "nothing is sealed")
    finally:
        stopping.set()
        running.join(10)
    assert not running.is_alive()
    sealer.close()


# ---- export ----------------------------------------------------------------------------------------------------------


def test_beancount_is_valid_and_says_what_the_house_says(engine: Engine, draw: Draw, tombola: Command) -> None:
    draw(20)
    seal_all(engine, rows_max=8)
    code, printed, _ = tombola("export")
    assert code == 0
    ledger = Beancount(printed)
    with engine.connect().execution_options(read_only=True) as connection:
        house = books.house_balances(connection)
    assert ledger.balances == {
        ("Assets:House:Issued", "POINT"): -house["house/issued", "POINT"],
        ("Assets:House:Issued:Stripe", "POINT"): -house["house/issued/stripe", "POINT"],
        ("Income:House:Default:Sales", "POINT"): -house["house/default/sales", "POINT"],
        ("Expenses:House:Default:Prizes", "POINT"): -house["house/default/prizes", "POINT"],
        ("Liabilities:Users", "POINT"): sum(house.values()),
    }
    assert (ledger.transactions, ledger.assertions) == (1, 5)
    today = date.today().isoformat()
    code, printed, _ = tombola("export", "--since", today)
    assert code == 0
    assert Beancount(printed).balances == ledger.balances
    assert tombola("export", "--until", "2001-01-01")[:2] == (0, "")


def test_csv_adds_up(engine: Engine, draw: Draw, tombola: Command) -> None:
    draw(20)
    seal_all(engine, rows_max=8)
    code, printed, _ = tombola("export", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert code == 0
    assert {it["account"] for it in rows} >= {"users", "house/issued", "house/default/sales"}
    assert sum(Decimal(it["amount"]) for it in rows) == 0
    assert {it["asset"] for it in rows} == {"POINT"}


# ---- reconcile -------------------------------------------------------------------------------------------------------


def test_payments_are_matched_by_their_references(engine: Engine, draw: Draw, tombola: Command, tmp_path: Path) -> None:
    draw(2)
    file = tmp_path / "payments.csv"
    file.write_text("id,reference,amount\n1,py_1,30.00\n2,py_2,30\n")
    code, printed, _ = tombola("reconcile", str(file))
    assert (code, "2 payments match; 0 do not." in printed) == (0, True)
    file.write_text("\ufeffReference,Total\npy_1,30.00\npy_3,1.00\n", encoding="utf-8")
    code, printed, _ = tombola("reconcile", str(file), "--reference", "Reference", "--amount", "Total", "--json")
    told = json.loads(printed)
    assert (code, told["matched"], told["is_complete"]) == (1, 1, False)
    assert told["only_here"] == [{"reference": "py_2", "amount": "30.00", "account_id": 2}]
    assert told["only_there"] == [{"reference": "py_3", "amount": "1.00", "account_id": None}]
    file.write_text("reference,amount\npy_1,29.99\npy_2,30.00\npy_2,30.00\n")
    code, printed, _ = tombola("reconcile", str(file))
    assert code == 1
    assert re.search(r"differs +py_1 +30\.00 +29\.99 +1", printed)
    assert re.search(r"repeated +py_2", printed)
    file.write_text("reference,amount\n")
    assert tombola("reconcile", str(file), "--channel", "paypal")[0] == 0
    assert tombola("reconcile", str(file), "--until", "2001-01-01")[0] == 0
    assert tombola("reconcile", str(file), "--channel", "stripe")[0] == 1


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"reference\nx\n", "there is no column amount; there are reference"),
        (b"", "there is no column amount or reference; there are none"),
        (b"reference,amount\nx,one\n", "line 2: not an amount: 'one'"),
        (b"reference,amount\nx\n", "line 2: not an amount: None"),
        (b"reference,amount\nx,NaN\n", "line 2: not an amount: 'NaN'"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes, error: str) -> None:
    file = tmp_path / "payments.csv"
    file.write_bytes(content)
    with pytest.raises(InvalidRequest) as refusal:
        reconciling.read_file(file, reference="reference", amount="amount")
    assert error in str(refusal.value)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        reconciling.read_file(tmp_path / "nowhere.csv", reference="reference", amount="amount")


def test_what_is_on_one_side_twice_matches_nothing() -> None:
    one, two = Payment("a", Decimal(1)), Payment("a", Decimal(1), 6)
    assert reconcile([one], [two]).is_complete
    found = reconcile([one, one], [two])
    assert (found.matched, found.repeated, found.only_here) == (0, ["a"], [])
