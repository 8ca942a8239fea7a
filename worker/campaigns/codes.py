"""The codes that a prize hands out: a pool, loaded by file. Each code is handed out once, ever, whatever the campaign.

The pool is the stock of its prize: codes and units are added in one transaction, and nothing else adds units of a prize
with codes (worker.campaigns.stock).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from typing import Final

from sqlalchemy import Connection, Engine, insert, select

from tombola.producers.domain.errors import InvalidRequest
from tombola.producers.storage import clock
from tombola.producers.storage.chunks import chunks
from tombola.producers.storage.schema import campaign_codes as table
from tombola.worker.campaigns import stock, versions
from tombola.worker.operators import actions
from tombola.worker.operators.once import once

CODES_MAX: Final = 1_000_000  # in one file
CODE_LENGTH_MAX: Final = 100
MISTAKES_SHOWN_MAX: Final = 10
ROWS_MAX: Final = 5_000  # in one INSERT

_is_code = re.compile(rb"[!-~]{1,100}").fullmatch


def read(raw: bytes) -> dict[str, int]:
    """The codes of a file, one a line, each with its line's number; lines without a character are left out.

    Raises InvalidRequest, with the numbers of the lines, for what is no code and for a code that stands twice; also for
    a file without codes, or with more than CODES_MAX.
    """
    lines: dict[str, int] = {}
    wrong: list[str] = []
    for number, raw_line in enumerate(raw.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        line = raw_line.removesuffix(b"\r")
        if not line:
            continue
        if not _is_code(line):
            wrong.append(f"line {number}: a code is 1 to {CODE_LENGTH_MAX} printable ASCII characters without blanks")
        elif (code := line.decode("ascii")) in lines:
            wrong.append(f"line {number}: {code} stands in line {lines[code]} already")
        else:
            lines[code] = number
    _refuse(wrong)
    if not lines:
        raise InvalidRequest("there is no code in this file: it has one a line")
    if len(lines) > CODES_MAX:
        raise InvalidRequest(f"a file has at most {CODES_MAX:,} codes, this one has {len(lines):,}: load several files")
    return lines


def load(engine: Engine, name: str, code: str, lines: Mapping[str, int], *, operator: str, reason: str) -> int:
    """Add the codes of a file, as `read` returns them, to the pool of prize `code`; return the units that are left.

    All of them or none. Raises CampaignNotFound; InvalidRequest for a prize without codes, and with the numbers of the
    lines for codes that were loaded before; ServiceUnavailable or ConfigurationError when the database cannot be used.
    """
    why = actions.checked_reason(reason)

    def act(connection: Connection) -> int:
        prize = versions.live_locked(connection, name).by_code.get(code)
        if prize is None or not prize.has_codes:
            raise InvalidRequest(f"campaign {name} has no prize {code!r:.80} with codes: its grant says codes = true")
        _refuse_known(connection, lines)
        for some in chunks(list(lines), ROWS_MAX):
            connection.execute(insert(table), [{"code": it, "campaign": name, "prize": code} for it in some])
        # Last: settling waits for the rows that this locks.
        now = clock.now(connection)
        left = stock.change(connection, name, prize, len(lines), operator=operator, reason=why, now=now)
        details = {"campaign": name, "prize": code, "codes": len(lines), "left": left}
        actions.record(
            connection, operator=operator, action="campaign codes load", reason=why, count=len(lines), details=details
        )
        return left

    return once(engine, act)


def _refuse_known(connection: Connection, lines: Mapping[str, int]) -> None:
    """Raise InvalidRequest if any of the codes was loaded before: for any prize of any campaign."""
    known: list[tuple[int, str]] = []
    for some in chunks(list(lines)):
        rows = connection.execute(select(table.c.code, table.c.campaign, table.c.prize).where(table.c.code.in_(some)))
        known += [(lines[code], f"{code} was loaded before, for {prize} of {name}") for code, name, prize in rows]
    _refuse([f"line {number}: {what}" for number, what in sorted(known)])


def _refuse(wrong: Sequence[str]) -> None:
    if wrong:
        more = f"; and {len(wrong) - MISTAKES_SHOWN_MAX:,} more" if len(wrong) > MISTAKES_SHOWN_MAX else ""
        raise InvalidRequest(f"no code was loaded: {'; '.join(wrong[:MISTAKES_SHOWN_MAX])}{more}")
