"""Nearest entries of a codebook whose entries are quotients: entry i is ``embed_sum[i] / usage[i]``."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from . import cpu
from .dispatch import for_cpu


def nearest_entries(
    embed_sum: Float[Array, "entries dim"],
    usage: Float[Array, "entries"],
    squares: Float[Array, "entries"],
    x: Float[Array, "*shape dim"],
) -> Int[Array, "*shape"]:
    """Index of the nearest entry (Euclidean), the first of equally near ones; int32.

    Args:
        embed_sum, usage: the table. Distances are divided afterwards: the whole table is larger than what a frame
            needs.
        squares: :func:`squared_norms` of ``embed_sum``.
        x: what is looked up.
    """

    def definition(embed_sum: Array, usage: Array, squares: Array, rows: Array) -> Array:
        # |x - e|² without |x|², which is the same for all entries
        products = jnp.matmul(rows, embed_sum.T, precision=lax.Precision.HIGHEST)
        return lax.argmin(((squares / usage)[None] - 2 * products) / usage[None], 1, jnp.int32)

    rows = x.reshape(-1, x.shape[-1])
    return for_cpu(definition, cpu.nearest_entries, embed_sum, usage, squares, rows).reshape(x.shape[:-1])


def squared_norms(embed_sum: Float[Array, "entries dim"]) -> Float[Array, "entries"]:
    """Of every entry, before the division."""
    return for_cpu(lambda embed_sum: jnp.sum(jnp.square(embed_sum), axis=-1), cpu.squared_norms, embed_sum)
