"""Memory that a caller goes on writing to while JAX computes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ALIGNMENT = 64
"""Bytes. JAX reads NumPy's memory in place on CPUs where it begins at a multiple."""


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that JAX would read in place."""
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@jax.jit
def late(tree: Any) -> Any:
    """The same, but some tenths of a second later: what is computed of it has to wait."""
    busy = jax.lax.fori_loop(0, 50, lambda _, x: x @ x / 600, jnp.ones((600, 600), jnp.float32))
    return jax.tree.map(lambda leaf: jnp.where(busy[0, 0] < 0, jnp.zeros_like(leaf), leaf), tree)
