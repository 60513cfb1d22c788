"""Parameters with the layers of each decoder stacked, for modules with ``scan_layers``, and back.

Files, models and generation keep one tree, ``.../layers/0/...``, ``.../layers/1/...``. A train state may have the
stacked one, ``.../layers/stacked/...``, in which every leaf has a leading axis of layers. Mimi is as it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ..partitioning import STACKED

_STACKED_LAYERS = f"/layers/{STACKED}/"
LAYER = re.compile(r"((?:(?:decoder/)?model|depth_decoder)/layers)/(\d+)/(.+)")


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters for a module with ``scan_layers``.

    Args:
        params: of ``FlaxMoshiForConditionalGeneration`` or a language model, or some of them. NumPy arrays stay on the
            host.

    Raises:
        ValueError: a parameter that some layers have is missing in another.
    """
    stacked: dict[str, Any] = {}
    layers: dict[str, dict[int, Any]] = {}
    for path, leaf in flatten_dict(dict(params), sep="/").items():
        match = LAYER.fullmatch(path)
        if match is None:
            stacked[path] = leaf
        else:
            decoder, number, rest = match.groups()
            layers.setdefault(f"{decoder}/{STACKED}/{rest}", {})[int(number)] = leaf
    counts = {path: 1 + max(numbers) for path, numbers in layers.items()}
    for path, numbers in layers.items():
        decoder = path.split(f"/{STACKED}/")[0]
        count = max(counts[other] for other in counts if other.startswith(f"{decoder}/"))
        missing = sorted(set(range(count)) - set(numbers))
        if missing:
            raise ValueError(f"`params` has {path} for some layers, but not for {missing}; give all or none of them.")
        leaves = [numbers[number] for number in range(count)]
        stack = np.stack if isinstance(leaves[0], np.ndarray) else jnp.stack
        stacked[path] = stack(leaves)
    return unflatten_dict(stacked, sep="/")


def layer_paths(path: str, leaf: Any) -> list[str]:
    """The paths of a parameter in files, "/"-joined: one a layer if it is stacked, in their order, else its own.

    Args:
        path: in a train state.
        leaf: the parameter, or its shape.
    """
    if _STACKED_LAYERS not in path:
        return [path]
    return [path.replace(_STACKED_LAYERS, f"/layers/{number}/") for number in range(leaf.shape[0])]


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`stack_layers`: the tree of models and files. Without stacked layers nothing changes."""
    unstacked: dict[str, Any] = {}
    for path, leaf in flatten_dict(dict(params), sep="/").items():
        paths = layer_paths(path, leaf)
        unstacked |= {path: leaf} if paths == [path] else {each: leaf[number] for number, each in enumerate(paths)}
    return unflatten_dict(unstacked, sep="/")
