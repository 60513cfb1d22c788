"""Opening checkpoints for a look: on the Hub, the headers of safetensors files alone are fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from transformers_moshi_flax.cli.checkpoints import Checkpoint, check_source, find_config
from transformers_moshi_flax.cli.errors import BadCheckpoint, UserMistake, hub_errors


def open_checkpoint(option: str, name: str, headers_only: bool = False) -> Checkpoint:
    """Open a directory, a weight file or a repository of the Hub, Kyutai's layout included; pickles are refused.

    Args:
        option: how messages call what was given.
        name: what was given.
        headers_only: of a repository, fetch no tensors: they have shapes and dtypes, and zeros in place of numbers.

    Raises:
        UserMistake: nothing is there, or no weights in a format that is read.
        BadCheckpoint: the weights are damaged.
    """
    from transformers_moshi_flax.checkpoints.files import Source

    check_source(option, name, files=True)
    if Path(name).is_file() and Path(name).suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UserMistake(f"{option}: {name!r} is a pickle; first moshi-flax convert its directory --from pt")
    config = find_config(option, name)
    source = Source.locate(name)
    opening = headers_on_hub if headers_only and source.folder is None else Source.weights
    if _is_of_kyutai(source, config):
        opening = _weights_of_kyutai
    errors: tuple[type[Exception], ...] = (*hub_errors(), ValueError)
    try:
        layout, tensors = opening(source)
    except errors as error:
        missing = isinstance(error, hub_errors()) and not _has_weights(source)
        kind = UserMistake if missing else BadCheckpoint
        raise kind(f"{option}: cannot open {name!r}: {error}") from error
    return Checkpoint(name, source, layout, tensors, config)


def _is_of_kyutai(source: Any, config: dict | None) -> bool:
    """Whether the checkpoint has the parts of Kyutai's layout: its configuration, or none and the published names."""
    from transformers_moshi_flax.checkpoints.recognising import is_kyutai_config
    from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import MIMI_NAME

    if source.file is not None:
        return False
    if config:
        return is_kyutai_config(config)
    return source.find(MIMI_NAME) is not None


def _weights_of_kyutai(source: Any) -> tuple[str, Any]:
    """The tensors of the language model and of Mimi, which lie in two files."""
    from transformers_moshi_flax.checkpoints.formats import ShardedFiles, open_kyutai
    from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import find_kyutai_files

    found = find_kyutai_files(source.name)
    files = [open_kyutai(path) for path in (found.moshi_weights, found.mimi_weights)]
    return "pt", ShardedFiles(
        found.moshi_weights.parent / "config.json", {key: file for file in files for key in file}
    )


def _has_weights(source: Any) -> bool:
    """Whether a directory has an entry of a checkpoint (where a shard is missing all the same)."""
    from transformers_moshi_flax.checkpoints.files import active_entry

    return source.folder is not None and active_entry(source.folder) is not None


def headers_on_hub(source: Any) -> tuple[str, Any]:
    """Layout and tensors of a repository by range requests for the headers.

    As :meth:`Source.weights` of ``checkpoints.files``, which is used for what has no such headers, and when the Hub
    cannot be asked.

    Returns:
        The layout, and a ``TensorFile`` or ``ShardedFiles`` whose arrays have the right shapes and dtypes, take no
        memory and hold zeros.

    Raises:
        OSError, ValueError: as ``Source.weights``; ``ValueError`` also for a damaged header.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    from transformers_moshi_flax.checkpoints.files import LAYOUTS
    from transformers_moshi_flax.checkpoints.formats import ShardedFiles

    try:
        present = set(HfApi().list_repo_files(source.name))
    except hub_errors():
        return source.weights()
    entry = next((name for names in LAYOUTS.values() for name in names if name in present), "")
    if ".safetensors" not in entry:
        return source.weights()
    try:
        if entry.endswith(".index.json"):
            index = (source.read_json(entry) or {})["weight_map"]
            files = {name: header_on_hub(source.name, name) for name in sorted(set(index.values()))}
            tensors = ShardedFiles(Path(entry), {key: files[name] for key, name in index.items()})
        else:
            tensors = header_on_hub(source.name, entry)
    except (SafetensorsParsingError, KeyError, AttributeError) as error:
        raise ValueError(f"{source.name}/{entry} is damaged ({error}); upload it again") from error
    layout = tensors.metadata.get("format", "pt")
    if layout not in LAYOUTS:
        raise ValueError(f"{source.name}/{entry} says that its format is {layout!r}; only {list(LAYOUTS)} are read")
    return layout, tensors


def header_on_hub(repo_id: str, filename: str) -> Any:
    """One file's header as a ``TensorFile``."""
    from huggingface_hub import HfApi

    from transformers_moshi_flax.checkpoints.formats import DTYPES, TensorFile

    header = HfApi().parse_safetensors_file_metadata(repo_id, filename)
    unknown = sorted({tensor.dtype for tensor in header.tensors.values()} - DTYPES.keys())
    if unknown:
        raise ValueError(f"{repo_id}/{filename} has tensors of the unknown dtypes {unknown}; convert them")
    zeros = {
        name: np.broadcast_to(np.zeros((), DTYPES[tensor.dtype]), tensor.shape)
        for name, tensor in header.tensors.items()
    }
    return TensorFile(Path(filename), header.metadata, zeros)
