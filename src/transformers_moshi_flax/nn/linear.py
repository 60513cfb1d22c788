"""The linear layer, of which every model's are made; its quantized kernel, and what an adapter adds to it.

A layer is quantized where its parameters hold codes and scales instead of the kernel, and has an adapter (LoRA, Hu et
al., 2021) where they hold one beside it; the layer itself has no setting for either. So everything that takes a tree
of parameters takes one with quantized kernels and adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..ops.linear import dot_general
from ..ops.quantization import BITS, quantized_dot
from ..ops.scales import QuantizedScales, Scales

KERNEL, SCALES, OFFSETS = "kernel", "scales", "offsets"
CODES = {kind: f"kernel_{kind}" for kind in BITS}
"""Names of a kernel, ``(inputs, outputs)``, and of what may be there instead of it: scales, ``(groups, outputs)``
float32, offsets alike or none, and codes, whose name says their kind
(:mod:`~transformers_moshi_flax.ops.quantization`)."""

QUANTIZED_SCALES = ("scales_int8", "scales_steps", "scales_mean")
"""Names of what may be there instead of scales: those of :class:`~transformers_moshi_flax.ops.scales.QuantizedScales`,
in its order."""

OF_GROUPS = (SCALES, OFFSETS, *QUANTIZED_SCALES)
"""Leaves whose floats are float32, whatever the dtype of the others is."""

LORA_A, LORA_B, SCALING, ROWS, DROPOUT = "lora_A", "lora_B", "lora_scaling", "lora_rows", "lora_dropout"
"""Names of an adapter's leaves: ``(inputs, rank)``, ``(rank, outputs)``, a number; of several adapters, ``(adapters,
inputs, rank)``, ``(adapters, rank, outputs)``, ``(adapters,)`` and the adapter of each row, ``(rows,)`` int32. The
last is the share of inputs that training drops, a number, and the name of the stream of random numbers for it."""

LEAVES = (LORA_A, LORA_B, SCALING, ROWS, DROPOUT)


class Dense(nn.Module):
    """``x @ kernel (+ bias)`` computed in ``dtype``, as ``flax.linen.Dense``, with a quantized kernel or an adapter
    where there is one."""

    features: int
    kernel_init: Any
    dtype: Any = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, inputs: Float[Array, "... inputs"]) -> Float[Array, "... features"]:
        inputs = inputs.astype(self.dtype)
        kind = quantized_kind(self)
        if kind is None:
            kernel = self.param(KERNEL, self.kernel_init, (inputs.shape[-1], self.features), jnp.float32)
            outputs = product(inputs, jnp.asarray(kernel, self.dtype))
        else:
            codes, scales = jnp.asarray(self.get_variable("params", CODES[kind])), scales_of(self)
            offsets = (
                jnp.asarray(self.get_variable("params", OFFSETS)) if self.has_variable("params", OFFSETS) else None
            )
            outputs = quantized_dot(inputs, codes, scales, kind, offsets)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            outputs = outputs + jnp.expand_dims(jnp.asarray(bias, self.dtype), tuple(range(outputs.ndim - 1)))
        leaves = adapter_of(self)
        return outputs if leaves is None else outputs + adapted(self, inputs, leaves)


def dense(features: int, kernel_init: Any, dtype: DTypeLike, use_bias: bool = False, name: str | None = None) -> Dense:
    """``x @ kernel (+ bias)``, ``(..., inputs)`` to ``(..., features)``, computed in ``dtype``."""
    return Dense(features, kernel_init, dtype, use_bias, name=name)


def quantized_kind(layer: nn.Module) -> str | None:
    """The kind of the quantized kernel that a bound layer has, None where it has a kernel of floats, or none yet."""
    if layer.has_variable("params", KERNEL):  # such as an adapter brings along instead of the model's
        return None
    return next((kind for kind, name in CODES.items() if layer.has_variable("params", name)), None)


def scales_of(layer: nn.Module) -> Scales:
    """Those of the quantized kernel that a bound layer has."""
    names = (SCALES,) if layer.has_variable("params", SCALES) else QUANTIZED_SCALES
    scales, *others = (jnp.asarray(layer.get_variable("params", name)) for name in names)
    return QuantizedScales(scales, *others) if others else scales


def is_kernel_alone(layer: nn.Module) -> bool:
    """Whether a bound layer without a bias is nothing but its kernel of floats."""
    return quantized_kind(layer) is None and adapter_of(layer) is None


def adapter_of(layer: nn.Module) -> dict[str, Array] | None:
    """The leaves of the adapter that a bound layer has, None without one."""
    if not layer.has_variable("params", LORA_A):
        return None
    return {name: layer.get_variable("params", name) for name in LEAVES if layer.has_variable("params", name)}


def adapted(
    layer: Dense, inputs: Float[Array, "... inputs"], leaves: Mapping[str, Array]
) -> Float[Array, "... features"]:
    """What the adapter adds to the layer's outputs, of inputs in its dtype.

    Dropout is applied where the layer has the random numbers for it, which it is given in training.
    """
    if DROPOUT in leaves and layer.has_rng(DROPOUT):
        keep = 1 - jnp.asarray(leaves[DROPOUT], jnp.float32)
        kept = jax.random.bernoulli(layer.make_rng(DROPOUT), keep, inputs.shape)
        inputs = jnp.where(kept, inputs / keep.astype(inputs.dtype), jnp.zeros_like(inputs))
    a, b, scaling = (jnp.asarray(leaves[name], layer.dtype) for name in (LORA_A, LORA_B, SCALING))
    if ROWS not in leaves:
        return scaling * product(product(inputs, a), b)
    # rows may stand for several, such as those of beams, of codebooks, or of the frames of a dialogue
    rows = jnp.repeat(jnp.asarray(leaves[ROWS]), inputs.shape[0] // leaves[ROWS].shape[0])
    inner = jnp.einsum("n...i,nir->n...r", inputs, a[rows])
    outputs = jnp.einsum("n...r,nro->n...o", inner, b[rows])
    return scaling[rows].reshape(-1, *(1,) * (outputs.ndim - 1)) * outputs


def dropout_rngs(key: jax.Array) -> dict[str, jax.Array]:
    """The random numbers of a module in training: of its own dropout, and of adapters'."""
    return {"dropout": key, DROPOUT: jax.random.fold_in(key, 1)}


def product(x: Float[Array, "... inputs"], matrix: Float[Array, "inputs outputs"]) -> Float[Array, "... outputs"]:
    """``x @ matrix``, as layers compute it."""
    return dot_general(x, matrix, (((x.ndim - 1,), (0,)), ((), ())))
