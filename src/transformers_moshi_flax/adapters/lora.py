"""Trees of adapters: new ones, several in one, and what the layers would be with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from ..nn.linear import DROPOUT, LEAVES, LORA_A, LORA_B, ROWS, SCALING
from .config import LoraConfig
from .targets import OF_AUDIO, Linear

BASE = "__base__"
"""The name of no adapter, for rows that have none; PEFT's."""

Leaves = dict[str, Any]


@dataclasses.dataclass
class Adapter:
    """An adapter of a model.

    Attributes:
        config: what it is like.
        layers: those that it changes.
        leaves: of its layers, and the parameters that it has instead of the model's, by "/"-joined path.
    """

    config: LoraConfig
    layers: list[Linear]
    leaves: Leaves

    @property
    def whole_parameters(self) -> Leaves:
        """Those that stand for the model's own."""
        return {path: leaf for path, leaf in self.leaves.items() if not is_of_adapter(path)}


def is_of_adapter(path: str) -> bool:
    """Whether a path, "/"-joined, is that of a leaf that only adapters have."""
    return path.rpartition("/")[2] in LEAVES


def new_leaves(config: LoraConfig, layers: Sequence[Linear], key: jax.Array, dtype: DTypeLike = jnp.float32) -> Leaves:
    """The leaves of a new adapter of these layers."""
    leaves: Leaves = {}
    paths = [(layer, path) for layer in layers for path in layer.paths]
    for (layer, path), layer_key in zip(paths, jax.random.split(key, max(len(paths), 1))):
        rank, keys = config.rank_of(layer.target), jax.random.split(layer_key)
        if config.init_lora_weights == "gaussian":
            a = jax.random.normal(keys[0], (layer.inputs, rank), dtype) / rank
        else:
            a = _uniform(keys[0], (layer.inputs, rank), layer.inputs, dtype)
        b = jnp.zeros((rank, layer.outputs), dtype)
        if config.init_lora_weights is False:
            b = _uniform(keys[1], b.shape, rank, dtype)
        leaves |= adapter_leaves(config, layer, path, a, b)
    return leaves


