"""Accounts, as their callers may see them: balances, histories, statements. The bounds of API keys hold for all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Final

from litestar import Request, Response, get
from litestar.openapi.spec import OpenAPIMediaType, OpenAPIResponse, OpenAPIType, Operation, Schema
from litestar.params import Parameter, QueryParameter
from litestar.response import Stream
from sqlalchemy import Connection

from tombola.producers.domain.contract import ACCOUNT_ID_MAX
from tombola.producers.domain.errors import AccountNotFound, InvalidRequest
from tombola.producers.domain.moments import parse_moment
from tombola.producers.gateway import account_views as views
from tombola.producers.gateway.account_views import CSV_TYPE
from tombola.producers.gateway.admission import needs
from tombola.producers.gateway.document import READ_PROBLEMS, answer
from tombola.producers.gateway.messages import AccountList, AccountRows, AccountView, StatementView
from tombola.producers.gateway.service import Gateway, gateway_of, holder_of
from tombola.producers.storage import ledger, statements
from tombola.producers.storage.ledger import Account

ROWS_MAX: Final = 500  # in a page
ROWS_DEFAULT: Final = 100

AccountIdText = Annotated[str, Parameter(pattern="^[1-9][0-9]{0,18}$")]
After = Annotated[int, QueryParameter(ge=0, le=ACCOUNT_ID_MAX, required=False, description="The page behind this id.")]
Limit = Annotated[int, QueryParameter(ge=1, le=ROWS_MAX, required=False, description="How many a page has, at most.")]
UserId = Annotated[int, QueryParameter(ge=1, le=ACCOUNT_ID_MAX, description="The user whose accounts to list.")]
Since = Annotated[
    str,
    QueryParameter(
        name="from", description="ISO 8601 with a zone, as in 2026-11-01T00:00:00Z, or a date: its beginning in UTC."
    ),
]
Until = Annotated[
    str | None,
    QueryParameter(required=False, description="The period ends before it; absent: the period goes on."),
]
Format = Annotated[
    str | None,
    QueryParameter(name="format", pattern="^(json|csv)$", required=False, description="As the header `Accept` says."),
]


@dataclass
class StatementOperation(Operation):
    """The operation in the OpenAPI document, which answers in a second media type."""

    def __post_init__(self) -> None:
        answer = (self.responses or {})["200"]
        assert isinstance(answer, OpenAPIResponse)
        assert answer.content is not None
        answer.content[CSV_TYPE] = OpenAPIMediaType(schema=Schema(type=OpenAPIType.STRING))


@get(
    "/v1/accounts",
    opt=needs("read"),
    operation_id="listAccounts",
    summary="The accounts of a user",
    description="Those within the bounds of the API key.",
    responses=READ_PROBLEMS,
)
async def list_accounts(
    request: Request[Any, Any, Any], user_id: UserId, after: After = 0, limit: Limit = ROWS_DEFAULT
) -> AccountList:
    gateway, holder = gateway_of(request), holder_of(request)

    def find(connection: Connection) -> list[Account]:
        return ledger.accounts_of_user(connection, user_id, after_id=after, rows_max=limit + 1)

    found: list[Account] = await gateway.read(find)
    shown = found[:limit]
    is_mine = holder.bounds.hold_user(user_id)
    return AccountList(
        [views.account(it) for it in shown if is_mine or holder.bounds.hold_account(it.account_id)],
        shown[-1].account_id if len(found) > limit else None,
    )


@get(
    "/v1/accounts/{account_id:str}",
    opt=needs("read"),
    operation_id="getAccount",
    summary="An account",
    responses=READ_PROBLEMS,
)
async def show_account(request: Request[Any, Any, Any], account_id: AccountIdText) -> AccountView:
    return views.account(await _account(request, account_id))


@get(
    "/v1/accounts/{account_id:str}/transactions",
    opt=needs("read"),
    operation_id="listAccountTransactions",
    summary="The ledger rows of an account",
    description="The oldest first. What a page has shown never changes, and new rows are on the last page.",
    responses=READ_PROBLEMS,
)
async def list_account_transactions(
    request: Request[Any, Any, Any], account_id: AccountIdText, after: After = 0, limit: Limit = ROWS_DEFAULT
) -> AccountRows:
    account = await _account(request, account_id)
    found = await _rows(gateway_of(request), account, after, None, limit + 1)
    return AccountRows(*views.page(found, limit))


@get(
    "/v1/accounts/{account_id:str}/statement",
    opt=needs("read"),
    operation_id="getStatement",
    operation_class=StatementOperation,
    summary="The statement of an account",
    description="The opening balance of a period, its ledger rows, and its closing balance, which add up. As JSON in "
    "pages; as CSV whole, with `Accept: text/csv` or `?format=csv`.",
    responses=READ_PROBLEMS | {200: answer(StatementView, "A page.")},
)
async def show_statement(
    request: Request[Any, Any, Any],
    account_id: AccountIdText,
    since: Since,
    until: Until = None,
    after: After = 0,
    limit: Limit = ROWS_DEFAULT,
    format: Format = None,
) -> Response[Any]:
    gateway = gateway_of(request)
    period = views.Period(parse_moment(since), None if until is None else parse_moment(until))
    if period.until is not None and period.until < period.since:
        raise InvalidRequest("the period ends before it begins: `until` is before `from`")
    account = await _account(request, account_id)
    found = await gateway.read(statements.statement, account.account_id, *period)
    if (format or ("csv" if CSV_TYPE in request.headers.get("accept", "") else "json")) == "csv":
        gateway.admission.begin_wait(request.scope)
        headers = {"Content-Disposition": f'attachment; filename="statement-{account_id}.csv"'}
        return Stream(_csv(gateway, account, period, found), media_type=CSV_TYPE, headers=headers)
    start = max(after, found.first_id - 1)
    rows, next_after = views.page(await _rows(gateway, account, start, found.end_id, limit + 1), limit)
    return Response(views.statement(account, period, found, rows, next_after))


async def _csv(
    gateway: Gateway, account: Account, period: views.Period, found: statements.Statement
) -> AsyncIterator[str]:
    """The statement as CSV. Its rows are known by their first and last id, so that they can be read in parts."""
    yield views.csv_begin(account, period, found)
    after: int | None = found.first_id - 1
    while after is not None:
        rows, after = views.page(await _rows(gateway, account, after, found.end_id, ROWS_MAX + 1), ROWS_MAX)
        yield views.csv_rows(rows)
    yield views.csv_end(account, period, found)


async def _account(request: Request[Any, Any, Any], account_id: str) -> Account:
    """The account. Raises OutOfBounds for an account outside the bounds of the API key, and AccountNotFound."""
    gateway, number = gateway_of(request), int(account_id)
    await gateway.must_be_within_bounds(holder_of(request), number)
    found: Account | None = await gateway.read(ledger.find_account, number) if number <= ACCOUNT_ID_MAX else None
    if found is None:
        raise AccountNotFound(f"there is no account {account_id}")
    return found


async def _rows(
    gateway: Gateway, account: Account, after_id: int, end_id: int | None, rows_max: int
) -> list[dict[str, Any]]:
    def find(connection: Connection) -> list[dict[str, Any]]:
        return statements.rows(connection, account.account_id, after_id=after_id, end_id=end_id, rows_max=rows_max)

    rows: list[dict[str, Any]] = await gateway.read(find)
    return rows


ROUTES: Final = (list_accounts, show_account, list_account_transactions, show_statement)
