"""More than 200 different messages that no worker can settle, each with its right cause.

The causes follow from the contract by hand, never from running the code under test:

    unparsable            no JSON object, or deeper than any parser goes
    unknown version       a JSON object whose `v` is an integer other than 1
    invalid               a JSON object that breaks the contract otherwise, or a body that is too large to parse
    fingerprint mismatch  a draw request whose key or session belongs to another request
    unknown campaign      a draw request for a campaign that the deployment does not have
"""

import base64
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, Final, NamedTuple

from sqlalchemy import Engine, select

from tombola.producers.brokers.registry import open_broker
from tombola.producers.domain.causes import Cause, LetterState
from tombola.producers.domain.contract import BODY_BYTES_MAX, DrawRequest
from tombola.producers.entry import Entry
from tombola.producers.storage.requests import Submission
from tombola.producers.storage.schema import dead_letters
from tombola.worker.deliveries import BODY_KEPT_BYTES_MAX

TAKEN_MIN: Final = 20  # how many accepted draws `corpus` collides with

INJECTIONS: Final = (
    "'; DROP TABLE dead_letters; --",
    "1' OR '1'='1",
    '" UNION SELECT password_hash FROM operators --',
    "<script>alert(document.cookie)</script>",
    "<img src=x onerror=alert(1)>",
    "{{7*7}}",
    "${jndi:ldap://127.0.0.1/a}",
    "%s%s%s%n%x",
    "{0.__class__.__mro__}",
    "../../../../etc/passwd",
    "$(reboot)",
    "`id`",
    "\x1b[2J\x1b[31mall is well\x1b[0m",
    "line one\nWARNING forged line two",
    "[bold red]markup[/]",
)
# Characters that look like allowed ones, or are invisible.
LOOK_ALIKES: Final = (
    "аккаунт", "kеy", "k\u212aey", "key\u200b", "key\u202eyek", "\ufeffkey", "key\u00a0", "key\u0663", "ｋｅｙ",
    "key\u0301", "key\u2028", "😀", "k\u0131y",
)  # fmt: skip


NOTHING_STRANGE: Final[Mapping[bytes, tuple[str, ...]]] = {}


class Poison(NamedTuple):
    """One bad message. Messages of one `kind` fail for the same reason."""

    name: str
    body: bytes
    cause: str
    kind: str
    headers: Mapping[str, str] = {}


def corpus(taken: Sequence[DrawRequest], *, other_account: int) -> list[Poison]:
    """All bad messages. `taken` are draws accepted before, of accounts other than `other_account`."""
    assert len(taken) >= TAKEN_MIN
    assert other_account not in {draw.account_id for draw in taken}
    found = [
        *_no_json(),
        *_truncated(),
        *_no_object(),
        *_bytes_that_are_no_text(),
        *_wrong_types(),
        *_missing_and_unknown_fields(),
        *_versions(),
        *_numbers(),
        *_keys(),
        *_deep_and_large(),
        *_celery(),
        *_taken(taken, other_account),
        *_campaigns(other_account),
    ]
    assert len({it.name for it in found}) == len(found), "two messages have the same name"
    assert len({it.body for it in found}) == len(found), "two messages have the same body"
    return found


def fields(name: str, **changes: Any) -> dict[str, Any]:
    """A valid draw request with `changes`, where `...` removes a field. Its key contains `name`."""
    key = f"poison_{''.join(it if it.isascii() and it.isalnum() else '_' for it in name)}"[:64]
    good = {"v": 1, "request_key": key, "lottery_session_id": f"{key}_s", "account_id": 1, "campaign": "default"}
    return {name: value for name, value in (good | changes).items() if value is not ...}


def text(name: str, **changes: Any) -> bytes:
    return json.dumps(fields(name, **changes)).encode()


def _raw(name: str, before: bytes, after: bytes) -> bytes:
    """A valid request with `before` replaced by `after`, for text that json.dumps does not write."""
    body = text(name)
    assert body.count(before) == 1, (name, before)
    return body.replace(before, after)


