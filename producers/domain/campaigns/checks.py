"""From a manifest's fields to odds, by every check that needs the manifest alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final
from zoneinfo import ZoneInfo

from tombola.producers.domain.campaigns.canonical import canonical_form
from tombola.producers.domain.campaigns.form import GuaranteeForm, LimitsForm, ManifestForm, Path, PrizeForm, Wrong
from tombola.producers.domain.campaigns.odds import (
    GRANTS_MAX,
    WEIGHT_SUM_MAX,
    Grant,
    Guarantee,
    Odds,
    Prize,
    Tier,
)
from tombola.producers.domain.contract import PULLS_MAX
from tombola.producers.domain.money import AMOUNT_MAX

NAME_LENGTH_MAX: Final = 40
STOCK_MAX: Final = 1_000_000_000
COUNT_MAX: Final = 1_000_000  # of a limit, and of the pulls until a guarantee
TIERS_MAX: Final = 20
GUARANTEES_MAX: Final = 5
STEPS_MAX: Final = 200_000  # exact chances take some seconds then: producers.domain.campaigns.figures
TITLE_LENGTH_MAX: Final = 100
# Names that no campaign may have, and why.
RESERVED: Final[Mapping[str, str]] = {
    "default": "is the campaign that is built in",
    "new": "is the address of the console's page for new campaigns",
}

_is_name = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*").fullmatch
_is_code = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*").fullmatch
_is_asset = re.compile(r"[A-Za-z0-9._-]{1,50}").fullmatch
_is_amount = re.compile(r"[0-9]{1,8}(\.[0-9]{1,2})?").fullmatch


def odds_of(manifest: ManifestForm) -> Odds:
    """The odds of a manifest, after every check that needs the manifest alone; raises Wrong."""
    _check_name(("name",), manifest.name, _is_name, NAME_LENGTH_MAX)
    if (why := RESERVED.get(manifest.name)) is not None:
        raise Wrong(("name",), f"{manifest.name!r} {why}: choose another name")
    _check_asset(("asset",), manifest.asset)
    _check_title((), manifest.title)
    opens, closes = (_moment((key,), getattr(manifest, key)) for key in ("opens", "closes"))
    if opens is not None and closes is not None and closes <= opens:
        raise Wrong(("closes",), "the campaign closes before it opens")
    try:
        ZoneInfo(manifest.day)
    except (KeyError, ValueError, OSError):
        raise Wrong(("day",), f"there is no time zone {manifest.day!r:.80}: write one as in Asia/Shanghai") from None
    _check_limits(manifest.limits)
    for key in ("deny", "allow"):
        if listed := getattr(manifest.eligibility, key):
            _check_name(("eligibility", key), listed, _is_name, NAME_LENGTH_MAX)
    prizes = _prizes(manifest)
    tiers = tuple(_tiers(manifest, prizes))
    draft = Odds(
        name=manifest.name,
        asset_code=manifest.asset,
        cost=_cost(manifest.cost),
        prizes=prizes,
        canonical=b"",
        title=manifest.title,
        opens=opens,
        closes=closes,
        day=manifest.day,
        per_day=manifest.limits.per_day,
        per_account=manifest.limits.per_account,
        deny=manifest.eligibility.deny,
        allow=manifest.eligibility.allow,
        tiers=tiers,
        guarantees=_guarantees(manifest, prizes, tiers),
    )
    return dataclasses.replace(draft, canonical=canonical_form(draft))


def _cost(cost: Mapping[str, str]) -> dict[int, Decimal]:
    if not cost:
        raise Wrong(("cost",), 'a campaign needs a price: cost = { 1 = "10.00" }')
    found = {}
    for key, amount in cost.items():
        if not re.fullmatch(r"[1-9]\d{0,2}", key) or int(key) > PULLS_MAX:
            raise Wrong(("cost", key), f"a price is for 1 to {PULLS_MAX} pulls, not {key!r:.40}")
        found[int(key)] = _amount(("cost", key), amount)
    return dict(sorted(found.items()))


def _check_limits(limits: LimitsForm) -> None:
    for key in ("per_day", "per_account"):
        _check_count(("limits", key), getattr(limits, key))
    if limits.per_day is not None and limits.per_account is not None and limits.per_day > limits.per_account:
        raise Wrong(("limits", "per_day"), "more a day than in all: per_day is at most per_account")


def _prizes(manifest: ManifestForm) -> tuple[Prize, ...]:
    if not manifest.prize:
        raise Wrong((), "a campaign needs a [[prize]]")
    prizes: dict[str, Prize] = {}
    for number, form in enumerate(manifest.prize):
        at: Path = ("prize", number)
        _check_name((*at, "code"), form.code, _is_code, NAME_LENGTH_MAX)
        if form.code in prizes:
            raise Wrong((*at, "code"), f"there is another prize {form.code!r}")
        if form.weight < 1:
            raise Wrong((*at, "weight"), f"a weight is at least 1, not {form.weight}")
        if form.stock is not None and not 0 <= form.stock <= STOCK_MAX:
            raise Wrong((*at, "stock"), f"a stock is 0 to {STOCK_MAX:,} units, not {form.stock}")
        _check_count((*at, "per_account"), form.per_account)
        _check_title(at, form.title)
        prizes[form.code] = Prize(
            code=form.code,
            weight=form.weight,
            grants=_grants((*at, "grants"), form, manifest.asset),
            title=form.title,
            stock=form.stock,
            per_account=form.per_account,
            value=_value((*at, "value"), form, manifest.asset),
            instead=form.instead,
        )
    if (total := sum(prize.weight for prize in prizes.values())) > WEIGHT_SUM_MAX:
        raise Wrong(("prize",), f"the weights add up to {total:,}, more than {WEIGHT_SUM_MAX:,}")
    for number, prize in enumerate(prizes.values()):
        _check_chain(("prize", number, "instead"), prize, prizes)
    return tuple(prizes.values())


def _grants(at: Path, form: PrizeForm, own_asset: str) -> tuple[Grant, ...]:
    if len(form.grants) > GRANTS_MAX:
        raise Wrong(at, f"a prize has at most {GRANTS_MAX} grants, not {len(form.grants)}")
    grants = []
    for number, it in enumerate(form.grants):
        here = (*at, number)
        if bool(it.asset) == bool(it.notify):
            raise Wrong(here, "a grant has an asset and an amount, or notify")
        if it.notify:
            _check_name((*here, "notify"), it.notify, _is_code, NAME_LENGTH_MAX)
            if it.amount or it.codes:
                raise Wrong(here, "a notification has no amount and no codes")
            grants.append(Grant("", Decimal("0.00"), it.notify))
            continue
        _check_asset((*here, "asset"), it.asset)
        amount = _amount((*here, "amount"), it.amount)
        if it.codes and (amount != 1 or it.asset == own_asset or any(grant.has_code for grant in grants)):
            raise Wrong((*here, "codes"), 'one grant of a prize carries codes: amount "1" of an asset of its own')
        if it.codes and form.stock is not None:
            raise Wrong((*at[:-1], "stock"), "the pool of codes is the stock: leave stock out, and load codes")
        grants.append(Grant(it.asset, amount, has_code=it.codes))
    return tuple(grants)


def _value(at: Path, form: PrizeForm, own_asset: str) -> Decimal:
    """What one unit costs the operator: as written, or the sum of what it pays in the campaign's asset."""
    if form.value:
        return _amount(at, form.value, least=Decimal(0))
    return sum((Decimal(it.amount) for it in form.grants if it.asset == own_asset), Decimal("0.00")).quantize(_CENT)


