"""The rotary position embedding (Su et al., 2021) of Moshi's backbone and Mimi's transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..precision import at_least_float32


def rotary_embedding(
    position_ids: Int[Array, "*shape"], head_dim: int, rope_parameters: Mapping[str, Any], dtype: DTypeLike
) -> tuple[Float[Array, "*shape {head_dim}"], Float[Array, "*shape {head_dim}"]]:
    """Cosines and sines, angles in at least float32; upstream ``MoshiRotaryEmbedding`` and ``MimiRotaryEmbedding``.

    Raises:
        ValueError: ``rope_parameters`` asks for scaled frequencies.
    """
    rope_type = rope_parameters["rope_type"]
    if rope_type != "default":
        raise ValueError(f"`rope_parameters` has rope_type={rope_type!r}, but only 'default' is supported.")
    wide = at_least_float32(dtype)
    exponents = np.arange(0, head_dim, 2, dtype=wide) / head_dim
    inverse_frequencies = (1.0 / rope_parameters["rope_theta"] ** exponents).astype(wide)
    angles = position_ids[..., None].astype(wide) * inverse_frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def apply_rotary_pos_emb(
    x: Float[Array, "*shape head_dim"], cos: Float[Array, "..."], sin: Float[Array, "..."]
) -> Float[Array, "*shape head_dim"]:
    """Turns each pair (i, i + head_dim / 2) by the angle of its position; ``cos`` and ``sin`` must broadcast to x."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