# ---- no JSON object --------------------------------------------------------------------------------------------------


def _no_json() -> list[Poison]:
    bodies = {
        "empty": b"",
        "a blank": b" ",
        "blanks": b" \t\r\n ",
        "a word": b"draw!",
        "a form": b"v=1&request_key=k&account_id=6",
        "XML": b"<draw v='1'><account>6</account></draw>",
        "YAML": b"v: 1\nrequest_key: k\naccount_id: 6\n",
        "a Python dict": b"{'v': 1, 'request_key': 'k', 'account_id': 6}",
        "a comment": b'{"v":1,"request_key":"comment","account_id":6/* six */}',
        "a comma too many": b'{"v":1,"request_key":"comma","account_id":6,}',
        "no colon": b'{"v" 1,"request_key":"no-colon","account_id":6}',
        "keys without quotes": b'{v:1,request_key:"k",account_id:6}',
        "two in one body": b'{"v":1,"request_key":"two","account_id":6}{"v":1,"request_key":"two","account_id":6}',
        "two lines": b'{"v":1,"request_key":"lines","account_id":6}\n{"v":1,"request_key":"lines","account_id":6}',
        "a bracket too many": b'{"v":1,"request_key":"bracket","account_id":6}}',
        "a NUL behind": b'{"v":1,"request_key":"nul-behind","account_id":6}\x00',
        "a NUL before": b'\x00{"v":1,"request_key":"nul-before","account_id":6}',
        "a raw NUL in the key": b'{"v":1,"request_key":"nul\x00in","account_id":6}',
        "a raw NUL in a name": b'{"v":1,"request_key":"nul-name","account_id":6,"x\x00":1}',
        "a raw newline in the key": b'{"v":1,"request_key":"new\nline","account_id":6}',
        "a raw control character": b'{"v":1,"request_key":"bell\x07","account_id":6}',
        "NaN": b'{"v":1,"request_key":"nan","account_id":NaN}',
        "Infinity": b'{"v":1,"request_key":"inf","account_id":Infinity}',
        "a leading zero": b'{"v":1,"request_key":"zero","account_id":06}',
        "a plus": b'{"v":1,"request_key":"plus","account_id":+6}',
        "hexadecimal": b'{"v":1,"request_key":"hex","account_id":0x6}',
        "True": b'{"v":1,"request_key":"True","account_id":6,"campaign":True}',
        "a bad escape": b'{"v":1,"request_key":"esc\\x","account_id":6}',
        "half an escape": b'{"v":1,"request_key":"esc\\u00","account_id":6}',
        "a lone high surrogate": b'{"v":1,"request_key":"hi\\ud800","account_id":6}',
        "a lone low surrogate": b'{"v":1,"request_key":"lo\\udc00","account_id":6}',
        "surrogates the wrong way round": b'{"v":1,"request_key":"wr\\udc00\\ud800","account_id":6}',
        "a lone surrogate in a campaign": b'{"v":1,"request_key":"ca","account_id":6,"campaign":"\\ud83d"}',
        "base64 of a good one": base64.b64encode(text("base64")),
        "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01v\x94K\x01s.",
        "msgpack": b"\x82\xa1v\x01\xabrequest_key\xa1k",
        "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xab\x56\x2a\x53\xb2\x32\xac\x05\x00",
        "all bytes": bytes(range(256)),
        "NULs": b"\x00" * 100,
    }
    return [Poison(f"no JSON: {name}", body, Cause.UNPARSABLE, "no JSON") for name, body in bodies.items()]


def _truncated() -> list[Poison]:
    body = text("truncated", campaign="truncated")
    places = sorted({*range(1, len(body), 5), len(body) - 1, len(body) - 2})
    return [Poison(f"truncated after {place}", body[:place], Cause.UNPARSABLE, "no JSON") for place in places] + [
        Poison("truncated after a field of the wrong type", b'{"v":1,"request_key":5', Cause.UNPARSABLE, "no JSON"),
        Poison("truncated after another version", b'{"v":2,"request_key":"k"', Cause.UNPARSABLE, "no JSON"),
        Poison("truncated after a number too large", b'{"v":1,"account_id":1e400', Cause.UNPARSABLE, "no JSON"),
    ]