def _check_chain(at: Path, prize: Prize, prizes: Mapping[str, Prize]) -> None:
    """Each limited prize leads, by `instead`, to one that is always there."""
    if prize.instead and not prize.is_limited:
        raise Wrong(at, f"{prize.code!r} is always available: it needs no instead")
    seen = [prize.code]
    while prize.is_limited:
        if not prize.instead:
            raise Wrong(at, f"{prize.code!r} may be unavailable: say what is drawn instead")
        if prize.instead not in prizes:
            raise Wrong(at, f"there is no prize {prize.instead!r:.80}")
        if prize.instead in seen:
            raise Wrong(at, f"instead goes in a circle: {' -> '.join([*seen, prize.instead])}")
        prize = prizes[prize.instead]
        seen.append(prize.code)


def _tiers(manifest: ManifestForm, prizes: Sequence[Prize]) -> Iterator[Tier]:
    if len(manifest.tier) > TIERS_MAX:
        raise Wrong(("tier", TIERS_MAX), f"a campaign has at most {TIERS_MAX} tiers, not {len(manifest.tier)}")
    codes = {prize.code for prize in prizes}
    names, least = set(), Decimal(0)
    for number, form in enumerate(manifest.tier):
        at: Path = ("tier", number)
        _check_name((*at, "name"), form.name, _is_code, NAME_LENGTH_MAX)
        if form.name in names:
            raise Wrong((*at, "name"), f"there is another tier {form.name!r}")
        names.add(form.name)
        spent_from = _amount((*at, "spent_from"), form.spent_from)
        if spent_from <= least:
            raise Wrong((*at, "spent_from"), "tiers stand in rising order of spent_from")
        least = spent_from
        for code, weight in form.weights.items():
            if code not in codes:
                raise Wrong((*at, "weights", code), f"there is no prize {code!r:.80}")
            if weight < 0:
                raise Wrong((*at, "weights", code), f"a tier's weight is at least 0, not {weight}")
        weights = tuple(form.weights.get(prize.code, prize.weight) for prize in prizes)
        if not 0 < sum(weights) <= WEIGHT_SUM_MAX:
            raise Wrong((*at, "weights"), f"the weights add up to {sum(weights):,}: 1 to {WEIGHT_SUM_MAX:,} will do")
        yield Tier(form.name, spent_from, weights)


