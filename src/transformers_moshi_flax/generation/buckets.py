"""Sizes that requests are rounded up to, so that many of them share one compiled program."""

from __future__ import annotations

import math

SMALLEST = 64
CHUNKS = (16, 64, 256)


def bucket(length: int) -> int:
    """The next of 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, …: at most a quarter more than ``length``."""
    if length <= SMALLEST:
        return SMALLEST
    step = 2 ** (math.ceil(math.log2(length)) - 3)
    return -(-length // step) * step


def small_bucket(length: int) -> int:
    """As :func:`bucket`, with 1, 2, 4, … 32 before them: for what takes as long as it has frames."""
    return bucket(length) if length > SMALLEST else 2 ** math.ceil(math.log2(length))


def prefill_chunk(steps: int) -> int:
    """How many steps of a prompt are run at once, if ``steps`` of them are to be run in all."""
    if steps == 0:
        return 0
    return next((chunk for chunk in CHUNKS if steps <= chunk), CHUNKS[-1])