def _no_object() -> list[Poison]:
    good = text("in an array").decode()
    bodies = {
        "null": b"null",
        "null between blanks": b" null\n",
        "true": b"true",
        "false": b"false",
        "a number": b"6",
        "a fraction": b"6.5",
        "a number too large": b"1e400",
        "a number of 31 digits": b"1" + b"0" * 30,
        "a string": b'"draw"',
        "an empty string": b'""',
        "a request in a string": json.dumps(good).encode(),
        "an empty array": b"[]",
        "an array of numbers": b"[1,2,3]",
        "a request in an array": f"[{good}]".encode(),
        "an array cut off": b"[1,2",
        "an array of a number too large": b"[1e400]",
    }
    return [Poison(f"no object: {name}", body, Cause.UNPARSABLE, "no JSON") for name, body in bodies.items()]


def _bytes_that_are_no_text() -> list[Poison]:
    good = text("encoded")
    bodies = {
        "BOM": b"\xef\xbb\xbf" + good,
        "UTF-16": good.decode().encode("utf-16"),
        "UTF-16 without a BOM": good.decode().encode("utf-16-le"),
        "UTF-32": good.decode().encode("utf-32"),
        "Latin-1": '{"v":1,"request_key":"schlüssel","account_id":6}'.encode("latin-1"),
        "ff in the key": b'{"v":1,"request_key":"k\xff","account_id":6}',
        "ff in a name": b'{"v":1,"request_key":"name","account_id":6,"x\xff":""}',
        "a lone continuation": b'{"v":1,"request_key":"k\x80","account_id":6}',
        "an overlong slash": b'{"v":1,"request_key":"k\xc0\xaf","account_id":6}',
        "a surrogate in UTF-8": b'{"v":1,"request_key":"k\xed\xa0\x80","account_id":6}',
        "beyond Unicode": b'{"v":1,"request_key":"k\xf4\x90\x80\x80","account_id":6}',
        "half a character": b'{"v":1,"request_key":"k\xe2\x82","account_id":6}',
        "only bad bytes": b"\xff\xfe\xfd" * 20,
    }
    return [Poison(f"no text: {name}", body, Cause.UNPARSABLE, "no JSON") for name, body in bodies.items()]


# ---- objects that break the contract ---------------------------------------------------------------------------------


def _wrong_types() -> list[Poison]:
    wrong: dict[str, list[Any]] = {
        "account_id": ["6", "", 6.0, 6.5, True, False, None, [6], {"id": 6}],
        "request_key": [6, 6.5, True, None, ["k"], {"key": "k"}],
        "lottery_session_id": [6, 6.5, False, None, ["s"], {}],
        "campaign": [6, 6.5, True, None, ["default"], {"name": "default"}],
    }
    return [
        Poison(
            f"{field} is {value!r}",
            text(f"{field}-{value!r}", **{field: value}),
            Cause.INVALID,
            f"{field} is {_json_type(value)}",
        )
        for field, values in wrong.items()
        for value in values
    ]


def _json_type(value: Any) -> str:
    return {str: "str", bool: "bool", int: "int", float: "float", list: "array", dict: "object"}.get(
        type(value), "null"
    )


