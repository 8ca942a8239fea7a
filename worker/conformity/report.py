"""The report of a campaign: all questions of all its versions, adjusted for each other. Pure, no I/O.

Right odds give a deviating report with a probability of at most `alpha`, however many versions and questions there are
(Holm 1979, Scandinavian Journal of Statistics 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple

from tombola.worker.conformity.questions import Account, Drawn, Examined, Question, examine
from tombola.worker.conformity.tails import Sums, holm, more_wins
from tombola.worker.conformity.tickets import Tickets

ALPHA: Final = 0.01  # of a report that somebody asks for


class Period(NamedTuple):
    """From the first day's beginning until before the end of the last one, UTC; None for no bound."""

    since: datetime | None = None
    until: datetime | None = None


ALWAYS: Final = Period()


class Answer(NamedTuple):
    """A question, its p-value adjusted for all other questions of the report, and whether it deviates."""

    question: Question
    adjusted: float
    deviates: bool
    detects: str


@dataclass(frozen=True)
class Version:
    """What a version's draws came to. `number` is 0 for a campaign that is built in."""

    odds_hash: str
    number: int
    examined: Examined
    answers: Sequence[Answer]
    accounts: int
    luckiest: Sequence[Account]
    tickets: Tickets | None


@dataclass(frozen=True)
class Report:
    """All versions of a campaign with draws in the period.

    `alpha` is how probable a deviation at most is by chance. The blocks up to number `block` are counted; `unreadable`
    charges among them, of whatever campaign, say no draw by known odds.
    """

    campaign: str
    period: Period
    alpha: float
    block: int
    unreadable: int
    versions: Sequence[Version]

    @property
    def deviations(self) -> list[str]:
        """What deviates, in sentences; empty where the draws are as the odds say."""
        return [
            f"version {it.number}, {answer.question.what}: {answer.question.found}; by chance in one report of "
            f"{_one_in(answer.adjusted)}"
            for it in self.versions
            for answer in it.answers
            if answer.deviates
        ]

    @property
    def pulls(self) -> int:
        """How many pulls it is of."""
        return sum(it.examined.pulls for it in self.versions)

    def told(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "campaign": self.campaign,
            "since": self.period.since,
            "until": self.period.until,
            "alpha": self.alpha,
            "counted_blocks": self.block,
            "unreadable": self.unreadable,
            "conforms": not self.deviations,
            "deviations": self.deviations,
            "versions": [_told(it) for it in self.versions],
        }


class Counted(NamedTuple):
    """A version's draws, its number and its odds hash."""

    odds_hash: str
    number: int
    drawn: Drawn


def report(
    campaign: str,
    versions: Sequence[Counted],
    *,
    alpha: float,
    period: Period = ALWAYS,
    block: int = 0,
    unreadable: int = 0,
) -> Report:
    """Examine these versions together."""
    examined = [examine(it.drawn) for it in versions]
    questions = [question for it in examined for question in it.questions]
    adjusted = iter(holm([it.p_value for it in questions]))
    level = alpha / max(1, len(questions))
    found = []
    for version, result in zip(versions, examined, strict=True):
        answers = []
        for question in result.questions:
            p_value = next(adjusted)
            answers.append(Answer(question, p_value, p_value <= alpha, question.detects(level)))
        drawn = version.drawn
        found.append(
            Version(version.odds_hash, version.number, result, answers, drawn.accounts, drawn.luckiest, drawn.tickets)
        )
    return Report(campaign, period, alpha, block, unreadable, found)


def _one_in(p_value: float) -> str:
    return f"{1 / p_value:,.0f}" if p_value > 1e-12 else "10^12 or more"


def _told(version: Version) -> dict[str, Any]:
    tickets = version.tickets
    return {
        "version": version.number,
        "odds_hash": version.odds_hash,
        "pulls": version.examined.pulls,
        "accounts": version.accounts,
        "prizes": [
            {"code": it.code, "is_win": it.is_win, **_sums(it.sums), "p_value": it.p_value}
            for it in version.examined.prizes
        ],
        "questions": [
            {
                "name": it.question.name,
                "what": it.question.what,
                "parts": it.question.parts,
                "p_value": it.question.p_value,
                "adjusted_p_value": it.adjusted,
                "deviates": it.deviates,
                "furthest": it.question.found,
                "detects": it.detects,
            }
            for it in version.answers
        ],
        "wins": {
            name: {key: _sums(sums) for key, sums in groups.items()} for name, groups in version.examined.groups.items()
        },
        "luckiest": [
            {
                "account_id": it.id,
                **_sums(it.luck.sums),
                "p_value": more_wins(it.luck.sums),
                "bound": it.luck.bound,
            }
            for it in version.luckiest
        ],
        "tickets": None
        if tickets is None
        else {
            "draws": tickets.draws,
            "tickets": len(tickets.places),
            "not_provable_yet": tickets.unknown,
            "other_than_noted": tickets.other,
            "bins": tickets.observed,
            "expected": tickets.expected(),
        },
    }


def _sums(sums: Sums) -> dict[str, Any]:
    return {
        "pulls": sums.pulls,
        "observed": sums.wins,
        "expected": sums.expected,
        "variance": sums.variance,
        "z": sums.z,
    }
