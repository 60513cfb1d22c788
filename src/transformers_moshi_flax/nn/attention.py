"""Attention of the next steps over what a cache holds; every model's attention layer goes through :func:`attend`.

:class:`SelfAttention` is the layer of encoders, in which every step attends all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..ops.attention import attention
from .cache import LayerCache, written
from .linear import dense


def attend(
    query: Float[Array, "batch steps heads head_dim"],
    key: Float[Array, "batch steps kv_heads head_dim"],
    value: Float[Array, "batch steps kv_heads head_dim"],
    mask: Bool[Array, "#batch #steps slots"],
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


class SelfAttention(nn.Module):
    """Attention of all steps to all that count, with projections that have biases; upstream ``Wav2Vec2Attention``,
    ``WhisperAttention``.

    Attributes:
        num_heads: they share the width of the input.
        kernel_init: of the projections.
        dropout: rate, of the weights.
        key_bias: whether keys have a bias, which changes no weight.
        dtype: of the computation.
    """

    num_heads: int
    kernel_init: Any
    dropout: float = 0.0
    key_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "batch steps hidden"],
        mask: Bool[Array, "#batch #steps steps"],
        deterministic: bool = True,
        output_attentions: bool = False,
    ) -> tuple[Float[Array, "batch steps hidden"], Float[Array, "batch heads steps steps"] | None]:
        """Arguments and returns as of :func:`attend`, without a cache."""
        batch, steps, hidden = hidden_states.shape

        def heads(name: str, use_bias: bool = True) -> Array:
            projected = dense(hidden, self.kernel_init, self.dtype, use_bias, name)(hidden_states)
            return projected.reshape(batch, steps, self.num_heads, hidden // self.num_heads)

        query, key, value = heads("q_proj"), heads("k_proj", self.key_bias), heads("v_proj")
        dropout = nn.Dropout(self.dropout, deterministic=False) if self.dropout and not deterministic else None
        mixed, weights, _ = attend(query, key, value, mask, dropout=dropout, output_attentions=output_attentions)
        return dense(hidden, self.kernel_init, self.dtype, use_bias=True, name="out_proj")(mixed), weights
