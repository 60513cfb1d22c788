"""Adapters in Kyutai's files: ``lora.safetensors`` and ``config.json``, which ``moshi-finetune`` writes.

Every linear layer of the language model has matrices there, ``lora_A`` (rank, inputs) and ``lora_B`` (outputs, rank),
all of one rank and with one scaling, which ``config.json`` tells. Queries, keys and values are one layer, with one A.
Other tensors, such as tables of embeddings, stand for the model's own.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import MoshiConfig

from ...adapters.config import LoraConfig
from ...adapters.files import (
    BASE_CHECKSUM,
    DROPOUT_HERE,
    KYUTAI_CONFIG,
    KYUTAI_WEIGHTS,
    base_checksum,
    read_config,
    replaced_adapter,
)
from ...adapters.lora import Adapter, Leaves, adapter_leaves, is_of_adapter, trained_leaves
from ...adapters.model import adapter_card
from ...adapters.targets import CODEC, WEIGHT, Linear, saved_whole
from ...checkpoints.files import CheckpointNotFoundError, Source
from ...checkpoints.formats import open_safetensors
from ...checkpoints.rules import Rule, Slot, read_slots, table_slots, table_tensors
from ...checkpoints.verifying import refuse_damage
from ...checkpoints.writing import write_safetensors, write_text
from ...input_checks import shortened
from ...nn.linear import LORA_A, LORA_B
from ..mimi.kyutai_flax_mimi import rope_theta
from .kyutai_config_flax_moshi import moshi_config_from_kyutai, moshi_config_to_kyutai
from .kyutai_flax_moshi import KyutaiCheckpointMixin, find_named_file, kyutai_moshi_rules

_OF_LORA = ("lora", "lora_name", "lora_rank", "lora_scaling")
_DEFAULT_RANK, _DEFAULT_SCALING = 128, 2.0
"""What the ``moshi`` package takes where ``config.json`` does not say."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "ffn_dim",
    "hidden_act",
    "audio_vocab_size",
    "num_codebooks",
)
"""Fields that an adapter's model and the one that it is loaded into must agree in."""

_FORMER = re.compile(r"(?P<projection>.*\.(?:in|out)_proj)\.(?P<matrix>lora_[AB]\.weight)")
"""Names of older files, which have the projections of all codebooks in one tensor."""


@dataclass(frozen=True)
class _Layer:
    """A linear layer of Kyutai's model.

    Attributes:
        name: there.
        slots: of the kernels here that it joins, in the order of its rows.
        shapes: theirs, ``(inputs, outputs)``.
    """

    name: str
    slots: tuple[Slot, ...]
    shapes: tuple[tuple[int, int], ...]

    @property
    def paths(self) -> list[str]:
        """Of the layers here, "/"-joined."""
        return [slot.path.removesuffix("/kernel") for slot in self.slots]

    @property
    def inputs(self) -> int:
        return self.shapes[0][0]

    @property
    def outputs(self) -> int:
        return sum(outputs for _, outputs in self.shapes)

    def keys(self) -> tuple[str, str]:
        """Of its A and its B."""
        return f"{self.name}.{LORA_A}.weight", f"{self.name}.{LORA_B}.weight"


