"""A run that trains an adapter: the model has the adapter's leaves in its tree, and these alone are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from ..adapters.files import write_adapter
from ..adapters.lora import Adapter, merged_kernels, new_leaves, trained_leaves, with_leaves
from ..adapters.model import adapter_card
from ..adapters.targets import Linear, linear_layers, saved_whole, targeted
from ..models.moshi import FlaxMoshiForConditionalGeneration
from .configuration import TrainingConfig

Model = FlaxMoshiForConditionalGeneration


class TrainedAdapter:
    """The adapter of a run.

    Args:
        config: of the run, with an adapter.
        model: that it is for.

    Attributes:
        config: of the adapter.
        layers: that it changes.
        whole: paths of the parameters that are trained whole.

    Raises:
        ValueError: a target that the model does not have.
    """

    def __init__(self, config: TrainingConfig, model: Model):
        self.config = config.adapter.lora_config(config.model.path)
        self._rules, self._seed = model.checkpoint_rules, config.run.seed
        self.layers: list[Linear] = targeted(self.config, linear_layers(model.params_shape_tree, self._rules))
        self.whole = set(saved_whole(self.config, model.params_shape_tree, self._rules))

    def added(self, params: Any) -> dict[str, Any]:
        """The parameters of the model, or their shapes, with a new adapter, or its shapes."""
        leaves = self.new_leaves()
        return with_leaves(params, leaves)

    def new_leaves(self) -> dict[str, Any]:
        """Of the adapter as the run begins with it."""
        return new_leaves(self.config, self.layers, jax.random.fold_in(jax.random.key(self._seed), 3))

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is trained, and the rest."""
        flat = flatten_dict(dict(params), sep="/")
        of_adapter = trained_leaves(self._own(flat))
        trained = {path: leaf for path, leaf in flat.items() if path in of_adapter or path in self.whole}
        frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
        return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")

    def _own(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The leaves that are not the model's."""
        layers = {path for layer in self.layers for path in layer.paths}
        kernels = ("kernel", "bias")
        return {
            path: leaf
            for path, leaf in flat.items()
            if path.rpartition("/")[0] in layers and path.rpartition("/")[2] not in kernels
        }

    def write(self, params: Mapping[str, Any], folder: Path) -> None:
        """The adapter alone, in PEFT's format."""
        flat = flatten_dict(dict(params), sep="/")
        own = self._own(flat)
        adapter = Adapter(self.config, self.layers, {**own, **{path: flat[path] for path in self.whole}})
        base = unflatten_dict({path: leaf for path, leaf in flat.items() if path not in own}, sep="/")
        write_adapter(folder, adapter, self._rules, base, adapter_card(adapter))

    def merged(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of the model, with the adapter in them."""
        flat = flatten_dict(dict(params), sep="/")
        own = self._own(flat)
        base = unflatten_dict({path: leaf for path, leaf in flat.items() if path not in own}, sep="/")
        return with_leaves(base, merged_kernels(base, [Adapter(self.config, self.layers, own)]))
