"""The tickets of draws, where the secret that they were drawn under is known: they must be uniform.

A ticket is computed again by the code that draws for players, from what the ledger says of the request. It says more
than the prize: a choice of request keys leaves traces in tickets, whatever their prizes. Draws whose secret is not
known yet are counted, and not provable yet.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Final, NamedTuple, cast

import msgspec

from tombola.producers.domain.campaigns.drawing import Drawing
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.campaigns.odds import Prize as CampaignPrize
from tombola.producers.domain.campaigns.record import read_draw_notes
from tombola.producers.domain.draw import CAMPAIGNS, Campaign, Prize, Wheel
from tombola.producers.domain.errors import InvalidRequest

BINS: Final = 100
_FIRST: Final = b"prize"  # the question of a pull's first ticket

# The key that a campaign's draws were drawn under, from the word after `seed=` in their notes and the campaign's name;
# None while it is not known.
KeyOf = Callable[[str, str], bytes | None]


class Charge(NamedTuple):
    """A charge, as the ledger has it. `terms` are those of its request, None for a draw of contract v1."""

    account_id: int
    request_key: str
    notes: str
    terms: str | None = None


@dataclass(slots=True)
class Tickets:
    """Tickets in the order of the ledger, each as its place between 0 and 1; and how many fell into each bin.

    `sizes` says how many tickets were one of so many. `unknown` draws have a secret that is not known yet, and `other`
    draws another prize than their ticket says: the audit says more.
    """

    places: array[float] = field(default_factory=lambda: array("d"))
    observed: list[int] = field(default_factory=lambda: [0] * BINS)
    sizes: Counter[int] = field(default_factory=Counter)
    draws: int = 0
    unknown: int = 0
    other: int = 0

    def add(self, ticket: int, tickets: int) -> None:
        """Add a ticket from 0 to below `tickets`."""
        self.places.append((ticket + 0.5) / tickets)
        self.observed[ticket * BINS // tickets] += 1
        self.sizes[tickets] += 1

    def expected(self) -> list[float]:
        """How many tickets are to be expected in each bin: a bin has whole tickets, and where they are few not equally
        many."""
        found = [0.0] * BINS
        for tickets, count in self.sizes.items():
            edges = [-(-number * tickets // BINS) for number in range(BINS + 1)]  # the first ticket of each bin
            for number, (first, end) in enumerate(pairwise(edges)):
                found[number] += count * (end - first) / tickets
        return found


def tickets_of(charges: Iterable[Charge], odds: Odds, key_of: KeyOf) -> Tickets:
    """The tickets of these charges by `odds`, as far as their secrets are known."""
    found, watch = Tickets(), _Watch(odds, key_of)
    for charge in charges:
        found.draws += 1
        drawn: tuple[list[tuple[int, int]], bool] | None
        try:
            drawn = watch.drawn(charge)
        except (InvalidRequest, KeyError, ValueError):  # notes that no draw has written
            drawn = [], False
        if drawn is None:
            found.unknown += 1
            continue
        tickets, is_as_noted = drawn
        found.other += not is_as_noted
        for ticket, count in tickets:
            found.add(ticket, count)
    return found


class _Watch:
    """Draws again, and says which tickets were drawn."""

    def __init__(self, odds: Odds, key_of: KeyOf) -> None:
        self._odds = odds
        self._built_in = next((it for it in CAMPAIGNS.values() if it.odds_hash == odds.odds_hash), None)
        self._key_of = key_of
        self._wheels: dict[bytes, _WatchedWheel] = {}

    def drawn(self, charge: Charge) -> tuple[list[tuple[int, int]], bool] | None:
        """Each pull's ticket and of how many; whether the notes say the same prizes. None without the secret."""
        said = dict(part.partition("=")[::2] for part in charge.notes.split(" "))
        key = self._key_of(said["seed"], self._odds.name)
        if key is None:
            return None
        nonce = nonce_in(charge.terms)
        if self._built_in is not None:
            return self._wheel(key, self._built_in).ticket_of(charge, nonce), True
        notes = read_draw_notes(charge.notes)
        drawing = _WatchedDrawing(key, self._odds, charge.account_id, charge.request_key, nonce)
        counters, is_as_noted = notes.since_hit, True
        for number, code in enumerate(notes.prizes, start=1):
            gone = {missing for at, missing in notes.gone if at == number}
            prize, _, counters = drawing.pull(number, notes.tier, counters, partial(_is_there, gone))
            is_as_noted = is_as_noted and prize.code == code
        return drawing.tickets, is_as_noted

    def _wheel(self, key: bytes, campaign: Campaign) -> _WatchedWheel:
        if key not in self._wheels:
            self._wheels[key] = _WatchedWheel(campaign, key)
        return self._wheels[key]


class _WatchedDrawing(Drawing):
    """A drawing that keeps the first ticket of each pull."""

    __slots__ = ("tickets",)

    def __init__(self, seed: bytes, odds: Odds, account_id: int, request_key: str, nonce: bytes) -> None:
        super().__init__(seed, odds, account_id, request_key, nonce)
        self.tickets: list[tuple[int, int]] = []

    def _ticket(self, pull: int, question: bytes, tickets: int) -> int:
        ticket = super()._ticket(pull, question, tickets)
        if question == _FIRST:
            self.tickets.append((ticket, tickets))
        return ticket


class _WatchedWheel(Wheel):
    """A wheel that keeps the last ticket."""

    def pick(self, ticket: int) -> Prize:
        object.__setattr__(self, "_last", ticket)
        return super().pick(ticket)

    def ticket_of(self, charge: Charge, nonce: bytes) -> list[tuple[int, int]]:
        self.draw(charge.account_id, charge.request_key, nonce)
        return [(cast(int, self._last), self.campaign.weight_sum)]  # type: ignore[attr-defined]


def _is_there(gone: Set[str], prize: CampaignPrize) -> bool:
    return prize.code not in gone


def nonce_in(terms: str | None) -> bytes:
    """The nonce that a request's client made; empty for none. `terms` is a JSON list: campaign, pulls[, nonce]."""
    said = [] if not terms else msgspec.json.decode(terms, type=list[str | int | None])
    return str(said[2]).encode() if len(said) > 2 else b""
