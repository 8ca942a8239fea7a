"""Checks the books in plain SQL, without the code that wrote them; and the results that are rebuilt from them."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from decimal import Decimal
from itertools import pairwise
from typing import Any, NamedTuple

from sqlalchemy import Engine, text

from tests.kept_results import results_of

Row = dict[str, Any]

# The fields of a result that follow from its request's row and its ledger rows.
Says = Callable[[Row, list[Row]], dict[str, Any]]


class Shape(NamedTuple):
    """What requests of one kind may write; `rows` raises AssertionError if a session's rows are others."""

    types: dict[str, str]  # types of derived keys and their business types; the first is always written
    rows: Callable[[list[Row]], None]
    says: Says


def _drawn(rows: list[Row]) -> None:
    # One charge, then its rewards, on the same account.
    first, *won = rows
    assert first["business_type"] == "lottery_consume", rows
    assert first["delta_amount"] < 0, rows
    assert [row["business_type"] for row in won] == ["lottery_reward"] * len(won), rows
    assert {row["account_id"] for row in rows} == {first["account_id"]}, rows
    assert all(row["delta_amount"] > 0 for row in won), rows


def _says_drawn(request: Row, rows: list[Row]) -> dict[str, Any]:
    own = [row for row in rows if row["account_id"] == request["account_id"]]
    won = sum(row["delta_amount"] for row in own if row["business_type"] == "lottery_reward")
    said = {"prize_amount": _amount(won), "campaign": request["campaign"], "transactions": [_shown(it) for it in rows]}
    return said | ({"balance_after": _amount(own[-1]["balance_after"])} if own else {})


DRAW = Shape({"consume": "lottery_consume", "reward": "lottery_reward"}, _drawn, _says_drawn)


def assert_books(engine: Engine, others: Mapping[str, Shape] = {}) -> None:
    """The ledger's invariants (ARCHITECTURE, Invariants), for all settled requests: draws, and `others` by kind.

    The ledger rows of archived requests remain. Any other request without its ledger rows is an error, as are ledger
    rows without their request.
    """
    accounts = {row["id"]: row for row in table(engine, "account_asset_balances")}
    ledger = sorted(table(engine, "asset_transactions"), key=lambda row: row["transaction_id"])
    requests = table(engine, "api_idempotency_requests")
    results = results_of(engine)
    _keys_are_taken_once(ledger)
    _balances_continue(accounts, ledger)
    shapes = {"draw": DRAW} | dict(others)
    _sessions_are_whole(accounts, ledger, shapes)
    _requests_match(requests, ledger, shapes)
    for request in requests:
        _result_matches(request, results[request["request_key"]], ledger, shapes)


def table(engine: Engine, name: str) -> list[Row]:
    """All rows of a table, amounts in hundredths: whole numbers on both databases, without rounding."""
    with engine.connect().execution_options(read_only=True) as connection:
        rows = [dict(row) for row in connection.execute(text(f"SELECT * FROM {name}")).mappings()]
    for row in rows:
        for column in row.keys() & {"balance", "delta_amount", "balance_before", "balance_after"}:
            stored = row[column] if engine.dialect.name == "sqlite" else row[column] * 100
            row[column] = int(stored)
            assert row[column] == stored, f"a fraction of a cent in {column}: {row}"
    return rows


def _keys_are_taken_once(ledger: list[Row]) -> None:
    assert len({row["idempotency_key"] for row in ledger}) == len(ledger)
    assert len({row["transaction_id"] for row in ledger}) == len(ledger)


def _balances_continue(accounts: dict[int, Row], ledger: list[Row]) -> None:
    chains: dict[int, list[Row]] = defaultdict(list)
    for row in ledger:
        assert row["balance_after"] == row["balance_before"] + row["delta_amount"], row
        assert row["balance_before"] >= 0, row
        assert row["balance_after"] >= 0, row
        chains[row["account_id"]].append(row)
    assert chains.keys() <= accounts.keys()
    for account_id, account in accounts.items():
        chain = chains[account_id]
        assert account["balance"] >= 0, account
        assert account["balance"] == sum(row["delta_amount"] for row in chain), account
        if chain:
            assert chain[0]["balance_before"] == 0, chain[0]
            assert chain[-1]["balance_after"] == account["balance"], account
        for before, after in pairwise(chain):
            assert after["balance_before"] == before["balance_after"], (before, after)


def _sessions_are_whole(accounts: dict[int, Row], ledger: list[Row], shapes: Mapping[str, Shape]) -> None:
    by_business_type = {business_type: shape for shape in shapes.values() for business_type in shape.types.values()}
    sessions: dict[str, list[Row]] = defaultdict(list)
    for row in ledger:
        assert row["business_id"] == row["lottery_session_id"], row
        assert row["asset_code"] == accounts[row["account_id"]]["asset_code"], row
        sessions[row["lottery_session_id"]].append(row)
    for rows in sessions.values():
        if len(rows) == 1 and rows[0]["business_type"] not in by_business_type:
            continue  # not the row of a request
        # All under one request key. Derived keys are unique, so that each type occurs once.
        assert len({row["idempotency_key"].partition(":")[0] for row in rows}) == 1, rows
        shape = by_business_type[rows[0]["business_type"]]
        for row in rows:
            assert shape.types[row["idempotency_key"].partition(":")[2]] == row["business_type"], row
        shape.rows(rows)


def _requests_match(requests: list[Row], ledger: list[Row], shapes: Mapping[str, Shape]) -> None:
    by_request: dict[str, list[Row]] = defaultdict(list)
    for row in ledger:
        by_request[row["idempotency_key"].partition(":")[0]].append(row)
    counted = Counter(row["request_key"] for row in requests)
    assert not counted or max(counted.values()) == 1
    for request in requests:
        shape = shapes[request["kind"] or "draw"]
        rows = by_request.get(request["request_key"], [])
        proof = f"{request['request_key']}:{next(iter(shape.types))}"
        assert sum(row["idempotency_key"] == proof for row in rows) == (request["status"] == "completed"), request
        assert rows == [] or request["status"] == "completed", request
        is_settled = request["status"] in ("completed", "rejected")
        assert request["result"] is None or is_settled, request
        assert (request["settled_at"] is None) == (not is_settled), request
        assert all(row["lottery_session_id"] == request["lottery_session_id"] for row in rows), request


def _result_matches(request: Row, body: bytes | None, ledger: list[Row], shapes: Mapping[str, Shape]) -> None:
    """The result, which is rebuilt (or was kept, by older releases), says what the request and its rows say."""
    assert (body is not None) == (request["status"] in ("completed", "rejected")), request
    if body is None:
        return
    result = json.loads(body)
    for name in ("request_key", "lottery_session_id", "account_id", "status", "reason"):
        assert result[name] == request[name], (name, request)
    rows = [it for it in ledger if it["idempotency_key"].startswith(f"{request['request_key']}:")]
    said = shapes[request["kind"] or "draw"].says(request, rows)
    assert {name: result[name] for name in said} == said, request


def _shown(row: Row) -> dict[str, str]:
    texts = {name: row[name] for name in ("idempotency_key", "business_type", "asset_code")}
    return texts | {name: _amount(row[name]) for name in ("delta_amount", "balance_before", "balance_after")}


def _amount(hundredths: int) -> str:
    return f"{Decimal(hundredths) / 100:.2f}"
