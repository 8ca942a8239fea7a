"""The manifest: what an operator writes, in TOML, and the odds that it says.

`parse` reads what a person wrote and names the line of the first mistake. `restore` reads a canonical form back. Both
end at the same Odds: the canonical form of a manifest is a manifest too, as JSON.
"""

from __future__ import annotations

import tomllib
from typing import Final

import msgspec

from tombola.producers.domain.campaigns.checks import odds_of
from tombola.producers.domain.campaigns.form import Wrong, formed, named
from tombola.producers.domain.campaigns.lines import line_of, syntax_error
from tombola.producers.domain.campaigns.odds import Odds
from tombola.producers.domain.errors import InvalidManifest

MANIFEST_BYTES_MAX: Final = 1024 * 1024


def parse(text: str | bytes) -> Odds:
    """The odds that a TOML manifest says. Raises InvalidManifest: one sentence, which names the line."""
    if len(text) > MANIFEST_BYTES_MAX:
        raise InvalidManifest(f"a manifest has at most {MANIFEST_BYTES_MAX:,} bytes, this one has {len(text):,}")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
            raise InvalidManifest(f"line {line}: this is not UTF-8 text (byte {byte:#04x})") from None
    try:
        fields = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidManifest(syntax_error(error, text)) from None
    except (RecursionError, ValueError) as error:
        raise InvalidManifest(f"this is not TOML: {error!s:.200}") from None
    try:
        return odds_of(formed(fields))
    except Wrong as wrong:
        raise InvalidManifest(f"line {line_of(text, wrong.path)}: {named(wrong.path)}{wrong}") from None


def restore(canonical: bytes) -> Odds:
    """The odds of a canonical form. Raises InvalidManifest for what is none."""
    try:
        odds = odds_of(formed(msgspec.json.decode(canonical)))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(f"this is not JSON: {error!s:.200}") from None
    except Wrong as wrong:
        raise InvalidManifest(f"{named(wrong.path)}{wrong}") from None
    if odds.canonical != canonical:
        raise InvalidManifest("this is a manifest, and not in its canonical form")
    return odds
