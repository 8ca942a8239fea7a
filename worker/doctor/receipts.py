"""The check of the keys that sign receipts: do the settings here agree with the keys that everybody sees?"""

from __future__ import annotations

from sqlalchemy import Connection

from tombola.producers.domain.errors import ConfigurationError
from tombola.producers.receipts import keys_in
from tombola.producers.settings import Settings
from tombola.producers.storage.receipt_keys import list_keys
from tombola.worker.doctor.checks import Facts, Verdict, fail, ok, warn


def look_at_receipt_keys(connection: Connection, settings: Settings, _found: Facts) -> Verdict:
    """Warns where no key signs, where a key here is not listed or has ended, and where another key signs elsewhere."""
    try:
        mine = keys_in(settings)
    except ConfigurationError as error:
        return fail(str(error), "mend the setting: a gateway does not start with it")
    listed = {it.kid: it for it in list_keys(connection)}
    elsewhere = [it for it in listed.values() if it.valid_until is None and it.kid not in {key.kid for key in mine}]
    if not mine:
        if elsewhere:
            return warn(
                f"TOMBOLA_RECEIPT_KEY is not set here, and the key {elsewhere[0].kid} signs receipts",
                "set it to the gateways' value before one of them starts without it; a key that no gateway has any "
                f"more is ended by `tombola receipt-key end {elsewhere[0].kid}`",
            )
        return warn("draws have no receipts", "make a key with `tombola receipt-key make`, and set TOMBOLA_RECEIPT_KEY")
    newest = listed.get(mine[0].kid)
    if newest is None:
        return warn(
            f"the key {mine[0].kid} is set here and not listed: nothing was signed with it yet",
            "restart the gateways with these settings",
        )
    if newest.valid_until is not None:
        return warn(
            f"the key {newest.kid} is set here, and ended at {newest.valid_until:%Y-%m-%d %H:%M:%S}",
            "set TOMBOLA_RECEIPT_KEY to the gateways' value: receipts of this key are not valid any more",
        )
    if elsewhere and elsewhere[0].valid_from > newest.valid_from:
        return warn(
            f"the key {elsewhere[0].kid} is newer than those that are set here",
            "give all processes the same TOMBOLA_RECEIPT_KEY, the new key first",
        )
    if elsewhere:
        return warn(
            f"the key {elsewhere[0].kid} is not set here any more, and still signs",
            "restart the gateways with these settings: the first one that starts ends the key",
        )
    return ok(f"{newest.kid} signs since {newest.valid_from:%Y-%m-%d %H:%M}; {len(listed)} listed")
