"""HMAC with prepared states is HMAC, for keys of every length."""

import hmac

from hypothesis import given
from hypothesis import strategies as st

from tombola.producers.domain.macs import hmac_sha256


@given(key=st.binary(max_size=200), messages=st.lists(st.binary(max_size=300), min_size=1, max_size=3))
def test_it_is_hmac_sha256(key: bytes, messages: list[bytes]) -> None:
    for message in messages:  # the states are kept from one message to the next
        assert hmac_sha256(key, message) == hmac.digest(key, message, "sha256")
