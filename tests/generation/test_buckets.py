"""Sizes that requests are rounded up to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from transformers_moshi_flax.generation.buckets import CHUNKS, SMALLEST, bucket, prefill_chunk


def test_steps_are_an_eighth_of_the_next_power_of_two() -> None:
    sizes = sorted({bucket(length) for length in range(1, 400)})
    assert sizes == [64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448]


@given(st.integers(1, 10**6))
def test_holds_the_length_and_at_most_a_quarter_more(length: int) -> None:
    size = bucket(length)
    assert length <= size
    assert size == SMALLEST or size <= 1.25 * length
    assert bucket(size) == size


def test_chunks() -> None:
    assert [prefill_chunk(n) for n in (0, 1, 16, 17, 64, 65, 256, 257, 5000)] == [
        0,
        16,
        16,
        64,
        64,
        256,
        256,
        256,
        256,
    ]
    assert max(CHUNKS) >= SMALLEST
