"""The head beside chunks of 128 rows: time, memory and error within limits (`head_cost.py` prints them)."""

import pytest

from tests.bench.head_cost import both_ways, error, forward, inputs, megabytes, ratio, tiles

FORWARD, BOTH_WAYS, MEGABYTES, NATS = 0.75, 1.0, 100.0, 5e-6
"""At most: of the time of row chunks, memory with the weight's gradient, difference from float64."""


@pytest.mark.bench
def test_the_head_is_faster_than_chunks_of_rows_in_a_tenth_of_their_memory() -> None:
    given = inputs(2048, 256, 32_000)
    both_ways(tiles, given)  # the allocator has its first pages
    memory = megabytes(lambda: both_ways(tiles, given))
    scored, trained = (ratio(way, given, rounds=7)[0] for way in (forward, both_ways))
    off = error(given)
    print(f"forward {scored:.2f}, both ways {trained:.2f} of row chunks; {memory:.0f} MB, {off:.1e} nats")
    assert scored <= FORWARD and trained <= BOTH_WAYS and memory <= MEGABYTES and off <= NATS
