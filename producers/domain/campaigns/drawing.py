"""Drawing by odds: a seed, odds and a request in, prizes out. Pure and deterministic, no I/O.

The construction (ARCHITECTURE, Fairness): HMAC-SHA256 under the seed over length-prefixed fields (version, campaign,
odds hash, account, request key, client nonce, pull, question, counter); the first 64 bits, rejected and asked for again
with a higher counter where they would favour some outcomes; cumulative integer weights.

Beside the seed a pull depends on where the account stands (its tier, its pulls since each guarantee's last hit) and on
which prizes were unavailable. All of it is recorded with the draw, so anybody who has the seed draws the same again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final, NamedTuple

from tombola.producers.domain.campaigns.odds import Odds, Prize, length_prefixed
from tombola.producers.domain.keys import SESSION_ID_LENGTH_MAX
from tombola.producers.domain.macs import hmac_sha256

_FIRST: Final = b"prize"
_OF_GUARANTEE: Final = b"guarantee"
# The lengths of account ids, request keys and client nonces, as length_prefixed writes them.
_LENGTHS: Final = [length.to_bytes(4, "big") for length in range(SESSION_ID_LENGTH_MAX + 1)]


def plain_prize(seed: bytes, odds: Odds, account_id: int, request_key: str, client_nonce: bytes = b"") -> Prize:
    """The prize of the only pull of a request, by the weights alone: what Drawing says of odds without guarantees.

    One call for what most draws are, as it is on the path of each.
    """
    account, key, sums = b"%d" % account_id, request_key.encode(), odds.cumulative[""]
    total = sums[-1]
    message = b"".join(
        (
            odds.drawing_prefix,
            *(_LENGTHS[len(account)], account, _LENGTHS[len(key)], key),
            *(_LENGTHS[len(client_nonce)], client_nonce, _FIRST_OF_ONE),
        )
    )
    value = int.from_bytes(hmac_sha256(seed, message)[:8], "big")
    if value >= 2**64 - 2**64 % total:  # hardly ever: asked for again
        return Drawing(seed, odds, account_id, request_key, client_nonce).pull(1, "", ()).prize
    return odds.prizes[bisect_right(sums, value % total)]


class Drawn(NamedTuple):
    """What one pull came to: the prize; which ones were drawn before it and unavailable; the counters after it."""

    prize: Prize
    unavailable: tuple[str, ...]
    since_hit: tuple[int, ...]


class Drawing:
    """The pulls of one request."""

    __slots__ = ("_odds", "_prefix", "_seed")

    def __init__(self, seed: bytes, odds: Odds, account_id: int, request_key: str, client_nonce: bytes = b"") -> None:
        self._seed = seed
        self._odds = odds
        account, key = b"%d" % account_id, request_key.encode()
        self._prefix = b"".join(
            (
                odds.drawing_prefix,
                *(_LENGTHS[len(account)], account, _LENGTHS[len(key)], key),
                length_prefixed(client_nonce) if client_nonce else _LENGTHS[0],
            )
        )

    def pull(
        self, pull: int, tier: str, since_hit: Sequence[int], is_available: Callable[[Prize], bool] = lambda _: True
    ) -> Drawn:
        """Pull number `pull`, from 1, of an account in `tier` (empty: none).

        `since_hit` are the account's pulls since the last hit of each guarantee, in the order of the odds.
        """
        odds = self._odds
        if odds.guarantees:
            prize = self._draw(pull, odds.weights_of(tier), since_hit)
        else:
            sums = odds.cumulative[tier]
            prize = odds.prizes[bisect_right(sums, self._ticket(pull, _FIRST, sums[-1]))]
        if not prize.is_limited or is_available(prize):
            unavailable: tuple[str, ...] = ()
        else:
            prize, unavailable = self._instead(prize, is_available)
        if not odds.guarantees:
            return Drawn(prize, unavailable, ())
        after = tuple(
            0 if prize.code in guarantee.prizes else count + 1
            for guarantee, count in zip(odds.guarantees, since_hit, strict=True)
        )
        return Drawn(prize, unavailable, after)

    def _instead(self, prize: Prize, is_available: Callable[[Prize], bool]) -> tuple[Prize, tuple[str, ...]]:
        """The first available prize on the chain of an unavailable one, and the unavailable ones before it."""
        unavailable = [prize.code]
        prize = self._odds.by_code[prize.instead]
        while prize.is_limited and not is_available(prize):
            unavailable.append(prize.code)
            prize = self._odds.by_code[prize.instead]
        return prize, tuple(unavailable)

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
        counter = 0
        while True:
            digest = hmac_sha256(self._seed, self._prefix + _suffix(pull, question, counter))
            value = int.from_bytes(digest[:8], "big")
            if value < limit:
                return value % tickets
            counter += 1


@cache
def _suffix(pull: int, question: bytes, counter: int) -> bytes:
    """The last fields of a message: few pulls, two questions, and hardly ever a counter above zero."""
    fields = (str(pull).encode(), question, counter.to_bytes(8, "big"))
    return b"".join(map(length_prefixed, fields))


_FIRST_OF_ONE: Final = _suffix(1, _FIRST, 0)
