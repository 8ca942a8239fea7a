"""A Stream of many times the memory that a worker may take, which the quick suite asks for with few entries."""

import pytest

from tests.deliveries.test_streams import read_large_entries


@pytest.mark.chaos
@pytest.mark.process
def test_a_stream_of_gigabytes_flows_on() -> None:
    read_large_entries(150, grown_mib_max=250)
