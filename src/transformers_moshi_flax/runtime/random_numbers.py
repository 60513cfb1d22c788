"""The random numbers of ``jax.random`` in NumPy: a seed says the same in every runtime.

Threefry-2x32 of 20 rounds (Salmon et al., 2011), with the counters that JAX has with ``jax_threefry_partitionable``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt32

Words = UInt32[np.ndarray, "..."]

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key: tuple[Words, Words], counter: tuple[Any, Any]) -> tuple[Words, Words]:
    """The two words for a counter of two words; all broadcast."""
    keys = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x, y = (np.asarray(word, np.uint32) + k for word, k in zip(counter, keys))
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = (y << np.uint32(rotation)) | (y >> np.uint32(32 - rotation))
            y = y ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def row_keys(seed: int, rows: int) -> tuple[Words, Words]:
    """A key for each row: ``jax.random.key(seed)``, folded with the number of the row."""
    words = np.array([[seed >> 32 & 0xFFFFFFFF], [seed & 0xFFFFFFFF]], np.uint32)
    return threefry((words[0], words[1]), (np.uint32(0), np.arange(rows, dtype=np.uint32)))


class UniformNumbers:
    """What the steps of a dialogue draw.

    Args:
        draws: each with ``input``, its name; ``stream``, which of the step's draws it is; ``part`` of a key that is
            split in two, or None; ``count``, numbers for each row.
        rows: of the batch.
        seed: of all.
    """

    def __init__(self, draws: Sequence[dict[str, Any]], rows: int, seed: int):
        self._draws, self._rows = draws, rows
        self._keys = row_keys(seed, rows)
        self._streams = np.array([draw["stream"] for draw in draws], np.uint32)[:, None]
        self._split = np.array([draw["part"] is not None for draw in draws], bool)[:, None]
        self._parts = np.array([draw["part"] or 0 for draw in draws], np.uint32)[:, None]
        counts = [draw["count"] for draw in draws]
        self._owner = np.repeat(np.arange(len(draws)), counts)
        counters = [np.arange(count, dtype=np.uint32) for count in (0, *counts)]
        self._counter = np.concatenate(counters)[:, None]
        self._ends = np.cumsum(counts).tolist()

    def of_step(self, step: int) -> dict[str, Float[np.ndarray, "rows count"]]:
        """The numbers of a step, in [0, 1), by the names of the inputs."""
        if not self._draws:
            return {}
        zero = np.uint32(0)
        keys = threefry(self._keys, (zero, np.uint32(step & 0xFFFFFFFF)))
        keys = threefry(keys, (zero, self._streams))
        halves = threefry(keys, (zero, self._parts))
        first, second = (np.where(self._split, half, key)[self._owner] for half, key in zip(halves, keys))
        high, low = threefry((first, second), (zero, self._counter))
        numbers = (((high ^ low) >> np.uint32(9)) * np.float32(2**-23)).astype(np.float32)
        begins = [0, *self._ends]
        return {
            draw["input"]: np.ascontiguousarray(numbers[begin:end].T)
            for draw, begin, end in zip(self._draws, begins, self._ends)
        }
