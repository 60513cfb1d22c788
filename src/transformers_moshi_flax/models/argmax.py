"""Where the largest of many numbers is, several times as fast on CPUs as by ``jnp.argmax``."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ..precision import at_least_float32


def argmax(x: Float[Array, "..."], axis: int = -1) -> Int[Array, "..."]:
    """As ``jnp.argmax``, int32: the first of equal ones, the first NaN if there is one.

    XLA's CPU backend compares one pair of number and index at a time, and takes maxima of floats, which must let NaN
    through, hardly faster. Maxima of integers in the same order are vectorised; so is the search for the first one.
    """
    x = x.astype(at_least_float32(x.dtype))
    integer = jnp.int32 if x.dtype == jnp.float32 else jnp.int64
    largest = jnp.iinfo(integer).max
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0, x), integer)  # the two zeros are equal
    # of negative numbers, larger bits are smaller
    order = jnp.where(jnp.isnan(x), largest, jnp.where(bits < 0, bits ^ largest, bits))
    indices = lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim)
    is_largest = order == jnp.max(order, axis=axis, keepdims=True)
    return jnp.min(jnp.where(is_largest, indices, x.shape[axis] - 1), axis=axis)
