"""What the ledger notes of a draw by a campaign: all that went into the decision beside the seed, and what came of it.

The consume row's notes say it all, so that anybody who has the seed draws the same again, and so that the answer can be
rebuilt from the ledger alone:

    odds={hash} seed=1.17 prizes=five,nothing tier=vip pulls=17 since=3,80 gone=2.phone,2.coupon

`seed` names the epoch; in draws of before the epochs, by 16 hex digits, the master seed. `pulls` are the account's
pulls in this campaign before this draw, `since` its pulls since the last hit of each guarantee, `gone` which prizes
were drawn at which pull and unavailable. A part that says nothing is absent. The row of a grant notes its prize, its
pull and, where there is one, the code that was handed out or the notification's name:

    odds={hash} prize=coupon pull=2 code=WINTER-0001
    odds={hash} prize=coupon pull=2 notify=coupon-won
"""

from __future__ import annotations

from typing import NamedTuple

from tombola.producers.domain.errors import InvalidRequest


class DrawNotes(NamedTuple):
    """The notes of a consume row. `prizes` are codes, one of each pull; `gone` are pulls from 1 and codes."""

    odds_hash: str
    seed_name: str
    prizes: tuple[str, ...]
    tier: str = ""
    pulls_before: int | None = None
    since_hit: tuple[int, ...] = ()
    gone: tuple[tuple[int, str], ...] = ()

    def written(self) -> str:
        """The notes' text."""
        parts = [f"odds={self.odds_hash}", f"seed={self.seed_name}", f"prizes={','.join(self.prizes)}"]
        if self.tier:
            parts.append(f"tier={self.tier}")
        if self.pulls_before is not None:
            parts.append(f"pulls={self.pulls_before}")
        if self.since_hit:
            parts.append(f"since={','.join(map(str, self.since_hit))}")
        if self.gone:
            parts.append(f"gone={','.join(f'{pull}.{code}' for pull, code in self.gone)}")
        return " ".join(parts)


class GrantNotes(NamedTuple):
    """The notes of a grant's row."""

    odds_hash: str
    prize: str
    pull: int
    code: str = ""
    notify: str = ""

    def written(self) -> str:
        """The notes' text."""
        code = f" code={self.code}" if self.code else ""
        notify = f" notify={self.notify}" if self.notify else ""
        return f"odds={self.odds_hash} prize={self.prize} pull={self.pull}{code}{notify}"


def read_draw_notes(text: str) -> DrawNotes:
    """The notes of a consume row; raises InvalidRequest for what is none."""
    said = _parts(text)
    try:
        return DrawNotes(
            odds_hash=said["odds"],
            seed_name=said["seed"],
            prizes=_words(said["prizes"]),
            tier=said.get("tier", ""),
            pulls_before=int(said["pulls"]) if "pulls" in said else None,
            since_hit=tuple(int(it) for it in _words(said.get("since", ""))),
            gone=tuple(_gone(it) for it in _words(said.get("gone", ""))),
        )
    except (KeyError, ValueError):
        raise InvalidRequest(f"not the notes of a draw: {text!r:.100}") from None


def read_grant_notes(text: str) -> GrantNotes:
    """The notes of a grant's row; raises InvalidRequest for what is none."""
    said = _parts(text)
    try:
        return GrantNotes(said["odds"], said["prize"], int(said["pull"]), said.get("code", ""), said.get("notify", ""))
    except (KeyError, ValueError):
        raise InvalidRequest(f"not the notes of a grant: {text!r:.100}") from None


def _gone(word: str) -> tuple[int, str]:
    pull, _, code = word.partition(".")
    return int(pull), code


def _parts(text: str) -> dict[str, str]:
    return {key: value for key, is_part, value in (it.partition("=") for it in text.split(" ")) if is_part}


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(",")) if text else ()
