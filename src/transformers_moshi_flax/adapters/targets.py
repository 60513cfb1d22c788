"""The linear layers of a model under the names that they have in PyTorch, and which of them get an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax.traverse_util import flatten_dict

from ..checkpoints.configs import did_you_mean
from ..checkpoints.rules import Rule, table_slots
from .config import ALL_LINEAR, LoraConfig

HEADS = ("lm_head", "lm_heads")
"""Last names of the layers that ``"all-linear"`` leaves out, as PEFT does."""

CODEC = "audio_encoder."
"""How the names of Mimi's layers begin within Moshi, which ``"all-linear"`` leaves out too: it is not trained."""

OF_AUDIO = (CODEC, "audio_tower.", "multi_modal_projector.")
"""How the names of layers begin whose batches are recordings."""

WEIGHT = ".weight"


@dataclass(frozen=True)
class Linear:
    """A linear layer, or those of all codebooks that are one weight in PyTorch.

    Attributes:
        name: of the module in PyTorch.
        paths: of the layers here, one a codebook, "/"-joined.
        inputs, outputs: sizes.
        by_codebook: whether there is one a codebook.
    """

    name: str
    paths: tuple[str, ...]
    inputs: int
    outputs: int
    by_codebook: bool

    @property
    def target(self) -> str:
        """What PEFT's patterns match: the weight of layers that are one a codebook, else the layer."""
        return self.name + WEIGHT if self.by_codebook else self.name


def linear_layers(shapes: Mapping[str, Any], rules: tuple[Rule, ...]) -> dict[str, Linear]:
    """All linear layers of a model by name, from the shapes of its parameters and its table of the PyTorch layout."""
    leaves = flatten_dict(dict(shapes), sep="/")
    found: dict[str, Linear] = {}
    for slot in table_slots(leaves, rules):
        path, _, last = slot.path.rpartition("/")
        shape = leaves[slot.path].shape
        if last != "kernel" or len(shape) != 2:
            continue
        name = slot.key.removesuffix(WEIGHT)
        before = found[name].paths if name in found else ()
        found[name] = Linear(name, (*before, path), shape[0], shape[1], slot.codebook is not None)
    return found


def targeted(config: LoraConfig, layers: Mapping[str, Linear]) -> list[Linear]:
    """The layers that get an adapter, in the order of ``layers``.

    Raises:
        ValueError: a target that matches no layer.
    """
    wanted = _matching("target_modules", config.target_modules, layers, all_linear=True)
    wanted |= {
        name.removesuffix(WEIGHT)
        for name in _matching("target_parameters", config.target_parameters, [name + WEIGHT for name in layers])
    }
    wanted -= _matching("exclude_modules", config.exclude_modules, layers)
    if not wanted and (config.target_modules or config.target_parameters):
        raise ValueError(f"`exclude_modules`={config.exclude_modules!r} leaves no layer; exclude less")
    return [layer for name, layer in layers.items() if name in wanted]


def saved_whole(config: LoraConfig, shapes: Mapping[str, Any], rules: tuple[Rule, ...]) -> list[str]:
    """Paths of the parameters of ``modules_to_save``.

    Raises:
        ValueError: a name that is none of a module.
    """
    names = {slot.path: slot.key for slot in table_slots(flatten_dict(dict(shapes), sep="/"), rules)}
    modules = {key.rpartition(".")[0] for key in names.values()}
    modules |= {module.rpartition(".")[0] for module in modules}
    wanted = _matching("modules_to_save", config.modules_to_save, sorted(modules))
    return [path for path, key in names.items() if any(key.startswith(f"{name}.") for name in wanted)]


def _matching(
    option: str, targets: Sequence[str] | str | None, names: Iterable[str], all_linear: bool = False
) -> set[str]:
    """The names that one of the targets means: PEFT's rules."""
    names = list(names)
    if not targets:
        return set()
    if isinstance(targets, str):
        if all_linear and targets == ALL_LINEAR:
            return {name for name in names if name.split(".")[-1] not in HEADS and not name.startswith(CODEC)}
        found = {name for name in names if re.fullmatch(targets, name)}
        if not found:
            raise ValueError(f"`{option}`={targets!r} matches no layer, such as {names[0]!r}")
        return found
    found = set()
    for target in targets:
        matched = {name for name in names if name == target or name.endswith(f".{target}")}
        if not matched:
            parts = {".".join(name.split(".")[-1 - target.count(".") :]) for name in names}
            hint = did_you_mean(target, sorted(parts)) or f"; there are {', '.join(sorted(parts))}"
            raise ValueError(f"`{option}`: {target!r} is no layer of the model{hint}")
        found |= matched
    return found