def _missing_and_unknown_fields() -> list[Poison]:
    found = [
        Poison("an empty object", b"{}", Cause.INVALID, "no v"),
        Poison("only v", b'{"v":1}', Cause.INVALID, "no request_key"),
        Poison("no v", text("no v", v=...), Cause.INVALID, "no v"),
        Poison("no request key", text("no request key", request_key=...), Cause.INVALID, "no request_key"),
        Poison("no account", text("no account", account_id=...), Cause.INVALID, "account_id out of bounds"),
        Poison("an empty request key", text("empty key", request_key=""), Cause.INVALID, "empty request_key"),
        Poison("an empty campaign", text("empty campaign", campaign=""), Cause.INVALID, "campaign out of bounds"),
        Poison("an error message", b'{"error":"upstream timed out","code":504}', Cause.INVALID, "unknown field"),
        Poison("GeoJSON", b'{"type":"Point","coordinates":[8.5,47.4]}', Cause.INVALID, "unknown field"),
    ]
    unknown: dict[str, Any] = {
        "campain": "default", "amount": 5, "prize": "1000.00", "balance": 1e9, "V": 1, "Request_Key": "k",
        "request-key": "k", "accountId": 6, "user_id": 6, "retries": 0, "__proto__": {"isAdmin": True},
        "constructor": {}, "": 1, "hmac": "0" * 64, "créé": 1, "n\nl": 1,
    }  # fmt: skip
    unknown |= dict.fromkeys(INJECTIONS[:6], 1)
    found += [
        Poison(f"unknown field {name!r}", text(f"unknown-{number}", **{name: value}), Cause.INVALID, "unknown field")
        for number, (name, value) in enumerate(unknown.items())
    ]
    # A name twice: the first value counts, whatever the second.
    found += [
        Poison(
            "account_id twice, first as text",
            b'{"v":1,"request_key":"twice-1","account_id":"6","account_id":6}',
            Cause.INVALID,
            "account_id is str",
        ),
        Poison(
            "account_id twice, then as text",
            b'{"v":1,"request_key":"twice-2","account_id":6,"account_id":"6"}',
            Cause.INVALID,
            "account_id is str",
        ),
        Poison(
            "request_key twice, then as a number",
            b'{"v":1,"request_key":"twice-3","request_key":3,"account_id":6}',
            Cause.INVALID,
            "request_key is int",
        ),
        Poison(
            "v twice, then another version",
            b'{"v":1,"v":2,"request_key":"twice-4","account_id":6}',
            Cause.UNKNOWN_VERSION,
            "version",
        ),
    ]
    return found


def _versions() -> list[Poison]:
    others = (0, 2, 3, 10, 99, -1, 2**31, 2**63, 2**64, 10**30)
    found = [Poison(f"version {it}", text(f"version {it}", v=it), Cause.UNKNOWN_VERSION, "version") for it in others]
    # A newer contract may have any fields beside its version.
    found.append(
        Poison("a newer contract", b'{"v":2,"key":"k","account":"6","items":[1e3]}', Cause.UNKNOWN_VERSION, "version")
    )
    found.append(Poison("a newer contract's bare v", b'{"v":2}', Cause.UNKNOWN_VERSION, "version"))
    none = ("1", "2", "", True, False, None, 1.0, 1.5, 2.0, [1], {"major": 1})
    found += [Poison(f"v is {it!r}", text(f"v-{it!r}", v=it), Cause.INVALID, f"v is {_json_type(it)}") for it in none]
    return found


def _numbers() -> list[Poison]:
    found = [
        Poison(f"account {it}", text(f"account {it}", account_id=it), Cause.INVALID, "account_id out of bounds")
        for it in (0, -1, -(2**63), 2**63, 2**64, -(2**64), 10**30, 10**100)
    ]
    for number in (b"1e400", b"-1e400", b"1e99999"):
        name = f"account {number.decode()}"
        body = _raw(name, b'"account_id": 1,', b'"account_id": %b,' % number)
        found.append(Poison(name, body, Cause.INVALID, "account_id too large"))
    found.append(Poison("v 1e400", _raw("v 1e400", b'"v": 1,', b'"v": 1e400,'), Cause.INVALID, "v too large"))
    for number in (b"6e0", b"1E2", b"1e-400", b"-0.0", b"0.1"):
        name = f"account {number.decode()}"
        body = _raw(name, b'"account_id": 1,', b'"account_id": %b,' % number)
        found.append(Poison(name, body, Cause.INVALID, "account_id is float"))
    name = "account -0"
    found.append(
        Poison(name, _raw(name, b'"account_id": 1,', b'"account_id": -0,'), Cause.INVALID, "account_id out of bounds")
    )
    return found


