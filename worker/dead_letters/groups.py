"""Groups: dead letters that died of the same error, whatever the errors quote of their messages."""

from __future__ import annotations

import hashlib
import re
import traceback
from typing import Final

from tombola.producers.domain.contract import DrawRequest
from tombola.producers.domain.errors import DrawError

# What differs between two messages that died of the same error: quoted words, keys and hashes, numbers.
_QUOTED: Final = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_SOME: Final = re.compile(r"'#'(?:, '#')+")
_TOKEN: Final = re.compile(r"\b(?=\w*\d)[\w.\-]{6,}\b")
_NUMBER: Final = re.compile(r"\b0x[0-9a-f]+|\d+(?:,\d{3})*")
# What does not differ: the words in which the parser names our own fields, and JSON's types.
_OURS: Final = frozenset(
    f"`{word}`"
    for name in ("v", *DrawRequest.__struct_fields__)
    for word in (name, f"$.{name}", "str", "int", "float", "bool", "null", "array", "object")
)


def group_of(cause: str, error: str, exception: BaseException | None = None) -> str:
    """The group of a dead letter, 16 hex digits: of its cause, and of its error's type and place or words.

    Our own errors differ in their words alone, because all are raised in the same few places. Other errors differ in
    the functions that they passed through: their words quote the message.
    """
    if exception is None or isinstance(exception, DrawError):
        signature = normalised(error)
    else:
        frames = traceback.extract_tb(exception.__traceback__)
        signature = " ".join(f"{frame.filename.rpartition('/')[2]}:{frame.name}" for frame in frames)
    kind = "" if exception is None else type(exception).__qualname__
    return hashlib.sha256("\n".join((cause, kind, signature)).encode(errors="replace")).hexdigest()[:16]


def normalised(error: str) -> str:
    """`error` with a `#` in place of whatever belongs to one message alone."""
    words = _SOME.sub("'#'", _QUOTED.sub(lambda quoted: quoted[0] if quoted[0] in _OURS else "'#'", error))
    return _NUMBER.sub("#", _TOKEN.sub("#", words))
