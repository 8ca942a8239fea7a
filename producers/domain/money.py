"""Amounts of money and points: decimals with two places, as the ledger's columns hold them. Pure."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from tombola.producers.domain.errors import InvalidRequest

CENT: Final = Decimal("0.01")
AMOUNT_MAX: Final = Decimal("99999999.99")  # decimal(10,2)

_is_amount = re.compile(r"-?[0-9]{1,8}(?:\.[0-9]{1,2})?").fullmatch


def parse_amount(given: object, *, is_signed: bool = False) -> Decimal:
    """The amount that text such as `5` or `5.00` says, or a Decimal; with `is_signed` it may be below zero.

    Raises InvalidRequest for 0, for any other text and type (a float is no amount), and above AMOUNT_MAX.
    """
    text = f"{given:f}" if isinstance(given, Decimal) else given
    amount = Decimal(text) if isinstance(text, str) and _is_amount(text) else Decimal(0)
    if not amount or (amount < 0 and not is_signed):
        least = "other than 0, at least -99,999,999.99" if is_signed else "above 0"
        raise InvalidRequest(
            f'an amount is text such as "5.00", {least}, at most {AMOUNT_MAX:,}, with two decimals: {given!r:.40}'
        )
    return amount.quantize(CENT)