def _language_model(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters by path that Kyutai's language model has."""
    flat = flatten_dict(dict(shapes), sep="/")
    return {path: leaf for path, leaf in flat.items() if not path.startswith("audio_encoder/")}


def _kyutai_layers(shapes: Mapping[str, Any], rules: tuple[Rule, ...]) -> list[_Layer]:
    kernels = {path: leaf for path, leaf in _language_model(shapes).items() if path.endswith("/kernel")}
    joined: dict[str, list[Slot]] = {}
    for slot in table_slots(kernels, rules):
        joined.setdefault((slot.other_keys or (slot.key,))[0].removesuffix(".weight"), []).append(slot)
    layers = []
    for name, slots in joined.items():
        slots.sort(key=lambda slot: slot.order)
        layers.append(_Layer(name, tuple(slots), tuple(kernels[slot.path].shape for slot in slots)))
    return layers


# ------------------------------------------------------------------------------------------------------------- reading


def read_kyutai_adapter(
    source: Source,
    config: MoshiConfig,
    linears: Mapping[str, Linear],
    rules: tuple[Rule, ...],
    shapes: Mapping[str, Any],
    params: Mapping[str, Any] | None,
    verify_base: bool = True,
) -> Adapter:
    """Read an adapter that ``moshi-finetune`` or :func:`write_kyutai_adapter` has written.

    Queries, keys and values get the A that they share in the file, and each its rows of B.

    Args:
        source: a directory or a repository of the Hub, or the file of the weights.
        config: of the model.
        linears: its layers, from ``linear_layers``.
        rules: its table of the PyTorch layout.
        shapes: of its parameters.
        params: its parameters, None if it has none.
        verify_base: refuse an adapter that :func:`write_kyutai_adapter` has written for other weights.

    Raises:
        CheckpointNotFoundError: a file is missing.
        ValueError: it is damaged, or does not fit the model.
    """
    values = read_config(source, KYUTAI_CONFIG)
    rank, scaling = _rank_and_scaling(values, source.name)
    _check_model(values, config, source.name)
    file = open_safetensors(_weights(source, values))
    refuse_damage(file)
    tensors = {key: np.asarray(file[key]) for key in file}
    integers = sorted(key for key, tensor in tensors.items() if not jnp.issubdtype(tensor.dtype, jnp.floating))
    if integers:
        raise ValueError(f"{source.name}: {shortened(integers, 3, ', ')} are not floating-point numbers")
    kyutai_rules = kyutai_moshi_rules(config, values.get("positional_embedding") != "rope_concat")
    layers = _kyutai_layers(shapes, kyutai_rules)
    _split_former(tensors, layers)
    _check_matrices(tensors, layers, rank, source.name)

    matrices: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for layer in layers:
        a, b = (tensors.pop(key) for key in layer.keys())
        ends = np.cumsum([outputs for _, outputs in layer.shapes])
        for path, slot, rows in zip(layer.paths, layer.slots, np.split(b, ends[:-1])):
            matrices[path] = a.T, slot.transform.read(rows)
    whole = _whole_leaves(tensors, shapes, kyutai_rules, source.name)
    changed = [linear for linear in linears.values() if linear.paths[0] in matrices]
    told = LoraConfig(
        r=rank,
        scaling=scaling,
        lora_dropout=json.loads(file.metadata.get(DROPOUT_HERE, "0.0")),
        target_modules=[linear.name for linear in changed if not linear.by_codebook],
        target_parameters=[linear.name + WEIGHT for linear in changed if linear.by_codebook],
        modules_to_save=_modules_of(whole, shapes, rules),
    )
    leaves: Leaves = {}
    for linear in changed:
        for path in linear.paths:
            leaves |= adapter_leaves(told, linear, path, *matrices[path])
    leaves |= _with_base(whole, saved_whole(told, shapes, rules), params, source.name)
    expected = file.metadata.get(BASE_CHECKSUM)
    if verify_base and params is not None and expected not in (None, base_checksum(changed, params)):
        raise ValueError(
            f"{source.name} was made for other weights than these: load it into those, or say verify_base=False"
        )
    return Adapter(told, changed, leaves)


def _rank_and_scaling(values: Mapping[str, Any], where: str) -> tuple[int, float]:
    if values.get("lora") is not True:
        raise ValueError(
            f"{where}: {KYUTAI_CONFIG} is of no adapter (lora={values.get('lora')!r}): lay the one beside it that "
            "moshi-finetune wrote with it, which has lora_rank and lora_scaling"
        )
    rank, scaling = values.get("lora_rank", _DEFAULT_RANK), values.get("lora_scaling", _DEFAULT_SCALING)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{where}: lora_rank={rank!r} of {KYUTAI_CONFIG} must be a whole number, at least 1")
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
        raise ValueError(f"{where}: lora_scaling={scaling!r} of {KYUTAI_CONFIG} must be a finite number")
    return rank, float(scaling)


def _check_model(values: Mapping[str, Any], config: MoshiConfig, where: str) -> None:
    """ValueError if an adapter's ``config.json`` describes another model: equal shapes do not tell, say, the number of
    heads, by which rows of queries and keys are ordered."""
    try:
        told = moshi_config_from_kyutai(
            {field: value for field, value in values.items() if field not in _OF_LORA}, config.audio_encoder_config
        )
    except ValueError as error:
        raise ValueError(f"{where} was made for another model than this: {error}") from error
    both = {"": (told, config), "depth_decoder_config.": (told.depth_decoder_config, config.depth_decoder_config)}
    different = [
        f"{part}{field}={getattr(theirs, field)!r}, not {getattr(ours, field)!r}"
        for part, (theirs, ours) in both.items()
        for field in _SIZES
        if getattr(theirs, field) != getattr(ours, field)
    ]
    if rope_theta(told) != rope_theta(config):
        different.append(f"rope_theta={rope_theta(told)}, not {rope_theta(config)}")
    if different:
        raise ValueError(f"{where} was made for another model than this, of {'; '.join(different)}")


def _weights(source: Source, values: Mapping[str, Any]) -> Path:
    if source.file is not None:
        return source.file
    name = values.get("lora_name") or KYUTAI_WEIGHTS
    hub = {option: value for option, value in source.hub.items() if option != "subfolder"}
    path = find_named_file(source, hub, "lora_name", name)
    if path is None:
        raise CheckpointNotFoundError(source.absence(name) or f"{source.name!r} has no {name}, the adapter itself")
    return path


def _split_former(tensors: dict[str, np.ndarray], layers: list[_Layer]) -> None:
    """Give the tensors of older files the present names, one a layer."""
    alike = Counter(re.sub(r"_projs\.\d+$", "_proj", layer.name) for layer in layers)
    for key in list(tensors):
        match = _FORMER.fullmatch(key)
        if match is None:
            continue
        number = alike.get(match["projection"], 0)
        if number and tensors[key].ndim == 2 and len(tensors[key]) % number == 0:
            for index, rows in enumerate(np.split(tensors.pop(key), number)):
                tensors[f"{match['projection']}s.{index}.{match['matrix']}"] = rows


def _check_matrices(tensors: Mapping[str, np.ndarray], layers: list[_Layer], rank: int, where: str) -> None:
    missing, wrong = [], []
    for layer in layers:
        for key, shape in zip(layer.keys(), ((rank, layer.inputs), (layer.outputs, rank))):
            if key not in tensors:
                missing.append(key)
            elif tensors[key].shape != shape:
                wrong.append(f"{key} has the shape {tensors[key].shape}, not {shape}")
    if missing:
        raise ValueError(
            f"{where}: {KYUTAI_WEIGHTS} lacks {len(missing)} of the {2 * len(layers)} matrices, without which the "
            f"moshi package does not load it either: {shortened(missing, 3, ', ')}"
        )
    if wrong:
        raise ValueError(
            f"{where} does not fit the model and lora_rank={rank} of {KYUTAI_CONFIG}: {shortened(wrong, 3, '; ')}"
        )


def _whole_leaves(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any], rules: tuple[Rule, ...], where: str
) -> Leaves:
    """The parameters that stand for the model's own, of tensors that are no adapter's."""
    if not tensors:
        return {}
    template = _language_model(shapes)
    found = read_slots(table_slots(template, rules), template, tensors)
    if found.unexpected:
        raise ValueError(
            f"{where}: {KYUTAI_WEIGHTS} has tensors that the model has no place for: "
            f"{shortened(sorted(found.unexpected), 3, ', ')}"
        )
    if found.mismatched:
        key, theirs, ours = found.mismatched[0]
        raise ValueError(f"{where} does not fit the model: {key} has the shape {theirs}, not {ours}")
    return dict(found.params)


