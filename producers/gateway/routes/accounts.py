"""Accounts, as their callers may see them."""

from __future__ import annotations

from typing import Annotated, Any, Final

from litestar import Request, get
from litestar.params import Parameter

from tombola.producers.domain.contract import ACCOUNT_ID_MAX
from tombola.producers.domain.errors import AccountNotFound
from tombola.producers.gateway.admission import needs
from tombola.producers.gateway.document import READ_PROBLEMS
from tombola.producers.gateway.messages import AccountView
from tombola.producers.gateway.service import gateway_of, holder_of
from tombola.producers.storage import ledger


@get(
    "/v1/accounts/{account_id:str}",
    opt=needs("read"),
    operation_id="getAccount",
    summary="An account",
    responses=READ_PROBLEMS,
)
async def show_account(
    request: Request[Any, Any, Any], account_id: Annotated[str, Parameter(pattern="^[1-9][0-9]{0,18}$")]
) -> AccountView:
    number = int(account_id)
    await gateway_of(request).must_be_within_bounds(holder_of(request), number)
    found = await gateway_of(request).read(ledger.find_account, number) if number <= ACCOUNT_ID_MAX else None
    if found is None:
        raise AccountNotFound(f"there is no account {account_id}")
    return AccountView(found.account_id, found.user_id, found.asset_code, f"{found.balance:.2f}")


ROUTES: Final = (show_account,)
