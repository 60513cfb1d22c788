"""Random spans for masking augmentation (SpecAugment, Park et al., 2019)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def masked_spans(
    key: jax.Array, lengths: Int[Array, "batch"], size: int, probability: float, span: int, least: int
) -> Bool[Array, "batch {size}"]:
    """Which places of an axis are masked, in spans that may overlap; upstream ``_compute_mask_indices``.

    A row of ``length`` places has ``probability * length / span`` spans, rounded up or down at random for all rows
    alike, at least ``least``, and as many as there is room for at most. Where they begin is drawn without putting
    back.

    Args:
        key: of the random numbers.
        lengths: of the rows; what lies behind is not masked.
        size: of the axis, at least ``span``.
        probability: the share of places that would be masked if no spans overlapped.
        span: places of one.
        least: spans of a row.
    """
    rounding, places = jax.random.split(key)
    share = jnp.asarray(probability / span, jnp.float32) * lengths.astype(jnp.float32)
    counts = jnp.floor(share + jax.random.uniform(rounding, (1,), jnp.float32)).astype(jnp.int32)
    counts = jnp.minimum(jnp.maximum(counts, least), size // span)
    starts = jnp.maximum(lengths.astype(jnp.int32) - (span - 1), 0)  # where a span may begin
    counts = jnp.minimum(counts, starts)
    number = size - span + 1
    draws = jax.random.uniform(places, (lengths.shape[0], number), jnp.float32)
    draws = jnp.where(jnp.arange(number)[None] < starts[:, None], draws, 2.0)
    ranks = jnp.argsort(jnp.argsort(draws, axis=1), axis=1)
    begun = jnp.pad(ranks < counts[:, None], ((0, 0), (0, span - 1)))
    begun_until = jnp.cumsum(begun.astype(jnp.int32), axis=1)
    ended_until = jnp.pad(begun_until, ((0, 0), (span, 0)))[:, :size]
    return begun_until > ended_until
