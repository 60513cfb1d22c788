"""The largest of many numbers."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from . import cpu
from .dispatch import for_cpu
from .precision import at_least_float32


def argmax(x: Float[Array, "..."], axis: int = -1) -> Int[Array, "..."]:
    """Where the largest is, int32: the first of equal ones, the first NaN if there is one."""
    x = x.astype(at_least_float32(x.dtype))
    return for_cpu(lambda x: lax.argmax(x, axis % x.ndim, jnp.int32), lambda x: cpu.argmax(x, axis % x.ndim), x)


def top_k(
    x: Float[Array, "rows columns"], number: int
) -> tuple[Float[Array, "rows {number}"], Int[Array, "rows {number}"]]:
    """The ``number`` largest of each row, descending, and their columns; the first of equal ones comes first."""

    def definition(x: Array) -> tuple[Array, Array]:
        values, columns = lax.top_k(x, number)
        return values, columns

    if not cpu.has_blocks(x.shape[-1], number):
        return definition(x)
    return for_cpu(definition, lambda x: cpu.top_k(x, number), x)


def take_group_rows(
    x: Shaped[Array, "groups members *rest"], members: Int[Array, "groups taken"]
) -> Shaped[Array, "groups taken *rest"]:
    """Of every group the given members; an index must be one of a member."""

    def definition(x: Array, members: Array) -> Array:
        return jnp.take_along_axis(x, members.reshape(*members.shape, *(1,) * (x.ndim - 2)), axis=1)

    return for_cpu(definition, cpu.take_group_rows, x, members)