def _modules_of(paths: Mapping[str, Any], shapes: Mapping[str, Any], rules: tuple[Rule, ...]) -> list[str] | None:
    """The names that the modules of parameters have in PyTorch."""
    slots = table_slots(_language_model(shapes), rules) if paths else []
    return sorted({slot.key.rpartition(".")[0] for slot in slots if slot.path in paths}) or None


def _with_base(whole: Leaves, paths: list[str], params: Mapping[str, Any] | None, where: str) -> Leaves:
    """With the model's own parameters where the names of modules mean more than the file has."""
    lacking = [path for path in paths if path not in whole]
    if not lacking:
        return whole
    if params is None:
        raise ValueError(
            f"{where} has only a part of the modules of {lacking[0]!r}: load it into a model with weights"
        )
    own = flatten_dict(dict(params), sep="/")
    return {**whole, **{path: own[path] for path in lacking}}


# ------------------------------------------------------------------------------------------------------------- writing


def write_kyutai_adapter(
    folder: Path,
    adapter: Adapter,
    config: MoshiConfig,
    linears: Mapping[str, Linear],
    params: Mapping[str, Any],
    readme: str,
) -> list[str]:
    """Write an adapter for the ``moshi`` package, into ``folder``, which is made, or has its adapter replaced.

    All layers there have one rank and one scaling, and queries, keys and values are one. Zeros make up for what the
    adapter has less of: layers, and rank. Parts of a joined layer that have an A of their own are put beside each
    other: three times the rank. That is exact. Where scalings differ, B takes up the quotient, with one rounding.

    Args:
        folder: what other files it has are left.
        adapter: what is written.
        config: of the model that it is for.
        linears: the model's layers, from ``linear_layers``.
        params: of the model.
        readme: the text of ``README.md``.

    Returns:
        The names of the files.

    Raises:
        ValueError: the adapter changes Mimi, or the format cannot express the model.
    """
    _refuse_codec(adapter)
    values = {"model_type": "moshi", **moshi_config_to_kyutai(config)}
    rules = kyutai_moshi_rules(config)
    layers = _kyutai_layers(params, rules)
    joined = {layer.name: _columns(layer, adapter.leaves) for layer in layers}
    ranks = [columns.rank for columns in joined.values()]
    rank = max(ranks) or adapter.config.r
    scalings = {
        path: float(adapter.config.scaling_of(layer.target)) for layer in adapter.layers for path in layer.paths
    }
    counts = Counter(scalings.values()) or Counter({1.0: 1})
    scaling = max(counts, key=lambda value: (value != 0, counts[value]))
    quotients = {path: 1.0 if value == scaling else value / scaling for path, value in scalings.items()}
    dtypes = [leaf.dtype for path, leaf in trained_leaves(adapter.leaves).items() if is_of_adapter(path)]
    dtype = functools.reduce(jnp.promote_types, dtypes or [np.float32])

    tensors = _whole_tensors(adapter, params, rules)
    for layer in layers:
        tensors |= zip(layer.keys(), _matrices(layer, joined[layer.name], adapter.leaves, quotients, rank, dtype))
    changed = [linear for linear in linears.values() if not linear.name.startswith(CODEC)]
    notes = {BASE_CHECKSUM: base_checksum(changed, params)}
    if adapter.config.lora_dropout:
        notes[DROPOUT_HERE] = json.dumps(adapter.config.lora_dropout)
    files = [KYUTAI_WEIGHTS, KYUTAI_CONFIG, "README.md"]
    values |= {"lora": True, "lora_rank": rank, "lora_scaling": scaling}
    with replaced_adapter(folder, files) as staged:
        write_safetensors(staged / KYUTAI_WEIGHTS, tensors, "pt", notes)
        write_text(staged / KYUTAI_CONFIG, json.dumps(values, indent=2) + "\n")
        write_text(staged / "README.md", readme)
    return files


