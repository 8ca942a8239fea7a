"""The tests of one version: each asks one question, and has one p-value. Pure, no I/O.

A question with parts (hours, callers, prizes) takes the smallest p-value of them times their number (Bonferroni), so a
version with many hours asks no more questions than one with few. The report adjusts the questions for each other.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from tombola.worker.conformity.chances import Compared, Pull, State
from tombola.worker.conformity.tails import (
    Sums,
    Trials,
    at_least,
    g_test,
    normal_quantile,
    normal_tail,
    other_wins,
)
from tombola.worker.conformity.tally import Cell, Luck
from tombola.worker.conformity.tickets import BINS, Tickets

EXPECTED_MIN: Final = 20.0  # of a cell of the G-test; rarer prizes share a cell, and are each tested exactly
LUCKIEST: Final = 20
TICKETS_MIN: Final = int(EXPECTED_MIN) * BINS
POWER: Final = 0.9  # what a question detects, it detects with this probability


class Account(NamedTuple):
    """An account among the luckiest, over the whole period."""

    id: int
    luck: Luck


@dataclass(frozen=True)
class Drawn:
    """What the draws of one version came to in a period. `accounts` is how many accounts drew; `cohorts` are accounts
    by the month that they were opened in. `tickets` is None where nobody asked for them."""

    compared: Compared
    cells: Mapping[Cell, int]
    accounts: int
    luckiest: Sequence[Account]
    cohorts: Mapping[str, Sums]
    tickets: Tickets | None = None


@dataclass(frozen=True)
class Question:
    """A question and its answer: the probability that true odds come out so far off, over all parts.

    `found` tells of the part that is furthest off. `detects` says which deviation is seen with the probability POWER,
    at a level for its p-value.
    """

    name: str
    what: str
    p_value: float
    parts: int
    found: str
    detects: Callable[[float], str]


@dataclass(frozen=True)
class Prize:
    """How often a prize was drawn by its tickets, beside what was expected. `win` prizes count as wins."""

    code: str
    sums: Sums
    p_value: float
    is_win: bool


@dataclass(frozen=True)
class Examined:
    """The questions of a version, and what they were asked of, by tier, hour, caller and cohort."""

    pulls: int
    prizes: Sequence[Prize]
    groups: Mapping[str, Mapping[str, Sums]]
    questions: Sequence[Question]


def examine(drawn: Drawn) -> Examined:
    """Ask all questions of a version that can be asked of these draws."""
    pulls = sum(drawn.cells.values())
    by_pull: Counter[Pull] = Counter()
    for cell, count in drawn.cells.items():
        by_pull[cell.pull] += count
    prizes = _prizes(drawn.compared, by_pull)
    groups = {
        "tier": _groups(drawn, lambda it: it.pull.state.tier or "none"),
        "hour": _groups(drawn, lambda it: f"{it.hour:%Y-%m-%d %H:00}"),
        "caller": _groups(drawn, lambda it: it.caller or "none"),
        "cohort": dict(sorted(drawn.cohorts.items())),
    }
    questions = [*_of_prizes(drawn.compared, by_pull, prizes)]
    if drawn.compared.wins:
        whole = {"all pulls": _wins(drawn.compared, by_pull)}
        questions.append(_furthest("wins", "wins among all pulls", whole))
        questions += [_furthest(name, f"wins by {name}", found) for name, found in groups.items() if len(found) > 1]
        questions.append(_of_accounts(drawn))
    if drawn.tickets is not None and len(drawn.tickets.places) >= TICKETS_MIN:
        questions += _of_tickets(drawn.tickets)
    return Examined(pulls, prizes, groups, questions)


# ---- prizes ----------------------------------------------------------------------------------------------------------


def _prizes(compared: Compared, by_pull: Mapping[Pull, int]) -> list[Prize]:
    pulls_in: Counter[State] = Counter()
    drawn: Counter[str] = Counter()
    for pull, count in by_pull.items():
        pulls_in[pull.state] += count
        drawn[pull.drawn] += count
    found = []
    for code in compared.odds.by_code:
        trials: Counter[float] = Counter()
        for state, count in pulls_in.items():
            trials[compared.chances(state).by_code[code]] += count
        certain = trials[1.0]
        left = Sums.of(drawn[code] - certain, _open(trials))  # to chance
        sums = Sums(sum(pulls_in.values()), drawn[code], left.expected + certain, left.variance)
        found.append(Prize(code, sums, other_wins(left), code in compared.wins))
    return found


def _of_prizes(compared: Compared, by_pull: Mapping[Pull, int], prizes: Sequence[Prize]) -> list[Question]:
    impossible = sum(count for pull, count in by_pull.items() if not compared.chances(pull.state).by_code[pull.drawn])
    questions = []
    if impossible:
        found = f"{impossible:,} pulls drew a prize that has no chance where their accounts stood"
        questions.append(Question("impossible", "prizes without a chance", 0.0, 1, found, lambda _: "a single one"))
    tests = [it for it in prizes if it.sums.variance > 0]
    if not tests:
        return questions
    questions.append(_together(tests))
    worst = min(tests, key=lambda it: it.p_value)
    common = max(tests, key=lambda it: it.sums.variance)
    return [
        *questions,
        Question(
            "each prize",
            "every prize by itself",
            min(1.0, len(tests) * worst.p_value),
            len(tests),
            f"{worst.code}: {_said(worst.sums)}",
            lambda level: f"{_detected(common.sums, level / len(tests))} of {common.code}",
        ),
    ]


def _together(prizes: Sequence[Prize]) -> Question:
    """The G-test. Chances that differ from pull to pull make its statistic smaller, never larger."""
    ranked = sorted(prizes, key=lambda it: it.sums.expected)
    cells: list[list[Prize]] = [[]]
    for it in ranked:
        if cells[-1] and sum(other.sums.expected for other in cells[-1]) >= EXPECTED_MIN:
            cells.append([])
        cells[-1].append(it)
    if len(cells) > 1 and sum(it.sums.expected for it in cells[-1]) < EXPECTED_MIN:
        cells[-2] += cells.pop()
    observed = [float(sum(it.sums.wins for it in cell)) for cell in cells]
    expected = [math.fsum(it.sums.expected for it in cell) for cell in cells]
    found = g_test(observed, expected)
    pulls, degrees = prizes[0].sums.pulls, max(1, found.degrees)

    def detects(level: float) -> str:
        return f"shares that differ by {math.sqrt(_noncentrality(degrees, level) / max(1, pulls)):.2%} (Cohen's w)"

    told = f"G {found.statistic:,.1f} with {found.degrees} degrees of freedom"
    return Question("prizes", "all prizes together (G-test)", found.p_value, 1, told, detects)


# ---- wins ------------------------------------------------------------------------------------------------------------


def _groups(drawn: Drawn, key_of: Callable[[Cell], str]) -> dict[str, Sums]:
    cells: dict[Hashable, Counter[Pull]] = defaultdict(Counter)
    for cell, count in drawn.cells.items():
        cells[key_of(cell)][cell.pull] += count
    return {str(key): _wins(drawn.compared, cells[key]) for key in sorted(cells, key=str)}


def _wins(compared: Compared, by_pull: Mapping[Pull, int]) -> Sums:
    """The wins of pulls that leave one to chance: not of those where a guarantee is due that has only wins."""
    wins, trials = 0, Counter[float]()
    for pull, count in by_pull.items():
        chance = compared.chances(pull.state).win
        if 0 < chance < 1:
            wins += count * (pull.drawn in compared.wins)
            trials[chance] += count
    return Sums.of(wins, _open(trials))


def _open(trials: Mapping[float, int]) -> list[Trials]:
    """Pulls by their chances, without those that leave nothing to chance."""
    return [Trials(count, chance) for chance, count in sorted(trials.items()) if 0 < chance < 1]


def _furthest(name: str, what: str, groups: Mapping[str, Sums]) -> Question:
    tests = {key: sums for key, sums in groups.items() if sums.variance > 0}
    if not tests:
        return Question(name, what, 1.0, 0, "no pull left a win to chance", lambda _: "nothing")
    p_values = {key: other_wins(sums) for key, sums in tests.items()}
    worst = min(p_values, key=p_values.__getitem__)
    count = len(tests)
    average = Sums(
        expected=math.fsum(it.expected for it in tests.values()) / count,
        variance=math.fsum(it.variance for it in tests.values()) / count,
    )

    def detects(level: float) -> str:
        of = f", in one {name} of average size" if count > 1 else ""
        return f"{_detected(average, level / count)} wins{of}"

    return Question(name, what, min(1.0, count * p_values[worst]), count, f"{worst}: {_said(tests[worst])}", detects)


def _of_accounts(drawn: Drawn) -> Question:
    """Are the luckiest accounts too lucky, alone or together? How probable is it that k of so many accounts have a
    bound as small as the k-th luckiest, for k up to LUCKIEST."""
    ranked = sorted(drawn.luckiest, key=lambda it: it.luck.bound)[:LUCKIEST]
    p_values = [at_least(rank, drawn.accounts, it.luck.bound) for rank, it in enumerate(ranked, 1)]
    p_value = min(1.0, len(p_values) * min(p_values, default=1.0))
    found = "no account"
    if ranked:
        found = f"account {ranked[0].id}: {_said(ranked[0].luck.sums)}"
    most_common = max(drawn.compared.wins, key=lambda code: drawn.compared.odds.by_code[code].weight)
    tier = drawn.compared.reduced([0] * len(drawn.compared.odds.guarantees))
    state = next((it.pull.state for it in drawn.cells if it.pull.state.since_hit == tier), None)
    growth = 0.0 if state is None else max(drawn.compared.chances(state).growth[most_common])

    def detects(level: float) -> str:
        if growth <= 0:
            return "nothing"
        needed = math.log(3 * LUCKIEST * max(1, drawn.accounts) / level)
        return f"an account that wins each of {math.ceil(needed / growth)} pulls"

    return Question("accounts", "the luckiest accounts", p_value, drawn.accounts, found, detects)


# ---- tickets ---------------------------------------------------------------------------------------------------------


def _of_tickets(tickets: Tickets) -> list[Question]:
    count = len(tickets.places)
    bins = [(seen, share) for seen, share in zip(tickets.observed, tickets.expected(), strict=True) if share > 0]
    even = g_test([seen for seen, _ in bins], [share for _, share in bins])
    above = [place > 0.5 for place in tickets.places]
    high = sum(above)
    low = count - high
    runs = 1 + sum(before != after for before, after in pairwise(above))
    mean = 1 + 2 * high * low / count
    spread = math.sqrt(max(1e-9, (mean - 1) * (mean - 2) / (count - 1)))
    z_runs = (runs - mean) / spread
    deviations = [place - 0.5 for place in tickets.places]
    lag = 12 * math.fsum(one * two for one, two in pairwise(deviations)) / (count - 1)
    z_lag = lag * math.sqrt(count - 1)

    def correlation(level: float) -> str:
        return f"a correlation of {_distance(level) / math.sqrt(count):.4f}"

    return [
        Question(
            "ticket bins",
            f"tickets in {BINS} bins",
            even.p_value,
            1,
            f"G {even.statistic:,.1f} with {even.degrees} degrees of freedom",
            lambda level: f"shares that differ by {math.sqrt(_noncentrality(even.degrees, level) / count):.2%} (w)",
        ),
        Question(
            "ticket runs",
            "runs of tickets above and below the middle",
            min(1.0, 2 * normal_tail(abs(z_runs))),
            1,
            f"{runs:,} runs, {mean:,.0f} expected",
            lambda level: f"{_distance(level) * spread:,.0f} runs more or fewer",
        ),
        Question(
            "ticket lag",
            "correlation of a ticket with the next one",
            min(1.0, 2 * normal_tail(abs(z_lag))),
            1,
            f"{lag:+.4f}",
            correlation,
        ),
    ]


# ---- what could have been seen ---------------------------------------------------------------------------------------


def _distance(level: float) -> float:
    """How many standard deviations a shift needs to be seen at this level, two-sided, with the probability POWER."""
    return normal_quantile(max(level, 1e-300) / 2) + normal_quantile(1 - POWER)


def _detected(sums: Sums, level: float) -> str:
    more = _distance(level) * math.sqrt(sums.variance)
    return f"{more:,.1f} more or fewer than {sums.expected:,.1f}"


def _noncentrality(degrees: int, level: float) -> float:
    """The noncentrality of a chi-squared statistic that is seen at this level with the probability POWER; by the normal
    approximations of Wilson and Hilferty and of Patnaik's moments."""
    cube = 2 / (9 * max(1, degrees))
    critical = degrees * (1 - cube + normal_quantile(max(level, 1e-300)) * math.sqrt(cube)) ** 3
    z, found = normal_quantile(1 - POWER), max(0.0, critical - degrees)
    for _ in range(50):
        found = max(0.0, critical - degrees + z * math.sqrt(2 * (degrees + 2 * found)))
    return found


def _said(sums: Sums) -> str:
    return f"{sums.wins:,} of {sums.pulls:,} pulls, {sums.expected:,.1f} expected ({sums.z:+.1f} standard deviations)"
