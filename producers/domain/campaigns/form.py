"""The tables and fields of a manifest, and their types."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import msgspec

from tombola.producers.domain.campaigns.odds import PRIZES_MAX

Path = tuple[str | int, ...]  # of a field: names, and indices from zero


class Wrong(Exception):
    """A mistake, and where it stands."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


class Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A table of the manifest: a field that is not here is a mistake."""


class GrantForm(Form, frozen=True):
    asset: str = ""
    amount: str = ""
    notify: str = ""
    codes: bool = False


class PrizeForm(Form, frozen=True):
    code: str
    weight: int
    title: str = ""
    stock: int | None = None
    per_account: int | None = None
    value: str = ""
    instead: str = ""
    grants: tuple[GrantForm, ...] = ()


class LimitsForm(Form, frozen=True):
    per_day: int | None = None
    per_account: int | None = None


class EligibilityForm(Form, frozen=True):
    deny: str = ""
    allow: str = ""


class TierForm(Form, frozen=True):
    name: str
    spent_from: str
    weights: dict[str, int]


class GuaranteeForm(Form, frozen=True):
    name: str
    prizes: tuple[str, ...]
    hard_at: int
    soft_from: int | None = None
    soft_step: int | None = None


class ManifestForm(Form, frozen=True):
    name: str
    asset: str
    cost: dict[str, str]
    prize: tuple[PrizeForm, ...]
    title: str = ""
    opens: datetime | None = None
    closes: datetime | None = None
    day: str = "UTC"
    limits: LimitsForm = LimitsForm()
    eligibility: EligibilityForm = EligibilityForm()
    tier: tuple[TierForm, ...] = ()
    guarantee: tuple[GuaranteeForm, ...] = ()


_at = re.compile(r"^(?P<what>.*?)(?: - at `(?P<where>[^`]*)`)?$", re.DOTALL).match
_step = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]").finditer


def formed(fields: Any) -> ManifestForm:
    """The manifest with the right fields of the right types; raises Wrong."""
    prizes = fields.get("prize") if isinstance(fields, dict) else None
    if isinstance(prizes, list) and len(prizes) > PRIZES_MAX:
        raise Wrong(("prize", PRIZES_MAX), f"a campaign has at most {PRIZES_MAX:,} prizes, not {len(prizes):,}")
    try:
        return msgspec.convert(fields, ManifestForm)
    except msgspec.ValidationError as error:
        match = _at(str(error))
        assert match is not None
        path = tuple(int(it[2]) if it[2] else it[1] for it in _step(match["where"] or ""))
        raise _worded(match["what"], fields, path) from None


def _worded(what: str, fields: Any, path: Path) -> Wrong:
    """What msgspec says of `path`, in the words of a manifest."""
    if unknown := re.search(r"unknown field `(.*)`", what):
        return Wrong((*path, unknown[1]), "there is no such setting")
    if missing := re.search(r"missing required field `(.*)`", what):
        return Wrong(path, f"{missing[1]} is missing")
    value: Any = fields
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            value = None
    wanted = re.search(r"Expected `(\w+)", what)
    if wanted and wanted[1] == "int":
        return Wrong(path, f"this is a whole number, not {value!r:.40}")
    if wanted and wanted[1] == "str":
        return Wrong(path, f'this is text in quotes, such as "10.00", not {value!r:.40}')
    return Wrong(path, what[:1].lower() + what[1:])


def named(path: Path) -> str:
    """`prize[2].weight: `, counted from one; nothing for the manifest itself."""
    text = ""
    for step in path:
        text += f"[{step + 1}]" if isinstance(step, int) else f".{step}" if text else step
    return f"{text}: " if text else ""
