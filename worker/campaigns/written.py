"""Odds written as a TOML manifest: what an operator edits to make the next version."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import msgspec

from tombola.producers.domain.campaigns.form import ManifestForm
from tombola.producers.domain.campaigns.odds import Odds

_TABLES = ("limits", "eligibility")
_LISTS = ("prize", "tier", "guarantee")


def written(odds: Odds) -> str:
    """A manifest in TOML that says exactly these odds: `manifest.parse` makes them from it again."""
    form: dict[str, Any] = msgspec.json.decode(odds.canonical)
    times: dict[str, Any] = {it: getattr(odds, it) for it in ("opens", "closes") if it in form}
    return "\n".join(_lines({**form, **times})) + "\n"


def _lines(form: Mapping[str, Any]) -> Iterator[str]:
    yield from _fields(form, ManifestForm.__struct_fields__, but=(*_TABLES, *_LISTS))
    for table in _TABLES:
        if table in form:
            yield from ("", f"[{table}]")
            yield from _fields(form[table], form[table])
    for name in _LISTS:
        for element in form.get(name, ()):
            yield from ("", f"[[{name}]]")
            first = [it for it in ("code", "name", "weight") if it in element]
            yield from _fields(element, [*first, *(it for it in element if it not in first)])


def _fields(fields: Mapping[str, Any], order: Any, *, but: tuple[str, ...] = ()) -> Iterator[str]:
    yield from (f"{name} = {_value(fields[name])}" for name in order if name in fields and name not in but)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_key(name)} = {_value(it)}' for name, it in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)  # a string of JSON is one of TOML, too


def _key(name: str) -> str:
    is_bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if is_bare else json.dumps(name)