def _refuse_codec(adapter: Adapter) -> None:
    of_codec = [layer.name for layer in adapter.layers if layer.name.startswith(CODEC)]
    of_codec += [path for path in adapter.whole_parameters if path.startswith("audio_encoder/")]
    if of_codec:
        raise ValueError(
            f"the adapter changes Mimi ({of_codec[0]!r}), which Kyutai's adapters cannot: save it in PEFT's format"
        )


@dataclass(frozen=True)
class _Columns:
    """Where the adapters of the parts of a joined layer lie in its rank.

    Attributes:
        matrices: the different A, (rank, inputs), one after the other.
        starts: path of a part -> its first column.
        rank: of all together.
    """

    matrices: list[np.ndarray]
    starts: dict[str, int]
    rank: int


def _columns(layer: _Layer, leaves: Leaves) -> _Columns:
    matrices: list[np.ndarray] = []
    places: list[int] = []
    starts: dict[str, int] = {}
    rank = 0
    for path in layer.paths:
        if f"{path}/{LORA_A}" not in leaves:
            continue
        a = np.asarray(leaves[f"{path}/{LORA_A}"]).T
        same = [start for other, start in zip(matrices, places) if np.array_equal(a, other)]
        if not same:
            matrices.append(a)
            places.append(rank)
            rank += len(a)
        starts[path] = same[0] if same else places[-1]
    return _Columns(matrices, starts, rank)