def _keys() -> list[Poison]:
    bad = {
        "a colon": "k:consume", "only a colon": ":", "a blank": "k k", "a blank behind": "k ", "a slash": "a/b",
        "a NUL": "k\x00", "a tab": "k\t", "a newline": "k\n", "DEL": "k\x7f", "a backslash": "a\\b", "a plus": "a+b",
        "an at": "a@b", "a comma": "a,b", "quotes": 'a"b', "a percent sign": "100%",
    }  # fmt: skip
    found = [
        Poison(f"a key with {name}", text("key", request_key=value), Cause.INVALID, "request_key's characters")
        for name, value in bad.items()
    ]
    found += [
        Poison(
            f"a session with {name}",
            text(f"session {name}", lottery_session_id=value),
            Cause.INVALID,
            "session's characters",
        )
        for name, value in bad.items()
    ]
    found += [
        Poison(
            f"a campaign with {name}", text(f"campaign {name}", campaign=value), Cause.INVALID, "campaign out of bounds"
        )
        for name, value in bad.items()
    ]
    for number, value in enumerate((*LOOK_ALIKES, *INJECTIONS)):
        found.append(
            Poison(f"a key like {value!r}", text("key", request_key=value), Cause.INVALID, "request_key's characters")
        )
        found.append(
            Poison(
                f"a campaign like {value!r}",
                text(f"campaign {number}", campaign=value),
                Cause.INVALID,
                "campaign out of bounds",
            )
        )
    for length in (65, 100, 255, 256, 10_000):
        found.append(
            Poison(f"a key of {length}", text("key", request_key="k" * length), Cause.INVALID, "request_key too long")
        )
    for length in (101, 256, 10_000):
        name = f"a session of {length}"
        found.append(Poison(name, text(name, lottery_session_id="s" * length), Cause.INVALID, "session too long"))
    for length in (65, 10_000):
        name = f"a campaign of {length}"
        found.append(Poison(name, text(name, campaign="c" * length), Cause.INVALID, "campaign out of bounds"))
    return found


def _deep_and_large() -> list[Poison]:
    too_large = "too large"
    deep = 7000  # within a body's limit, beyond any parser's stack
    name = "a number of 5,000 digits"
    return [
        Poison("100,000 brackets", b"[" * 100_000, Cause.INVALID, too_large),
        Poison("100,000 brackets, closed", b"[" * 50_000 + b"]" * 50_000, Cause.INVALID, too_large),
        Poison("100,000 braces", b'{"a":' * 20_000 + b"1" + b"}" * 20_000, Cause.INVALID, too_large),
        Poison("one byte too many", text("large").ljust(BODY_BYTES_MAX + 1), Cause.INVALID, too_large),
        Poison("a megabyte of blanks", b" " * 2**20, Cause.INVALID, too_large),
        Poison("a key of 100,000", text("key", request_key="k" * 100_000), Cause.INVALID, too_large),
        Poison("a field of 200,000", text("field", note="n" * 200_000), Cause.INVALID, too_large),
        Poison("200,000 bytes of ff", b"\xff" * 200_000, Cause.INVALID, too_large),
        Poison("as many brackets as fit", b"[" * BODY_BYTES_MAX, Cause.UNPARSABLE, "too deep"),
        Poison("deep and closed", b"[" * deep + b"]" * deep, Cause.UNPARSABLE, "too deep"),
        Poison(
            "deep in a field",
            b'{"v":1,"request_key":"deep","account_id":' + b"[" * deep + b"]" * deep + b"}",
            Cause.UNPARSABLE,
            "too deep",
        ),
        Poison(
            "deep objects in an unknown field",
            b'{"v":1,"request_key":"deep","account_id":6,"x":' + b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"}",
            Cause.UNPARSABLE,
            "too deep",
        ),
        Poison(
            name, _raw(name, b'"account_id": 1,', b'"account_id": %b,' % (b"9" * 5000)), Cause.INVALID, "long number"
        ),
        # As large as a body may be: only the field is wrong.
        Poison(
            "blanks up to the limit",
            text("limit", account_id="6").ljust(BODY_BYTES_MAX),
            Cause.INVALID,
            "account_id is str",
        ),
    ]


