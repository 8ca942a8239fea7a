"""Tickets: those that players' draws had, uniform where nobody chose, and not provable without the secret."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest

from tests.conformity.simulated import BEGIN, drawn_of
from tests.conformity.test_report import CROWDED, WINTER_ODDS
from tombola.producers.domain.campaigns.built_in import DEFAULT_ODDS
from tombola.producers.domain.campaigns.drawing import Drawing
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.campaigns.record import DrawNotes
from tombola.producers.domain.draw import DEFAULT_CAMPAIGN, Wheel, seed_id_of
from tombola.worker.conformity.chances import Pull, State
from tombola.worker.conformity.questions import TICKETS_MIN, Question, examine
from tombola.worker.conformity.tally import Tally
from tombola.worker.conformity.tickets import BINS, Charge, KeyOf, Tickets, nonce_in, tickets_of

SEED = bytes(range(32))
WHEEL = Wheel(DEFAULT_CAMPAIGN, SEED)


def known(seed_id: str, _campaign: str) -> bytes | None:
    return {seed_id_of(SEED): SEED}.get(seed_id)


def built_in(count: int, *, picks: bool = False) -> list[Charge]:
    found: list[Charge] = []
    number = 0
    while len(found) < count:
        number += 1
        if not picks or WHEEL.draw(7, f"r{number}").amount:
            found.append(Charge(7, f"r{number}", WHEEL.notes))
    return found


def by_campaign(odds: Odds, count: int, *, pulls: int = 1) -> list[Charge]:
    """Draws of one account under its guarantees."""
    found, since_hit = [], tuple(0 for _ in odds.guarantees)
    for number in range(count):
        before, prizes = since_hit, []
        drawing = Drawing(SEED, odds, 7, f"r{number}")
        for pull in range(1, pulls + 1):
            prize, _, since_hit = drawing.pull(pull, "", since_hit)
            prizes.append(prize.code)
        notes = DrawNotes(odds.odds_hash, seed_id_of(SEED), tuple(prizes), "", None, before)
        found.append(Charge(7, f"r{number}", notes.written()))
    return found


def asked(odds: Odds, tickets: Tickets) -> dict[str, Question]:
    tally = Tally.of(odds)
    tally.add(7, BEGIN, "", Pull(State("", tuple(0 for _ in odds.guarantees)), odds.prizes[0].code))
    return {it.name: it for it in examine(dataclasses.replace(drawn_of(tally), tickets=tickets)).questions}


def test_a_ticket_is_the_one_that_drew_the_prize() -> None:
    for charge in built_in(50):
        tickets = tickets_of([charge], DEFAULT_ODDS, known)
        (place,) = tickets.places
        assert WHEEL.pick(int(place * 100)) == WHEEL.draw(7, charge.request_key)
        assert tickets.sizes == {100: 1}


@pytest.mark.parametrize(
    ("odds", "made", "pulls"),
    [
        (DEFAULT_ODDS, lambda: built_in(TICKETS_MIN), 1),
        (WINTER_ODDS, lambda: by_campaign(WINTER_ODDS, TICKETS_MIN // 5, pulls=10), 10),
        (CROWDED, lambda: by_campaign(CROWDED, TICKETS_MIN), 1),
    ],
    ids=["default", "winter", "crowded"],
)
def test_tickets_of_draws_are_uniform(odds: Odds, made: Callable[[], list[Charge]], pulls: int) -> None:
    charges = made()
    tickets = tickets_of(charges, odds, known)
    assert (tickets.draws, tickets.unknown, tickets.other) == (len(charges), 0, 0)
    assert len(tickets.places) == sum(tickets.observed) == len(charges) * pulls
    assert sum(tickets.expected()) == pytest.approx(len(charges) * pulls)
    found = asked(odds, tickets)
    assert {"ticket bins", "ticket runs", "ticket lag"} <= found.keys()
    assert all(found[name].p_value > 0.001 for name in ("ticket bins", "ticket runs", "ticket lag"))
    assert all(found[name].detects(0.001) for name in ("ticket bins", "ticket runs", "ticket lag"))


def test_chosen_keys_are_seen_in_their_tickets() -> None:
    tickets = tickets_of([*built_in(TICKETS_MIN), *built_in(500, picks=True)], DEFAULT_ODDS, known)
    assert asked(DEFAULT_ODDS, tickets)["ticket bins"].p_value < 1e-6


def test_tickets_that_follow_each_other_are_seen() -> None:
    tickets = Tickets()
    for number in range(TICKETS_MIN):
        tickets.add(number * 7 % 1000, 1000)
    found = asked(DEFAULT_ODDS, tickets)
    assert found["ticket bins"].p_value > 0.5
    assert found["ticket runs"].p_value < 1e-9
    assert found["ticket lag"].p_value < 1e-9


def test_few_whole_tickets_are_not_expected_in_every_bin() -> None:
    tickets = Tickets()
    for ticket in (0, 1, 2) * 1000:
        tickets.add(ticket, 3)
    assert Counter(tickets.expected()) == {0.0: BINS - 3, 1000.0: 3}
    assert [number for number, count in enumerate(tickets.observed) if count] == [0, 33, 66]
    assert asked(DEFAULT_ODDS, tickets)["ticket bins"].p_value > 0.99


def test_too_few_tickets_are_not_asked_about() -> None:
    assert "ticket bins" not in asked(DEFAULT_ODDS, tickets_of(built_in(100), DEFAULT_ODDS, known))


def test_without_the_secret_a_draw_is_not_provable_yet() -> None:
    unknown: KeyOf = lambda _seed, _campaign: None  # noqa: E731
    for odds, charges in ((DEFAULT_ODDS, built_in(9)), (CROWDED, by_campaign(CROWDED, 9))):
        tickets = tickets_of(charges, odds, unknown)
        assert (tickets.draws, tickets.unknown, len(tickets.places)) == (9, 9, 0)


def test_a_draw_that_names_another_prize_than_its_ticket_is_counted() -> None:
    charges = by_campaign(WINTER_ODDS, 40)
    wrong = charges[0]._replace(notes=charges[0].notes.replace("prizes=nothing", "prizes=phone"))
    assert wrong != charges[0]
    garbage = charges[1]._replace(notes="odds=a seed=")
    tickets = tickets_of([wrong, garbage, *charges[2:]], WINTER_ODDS, known)
    assert tickets.other == 1
    assert tickets.unknown == 1


@pytest.mark.parametrize(
    ("terms", "nonce"),
    [
        (None, b""),
        ('["winter",10]', b""),
        ('["winter",10,"n0nce_n0nce_n0nce"]', b"n0nce_n0nce_n0nce"),
        ('["winter",null,"n0nce_n0nce_n0nce"]', b"n0nce_n0nce_n0nce"),
    ],
)
def test_the_nonce_of_a_request(terms: str | None, nonce: bytes) -> None:
    assert nonce_in(terms) == nonce
    assert terms is None or msgspec.json.decode(terms)
