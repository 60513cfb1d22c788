"""Matrices in 8 or 4 bits a number: how they are made, what they stand for, products with them.

A matrix ``(inputs, outputs)`` is kept as codes and scales. Each column is cut into groups of equally many inputs, and
every group has a scale, a number ``s``:

* ``int8``: ``s`` is the largest magnitude over 127, a code ``q`` is a whole number of [-127, 127] and stands for
  ``s q`` (symmetric "absmax" quantization, as LLM.int8, Dettmers et al., 2022, has it for weights).
* ``int4``: the same with 7 instead of 127.
* ``nf4``: ``s`` is the largest magnitude, a code is the place of one of :data:`NF4` and stands for ``s NF4[code]``.

``int8`` and ``int4`` may have an offset ``o`` for each group as well, so that codes stand for ``s q + o`` (asymmetric,
or affine, quantization): then ``q`` are all whole numbers of 8 or 4 bits, from -128 or -8 on.

Codes of 4 bits lie two in a byte, that of the row with the even number in the low half; those of ``int4`` plus 8.

Scales may be quantized themselves (:mod:`~transformers_moshi_flax.ops.scales`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, UInt8

from . import cpu, cpu_native
from .dispatch import for_cpu
from .scales import BLOCK, QuantizedScales, Scales, float_scales

BITS = {"int8": 8, "int4": 4, "nf4": 4}
"""Kind -> bits of a code."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""NormalFloat with 4 bits: quantiles of the normal distribution in [-1, 1], zero among them (QLoRA, Dettmers et al.,
2023, appendix E)."""

_LARGEST = {"int8": 127, "int4": 7, "nf4": 1}

Codes = Int8[Array, "inputs outputs"] | UInt8[Array, "bytes outputs"]


def quantize(
    matrix: Float[Array, "inputs outputs"], kind: str, groups: int
) -> tuple[Codes, Float32[Array, "{groups} outputs"]]:
    """The codes and scales that stand for a matrix best.

    Args:
        matrix: computed with in float32.
        kind: a key of :data:`BITS`.
        groups: of each column; they divide ``inputs``, with 4 bits into an even number.

    Returns:
        ``(inputs, outputs)`` int8, or ``(inputs / 2, outputs)`` uint8, and the scales. Groups of zeros have the scale
        0, groups with a number that is not finite a scale that is not.
    """
    inputs, outputs = matrix.shape
    grouped = matrix.astype(jnp.float32).reshape(groups, -1, outputs)
    scales = jnp.max(jnp.abs(grouped), axis=1) / _LARGEST[kind]
    scaled = grouped / jnp.where(scales == 0, jnp.ones_like(scales), scales)[:, None]
    if kind == "nf4":
        between = np.convolve(NF4, (0.5, 0.5), "valid").astype(np.float32)
        codes = jnp.searchsorted(jnp.asarray(between), scaled, method="compare_all").astype(jnp.uint8)
    else:
        codes = jnp.round(scaled).astype(jnp.int8)
    return _packed(codes.reshape(inputs, outputs), kind), scales


def quantize_with_offsets(
    matrix: Float[Array, "inputs outputs"], kind: str, groups: int
) -> tuple[Codes, Float32[Array, "{groups} outputs"], Float32[Array, "{groups} outputs"]]:
    """As :func:`quantize`, from the smallest to the largest number of each group.

    Args:
        matrix, groups: as there.
        kind: ``int8`` or ``int4``.

    Returns:
        The codes, the scales and the offsets. Groups of one number have the scale 0.
    """
    inputs, outputs = matrix.shape
    least_code = -(2 ** (BITS[kind] - 1))
    grouped = matrix.astype(jnp.float32).reshape(groups, -1, outputs)
    least = jnp.min(grouped, axis=1)
    scales = (jnp.max(grouped, axis=1) - least) / (2 ** BITS[kind] - 1)
    steps = (grouped - least[:, None]) / jnp.where(scales == 0, jnp.ones_like(scales), scales)[:, None]
    codes = (jnp.round(steps) + least_code).astype(jnp.int8)
    return _packed(codes.reshape(inputs, outputs), kind), scales, least - least_code * scales


def quantize_scales(scales: Float32[Array, "groups outputs"]) -> QuantizedScales:
    """Scales in 8 bits, ``"groups outputs"`` int8 with a step for each block of them.

    Where one is not finite, none of those that the codes stand for is.
    """
    groups, outputs = scales.shape
    mean = jnp.mean(scales)
    blocks = jnp.pad(scales - mean, ((0, 0), (0, -outputs % BLOCK))).reshape(-1, BLOCK)
    codes, steps = quantize(blocks.T, "int8", 1)
    return QuantizedScales(codes.T.reshape(groups, -1)[:, :outputs], steps.reshape(groups, -1), mean)


def _packed(codes: Array, kind: str) -> Codes:
    if BITS[kind] == 8:
        return codes
    if kind == "int4":
        codes = (codes + jnp.int8(8)).astype(jnp.uint8)
    pairs = codes.reshape(-1, 2, codes.shape[1])
    return pairs[:, 0] | (pairs[:, 1] << jnp.uint8(4))


def dequantize(
    codes: Codes,
    scales: Scales,
    kind: str,
    offsets: Float32[Array, "groups outputs"] | None = None,
) -> Float32[Array, "dequantized outputs"]:
    """The matrix that codes, scales and offsets, if there are some, stand for."""
    groups, outputs = scales.shape
    matrix = jnp.stack(numbers(codes, kind), axis=1).reshape(groups, -1, outputs)
    matrix = matrix * float_scales(scales)[:, None]
    return (matrix if offsets is None else matrix + offsets[:, None]).reshape(-1, outputs)


def numbers(codes: Codes, kind: str) -> list[Float32[Array, "rows outputs"]]:
    """What codes stand for before it is scaled; of those with 4 bits the rows with even and those with odd numbers."""
    if BITS[kind] == 8:
        return [codes.astype(jnp.float32)]
    # by way of int8, as XLA's CPU backend makes floats of unsigned numbers at half the speed
    halves = [half.astype(jnp.int8) for half in (codes & jnp.uint8(15), codes >> jnp.uint8(4))]
    if kind == "nf4":
        return [jnp.asarray(NF4, jnp.float32)[half] for half in halves]
    return [half.astype(jnp.float32) - jnp.float32(8) for half in halves]


def quantized_dot(
    x: Float[Array, "*shape inputs"],
    codes: Codes,
    scales: Scales,
    kind: str,
    offsets: Float32[Array, "groups outputs"] | None = None,
) -> Float[Array, "*shape outputs"]:
    """``x @ matrix`` in the dtype of ``x``, with the matrix as codes, scales and offsets, if there are some.

    The gradient is that by ``x`` alone.
    """
    return _quantized_dot(kind, x, codes, scales, offsets)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantized_dot(kind: str, x: Array, codes: Array, scales: Scales, offsets: Array | None) -> Array:
    def definition(x: Array, codes: Array, scales: Scales, offsets: Array | None) -> Array:
        x, codes, scales = _tied(x, codes, scales)
        return x @ dequantize(codes, scales, kind, offsets).astype(x.dtype)

    def twin(x: Array, codes: Array, scales: Scales, offsets: Array | None) -> Array:
        if not cpu_native.takes(x, codes.shape[1]):
            return cpu.tiled_dot(x, codes, scales, partial(numbers, kind=kind), offsets)
        product = cpu_native.quantized_dot(x, codes, scales, kind)
        return product if offsets is None else product + cpu.offset_dot(x, offsets).astype(x.dtype)

    return for_cpu(definition, twin, x, codes, scales, offsets)


def _tied(x: Array, codes: Array, scales: Scales) -> tuple[Array, Array, Scales]:
    """The same. Tied to ``x``, codes are others in every step of a loop: XLA does not make floats of them once, before
    it."""
    if isinstance(scales, QuantizedScales):
        return lax.optimization_barrier((x, codes, scales))
    return *lax.optimization_barrier((x, codes)), scales


def _transposed_dot(kind: str, y: Array, codes: Array, scales: Scales, offsets: Array | None) -> Array:
    """``y @ matrix.T``."""

    def definition(y: Array, codes: Array, scales: Scales, offsets: Array | None) -> Array:
        y, codes, scales = _tied(y, codes, scales)
        return y @ dequantize(codes, scales, kind, offsets).astype(y.dtype).T

    def twin(y: Array, codes: Array, scales: Scales, offsets: Array | None) -> Array:
        return cpu.tiled_transposed_dot(y, codes, scales, partial(numbers, kind=kind), offsets)

    return for_cpu(definition, twin, y, codes, scales, offsets)


def _forward(
    kind: str, x: Array, codes: Array, scales: Scales, offsets: Array | None
) -> tuple[Array, tuple[Array, Scales, Array | None]]:
    return _quantized_dot(kind, x, codes, scales, offsets), (codes, scales, offsets)


def _backward(kind: str, kept: tuple[Array, Scales, Array | None], cotangent: Array) -> tuple[Array, Any, None, None]:
    # floats again, a tile at a time, as on the way forward: what is kept between them is codes
    return _transposed_dot(kind, cotangent, *kept), np.zeros(kept[0].shape, jax.dtypes.float0), None, None


_quantized_dot.defvjp(_forward, _backward)