def _matrices(
    layer: _Layer, columns: _Columns, leaves: Leaves, quotients: Mapping[str, float], rank: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a joined layer, ``(rank, inputs)`` and ``(outputs, rank)``."""
    a, b = np.zeros((rank, layer.inputs), dtype), np.zeros((layer.outputs, rank), dtype)
    if columns.matrices:
        a[: columns.rank] = np.concatenate(columns.matrices)
    row = 0
    for path, slot, (_, outputs) in zip(layer.paths, layer.slots, layer.shapes):
        if path in columns.starts:
            part = slot.transform.write(np.asarray(leaves[f"{path}/{LORA_B}"]))
            if quotients[path] != 1:
                part = part.astype(np.float64) * quotients[path]
            start = columns.starts[path]
            b[row : row + outputs, start : start + part.shape[1]] = part.astype(dtype)
        row += outputs
    return a, b


def _whole_tensors(adapter: Adapter, params: Mapping[str, Any], rules: tuple[Rule, ...]) -> dict[str, np.ndarray]:
    """The parameters that the adapter has instead of the model's; of a joined tensor the model's own beside them."""
    whole = adapter.whole_parameters
    if not whole:
        return {}
    own = _language_model(params)
    slots = table_slots(own, rules)
    keys = {slot.key for slot in slots if slot.path in whole}
    wanted = {slot.path: whole.get(slot.path, own[slot.path]) for slot in slots if slot.key in keys}
    return {tensor.key: tensor.build() for tensor in table_tensors(unflatten_dict(wanted, sep="/"), rules)}


class KyutaiAdapterMixin(KyutaiCheckpointMixin):
    """Kyutai's own files, those of adapters included."""

    def _read_kyutai_adapter(self, source: Source, verify_base: bool) -> Adapter:
        adapter = read_kyutai_adapter(
            source,
            self.config,
            self._linear_layers(),
            self.checkpoint_rules,
            self._float_shape_tree,
            self._checked_base(),
            verify_base,
        )
        adapter.config.base_model_name_or_path = self.hub_id or self.name_or_path
        return adapter

    def _write_kyutai_adapter(self, folder: Path, adapter: Adapter, params: Mapping[str, Any]) -> list[str]:
        readme = adapter_card(adapter, "kyutai")
        return write_kyutai_adapter(folder, adapter, self.config, self._linear_layers(), params, readme)
