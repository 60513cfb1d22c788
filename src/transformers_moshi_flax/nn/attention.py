"""Attention of the next steps over what a cache holds; every model's attention layer goes through :func:`attend`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Bool, Float

from ..ops.attention import attention
from .cache import LayerCache, written


def attend(
    query: Float[Array, "batch steps heads head_dim"],
    key: Float[Array, "batch steps kv_heads head_dim"],
    value: Float[Array, "batch steps kv_heads head_dim"],
    mask: Bool[Array, "#batch steps slots"],
    layer_cache: LayerCache | None = None,
    index: Any = 0,
    dropout: Callable[[Array], Array] | None = None,
    output_attentions: bool = True,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> tuple[
    Float[Array, "batch steps heads*head_dim"], Float[Array, "batch heads steps slots"] | None, LayerCache | None
]:
    """Attends over the keys of these steps, or over those of the cache after writing these into it.

    Args:
        query, key, value: of the next steps.
        mask, index: of the cache's :class:`~.cache.Steps`.
        layer_cache: keys and values of this layer.
        dropout: of the weights.
        output_attentions: False returns None for the weights.
        scale, soft_cap: of the scores, as of :func:`~transformers_moshi_flax.ops.attention.attention`.

    Returns:
        The mixed values, heads beside each other, the weights, and the updated cache of this layer.
    """
    if layer_cache is not None:
        layer_cache, key, value = written(layer_cache, key, value, index, slots=mask.shape[-1])
    mixed, weights = attention(query, key, value, mask, dropout, output_attentions, scale, soft_cap)
    return mixed.reshape(*mixed.shape[:2], -1), weights, layer_cache
