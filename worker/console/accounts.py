"""Accounts: those of a user, and one account with its open holds and its history. Operators adjust a balance."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, Engine
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from tombola.producers.domain import keys
from tombola.producers.domain.errors import AccountNotFound
from tombola.producers.domain.operations.adjust import AdjustRequest
from tombola.producers.storage import ledger, statements
from tombola.producers.storage.ledger import Account, Hold
from tombola.worker.console.pages import Page, act, integer, page, url_of
from tombola.worker.movements.settling import Moved, settle
from tombola.worker.operators.actions import checked_reason

ROWS_MAX: Final = 100
ACCOUNTS_MAX: Final = 200
HOLDS_MAX: Final = 200


class AccountsPage(Page):
    """Finds accounts by their user or their id, and shows an account."""

    path = "/accounts"
    menu_label = "Accounts"
    icon = "fa-solid fa-wallet"

    @page("")
    async def index(self, request: Request) -> Response:
        user, account = integer(request.query_params, "user"), integer(request.query_params, "account")
        if account is not None:
            return RedirectResponse(f"{self.path}/{account}", 303)
        after = integer(request.query_params, "after") or 0
        found: list[Account] = []
        if user is not None:
            found = await self.read(ledger.accounts_of_user, user, after_id=after, rows_max=ACCOUNTS_MAX + 1)
        shown = found[:ACCOUNTS_MAX]
        following = None
        if len(found) > ACCOUNTS_MAX:
            following = url_of(self.path, {"user": user}, after=shown[-1].account_id)
        return self.show(request, "accounts.html", "Accounts", user=user, accounts=shown, next=following)

    @page("/{account_id:int}")
    async def one(self, request: Request) -> Response:
        account_id = request.path_params["account_id"]
        before = integer(request.query_params, "before")
        account, holds, rows = await self.read(_find, account_id, before)
        following = None
        if len(rows) > ROWS_MAX:
            following = url_of(f"{self.path}/{account_id}", {}, before=rows[ROWS_MAX - 1]["transaction_id"])
        return self.show(
            request,
            "account.html",
            f"Account {account_id}",
            account=account,
            holds=holds,
            rows=rows[:ROWS_MAX],
            next=following,
            is_first=before is None,
            key=keys.make_act_key("account_adjust"),
        )

    @page("/{account_id:int}/adjust", methods=("POST",))
    async def adjust(self, request: Request) -> Response:
        account_id, form = request.path_params["account_id"], request.state.form
        return await act(
            request,
            _adjust,
            self.services.engine,
            account_id,
            key=form.get("key", ""),
            amount=form.get("amount", "").strip(),
            reason=form.get("reason", ""),
            message=_told,
            back=f"{self.path}/{account_id}",
        )


def _adjust(engine: Engine, account_id: int, *, key: str, amount: str, reason: str, operator: str) -> Moved:
    why = checked_reason(reason)
    request = AdjustRequest(account_id=account_id, request_key=keys.check_request_key(key), amount=amount, reason=why)
    return settle(engine, request, operator=operator, reason=why)


def _told(moved: Moved) -> str:
    if moved.is_repeat:
        return "This form was sent before: the balance was adjusted then, once."
    return f"The balance is adjusted: {moved.result.balance_after} now."


def _find(
    connection: Connection, account_id: int, before_id: int | None
) -> tuple[Account, list[Hold], list[dict[str, Any]]]:
    """The account, its open holds, and a page of its ledger rows and one more. Raises AccountNotFound."""
    account = ledger.find_account(connection, account_id) if account_id < 2**63 else None
    if account is None:
        raise AccountNotFound(f"there is no account {account_id}")
    holds = ledger.open_holds(connection, account_id, rows_max=HOLDS_MAX)
    rows = statements.newest_rows(connection, account_id, before_id=before_id, rows_max=ROWS_MAX + 1)
    return account, holds, rows
