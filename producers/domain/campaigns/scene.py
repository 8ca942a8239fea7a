"""What the decision on a draw by a campaign needs beside its request and its accounts. Whoever decides provides it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.campaigns.pulls import Pulled, Standing
from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.draw import DrawKey


class Bound(NamedTuple):
    """The version that a request is drawn by, and the moment that decides about its window and its day (UTC).

    A request that was not accepted at a door binds when it settles; `is_open` is False if its campaign takes no
    requests then.
    """

    odds: Odds
    moment: datetime
    is_open: bool = True


class Scene(Protocol):
    """What a batch has read under its locks, as earlier requests of the batch left it."""

    def draw_key(self, request_key: str, campaign: str) -> DrawKey | None:
        """What the request is drawn under; None where it is unknown, as in a forecast without prizes."""

    def bound(self, request_key: str, campaign: str) -> Bound | None:
        """The version that the request is drawn by; None for an unknown campaign."""

    def standing(self, account_id: int, campaign: str) -> Standing:
        """What the account has done in the campaign."""

    def foreseen(self, request: DrawRequest, standing: Standing) -> Pulled | None:
        """The request's pulls as they were drawn from this standing, if all of their units are there; else None."""

    def is_listed(self, name: str, account_id: int) -> bool:
        """Whether the account is on the list `name`."""

    def units(self, campaign: str, code: str) -> int:
        """The units of a stocked prize that are left."""

    def prize_account(self, account_id: int, asset_code: str) -> int:
        """The account of the same user that receives prizes in this asset."""

    def codes(self, campaign: str, code: str, count: int) -> Sequence[str]:
        """So many codes of the pool of a prize, which nobody else can get. Units of the prize are taken for them."""


class Versions(Protocol):
    """Every version of every campaign, live or not."""

    def version(self, odds_hash: str) -> Odds | None:
        """The version with that hash; None if there is none."""
