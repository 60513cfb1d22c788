"""A run that trains an adapter: the model has the adapter's leaves in its tree, and these alone are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from ..adapters.files import write_adapter
from ..adapters.lora import Adapter, is_of_adapter, merged_kernels, new_leaves, trained_leaves, with_leaves
from ..adapters.model import adapter_card
from ..adapters.targets import Linear, linear_layers, saved_whole, targeted
from ..modeling_flax_utils import FlaxPreTrainedModel
from ..quantization.tree import dequantized, is_quantized


class TrainedAdapter:
    """The adapter of a run.

    Args:
        config: of the run, with model, adapter and run.
        model: that it is for.

    Attributes:
        config: of the adapter.
        layers: that it changes.
        whole: paths of the parameters that are trained whole.

    Raises:
        ValueError: a target that the model does not have.
    """

    def __init__(self, config: Any, model: FlaxPreTrainedModel):
        self.config = config.adapter.lora_config(config.model.path)
        self._rules, self._seed = model.checkpoint_rules, config.run.seed
        shapes = model._float_shape_tree
        self.layers: list[Linear] = targeted(self.config, linear_layers(shapes, self._rules))
        self.whole = set(saved_whole(self.config, shapes, self._rules))
        if quantized := sorted(self.whole - flatten_dict(dict(model.params_shape_tree), sep="/").keys()):
            raise ValueError(
                f"`modules_to_save`: {quantized[0]} is quantized, {model.quantization}, and cannot be trained as a "
                "whole; leave it out"
            )

    def new_leaves(self) -> dict[str, Any]:
        """Of the adapter as the run begins with it."""
        return new_leaves(self.config, self.layers, jax.random.fold_in(jax.random.key(self._seed), 3))

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is trained, and the rest."""
        flat = flatten_dict(dict(params), sep="/")
        trained = {
            path: leaf for path, leaf in trained_leaves(flat).items() if is_of_adapter(path) or path in self.whole
        }
        frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
        return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")

    def apart(self, params: Mapping[str, Any]) -> tuple[Adapter, dict[str, Any]]:
        """The adapter in these parameters, and the parameters of the model."""
        flat = flatten_dict(dict(params), sep="/")
        leaves = {path: leaf for path, leaf in flat.items() if is_of_adapter(path) or path in self.whole}
        base = {path: leaf for path, leaf in flat.items() if not is_of_adapter(path)}
        return Adapter(self.config, self.layers, leaves), unflatten_dict(base, sep="/")

    def write(self, params: Mapping[str, Any], folder: Path, dtype: DTypeLike | None = None) -> None:
        """The adapter alone, in PEFT's format, in a dtype of its own if one is given."""
        adapter, base = self.apart(params)
        if dtype is not None:
            adapter.leaves = {path: leaf.astype(jnp.dtype(dtype)) for path, leaf in adapter.leaves.items()}
        # of floats that are not known there is no checksum
        known = None if is_quantized(base) else base
        write_adapter(folder, adapter, self._rules, known, adapter_card(adapter))

    def merged(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of the model with the adapter in them, quantized ones as the floats that they stand for."""
        adapter, base = self.apart(params)
        base = dequantized(base)
        return with_leaves(base, merged_kernels(base, [adapter]))
