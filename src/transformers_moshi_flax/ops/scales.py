"""The scales of a quantized matrix that are quantized themselves (double quantization, QLoRA, Dettmers et al., 2023,
section 3).

Scales ``(groups, outputs)`` are all positive, so their mean is subtracted first. What is left is quantized to ``int8``
in blocks of :data:`BLOCK` neighbouring outputs of a group, the last of which may be shorter: the step of a block is
its largest magnitude over 127, and a code ``q`` stands for ``step q + mean``. (The paper has floats of 8 bits there.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float32

BLOCK = 256
"""Scales that have a step in common."""


class QuantizedScales(NamedTuple):
    """Scales in 8 bits.

    Attributes:
        codes: ``(groups, outputs)`` int8.
        steps: ``(groups, blocks)`` float32.
        mean: of all scales of the matrix, ``()`` float32.
    """

    codes: Any
    steps: Any
    mean: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """``(groups, outputs)``, as of scales that are floats."""
        return self.codes.shape


Scales = Float32[Array, "groups outputs"] | QuantizedScales


def float_scales(scales: Scales) -> Float32[Array, "groups outputs"]:
    """The scales that codes stand for; floats as they are."""
    if not isinstance(scales, QuantizedScales):
        return scales
    steps = jnp.repeat(scales.steps, BLOCK, axis=1)[:, : scales.shape[1]]
    return scales.codes.astype(jnp.float32) * steps + scales.mean


def tiled_scales(scales: Scales, tiles: int) -> Float32[Array, "{tiles} tile_groups outputs"] | QuantizedScales:
    """With a leading axis of tiles, into which the groups are cut."""
    if not isinstance(scales, QuantizedScales):
        return scales.reshape(tiles, -1, scales.shape[1])
    codes, steps = (leaf.reshape(tiles, -1, leaf.shape[1]) for leaf in scales[:2])
    return QuantizedScales(codes, steps, jnp.broadcast_to(scales.mean, (tiles,)))