# ---- other people's messages -----------------------------------------------------------------------------------------


def _celery() -> list[Poison]:
    """Celery's messages, which belong on another queue."""
    task_id = "3f2c5f0e-0a3e-4f56-9f0e-8d5b8a1c7e11"
    task = "shop.tasks.send_mail"
    protocol_1 = {
        "task": task, "id": task_id, "args": [6], "kwargs": {"to": "ada@example.org"}, "retries": 0, "eta": None,
        "expires": None, "utc": True, "callbacks": None, "errbacks": None, "timelimit": [None, None],
        "taskset": None, "chord": None,
    }  # fmt: skip
    arguments = [[6], {"to": "ada@example.org"}]
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    protocol_2 = json.dumps([*arguments, embed]).encode()
    headers = {"lang": "py", "task": task, "id": task_id, "root_id": task_id, "parent_id": "", "origin": "gen1@shop"}
    # As stored in Redis: the body in base64, with headers and properties.
    in_redis = {
        "body": base64.b64encode(protocol_2).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": {"correlation_id": task_id, "delivery_tag": "t", "delivery_mode": 2, "priority": 0},
    }
    return [
        Poison("Celery, protocol 1", json.dumps(protocol_1).encode(), Cause.INVALID, "unknown field"),
        Poison("Celery, protocol 2", protocol_2, Cause.UNPARSABLE, "no JSON", headers),
        Poison("Celery, protocol 2, no arguments", b"[[], {}, {}]", Cause.UNPARSABLE, "no JSON", headers),
        Poison("Celery, as it lies in Redis", json.dumps(in_redis).encode(), Cause.INVALID, "unknown field"),
        Poison("a Celery event", b'[{"type":"worker-heartbeat","freq":2.0}]', Cause.UNPARSABLE, "no JSON"),
    ]


# ---- draw requests that cannot be settled ----------------------------------------------------------------------------


def _taken(taken: Sequence[DrawRequest], other_account: int) -> list[Poison]:
    """Keys and sessions that belong to other requests."""
    draws = iter(taken)
    found = []
    for number in range(5):
        draw = next(draws)
        body = DrawRequest(account_id=other_account, request_key=draw.request_key).encode()
        found.append(Poison(f"key taken, other account {number}", body, Cause.FINGERPRINT_MISMATCH, "key taken"))
    for number in range(5):
        draw = next(draws)
        body = DrawRequest(
            account_id=draw.account_id, request_key=draw.request_key, lottery_session_id=f"other_{number}"
        ).encode()
        found.append(Poison(f"key taken, other session {number}", body, Cause.FINGERPRINT_MISMATCH, "key taken"))
    for number in range(5):
        draw = next(draws)
        # The key is checked before the campaign, known or not.
        body = DrawRequest(
            account_id=draw.account_id, request_key=draw.request_key, campaign=("winter", "spring")[number % 2]
        ).encode()
        found.append(Poison(f"key taken, other campaign {number}", body, Cause.FINGERPRINT_MISMATCH, "key taken"))
    for number in range(5):
        draw = next(draws)
        body = DrawRequest(
            account_id=other_account, request_key=f"thief_{number}", lottery_session_id=draw.lottery_session_id
        ).encode()
        found.append(Poison(f"session taken {number}", body, Cause.FINGERPRINT_MISMATCH, "session taken"))
    return found


def _campaigns(account_id: int) -> list[Poison]:
    names = ("winter", "Default", "DEFAULT", "default.", "defau1t", "none", "null", "0", "-", "c" * 64, "..", "a.b-c_d")
    return [
        Poison(
            f"campaign {name}",
            DrawRequest(account_id=account_id, request_key=f"campaign_{number}", campaign=name).encode(),
            Cause.UNKNOWN_CAMPAIGN,
            "unknown campaign",
        )
        for number, name in enumerate(names)
    ]


