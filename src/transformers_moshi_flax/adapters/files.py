"""Adapters in PEFT's files: ``adapter_model.safetensors`` and ``adapter_config.json``, and which format a folder has.

A layer's matrices are ``lora_A`` (rank, inputs) and ``lora_B`` (outputs, rank) there. Of the layers that are one a
codebook, PEFT has two matrices for the whole three-dimensional weight: ``lora_A`` (codebooks · rank, inputs), the rows
of the first codebook first, and ``lora_B`` (outputs, rank · codebooks), the codebooks of the first rank first.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ..checkpoints.files import CheckpointNotFoundError, Source
from ..checkpoints.formats import open_safetensors, parse_json
from ..checkpoints.replacing import whole_folder
from ..checkpoints.rules import Rule, read_params, table_tensors
from ..checkpoints.verifying import refuse_damage
from ..checkpoints.writing import write_safetensors, write_text
from ..input_checks import shortened
from ..nn.linear import LORA_A, LORA_B
from .config import LoraConfig
from .lora import Adapter, Leaves, adapter_leaves
from .targets import WEIGHT, Linear, saved_whole, targeted

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KYUTAI_WEIGHTS, KYUTAI_CONFIG = "lora.safetensors", "config.json"
PREFIX = "base_model.model."
BASE_CHECKSUM = "base_checksum"
"""Key of the header's metadata: a checksum of the layers that the adapter was made for."""

DROPOUT_HERE = "lora_dropout"
"""Key of the header's metadata: the dropout of an adapter of layers that are one a codebook, which PEFT refuses to
load with any. Its configuration has none then; outside of training that changes nothing."""


def write_adapter(
    folder: Path, adapter: Adapter, rules: tuple[Rule, ...], params: Mapping[str, Any] | None, readme: str
) -> list[str]:
    """Write an adapter's files into ``folder``, which is made, or replaced as a whole if it has an adapter.

    Args:
        folder: what other files it has are left.
        adapter: what is written.
        rules: the model's table of the PyTorch layout.
        params: of the model that it is for; None leaves out their checksum.
        readme: the text of ``README.md``.

    Returns:
        The names of the files.
    """
    tensors = adapter_tensors(adapter, rules)
    by_codebook = [layer.name + WEIGHT for layer in adapter.layers if layer.by_codebook]
    names = [layer.name for layer in adapter.layers if not layer.by_codebook]
    config = adapter.config.to_dict() | {
        "target_modules": names,
        "target_parameters": by_codebook or None,
        "exclude_modules": None,
    }
    files = (WEIGHTS, CONFIG, "README.md")
    notes = {} if params is None else {BASE_CHECKSUM: base_checksum(adapter.layers, params)}
    if by_codebook and adapter.config.lora_dropout:
        notes[DROPOUT_HERE] = json.dumps(adapter.config.lora_dropout)
        config["lora_dropout"] = 0.0
    with replaced_adapter(folder, files) as staged:
        write_safetensors(staged / WEIGHTS, tensors, "pt", notes)
        write_text(staged / CONFIG, json.dumps(config, indent=2) + "\n")
        write_text(staged / "README.md", readme)
    return list(files)


def adapter_tensors(adapter: Adapter, rules: tuple[Rule, ...]) -> dict[str, np.ndarray]:
    """The tensors of an adapter's file by key."""
    tensors: dict[str, np.ndarray] = {}
    for layer in adapter.layers:
        a = np.stack([np.asarray(adapter.leaves[f"{path}/{LORA_A}"]).T for path in layer.paths])
        b = np.stack([np.asarray(adapter.leaves[f"{path}/{LORA_B}"]).T for path in layer.paths], axis=-1)
        tensors[f"{PREFIX}{layer.name}.{LORA_A}.weight"] = a.reshape(-1, layer.inputs)
        tensors[f"{PREFIX}{layer.name}.{LORA_B}.weight"] = b.reshape(layer.outputs, -1)
    whole = adapter.whole_parameters
    if whole:
        made = table_tensors(unflatten_dict(whole, sep="/"), rules)
        tensors |= {PREFIX + tensor.key: tensor.build() for tensor in made}
    return tensors


def read_adapter(
    source: Source,
    layers: Mapping[str, Linear],
    rules: tuple[Rule, ...],
    shapes: Mapping[str, Any],
    params: Mapping[str, Any] | None,
) -> Adapter:
    """Read an adapter that PEFT or :func:`write_adapter` has written.

    Args:
        source: a directory or a repository of the Hub.
        layers: of the model, from ``linear_layers``.
        rules: the model's table of the PyTorch layout.
        shapes: of the model's parameters.
        params: the model's parameters, to check that the adapter was made for them; None does not.

    Raises:
        CheckpointNotFoundError: there is no adapter.
        ValueError: it is damaged, of another kind, or does not fit the model.
    """
    values = read_config(source, CONFIG)
    file = open_safetensors(_found(source, WEIGHTS))
    refuse_damage(file)
    if DROPOUT_HERE in file.metadata:
        values["lora_dropout"] = json.loads(file.metadata[DROPOUT_HERE])
    config = LoraConfig.from_dict(values, f"{source.name}: {CONFIG}")
    tensors = {key: np.asarray(file[key]) for key in file}
    try:
        wanted = targeted(config, layers)
        whole = saved_whole(config, shapes, rules)
    except ValueError as error:
        raise ValueError(f"{source.name} does not fit the model: {error}") from error
    leaves = _layer_leaves(config, wanted, tensors, source.name)
    if whole:
        leaves |= _whole_leaves(whole, shapes, rules, tensors, source.name)
    if tensors:
        names = shortened(sorted(tensors), 3, ", ")
        raise ValueError(f"{source.name}: {WEIGHTS} has tensors that {CONFIG} has no place for: {names}")
    expected = file.metadata.get(BASE_CHECKSUM)
    if params is not None and expected is not None and expected != base_checksum(wanted, params):
        base = config.base_model_name_or_path
        raise ValueError(
            f"{source.name} was made for other weights than these{f' (for {base})' if base else ''}: load it into "
            "those, or say verify_base=False"
        )
    return Adapter(config, wanted, leaves)


