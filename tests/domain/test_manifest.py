"""Manifests: what is right says its odds, what is wrong names its line."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from tombola.producers.domain.campaigns import manifest
from tombola.producers.domain.campaigns.odds import PRIZES_MAX
from tombola.producers.domain.errors import InvalidManifest

WINTER = """\
name = "winter-2026"
asset = "POINT"
cost = { 1 = "10.00", 10 = "90.00" }
opens = 2026-12-01T00:00:00+08:00
closes = 2027-01-01T00:00:00+08:00
day = "Asia/Shanghai"

[limits]
per_day = 20
per_account = 200

[eligibility]
deny = "blacklist-1"

[[prize]]
code = "phone"
weight = 1
stock = 3
per_account = 1
value = "3999.00"
instead = "five"
grants = [{ asset = "ITEM.PHONE", amount = "1" }]

[[prize]]
code = "coupon"
weight = 999
instead = "nothing"
value = "10.00"
grants = [
    { asset = "COUPON.10", amount = "1", codes = true },
    { notify = "coupon-won" },
]

[[prize]]
code = "five"
weight = 2000
grants = [{ asset = "POINT", amount = "5.00" }]

[[prize]]
code = "nothing"
weight = 7000

[[tier]]
name = "vip"
spent_from = "1000.00"
weights = { phone = 2, nothing = 6999 }

