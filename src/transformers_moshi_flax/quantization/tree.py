"""Trees of parameters with quantized layers: their shapes, made from those of floats and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ..checkpoints.configs import did_you_mean
from ..input_checks import shortened
from ..nn.linear import CODES, KERNEL, OFFSETS, QUANTIZED_SCALES, SCALES
from ..ops.quantization import dequantize, quantize, quantize_scales, quantize_with_offsets
from ..ops.scales import QuantizedScales
from .config import QuantizationConfig

_quantize = jax.jit(quantize, static_argnums=(1, 2))
_quantize_with_offsets = jax.jit(quantize_with_offsets, static_argnums=(1, 2))
_quantize_scales = jax.jit(quantize_scales)
_dequantize = jax.jit(dequantize, static_argnums=2)


def quantized_layers(shapes: Mapping[str, Any], config: QuantizationConfig, prefix: str) -> dict[str, int]:
    """The linear layers that are quantized: "/"-joined path -> groups of each column.

    Args:
        shapes: of parameters that are floats.
        config: which layers, and how.
        prefix: of the parameters' names in the whole of Moshi, ending in a dot if it is not empty.

    Raises:
        ValueError: the size of the groups does not divide a layer's inputs.
    """
    layers, problems = {}, []
    for path, leaf in flatten_dict(dict(shapes), sep="/").items():
        layer, _, last = path.rpartition("/")
        if last != KERNEL or len(leaf.shape) != 2 or _is_within(layer, config.skip, prefix):
            continue
        inputs = leaf.shape[0]
        size = config.group_size or inputs
        if inputs % size:
            problems.append(f"{layer} ({inputs})")
        layers[layer] = inputs // size
    if problems:
        raise ValueError(
            f"`group_size`={config.group_size} does not divide the inputs of {shortened(problems, 3, ', ')}; give one "
            "that does, or `skip` these layers"
        )
    return layers


def check_skip(shapes: Mapping[str, Any], config: QuantizationConfig, prefix: str) -> None:
    """ValueError for a name in ``skip`` that is none of a linear layer or of what it lies in, or where no layer is
    left."""
    everything = QuantizationConfig("int8")
    layers = quantized_layers(shapes, everything, prefix)
    for name in config.skip:
        if not any(_is_within(layer, [name], prefix) for layer in layers):
            known = {part for layer in layers for part in (prefix + layer.replace("/", ".")).split(".")}
            raise ValueError(f"`skip`: {name!r} is no module with linear layers{did_you_mean(name, known)}")
    if all(_is_within(layer, config.skip, prefix) for layer in layers):
        raise ValueError(f"`skip`={config.skip} leaves no linear layer to quantize; skip less")


def _is_within(layer: str, names: list[str], prefix: str) -> bool:
    full = f".{prefix}{layer.replace('/', '.')}."
    return any(f".{name}." in full for name in names)


def quantized_shapes(shapes: Mapping[str, Any], config: QuantizationConfig, prefix: str) -> dict[str, Any]:
    """The shapes of the parameters with quantized layers; arguments and errors as of :func:`quantized_layers`."""
    flat = flatten_dict(dict(shapes), sep="/")
    for layer, groups in quantized_layers(shapes, config, prefix).items():
        leaf = flat.pop(f"{layer}/{KERNEL}")
        flat |= jax.eval_shape(partial(quantized_leaves, layer, config=config, groups=groups), leaf)
    return unflatten_dict(flat, sep="/")


def quantized_leaves(layer: str, kernel: jax.Array, config: QuantizationConfig, groups: int) -> dict[str, jax.Array]:
    """The leaves of a quantized layer by path, from its kernel."""
    make = _quantize_with_offsets if config.offsets else _quantize
    leaves = dict(zip((CODES[str(config.kind)], SCALES, OFFSETS), make(kernel, config.kind, groups)))
    if config.double_quantization:
        leaves |= zip(QUANTIZED_SCALES, _quantize_scales(leaves.pop(SCALES)))
    return {f"{layer}/{name}": leaf for name, leaf in leaves.items()}


def quantized(params: Mapping[str, Any], config: QuantizationConfig, prefix: str) -> dict[str, Any]:
    """Parameters of floats with quantized layers; errors as of :func:`quantized_layers`."""
    layers = quantized_layers(params, config, prefix)
    flat = flatten_dict(dict(params), sep="/")
    for layer, groups in layers.items():
        flat |= quantized_leaves(layer, jnp.asarray(flat.pop(f"{layer}/{KERNEL}")), config, groups)
    return unflatten_dict(flat, sep="/")


def dequantized(params: Mapping[str, Any], dtype: Any = jnp.float32) -> dict[str, Any]:
    """Parameters with kernels of floats, in ``dtype``, in place of the quantized ones."""
    flat = flatten_dict(dict(params), sep="/")
    kinds = {name: kind for kind, name in CODES.items()}
    for path in [path for path in flat if path.rpartition("/")[2] in kinds]:
        layer, _, name = path.rpartition("/")
        scales, offsets = (flat.pop(f"{layer}/{each}", None) for each in (SCALES, OFFSETS))
        if scales is None:
            scales = QuantizedScales(*(flat.pop(f"{layer}/{each}") for each in QUANTIZED_SCALES))
        kernel = _dequantize(flat.pop(path), scales, kinds[name], offsets)
        flat[f"{layer}/{KERNEL}"] = kernel.astype(dtype)
    return unflatten_dict(flat, sep="/")


def bits_per_weight(floats: Mapping[str, Any], shapes: Mapping[str, Any]) -> float:
    """How many bits a weight of the quantized layers takes, codes, scales and all.

    Args:
        floats: the shapes of the parameters as floats.
        shapes: as they are; some layer is quantized.
    """
    before, after = (flatten_dict(dict(tree), sep="/") for tree in (floats, shapes))
    weights = sum(math.prod(leaf.shape) for path, leaf in before.items() if path not in after)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for path, leaf in after.items() if path not in before)
    return 8 * size / weights


def is_quantized(params: Mapping[str, Any]) -> bool:
    """Whether a layer of a parameter tree, or its shapes, is quantized."""
    return any(path[-1] in CODES.values() for path in flatten_dict(dict(params)))
