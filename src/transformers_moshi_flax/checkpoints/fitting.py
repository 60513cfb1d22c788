"""Which tensors of a checkpoint are the parameters of a model, and what is missing or left over."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flax.traverse_util import flatten_dict
from transformers import PreTrainedConfig

from ..nn.linear import CODES
from .configs import override_config
from .files import Source
from .formats import ShardedFiles, TensorFile
from .rules import ReadResult, choose_renaming, flax_slots, read_slots, table_slots


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint of any format, opened.

    Attributes:
        name: of the checkpoint, as the user gave it.
        is_on_hub: whether that is an id on the Hub.
        files: that they lie in.
        fit: distributes them over the parameters of a model, as :func:`fit` does: ``(model, convert)`` -> what it
            returns.
        quantization: the ``quantization_config`` of the model, where the files tell it and not the configuration.
    """

    name: str
    is_on_hub: bool
    files: tuple[TensorFile | ShardedFiles, ...]
    fit: Callable[[Any, Callable[[str, Any], Any]], tuple[ReadResult, list[str]]]
    quantization: Mapping[str, Any] | None = None

    def described(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of a model of these weights, which tells of their quantization."""
        if self.quantization is None:
            return config
        return override_config(config, {"quantization_config": dict(self.quantization)})

    @classmethod
    def of(cls, source: Source, from_pt: bool | None = None) -> Weights:
        """Those of the formats of ``transformers``; ``from_pt`` as of :meth:`Source.weights`."""
        layout, tensors = source.weights(from_pt)
        return cls(
            source.name,
            source.folder is None,
            (tensors,),
            partial(_fit_layout, layout, tensors),
        )


def _fit_layout(
    layout: str, tensors: Mapping[str, Any], model: Any, convert: Callable[[str, Any], Any]
) -> tuple[ReadResult, list[str]]:
    return fit(model, layout, tensors, convert)


def fit(
    model: Any,
    layout: str,
    tensors: Mapping[str, Any],
    convert: Callable[[str, Any], Any] = lambda path, leaf: leaf,
) -> tuple[ReadResult, list[str]]:
    """Distribute the tensors of a file over the parameters of a model.

    Args:
        model: a ``FlaxPreTrainedModel``; its parameters are not looked at.
        layout: ``"pt"`` or ``"flax"``.
        tensors: key -> array; only those that the model wants are fetched.
        convert: called on every path and leaf.

    Returns:
        The leaves by "/"-joined path with what does not fit, and those of the unexpected keys that lie in a part that
        the model has; tensors of a part that its class lacks (a head) are no concern, nor are the further ones of a
        series of which it has the first (``checkpoint_series``).

    Raises:
        ValueError: no tensor belongs to the model, or it is quantized and the layout PyTorch's.
    """
    template = flatten_dict(model.params_shape_tree, sep="/")
    if layout == "pt" and any(path.rpartition("/")[2] in CODES.values() for path in template):
        raise ValueError(
            "the configuration tells of quantized weights (quantization_config), which the PyTorch layout has not: "
            "take the config.json that belongs to these weights"
        )
    slots = table_slots(template, model.checkpoint_rules) if layout == "pt" else flax_slots(template)
    base = model.base_model_prefix if model.base_model_prefix in model.params_shape_tree else ""
    prefix, rename = choose_renaming(slots, tensors, model.checkpoint_prefixes, base)
    result = read_slots(slots, template, tensors, rename, convert)
    parts = {slot.key.split(".")[0] for slot in slots}
    surplus = [
        key
        for key in result.unexpected
        if key.startswith(prefix)
        and key.removeprefix(prefix).split(".")[0] in parts
        and "rotary_emb" not in key
        and not any(re.search(series, key) for series in model.checkpoint_series)
    ]
    return result, surplus
