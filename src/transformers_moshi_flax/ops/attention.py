"""Attention over keys and values, and how these are stored.

Everywhere a person reads them, keys and values are ``(batch, slots, kv_heads, head_dim)``. Caches keep them *stored*,
with batch and heads as one axis in front, as this is what the products want on all platforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from . import cpu
from .dispatch import for_cpu
from .precision import at_least_float32

Heads = Float[Array, "batch steps heads head_dim"]
Stored = Float[Array, "batch_heads capacity head_dim"]


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch slots kv_heads head_dim"],
    value: Float[Array, "batch slots kv_heads head_dim"],
    mask: Bool[Array, "#batch #queries slots"],
    dropout: Callable[[Array], Array] | None = None,
    output_weights: bool = True,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries slots"] | None]:
    """Scaled dot-product attention (Vaswani et al., 2017), softmax in at least float32.

    Args:
        query: heads in groups that share keys and values; the heads of a group are neighbours.
        key, value: converted to the dtype of ``query``.
        mask: True where a query may attend a slot. A query that may attend none attends all alike.
        dropout: of the weights.
        output_weights: False returns None for the weights, and need not make them.
        scale: of the scores, 1 / sqrt(head_dim) if None.
        soft_cap: scaled scores are squeezed into (-soft_cap, soft_cap) by a tanh.

    Returns:
        The mixed values and the weights before the dropout, in the dtype of ``query``.
    """
    batch, queries, heads, head_dim = query.shape
    groups = key.shape[2]
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    wide = at_least_float32(query.dtype)

    def weights_of(scores: Float[Array, "... queries slots"], mask: Bool[Array, "..."]) -> Array:
        scores = scores * (1 / math.sqrt(head_dim) if scale is None else scale)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(mask, scores, jnp.finfo(wide).min)
        return jax.nn.softmax(scores, axis=-1).astype(query.dtype)

    def with_weights(query: Array, key: Array, value: Array, mask: Array) -> tuple[Array, Array]:
        query = query.reshape(batch, queries, groups, heads // groups, head_dim)
        scores = jnp.einsum("bqghd,bsgd->bghqs", query, key, preferred_element_type=wide)
        weights = weights_of(scores, mask[:, None, None])
        dropped = weights if dropout is None else dropout(weights)
        mixed = jnp.einsum("bghqs,bsgd->bqghd", dropped, value)
        return mixed.reshape(batch, queries, heads, head_dim), weights.reshape(batch, heads, queries, -1)

    if dropout is not None:
        return with_weights(query, key, value, mask)
    twin = partial(cpu.attention, weights_of=weights_of)
    if output_weights:
        return for_cpu(with_weights, twin, query, key, value, mask)

    def definition(query: Array, key: Array, value: Array, mask: Array) -> Array:
        if soft_cap is not None:
            return with_weights(query, key, value, mask)[0]
        with jax.numpy_dtype_promotion("standard"):  # it masks in a way that the strict rules refuse
            return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=scale)

    return for_cpu(definition, lambda *arrays: twin(*arrays)[0], query, key, value, mask), None


def stored(array: Heads) -> Stored:
    """Keys or values as caches keep them."""
    return cpu.by_head(array)


def restored(array: Stored, batch_size: int) -> Heads:
    """The inverse of :func:`stored`."""
    batch_heads, slots, head_dim = array.shape
    return array.reshape(batch_size, batch_heads // batch_size, slots, head_dim).transpose(0, 2, 1, 3)


def write_steps(cached: Stored, new: Float[Array, "batch_heads steps head_dim"], index: Any) -> Stored:
    """Puts ``new`` into the slots from ``index`` on, a scalar, or one for each row, ``(batch,)``; in place where XLA
    may."""
    new = new.astype(cached.dtype)
    if not np.ndim(index):
        return lax.dynamic_update_slice_in_dim(cached, new, index, axis=1)

    def definition(cached: Array, new: Array, index: Array) -> Array:
        rows = (index.shape[0], cached.shape[0] // index.shape[0])
        update = jax.vmap(partial(lax.dynamic_update_slice_in_dim, axis=1))
        written = update(cached.reshape(*rows, *cached.shape[1:]), new.reshape(*rows, *new.shape[1:]), index)
        return written.reshape(cached.shape)

    return for_cpu(definition, cpu.write_rows, cached, new, index)
