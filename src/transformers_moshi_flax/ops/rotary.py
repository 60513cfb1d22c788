"""The rotary position embedding (Su et al., 2021), and the kinds of it that reach beyond the original length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, UInt

from .precision import at_least_float32

ORIGINAL_LENGTH = "original_max_position_embeddings"
ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "yarn")


def rotary_embedding(
    position_ids: Integer[Array, "*shape"],
    head_dim: int,
    rope_parameters: Mapping[str, Any],
    dtype: DTypeLike,
    max_position_embeddings: int | None = None,
    context_length: Integer[Array, "..."] | None = None,
) -> tuple[Float[Array, "*shape {head_dim}"], Float[Array, "*shape {head_dim}"]]:
    """Cosines and sines, angles in at least float32; upstream's ``...RotaryEmbedding`` of all models.

    Positions of an unsigned dtype are those of an endless stream: counted modulo 2**32, and as exact after a year as
    after a second.

    Args:
        position_ids: the positions.
        head_dim: angles are made twice for half of it.
        rope_parameters: ``rope_type``, one of :data:`ROPE_TYPES`, ``rope_theta`` and what the type wants.
        dtype: of the results.
        max_position_embeddings: the original length; ``dynamic`` wants it.
        context_length: how long the text of each position is, which must broadcast; for ``dynamic`` alone, whose
            frequencies depend on it. It is no less than the position and one.

    Raises:
        ValueError: another type, or something is missing.
    """
    wide = at_least_float32(dtype)
    frequencies, factor = inverse_frequencies(rope_parameters, head_dim, wide)
    if rope_parameters["rope_type"] == "dynamic":
        if max_position_embeddings is None or context_length is None:
            raise ValueError(
                "`rope_parameters` has rope_type='dynamic', which needs a length that it is made for: use another one."
            )
        lengths = jnp.maximum(context_length, position_ids + 1).astype(wide)
        growth = dynamic_growth(lengths, float(rope_parameters["factor"]), max_position_embeddings)
        exponents = np.arange(0, head_dim, 2, dtype=wide) / max(head_dim - 2, 1)
        row = (*[1] * growth.ndim, -1)
        slower = frequencies.reshape(row) * growth[..., None] ** -exponents.reshape(row)
        angles = position_ids.astype(wide)[..., None] * slower
    elif jnp.issubdtype(position_ids.dtype, jnp.unsignedinteger):
        angles = wrapped_angles(position_ids, frequencies)
    else:
        angles = jnp.multiply.outer(position_ids.astype(wide), frequencies)
    angles = jnp.concatenate([angles, angles], axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if factor != 1:
        cos, sin = cos * wide.type(factor), sin * wide.type(factor)
    return cos.astype(dtype), sin.astype(dtype)


def dynamic_growth(
    lengths: Float[Array, "*shape"], factor: float, max_position_embeddings: int
) -> Float[Array, "*shape"]:
    """By how much the base of ``dynamic`` grows with the length, but for an exponent; 1 up to the original length."""
    wide = lengths.dtype.type
    longer = jnp.maximum(lengths, wide(max_position_embeddings)) / wide(max_position_embeddings)
    return wide(factor) * longer - wide(factor - 1)


def inverse_frequencies(
    rope_parameters: Mapping[str, Any], head_dim: int, dtype: jnp.dtype
) -> tuple[Float[np.ndarray, "pairs"], float]:
    """The angle that each pair is turned by from one position to the next, and a factor of cosines and sines.

    Of ``dynamic``, those up to the original length.

    Args:
        rope_parameters: as of :func:`rotary_embedding`.
        head_dim: twice as many as there are pairs.
        dtype: of the angles.

    Raises:
        ValueError: a type that is not known, a parameter that is missing, or rotation of a part of the heads.
    """
    rope_type = rope_parameters.get("rope_type")
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"`rope_parameters` has rope_type={rope_type!r}, which is not supported: use one of "
            f"{', '.join(map(repr, ROPE_TYPES))}."
        )

    def number(name: str, default: float | None = None) -> float:
        value = rope_parameters.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"`rope_parameters` of rope_type={rope_type!r} has no {name!r}: give a number.")
        return float(value)

    if number("partial_rotary_factor", 1.0) != 1:
        raise ValueError(
            f"`rope_parameters` has partial_rotary_factor={rope_parameters['partial_rotary_factor']!r}, but heads are "
            "rotated as a whole: leave it out."
        )
    theta = number("rope_theta")
    exponents = np.arange(0, head_dim, 2, dtype=dtype) / head_dim
    # as exact as upstream's: NumPy's powers of float32 are off by a bit where the processor has AVX-512
    powers = np.power(theta, exponents.astype(np.float64)).astype(dtype)
    frequencies = 1 / powers
    if rope_type == "linear":
        return frequencies / dtype.type(number("factor")), 1.0
    if rope_type == "llama3":
        return llama3_frequencies(frequencies, number), 1.0
    if rope_type == "yarn":
        return yarn_frequencies(powers, theta, number, rope_parameters.get("truncate", True)), yarn_factor(number)
    if rope_type == "dynamic":
        number("factor")
    return frequencies, 1.0


def llama3_frequencies(
    frequencies: Float[np.ndarray, "pairs"], number: Callable[..., float]
) -> Float[np.ndarray, "pairs"]:
    """Low frequencies divided by ``factor``, high ones as they are, and a smooth passage (Llama 3.1)."""
    length, low, high = (number(name) for name in (ORIGINAL_LENGTH, "low_freq_factor", "high_freq_factor"))
    turns = length * frequencies / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - kept) * frequencies / number("factor") + kept * frequencies).astype(frequencies.dtype)


def yarn_frequencies(
    powers: Float[np.ndarray, "pairs"], theta: float, number: Callable[..., float], truncate: bool
) -> Float[np.ndarray, "pairs"]:
    """Frequencies of few turns within the original length divided by ``factor``, those of many as they are, and a ramp
    between them (YaRN, Peng et al., 2023)."""
    length, head_dim = number(ORIGINAL_LENGTH), 2 * len(powers)

    def pair_of(turns: float) -> float:
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    # `or`: upstream takes 0 for nothing
    first, last = pair_of(number("beta_fast", 32.0) or 32.0), pair_of(number("beta_slow", 1.0) or 1.0)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    ramp = np.clip((np.arange(len(powers)) - first) / (last - first), 0, 1).astype(powers.dtype)
    return (ramp / (powers.dtype.type(number("factor")) * powers) + (1 - ramp) / powers).astype(powers.dtype)


def yarn_factor(number: Callable[..., float]) -> float:
    """By which YaRN multiplies cosines and sines."""
    factor, scale, scale_all = number("factor"), number("mscale", 0.0), number("mscale_all_dim", 0.0)

    def grown(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1

    return number("attention_factor", grown(scale) / grown(scale_all) if scale and scale_all else grown(1.0))


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
    x: Float[Array, "*shape head_dim"],
    cos: Float[Array, "..."],
    sin: Float[Array, "..."],
    interleaved: bool = False,
) -> Float[Array, "*shape head_dim"]:
    """Turns each pair by the angle of its position.

    Args:
        x: queries or keys.
        cos, sin: of :func:`rotary_embedding`; they must broadcast to ``x``, with as many axes.
        interleaved: pairs are (2 i, 2 i + 1) instead of (i, i + head_dim / 2).
    """
    if interleaved:
        half = x.shape[-1] // 2
        first, second = x[..., 0::2], x[..., 1::2]
        cos, sin = cos[..., :half], sin[..., :half]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.reshape(x.shape)
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