def is_of_kyutai(source: Source) -> bool:
    """Whether it is Kyutai's files that an adapter lies in, and not PEFT's."""
    if source.file is not None:
        return source.file.name != WEIGHTS
    if source.find(CONFIG) is not None:
        return False
    return source.find(KYUTAI_WEIGHTS) is not None or (source.read_json(KYUTAI_CONFIG) or {}).get("lora") is True


def read_config(source: Source, name: str) -> dict[str, Any]:
    """The content of an adapter's configuration.

    Raises:
        CheckpointNotFoundError: there is none.
        ValueError: it cannot be read.
    """
    try:
        return parse_json(_found(source, name).read_bytes())
    except CheckpointNotFoundError:
        raise
    except ValueError as error:
        raise ValueError(f"{source.name}: {name} cannot be read ({error}); save the adapter again") from error


@contextmanager
def replaced_adapter(folder: Path, files: Sequence[str]) -> Iterator[Path]:
    """A directory to write an adapter in; when the block ends it is in ``folder``, in one step, instead of an adapter
    of any format that was there. Other files stay.

    Args:
        folder: made if it is not there.
        files: what the block writes.

    Raises:
        ValueError: ``folder`` has a ``config.json`` that is no adapter's, and would be replaced.
    """
    replaced = {WEIGHTS, CONFIG, KYUTAI_WEIGHTS}
    if _tells_of_adapter(folder / KYUTAI_CONFIG):
        replaced.add(KYUTAI_CONFIG)
    elif KYUTAI_CONFIG in files and (folder / KYUTAI_CONFIG).exists():
        raise ValueError(
            f"{str(folder)!r} has a config.json that is no adapter's: save the adapter into another folder"
        )
    with whole_folder(folder, keeps=lambda path: path.is_file() and path.name not in replaced) as staged:
        yield staged


def _tells_of_adapter(config: Path) -> bool:
    try:
        return parse_json(config.read_bytes()).get("lora") is True
    except (OSError, ValueError):
        return False


def _found(source: Source, name: str) -> Path:
    path = source.find(name)
    if path is None:
        owner = "PEFT" if name in (WEIGHTS, CONFIG) else "Kyutai"
        lacking = f"{source.name!r} has no {name}, so it is no adapter in {owner}'s format"
        raise CheckpointNotFoundError(source.absence(name) or lacking)
    return path


def _layer_leaves(config: LoraConfig, layers: Sequence[Linear], tensors: dict[str, np.ndarray], where: str) -> Leaves:
    """The leaves of the layers; their tensors are taken out of ``tensors``."""
    leaves: Leaves = {}
    for layer in layers:
        rank, codebooks = config.rank_of(layer.target), len(layer.paths)
        keys = [f"{PREFIX}{layer.name}.{name}.weight" for name in (LORA_A, LORA_B)]
        shapes = [(codebooks * rank, layer.inputs), (layer.outputs, rank * codebooks)]
        for key, shape in zip(keys, shapes):
            if key not in tensors:
                raise ValueError(f"{where}: {WEIGHTS} lacks {key}")
            if tensors[key].shape != shape:
                raise ValueError(
                    f"{where}: {key} has the shape {tensors[key].shape}, but the model and `r`={rank} want {shape}"
                )
        a, b = (tensors.pop(key) for key in keys)
        a, b = a.reshape(codebooks, rank, layer.inputs), b.reshape(layer.outputs, rank, codebooks)
        for number, path in enumerate(layer.paths):
            leaves |= adapter_leaves(config, layer, path, a[number].T, b[..., number].T)
    return leaves


def _whole_leaves(
    paths: Sequence[str],
    shapes: Mapping[str, Any],
    rules: tuple[Rule, ...],
    tensors: dict[str, np.ndarray],
    where: str,
) -> Leaves:
    flat = flatten_dict(dict(shapes), sep="/")
    template = unflatten_dict({path: flat[path] for path in paths}, sep="/")
    named = {key.removeprefix(PREFIX): key for key in tensors}
    found, missing, unexpected, mismatched = read_params(
        template, rules, {key: tensors[full] for key, full in named.items()}
    )
    if missing or mismatched:
        raise ValueError(f"{where}: {WEIGHTS} lacks {missing}, or has another shape: {mismatched}")
    for key in named.keys() - set(unexpected):
        del tensors[named[key]]
    return flatten_dict(found, sep="/")


def base_checksum(layers: Sequence[Linear], params: Mapping[str, Any]) -> str:
    """A checksum of the first and the last layer that an adapter changes, in bfloat16: the same in every dtype that
    the model may be loaded in, and cheap however large it is."""
    if not layers:
        return ""
    flat = flatten_dict(dict(params), sep="/")
    total = 0
    for path in (layers[0].paths[0], layers[-1].paths[-1]):
        kernel = np.asarray(flat[f"{path}/kernel"]).astype(ml_dtypes.bfloat16)
        total = zlib.crc32(kernel.tobytes(), total)
    return f"{total:08x}"
