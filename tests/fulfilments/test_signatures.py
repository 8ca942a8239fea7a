"""Signatures as the Standard Webhooks specification says: its libraries' own example, and two secrets at once."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

from tombola.worker.fulfilments.bodies import GrantMade
from tombola.worker.fulfilments.signatures import PREFIX, SECRET_BYTES, make_secret, signature, signatures

# From the tests of the specification's libraries (MIT).
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
BODY = b'{"test": 2432232314}'


def test_the_example_of_the_libraries() -> None:
    assert signature(SECRET, ID, 1614265330, BODY) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_any_change_changes_it() -> None:
    first = signature(SECRET, ID, 1614265330, BODY)
    others = [
        signature(make_secret(), ID, 1614265330, BODY),
        signature(SECRET, ID + "x", 1614265330, BODY),
        signature(SECRET, ID, 1614265331, BODY),
        signature(SECRET, ID, 1614265330, BODY + b" "),
    ]
    assert len({first, *others}) == 5


def test_a_signature_for_each_secret() -> None:
    old, new = make_secret(), make_secret()
    both = signatures((new, old), ID, 1, BODY)
    assert both.split() == [signature(new, ID, 1, BODY), signature(old, ID, 1, BODY)]


def test_a_secret_is_random_and_of_the_length_that_the_specification_asks_for() -> None:
    made = {make_secret() for _ in range(100)}
    assert len(made) == 100
    for secret in made:
        assert secret.startswith(PREFIX)
        assert len(base64.b64decode(secret.removeprefix(PREFIX), validate=True)) == SECRET_BYTES


def test_the_example_of_the_documents() -> None:
    text = (Path(__file__).parents[2] / "worker" / "docs" / "webhooks.md").read_text()
    head, body = re.findall(r"```http\n(.*?)\n\n(.*?)\n```", text, re.DOTALL)[0]
    headers = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    (secret,) = re.findall(r"^whsec_\S+$", text, re.MULTILINE)
    sent = body.replace("\n", "").encode()
    assert headers["Webhook-Signature"] == signature(
        secret, headers["Webhook-Id"], int(headers["Webhook-Timestamp"]), sent
    )
    event = json.loads(sent)
    assert list(event) == list(GrantMade.__struct_fields__)
    assert headers["Idempotency-Key"] == event["idempotency_key"]
