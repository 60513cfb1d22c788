"""Normalisation."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..ops.precision import at_least_float32


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich, 2019) in at least float32; upstream ``...RMSNorm`` of all models.

    Attributes:
        eps: added to the mean square.
        dtype: of the results.
        offset: added to the scale; 1 in Gemma, whose scales are around 0.
    """

    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    offset: float = 0.0

    @nn.compact
    def __call__(self, hidden_states: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        scale = self.param("scale", nn.initializers.constant(1 - self.offset), (hidden_states.shape[-1],), jnp.float32)
        wide = at_least_float32(self.dtype)
        x = hidden_states.astype(wide)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(scale.astype(wide) + self.offset, tuple(range(x.ndim - 1)))
        return (x * scale).astype(self.dtype)


def layer_norm(eps: float, dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    """Layer norm (Ba et al., 2016) over the last axis, in at least float32, with scale and bias."""
    # the fast variance E[x²] - E[x]² cancels
    return nn.LayerNorm(eps, dtype, use_fast_variance=False, name=name)


def channel_norm(eps: float, dtype: DTypeLike, name: str | None = None) -> nn.GroupNorm:
    """Group norm (Wu & He, 2018) with a group for every channel: each is normed over all of a row's time, in at least
    float32, with scale and bias."""
    return nn.GroupNorm(num_groups=None, group_size=1, epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)
