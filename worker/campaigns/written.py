"""Odds written as a TOML manifest: what an operator edits to make the next version."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

import msgspec

from tombola.producers.domain.campaigns.form import (
    EligibilityForm,
    GrantForm,
    GuaranteeForm,
    LimitsForm,
    ManifestForm,
    PrizeForm,
    TierForm,
)
from tombola.producers.domain.campaigns.odds import Odds

# The tables of a manifest with what stands in them: once, and any number of times.
_ONCE: Final = {"limits": LimitsForm, "eligibility": EligibilityForm}
_MANY: Final = {"prize": PrizeForm, "tier": TierForm, "guarantee": GuaranteeForm}


def written(odds: Odds) -> str:
    """A manifest in TOML that says exactly these odds: `manifest.parse` makes them from it again."""
    form: dict[str, Any] = msgspec.json.decode(odds.canonical)
    form |= {name: getattr(odds, name) for name in ("opens", "closes") if name in form}
    return "\n".join(_lines(form)) + "\n"


def _lines(form: Mapping[str, Any]) -> Iterator[str]:
    yield from _fields({name: it for name, it in form.items() if name not in _ONCE | _MANY}, ManifestForm)
    for name, fields in _ONCE.items():
        if name in form:
            yield from ("", f"[{name}]")
            yield from _fields(form[name], fields)
    for name, fields in _MANY.items():
        for element in form.get(name, ()):
            yield from ("", f"[[{name}]]")
            yield from _fields(element, fields)


def _fields(values: Mapping[str, Any], form: Any) -> Iterator[str]:
    """A line for each value, in the order in which the form names its fields."""
    for name in form.__struct_fields__:
        if name == "grants" and name in values:
            yield f"grants = [{', '.join(_inline(it, GrantForm.__struct_fields__) for it in values[name])}]"
        elif name in values:
            yield f"{name} = {_value(values[name])}"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return _inline(value, sorted(value, key=_in_order))
    return json.dumps(value, ensure_ascii=False)  # a string of JSON is one of TOML, too


def _inline(table: Mapping[str, Any], names: Iterable[str]) -> str:
    return f"{{ {', '.join(f'{_key(name)} = {_value(table[name])}' for name in names if name in table)} }}"


def _in_order(name: str) -> tuple[int, str]:
    """Numbers of pulls by their size, other names by their letters."""
    return (int(name), "") if name.isdecimal() else (0, name)


def _key(name: str) -> str:
    is_bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if is_bare else json.dumps(name)