[[guarantee]]
name = "ssr"
prizes = ["phone", "five"]
hard_at = 90
soft_from = 75
soft_step = 300
"""


def test_it_says_what_was_written() -> None:
    odds = manifest.parse(WINTER)

    assert (odds.name, odds.asset_code, odds.cost) == ("winter-2026", "POINT", {1: Decimal(10), 10: Decimal(90)})
    assert odds.opens == datetime(2026, 11, 30, 16, tzinfo=UTC)
    assert (odds.per_day, odds.per_account, odds.deny, odds.allow) == (20, 200, "blacklist-1", "")
    assert [prize.weight for prize in odds.prizes] == [1, 999, 2000, 7000]
    assert odds.weights_of("vip") == (2, 999, 2000, 6999)
    assert [(grant.entry, grant.has_code) for grant in odds.by_code["coupon"].grants] == [
        ("coupon", True),
        ("notice", False),
    ]
    assert [prize.code for prize in odds.prizes if prize.is_stocked] == ["phone", "coupon"]
    assert odds.by_code["five"].value == Decimal("5.00")  # what it pays, where nothing else is written
    assert odds.asset_codes == ("COUPON.10", "ITEM.PHONE")


def test_a_day_begins_where_the_campaign_says() -> None:
    odds = manifest.parse(WINTER)

    assert odds.day_of(datetime(2026, 12, 5, 15, 59, tzinfo=UTC)) == "2026-12-05"
    assert odds.day_of(datetime(2026, 12, 5, 16, 0, tzinfo=UTC)) == "2026-12-06"


def test_the_window_has_its_first_moment_and_not_its_last() -> None:
    odds = manifest.parse(WINTER)
    assert odds.opens is not None
    assert odds.closes is not None

    assert [odds.is_open_at(it) for it in (odds.opens, odds.closes)] == [True, False]


def test_the_highest_tier_that_is_reached_counts() -> None:
    second = '[[tier]]\nname = "gold"\nspent_from = "2000.00"\nweights = { phone = 5 }\n\n[[guarantee]]'
    odds = manifest.parse(WINTER.replace("[[guarantee]]", second))

    spent = ("0.00", "999.99", "1000.00", "1999.99", "2000.00")
    assert [odds.tier_of(Decimal(it)) for it in spent] == ["", "", "vip", "vip", "gold"]


def test_the_canonical_form_is_a_manifest_too_and_its_hash_is_the_odds_hash() -> None:
    odds = manifest.parse(WINTER)

    assert manifest.restore(odds.canonical) == odds
    assert odds.odds_hash == hashlib.sha256(odds.canonical).hexdigest()
    assert odds.canonical.startswith(b'{"asset":"POINT","closes":"2026-12-31T16:00:00Z","cost":{"1":"10.00",')
    assert b"allow" not in odds.canonical


@pytest.mark.parametrize(
    "same",
    [
        WINTER.replace('cost = { 1 = "10.00", 10 = "90.00" }', 'cost = { 10 = "90", 1 = "10.0" }'),
        WINTER.replace("2026-12-01T00:00:00+08:00", "2026-11-30T16:00:00Z"),
        "# for the winter\n" + WINTER.replace('prizes = ["phone", "five"]', "prizes = [\n  'five',\n  'phone',\n]"),
        WINTER.replace('deny = "blacklist-1"', 'deny = "blacklist-1"\nallow = ""'),
    ],
    ids=["amounts", "zone", "layout", "empty"],
)
def test_what_says_the_same_has_the_same_hash(same: str) -> None:
    assert manifest.parse(same).odds_hash == manifest.parse(WINTER).odds_hash


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'{"name":"a"}', b" " + b"{}"])
def test_what_is_no_canonical_form_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidManifest):
        manifest.restore(body)


def test_a_manifest_in_another_form_is_not_canonical() -> None:
    canonical = manifest.parse(WINTER).canonical
    with pytest.raises(InvalidManifest, match="canonical"):
        manifest.restore(canonical.replace(b'"10.00"', b'"10.0"'))


def _with(old: str, new: str) -> str:
    assert old in WINTER
    return WINTER.replace(old, new, 1)


MANY = "".join(f'[[prize]]\ncode = "p{number}"\nweight = 1\n\n' for number in range(10_000))
# What is written, the line of the mistake, and a word of the message.
BAD: dict[str, tuple[str | bytes, int, str]] = {
    "empty": ("", 1, "name is missing"),
    "blank": ("\n\n  \n", 1, "name is missing"),
    "no text": (b"name = 1\n\xff\xfe", 2, "UTF-8"),
    "utf-16": (WINTER.encode("utf-16"), 1, "UTF-8"),
    "binary": (bytes(range(256)), 2, ""),
    "JSON": ('{"name": "winter"}', 1, "TOML"),
    "YAML": ("name: winter\nasset: POINT\n", 1, "TOML"),
    "a key twice": (_with('asset = "POINT"', 'asset = "POINT"\nasset = "COIN"'), 3, "TOML"),
    "a string without end": (_with('name = "winter-2026"', 'name = "winter'), 1, "TOML"),
    "an end too early": (WINTER + "[[prize", 54, "TOML"),
    "no name": (_with('name = "winter-2026"\n', ""), 1, "name is missing"),
    "a blank in the name": (_with('"winter-2026"', '"winter 2026"'), 1, "name"),
    "a colon in the name": (_with('"winter-2026"', '"winter:2026"'), 1, "name"),
    "an empty name": (_with('"winter-2026"', '""'), 1, "name"),
    "a long name": (_with('"winter-2026"', f'"{"w" * 41}"'), 1, "40"),
    "a foreign letter": (_with('"winter-2026"', '"冬季"'), 1, "name"),
    "the built-in name": (_with('"winter-2026"', '"default"'), 1, "built in"),
    "a number for the name": (_with('"winter-2026"', "2026"), 1, "text"),
    "no asset": (_with('asset = "POINT"\n', ""), 1, "asset is missing"),
    "a bad asset": (_with('asset = "POINT"', 'asset = "PO INT"'), 2, "asset"),
    "a title with a line break": (_with('asset = "POINT"', 'asset = "POINT"\ntitle = "a\\nb"'), 3, "title"),
    "a long title": (_with('asset = "POINT"', f'asset = "POINT"\ntitle = "{"t" * 101}"'), 3, "100"),
    "no cost": (_with('cost = { 1 = "10.00", 10 = "90.00" }\n', ""), 1, "cost is missing"),
    "an empty cost": (_with('{ 1 = "10.00", 10 = "90.00" }', "{}"), 3, "price"),
    "a cost for nothing": (_with('{ 1 = "10.00", 10', '{ 1 = "0.00", 10'), 3, "0.01"),
    "a negative cost": (_with('"10.00", 10', '"-10.00", 10'), 3, "amount"),
    "a fraction of a cent": (_with('"10.00", 10', '"10.005", 10'), 3, "two decimals"),
    "a cost as a number": (_with('"10.00", 10', "10.5, 10"), 3, "quotes"),
    "a cost that is not one": (_with('"10.00", 10', '"NaN", 10'), 3, "amount"),
    "an infinite cost": (_with('"10.00", 10', '"Infinity", 10'), 3, "amount"),
    "a cost with an exponent": (_with('"10.00", 10', '"1e3", 10'), 3, "amount"),
    "a cost in other digits": (_with('"10.00", 10', '"１０", 10'), 3, "amount"),
    "a cost too large": (_with('"10.00", 10', '"100000000.00", 10'), 3, "amount"),
    "no pulls": (_with("{ 1 =", "{ 0 ="), 3, "pulls"),
    "a thousand pulls": (_with(", 10 =", ", 1000 ="), 3, "pulls"),
    "half a pull": (_with(", 10 =", ', "1.5" ='), 3, "pulls"),
    "a time without a zone": (_with("2026-12-01T00:00:00+08:00", "2026-12-01T00:00:00"), 4, "zone"),
    "a date": (_with("2026-12-01T00:00:00+08:00", "2026-12-01"), 4, ""),
    "a time as a word": (_with("2026-12-01T00:00:00+08:00", '"tomorrow"'), 4, ""),
    "a time out of range": (_with("2026-12-01T00:00:00+08:00", "0001-01-01T00:00:00+08:00"), 4, "range"),
    "it closes before it opens": (_with("2027-01-01", "2026-11-01"), 5, "before it opens"),
    "it closes when it opens": (_with("2027-01-01", "2026-12-01"), 5, "before it opens"),
    "an unknown time zone": (_with("Asia/Shanghai", "Asia/Atlantis"), 6, "time zone"),
    "a path for a time zone": (_with("Asia/Shanghai", "../../etc/passwd"), 6, "time zone"),
    "a limit of none": (_with("per_day = 20", "per_day = 0"), 9, "per_day"),
    "a limit as text": (_with("per_day = 20", 'per_day = "20"'), 9, "whole number"),
    "a limit as a switch": (_with("per_day = 20", "per_day = true"), 9, "whole number"),
    "more a day than in all": (_with("per_day = 20", "per_day = 201"), 9, "in all"),
    "an unknown limit": (_with("per_day = 20", "per_hour = 20"), 9, "no such setting"),
    "a bad list": (_with('"blacklist-1"', '"black list"'), 13, "deny"),
    "an unknown setting": ('colour = "red"\n' + WINTER, 1, "no such setting"),
    "an unknown setting of a prize": (_with("stock = 3", "stok = 3"), 18, "no such setting"),
    "no prizes": (WINTER[: WINTER.index("[[prize]]")], 1, "prize is missing"),
    "an empty list of prizes": ("prize = []\n" + WINTER[: WINTER.index("[[prize]]")], 1, "prize"),
    "one prize, not a list": (_with("[[prize]]", "[prize]"), 24, ""),
    "10,000 prizes": (WINTER[: WINTER.index("[[prize]]")] + MANY, 14 + 4 * PRIZES_MAX + 1, "10,000"),
    "no code": (_with('code = "phone"\n', ""), 15, "code is missing"),
    "a code twice": (_with('code = "coupon"', 'code = "phone"'), 25, "another prize"),
    "a comma in a code": (_with('code = "coupon"', 'code = "cou,pon"'), 25, "code"),
    "no weight": (_with("weight = 999\n", ""), 24, "weight is missing"),
    "a weight of nothing": (_with("weight = 999", "weight = 0"), 26, "at least 1"),
    "a negative weight": (_with("weight = 999", "weight = -1"), 26, "at least 1"),
    "a fractional weight": (_with("weight = 999", "weight = 9.99"), 26, "whole number"),
    "a weight that is not one": (_with("weight = 999", "weight = nan"), 26, "whole number"),
    "an infinite weight": (_with("weight = 999", "weight = inf"), 26, "whole number"),
    "a weight as text": (_with("weight = 999", 'weight = "999"'), 26, "whole number"),
    "a weight out of range": (_with("weight = 999", "weight = 4294967296"), 15, "add up"),
    "a weight beyond 64 bits": (_with("weight = 999", f"weight = {10**30}"), 15, ""),
    "a negative stock": (_with("stock = 3", "stock = -3"), 18, "stock"),
    "half a unit": (_with("stock = 3", "stock = 3.5"), 18, "whole number"),
    "won by none": (_with("per_account = 1", "per_account = 0"), 19, "per_account"),
    "a negative value": (_with('"3999.00"', '"-1"'), 20, "amount"),
    "limited, and no instead": (_with('instead = "five"\n', ""), 15, "instead"),
    "an unknown instead": (_with('instead = "five"', 'instead = "six"'), 21, "no prize"),
    "instead of itself": (_with('instead = "five"', 'instead = "phone"'), 21, "circle"),
    "a circle of two": (_with('instead = "nothing"', 'instead = "phone"').replace('"five"\n', '"coupon"\n', 1), 21, ""),
    "a needless instead": (_with("weight = 7000", 'weight = 7000\ninstead = "five"'), 42, "always available"),
    "a grant of nothing": (_with('{ asset = "POINT", amount = "5.00" }', "{}"), 37, "grant"),
    "a grant without an amount": (_with(', amount = "5.00"', ""), 37, "amount"),
    "a grant of zero": (_with('amount = "5.00"', 'amount = "0.00"'), 37, "amount"),
    "a grant as a number": (_with('amount = "5.00"', "amount = 5"), 37, "text in quotes"),
    "a grant of two kinds": (_with('{ notify = "coupon-won" }', '{ notify = "a", asset = "B" }'), 29, "grant"),
    "a notification with an amount": (
        _with('{ notify = "coupon-won" }', '{ notify = "a", amount = "1" }'),
        29,
        "no amount",
    ),
    "eleven grants": (
        _with('[{ asset = "POINT", amount = "5.00" }]', "[" + '{ notify = "a" },' * 11 + "]"),
        37,
        "at most 10",
    ),
    "two coupons for a code": (_with('amount = "1", codes', 'amount = "2", codes'), 29, "codes"),
    "codes and a stock": (_with("weight = 999", "weight = 999\nstock = 5"), 27, "pool"),
    "a tier of an unknown prize": (_with("weights = { phone = 2", "weights = { car = 2"), 46, "no prize"),
    "a negative weight of a tier": (_with("weights = { phone = 2", "weights = { phone = -2"), 46, "at least 0"),
    "a tier that wins nothing": (
        _with("{ phone = 2, nothing = 6999 }", "{ phone = 0, coupon = 0, five = 0, nothing = 0 }"),
        46,
        "add up",
    ),
    "a tier from nothing on": (_with('spent_from = "1000.00"', 'spent_from = "0.00"'), 45, "amount"),
    "tiers that fall": (
        WINTER + '[[tier]]\nname = "a"\nspent_from = "10.00"\nweights = {}\n',
        56,
        "rising",
    ),
    "a guarantee of nothing": (_with('["phone", "five"]', "[]"), 50, "names its prizes"),
    "a guarantee of an unknown prize": (_with('["phone", "five"]', '["car"]'), 50, "no prize"),
    "a prize twice in a guarantee": (_with('["phone", "five"]', '["five", "five"]'), 50, "twice"),
    "a guarantee that sells out": (_with('["phone", "five"]', '["phone"]'), 50, "unavailable"),
    "a guarantee at no pull": (_with("hard_at = 90", "hard_at = 0"), 51, "hard_at"),
    "a guarantee beyond all figures": (_with("hard_at = 90", "hard_at = 50001"), 51, "too many for exact chances"),
    "a guarantee that is not one": (_with("hard_at = 90", "hard_at = nan"), 51, "whole number"),
    "soft after hard": (_with("soft_from = 75", "soft_from = 90"), 52, "before hard_at"),
    "a step, and no begin": (_with("soft_from = 75\n", ""), 48, "together"),
    "a step back": (_with("soft_step = 300", "soft_step = -300"), 53, "soft_step"),
    "two guarantees at once": (
        WINTER + '[[guarantee]]\nname = "b"\nprizes = ["coupon", "nothing"]\nhard_at = 9\n',
        56,
        "both be due",
    ),
    "a tier that cannot win what is guaranteed": (
        _with("{ phone = 2, nothing = 6999 }", "{ phone = 0, five = 0 }"),
        50,
        "cannot win",
    ),
    "too large": (WINTER + "#" * manifest.MANIFEST_BYTES_MAX, 0, "bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_manifest_is_one_sentence_that_names_the_line(name: str) -> None:
    written, line, word = BAD[name]

    with pytest.raises(InvalidManifest) as refusal:
        manifest.parse(written)

    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 400
    assert word in message
    if line:
        assert message.startswith(f"line {line}: "), message


def test_the_manifest_in_the_documents_is_right() -> None:
    page = (Path(__file__).parents[2] / "worker/docs/campaigns.md").read_text()
    assert manifest.parse(page.split("```toml\n")[1].split("```")[0]).name == "winter-2026"


def test_there_are_many_ways_to_be_wrong() -> None:
    assert len(BAD) >= 60