# ---- mixed into good ones --------------------------------------------------------------------------------------------


def accept(engine: Engine, draws: Sequence[DrawRequest]) -> None:
    """Accept `draws` as the gateway does: their keys and sessions are taken before any message arrives."""
    Entry(engine, relay_after_s=3600).accept([Submission(draw) for draw in draws])


def mixed(good: Sequence[DrawRequest], bad: Sequence[Poison], *, seed: int) -> list[tuple[bytes, Mapping[str, str]]]:
    """Bodies and headers of all messages in a random order, every third bad one twice."""
    messages: list[tuple[bytes, Mapping[str, str]]] = [(draw.encode(), {}) for draw in good]
    places = random.Random(seed)
    for it in (*bad, *bad[::3]):
        messages.insert(places.randrange(len(messages) + 1), (it.body, it.headers))
    return messages


def publish(broker_url: str, messages: Sequence[tuple[bytes, Mapping[str, str]]], *, size: int = 1000) -> None:
    with closing(open_broker(broker_url, publish_timeout_s=30)) as broker:
        for start in range(0, len(messages), size):
            some = messages[start : start + size]
            broker.publish([body for body, _ in some], [headers for _, headers in some])


def assert_parked_once(
    engine: Engine, bad: Sequence[Poison], strange: Mapping[bytes, tuple[str, ...]] = NOTHING_STRANGE
) -> None:
    """Assert that each bad message has one row, with its cause, body and headers, and that no other row exists.

    `strange` are bodies that only one broker can carry, with the causes allowed for each.
    """
    with engine.connect().execution_options(read_only=True) as connection:
        rows = connection.execute(select(dead_letters)).all()
    # Beginning and length identify a body.
    found = {(row.body, row.body_bytes): row for row in rows}
    assert len(found) == len(rows), "parked more than once"
    for body, causes in strange.items():
        assert found.pop((body[:BODY_KEPT_BYTES_MAX], len(body))).cause in causes, body[:100]
    expected = {(it.body[:BODY_KEPT_BYTES_MAX], len(it.body)): it for it in bad}
    assert len(expected) == len(bad)
    assert found.keys() - expected.keys() == set(), "a good one was parked"
    assert [it.name for kept, it in expected.items() if kept not in found] == [], "not parked"
    wrong = {it.name: (found[kept].cause, it.cause) for kept, it in expected.items() if found[kept].cause != it.cause}
    assert wrong == {}, "parked with the wrong cause"
    assert {row.state for row in rows} == {LetterState.PARKED}
    assert {row.times_parked for row in rows if row.body[:BODY_KEPT_BYTES_MAX] in strange} <= {1}
    for kept, it in expected.items():
        headers = json.loads(found[kept].headers or "{}")
        assert it.headers.items() <= headers.items(), it.name
    _assert_groups([(it.kind, found[kept].group_id) for kept, it in expected.items()])


def _assert_groups(groups: Sequence[tuple[str, str]]) -> None:
    """Assert that a kind is in one group, or in two where the error's words differ, and no group has two kinds."""
    kinds: dict[str, set[str]] = {}
    by_kind: dict[str, set[str]] = {}
    for kind, group in groups:
        kinds.setdefault(group, set()).add(kind)
        by_kind.setdefault(kind, set()).add(group)
    assert {group: names for group, names in kinds.items() if len(names) > 1} == {}
    # Broken JSON is grouped by the parser's message, of which there are only so many.
    parser_words_max = 40
    assert len(by_kind.pop("no JSON")) <= parser_words_max
    assert {kind: len(found) for kind, found in by_kind.items() if len(found) > 2} == {}
    for kind, found in by_kind.items():
        assert len(found) == 1 or not kind.partition(" is ")[2], f"a wrong type in the same field is one group: {kind}"
