"""Drawing by odds: a seed, odds and a request in, prizes out. Pure and deterministic, no I/O.

The construction (ARCHITECTURE, Fairness): HMAC-SHA256 under the seed over length-prefixed fields (version, campaign,
odds hash, account, request key, client nonce, pull, question, counter); the first 64 bits, rejected and asked for again
with a higher counter where they would favour some outcomes; cumulative integer weights.

Beside the seed a pull depends on where the account stands (its tier, its pulls since each guarantee's last hit) and on
which prizes were unavailable. All of it is recorded with the draw, so anybody who has the seed draws the same again.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from tombola.producers.domain.campaigns.odds import Odds, Prize

DRAW_VERSION: Final = b"tombola-draw-2"
_FIRST: Final = b"prize"
_OF_GUARANTEE: Final = b"guarantee"


class Drawn(NamedTuple):
    """What one pull came to: the prize; which ones were drawn before it and unavailable; the counters after it."""

    prize: Prize
    unavailable: tuple[str, ...]
    since_hit: tuple[int, ...]


class Drawing:
    """The pulls of one request."""

    def __init__(self, seed: bytes, odds: Odds, account_id: int, request_key: str, client_nonce: bytes = b"") -> None:
        self._seed = seed
        self._odds = odds
        fields = (
            DRAW_VERSION,
            odds.name.encode(),
            bytes.fromhex(odds.odds_hash),
            str(account_id).encode(),
            request_key.encode(),
            client_nonce,
        )
        self._prefix = b"".join(map(length_prefixed, fields))

    def pull(
        self, pull: int, tier: str, since_hit: Sequence[int], is_available: Callable[[Prize], bool] = lambda _: True
    ) -> Drawn:
        """Pull number `pull`, from 1, of an account in `tier` (empty: none).

        `since_hit` are the account's pulls since the last hit of each guarantee, in the order of the odds.
        """
        odds = self._odds
        prize = self._draw(pull, odds.weights_of(tier), since_hit)
        unavailable = []
        while prize.is_limited and not is_available(prize):
            unavailable.append(prize.code)
            prize = odds.by_code[prize.instead]
        after = tuple(
            0 if prize.code in guarantee.prizes else count + 1
            for guarantee, count in zip(odds.guarantees, since_hit, strict=True)
        )
        return Drawn(prize, tuple(unavailable), after)

    def _draw(self, pull: int, weights: Sequence[int], since_hit: Sequence[int]) -> Prize:
        """The prize that the tickets say, whether it is available or not."""
        guarantees = self._odds.guarantees
        due = next((it for it, count in zip(guarantees, since_hit, strict=True) if it.is_due(count)), None)
        if due is not None:
            weights = self._within(weights, due.prizes)
        base = sum(weights)
        # Only what may be drawn at all is made likelier: a wider guarantee that is due contains every narrower one.
        added = [
            (it, it.tickets(count))
            for it, count in zip(guarantees, since_hit, strict=True)
            if due is None or it.prizes < due.prizes
        ]
        ticket = self._ticket(pull, _FIRST, base + sum(tickets for _, tickets in added))
        if ticket >= base:
            ticket -= base
            for guarantee, tickets in added:
                if ticket < tickets:
                    weights = self._within(weights, guarantee.prizes)
                    ticket = self._ticket(pull, _OF_GUARANTEE, sum(weights))
                    break
                ticket -= tickets
        for prize, weight in zip(self._odds.prizes, weights, strict=True):
            if ticket < weight:
                return prize
            ticket -= weight
        raise AssertionError("a ticket is below the sum of the weights")

    def _within(self, weights: Sequence[int], codes: frozenset[str]) -> list[int]:
        return [weight if prize.code in codes else 0 for prize, weight in zip(self._odds.prizes, weights, strict=True)]

    def _ticket(self, pull: int, question: bytes, tickets: int) -> int:
        """A ticket from 0 to below `tickets`, each as likely as any other one."""
        # Values from here on would give the first outcomes one chance more: they are asked for again.
        limit = (2**64 // tickets) * tickets
        message = self._prefix + length_prefixed(str(pull).encode()) + length_prefixed(question)
        counter = 0
        while True:
            digest = hmac.digest(self._seed, message + length_prefixed(counter.to_bytes(8, "big")), "sha256")
            value = int.from_bytes(digest[:8], "big")
            if value < limit:
                return value % tickets
            counter += 1


def length_prefixed(value: bytes) -> bytes:
    """`value` after its length, so that no two lists of fields run together to the same message."""
    return len(value).to_bytes(4, "big") + value
