"""The page of the books: balance per asset, sealing, anchors, and what payment providers' files said."""

from __future__ import annotations

import threading
import time
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from tombola.worker.books.balance import TrialBalance, trial_balance
from tombola.worker.books.reconciling import RECONCILE
from tombola.worker.books.standing import standing
from tombola.worker.console.pages import Page, Services, page
from tombola.worker.console.threads import in_thread
from tombola.worker.operators import actions

BALANCE_KEPT_S: Final = 10.0  # a large ledger takes seconds to add up
RECONCILED_SHOWN: Final = 10


class BooksPage(Page):
    """The trial balance, read once for all who look within BALANCE_KEPT_S."""

    path = "/books"
    menu_label = "Books"
    icon = "fa-solid fa-scale-balanced"

    def __init__(self, services: Services) -> None:
        super().__init__(services)
        self._lock = threading.Lock()
        self._kept: TrialBalance | None = None
        self._kept_until = 0.0

    @page("")
    async def index(self, request: Request) -> Response:
        balance = await in_thread(self._balance)
        return self.show(
            request,
            "books.html",
            "Books",
            balance=balance,
            standing=await self.read(standing),
            reconciled=await self.read(actions.recent, rows_max=RECONCILED_SHOWN, action=RECONCILE),
        )

    def _balance(self) -> TrialBalance:
        with self._lock:
            if self._kept is None or time.monotonic() >= self._kept_until:
                self._kept = trial_balance(self.services.engine)
                self._kept_until = time.monotonic() + BALANCE_KEPT_S
            return self._kept