def _uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> jax.Array:
    # Kaiming's, with the slope that torch's linear layers have
    return jax.random.uniform(key, shape, dtype, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


def adapter_leaves(config: LoraConfig, layer: Linear, path: str, a: Any, b: Any) -> Leaves:
    """The leaves of one layer from its matrices."""
    leaves = {LORA_A: a, LORA_B: b, SCALING: jnp.asarray(config.scaling_of(layer.target), float)}
    if config.lora_dropout:
        leaves[DROPOUT] = jnp.asarray(config.lora_dropout, jnp.float32)
    return {f"{path}/{name}": leaf for name, leaf in leaves.items()}


def joined(adapters: Sequence[Adapter]) -> Leaves:
    """Several adapters as one that adds what all of them add.

    Raises:
        ValueError: more than one stands for the same parameter of the model.
    """
    if len(adapters) == 1:
        return adapters[0].leaves
    leaves: Leaves = {}
    for adapter in adapters:
        for path, leaf in adapter.whole_parameters.items():
            if path in leaves:
                raise ValueError(f"two adapters that are to be active have a parameter {path!r} of their own")
            leaves[path] = leaf
    for path, parts in _by_layer(adapters).items():
        found = [part for part in parts if part is not None]
        leaves[f"{path}/{LORA_A}"] = jnp.concatenate([part[LORA_A] for part in found], axis=1)
        scaled = [part[LORA_B] * part[SCALING].astype(part[LORA_B].dtype) for part in found]
        leaves[f"{path}/{LORA_B}"] = jnp.concatenate(scaled, axis=0)
        leaves[f"{path}/{SCALING}"] = jnp.ones((), jnp.float32)
    return leaves


def by_row(adapters: Sequence[Adapter], rows: Sequence[int]) -> Leaves:
    """A different adapter in each row of a batch.

    Args:
        adapters: those that occur.
        rows: the number of each row's adapter; ``len(adapters)`` is none.

    Raises:
        ValueError: an adapter changes an encoder of audio within a larger model, whose batches are others, or has
            parameters instead of the model's, which are the same in all rows.
    """
    whole = sorted({path for adapter in adapters for path in adapter.whole_parameters})
    of_audio = [layer.name for adapter in adapters for layer in adapter.layers if layer.name.startswith(OF_AUDIO)]
    if of_audio:
        raise ValueError(
            f"an adapter of an audio encoder's layers ({of_audio[0]!r}) cannot be one row's alone, as its batches are "
            "others than those of the text: make it the active one"
        )
    if whole:
        raise ValueError(
            f"an adapter with `modules_to_save` ({whole[0]!r}) cannot be one row's alone: make it the active one"
        )
    leaves: Leaves = {}
    for path, parts in _by_layer(adapters).items():
        rank = max(part[LORA_A].shape[1] for part in parts if part is not None)
        first = next(part for part in parts if part is not None)
        inputs, outputs = first[LORA_A].shape[0], first[LORA_B].shape[1]
        dtype = first[LORA_A].dtype
        every = [
            (jnp.zeros((inputs, rank), dtype), jnp.zeros((rank, outputs), dtype), jnp.zeros_like(first[SCALING]))
            if part is None
            else (
                jnp.pad(part[LORA_A], ((0, 0), (0, rank - part[LORA_A].shape[1]))),
                jnp.pad(part[LORA_B], ((0, rank - part[LORA_B].shape[0]), (0, 0))),
                part[SCALING],
            )
            for part in [*parts, None]
        ]
        for name, stacked in zip((LORA_A, LORA_B, SCALING), zip(*every)):
            leaves[f"{path}/{name}"] = jnp.stack(stacked)
        leaves[f"{path}/{ROWS}"] = jnp.asarray(rows, jnp.int32)
    return leaves


def check_rows(params: Mapping[tuple[str, ...], Any], rows: int) -> None:
    """ValueError for parameters, flat, that have an adapter for each row of a batch of another size."""
    sizes = {leaf.shape[0] for path, leaf in params.items() if path[-1] == ROWS}
    if sizes - {rows}:
        raise ValueError(
            f"params have an adapter for each of {max(sizes)} rows, but there are {rows}; give adapted_params as many "
            "adapter_names"
        )


def _by_layer(adapters: Sequence[Adapter]) -> dict[str, list[dict[str, Any] | None]]:
    """Path of a layer -> what each adapter has there."""
    paths = dict.fromkeys(path for adapter in adapters for layer in adapter.layers for path in layer.paths)

    def part(adapter: Adapter, path: str) -> dict[str, Any] | None:
        found = {name: adapter.leaves[f"{path}/{name}"] for name in LEAVES if f"{path}/{name}" in adapter.leaves}
        return found or None

    return {path: [part(adapter, path) for adapter in adapters] for path in paths}


def with_leaves(params: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of parameters with the leaves of adapters in it."""
    return unflatten_dict({**flatten_dict(dict(params), sep="/"), **leaves}, sep="/")


def merged_kernels(params: Mapping[str, Any], adapters: Sequence[Adapter]) -> Leaves:
    """The kernels and other parameters of a model with these adapters in them, in the dtype that they have.

    The sum is taken in float32 at least, and rounded once.
    """
    flat = flatten_dict(dict(params), sep="/")
    changed: Leaves = {}
    for adapter in adapters:
        changed |= adapter.whole_parameters
        for layer in adapter.layers:
            for path in layer.paths:
                a, b, scaling = (adapter.leaves[f"{path}/{name}"] for name in (LORA_A, LORA_B, SCALING))
                wide = jnp.promote_types(jnp.float32, flat[f"{path}/kernel"].dtype)
                delta = scaling.astype(wide) * jnp.matmul(a.astype(wide), b.astype(wide), precision="highest")
                kernel = changed.get(f"{path}/kernel", flat[f"{path}/kernel"])
                changed[f"{path}/kernel"] = kernel.astype(wide) + delta
    return {path: leaf.astype(flat[path].dtype) for path, leaf in changed.items()}


def trained_leaves(leaves: Mapping[str, Any]) -> Leaves:
    """Those of an adapter that are no settings."""
    return {path: leaf for path, leaf in leaves.items() if path.rpartition("/")[2] not in (SCALING, DROPOUT)}


def check_trained(own: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """ValueError for leaves that are to stand for others, by "/"-joined path, with other paths or shapes."""
    wrong = sorted(own.keys() ^ leaves.keys()) or sorted(path for path in own if own[path].shape != leaves[path].shape)
    if wrong:
        raise ValueError(f"`leaves` are missing, too many, or of another shape: {wrong[:3]}")


def parameter_count(leaves: Mapping[str, Any]) -> int:
    """How many numbers of an adapter are trained."""
    return sum(int(np.prod(leaf.shape)) for leaf in trained_leaves(leaves).values())