def _guarantees(manifest: ManifestForm, prizes: Sequence[Prize], tiers: Sequence[Tier]) -> tuple[Guarantee, ...]:
    """The guarantees, from the narrowest to the widest."""
    forms = manifest.guarantee
    if len(forms) > GUARANTEES_MAX:
        raise Wrong(("guarantee", GUARANTEES_MAX), f"a campaign has at most {GUARANTEES_MAX} guarantees")
    found: list[tuple[Path, Guarantee]] = []
    for number, form in enumerate(forms):
        at: Path = ("guarantee", number)
        _check_name((*at, "name"), form.name, _is_code, NAME_LENGTH_MAX)
        if any(form.name == other.name for _, other in found):
            raise Wrong((*at, "name"), f"there is another guarantee {form.name!r}")
        _check_guaranteed((*at, "prizes"), form, prizes, tiers)
        found.append((at, _guarantee(at, form)))
    found.sort(key=lambda it: len(it[1].prizes))
    for (_, narrow), (at, wide) in itertools.pairwise(found):
        if not narrow.prizes < wide.prizes:
            raise Wrong(
                (*at, "prizes"),
                f"{narrow.name!r} and {wide.name!r} may both be due at one pull: the prizes of one contain the other's",
            )
    steps = math.prod(guarantee.hard_at for _, guarantee in found) * len(prizes) if found else 0
    if steps > STEPS_MAX:
        raise Wrong(
            (*found[-1][0], "hard_at"),
            f"the pulls until the guarantees, multiplied with each other and with the number of prizes, are {steps:,}: "
            f"more than {STEPS_MAX:,}, too many for exact chances",
        )
    return tuple(it for _, it in found)


def _guarantee(at: Path, form: GuaranteeForm) -> Guarantee:
    _check_count((*at, "hard_at"), form.hard_at)
    if (form.soft_from is None) != (form.soft_step is None):
        raise Wrong(at, "soft_from and soft_step stand together")
    if form.soft_from is not None and form.soft_step is not None:
        if not 1 <= form.soft_from < form.hard_at:
            raise Wrong((*at, "soft_from"), f"soft_from is 1 to {form.hard_at - 1}, before hard_at")
        if not 1 <= form.soft_step * form.hard_at <= WEIGHT_SUM_MAX:
            raise Wrong((*at, "soft_step"), f"soft_step is at least 1, and {WEIGHT_SUM_MAX:,} at most until hard_at")
    return Guarantee(form.name, frozenset(form.prizes), form.hard_at, form.soft_from, form.soft_step or 0)


def _check_guaranteed(at: Path, form: GuaranteeForm, prizes: Sequence[Prize], tiers: Sequence[Tier]) -> None:
    """A promise may not sell out: whatever a guaranteed prize's `instead` leads to is guaranteed as well."""
    by_code = {prize.code: prize for prize in prizes}
    if not form.prizes:
        raise Wrong(at, "a guarantee names its prizes")
    if len(set(form.prizes)) < len(form.prizes):
        raise Wrong(at, "a prize stands twice")
    for code in form.prizes:
        if code not in by_code:
            raise Wrong(at, f"there is no prize {code!r:.80}")
        instead = by_code[code].instead
        if instead and instead not in form.prizes:
            raise Wrong(at, f"{code!r} may be unavailable, and {instead!r} instead of it is no prize of this guarantee")
    for tier in tiers:
        weights = dict(zip(by_code, tier.weights, strict=True))
        if not any(weights[code] for code in form.prizes):
            raise Wrong(at, f"tier {tier.name!r} cannot win any of these")


# ---- single values ---------------------------------------------------------------------------------------------------

_CENT: Final = Decimal("0.01")


def _check_name(at: Path, name: str, is_right: Callable[[str], object], length_max: int) -> None:
    if not is_right(name) or len(name) > length_max:
        raise Wrong(at, f"1 to {length_max} letters, digits, _ and - (and . in names) will do, not {name!r:.80}")


def _check_asset(at: Path, code: str) -> None:
    if not _is_asset(code):
        raise Wrong(at, f"an asset is 1 to 50 characters of A-Z a-z 0-9 . _ and -, not {code!r:.80}")


def _check_title(at: Path, title: str) -> None:
    if len(title) > TITLE_LENGTH_MAX or not (title.isprintable() or not title):
        raise Wrong((*at, "title"), f"a title is at most {TITLE_LENGTH_MAX} characters that can be printed")


def _check_count(at: Path, count: int | None) -> None:
    if count is not None and not 1 <= count <= COUNT_MAX:
        raise Wrong(at, f"this is 1 to {COUNT_MAX:,}, not {count}")


def _amount(at: Path, text: str, *, least: Decimal = _CENT) -> Decimal:
    if not _is_amount(text) or not (amount := Decimal(text).quantize(_CENT)) >= least:
        raise Wrong(
            at, f"an amount is {least} to {AMOUNT_MAX:,} with at most two decimals, in quotes, not {text!r:.40}"
        )
    return amount


def _moment(at: Path, moment: datetime | None) -> datetime | None:
    if moment is None:
        return None
    if moment.tzinfo is None:
        raise Wrong(at, "a time has a zone: write 2026-12-01T00:00:00+08:00, or Z for UTC")
    try:
        return moment.astimezone(UTC).replace(microsecond=0)
    except OverflowError:
        raise Wrong(at, "this time is out of range") from None
