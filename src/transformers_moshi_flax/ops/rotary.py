"""The rotary position embedding (Su et al., 2021) of Moshi's backbone and Mimi's transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, UInt

from .precision import at_least_float32


def rotary_embedding(
    position_ids: Integer[Array, "*shape"],
    head_dim: int,
    rope_parameters: Mapping[str, Any],
    dtype: DTypeLike,
) -> tuple[Float[Array, "*shape {head_dim}"], Float[Array, "*shape {head_dim}"]]:
    """Cosines and sines, angles in at least float32; upstream ``MoshiRotaryEmbedding`` and ``MimiRotaryEmbedding``.

    Positions of an unsigned dtype are those of an endless stream: counted modulo 2**32, and as exact after a year as
    after a second.

    Raises:
        ValueError: ``rope_parameters`` asks for scaled frequencies.
    """
    rope_type = rope_parameters["rope_type"]
    if rope_type != "default":
        raise ValueError(f"`rope_parameters` has rope_type={rope_type!r}, but only 'default' is supported.")
    wide = at_least_float32(dtype)
    exponents = np.arange(0, head_dim, 2, dtype=wide) / head_dim
    # as exact as upstream's: NumPy's powers of float32 are off by a bit where the processor has AVX-512
    powers = np.power(float(rope_parameters["rope_theta"]), exponents.astype(np.float64)).astype(wide)
    inverse_frequencies = 1 / powers
    if jnp.issubdtype(position_ids.dtype, jnp.unsignedinteger):
        angles = wrapped_angles(position_ids, inverse_frequencies)
    else:
        angles = jnp.multiply.outer(position_ids.astype(wide), inverse_frequencies)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def wrapped_angles(
    position_ids: UInt[Array, "*shape"], frequencies: Float[np.ndarray, "angles"]
) -> Float[Array, "*shape angles"]:
    """``position * frequency`` modulo a turn, in the dtype of ``frequencies``.

    Angles are whole numbers, fractions of a turn, that wrap around as the position does. So the angle between two
    positions depends on their distance alone, wherever they are; the product in floats is off by 0.1 rad after a day.
    """
    signed, unsigned = (jnp.int32, jnp.uint32) if frequencies.dtype == np.float32 else (jnp.int64, jnp.uint64)
    turn = 2.0 ** jnp.iinfo(unsigned).bits
    steps = [round(float(frequency) / (2 * np.pi) * turn) for frequency in frequencies]
    phases = jnp.multiply.outer(position_ids.astype(unsigned), jnp.array(steps, dtype=unsigned))
    return lax.bitcast_convert_type(phases, signed).astype(frequencies.dtype) * (2 * np.pi / turn)


def apply_rotary_pos_emb(
    x: Float[Array, "*shape head_dim"], cos: Float[Array, "..."], sin: Float[Array, "..."]
) -> Float[Array, "*shape head_dim"]:
    """Turns each pair (i, i + head_dim / 2) by the angle of its position; ``cos`` and ``sin`` must broadcast to x."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
