"""The folder of an export: graphs, weights, tokenizer, and a manifest that says all that a runtime has to know."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import __version__
from ..checkpoints.configs import override_config
from ..checkpoints.files import Source
from ..checkpoints.replacing import whole_folder
from ..generation.sampling import TOP_P_CANDIDATES
from ..input_checks import is_whole
from ..models.moshi.generation_flax_moshi import DEPTH_PREFIX
from ..runtime.manifest import FORMAT, FORMAT_VERSION, MANIFEST, NEXT, checksum
from .graph import OPSET
from .saving import save_graph
from .steps import Step, dialogue_steps

QUANTIZATIONS = ("none", "int8")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def export_onnx(
    model: Any,
    folder: str | os.PathLike,
    source: str | os.PathLike | None = None,
    batch_size: int = 1,
    context: int | None = None,
    quantization: str = "none",
    **options: Any,
) -> dict[str, Any]:
    """Writes a Moshi as ONNX graphs, with all that a runtime needs. It is complete before the folder has its name.

    Args:
        model: a ``FlaxMoshiForConditionalGeneration`` in float32 with the whole of Mimi.
        folder: where to; not there yet, or empty.
        source: a checkpoint, directory or Hub id, whose tokenizer and licence go along.
        batch_size: dialogues that go on side by side.
        context: frames that Moshi looks back, at most as many as the model's ``sliding_window`` (default).
        quantization: of the weights of Moshi's linear layers, ``"none"`` or ``"int8"``; Mimi's stay float32.
        **options: how tokens are chosen, as of ``model.streaming``, as JSON has it; numbers become inputs.

    Returns:
        The manifest.

    Raises:
        ValueError: another model or dtype, a folder in use, a size that is out of range; an option that cannot be
            exported, which is named (``NotExportable``).
        OSError: something cannot be read or written.
    """
    folder = Path(folder)
    check_unused(folder)
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"`quantization` is {quantization!r}: choose from {', '.join(map(repr, QUANTIZATIONS))}.")
    try:
        json.dumps(options)
    except TypeError as error:
        raise ValueError(
            f"options must be plain numbers, strings and lists, as the manifest has them: {error}"
        ) from error
    model, params = with_context(checked(model), context)
    stream = model.streaming(batch_size, params=params, **options)
    check_sampling(stream, (model.config.vocab_size, model.config.audio_vocab_size))
    steps = dialogue_steps(model, stream, quantization)
    with whole_folder(folder) as fresh:
        for step in steps.values():
            save_graph(step.graph, fresh, __version__)
        tokenizer, licence = copied(source, fresh)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "opset": OPSET,
            "quantization": quantization,
            "license": licence,
            "batch_size": batch_size,
            "context": model.config.sliding_window,
            "sampling_rate": stream.sampling_rate,
            "frame_size": stream.frame_size,
            "frame_rate": stream.frame_rate,
            "channels": stream.channels,
            "num_codebooks": stream.num_codebooks,
            "vocab_size": model.config.vocab_size,
            "audio_vocab_size": model.config.audio_vocab_size,
            "tokenizer": tokenizer,
            "options": options,
            "sampling": stream.numbers,
            "bounds": {name: bound for name, bound in stream.bounds.items() if name in stream.numbers},
            "steps": {name: described(step) for name, step in sorted(steps.items())},
            "files": {
                path.name: {"bytes": path.stat().st_size, "sha256": checksum(path)} for path in sorted(fresh.iterdir())
            },
        }
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return manifest


def check_unused(folder: Path) -> None:
    """Raises ``ValueError`` for a folder that is there, unless it is empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"`folder` is {str(folder)!r}, which is there and not empty: give another one.")


def checked(model: Any) -> Any:
    """The model; raises ``ValueError`` if it is not one that can be exported."""
    if not hasattr(model, "streaming") or not hasattr(model.config, "audio_encoder_config"):
        raise ValueError(f"`model` is a {type(model).__name__}: only whole Moshi models are exported.")
    if jnp.dtype(model.dtype) != jnp.float32:
        raise ValueError(f"`model` computes in {jnp.dtype(model.dtype)}: load it with dtype=jnp.float32 to export it.")
    if model.quantization is not None:
        raise ValueError("`model` is quantized: make floats of its weights with `dequantize` to export it.")
    codec = model.config.audio_encoder_config
    if codec.encoder_config is None or codec.decoder_config is None:
        raise ValueError("`model` has only a half of Mimi: load it with both to export it.")
    return model


def check_sampling(stream: Any, vocabularies: tuple[int, int]) -> None:
    """Raises ``ValueError`` for top-p without top-k, which sorts a large vocabulary where the best do not suffice."""
    for prefix, sampling, size in zip(("", DEPTH_PREFIX), stream.samplings, vocabularies):
        if sampling.do_sample and sampling.top_p is not None and sampling.top_k is None and size > TOP_P_CANDIDATES:
            raise ValueError(
                f"`{prefix}top_p` without `{prefix}top_k` is not exported, as it sorts all {size} tokens where it has "
                f"to: give `{prefix}top_k` too."
            )


def with_context(model: Any, context: int | None) -> tuple[Any, Any]:
    """The model with a shorter window of attention, without parameters, and these; raises ``ValueError`` for a window
    that it does not have."""
    params, window = model.whole_params(None), model.config.sliding_window
    if context is None or context == window:
        return model, params
    if not is_whole(context) or not 1 <= context <= window:
        raise ValueError(f"`context` is {context!r}, but must be in [1, {window}], the `sliding_window` of the model.")
    shorter = type(model)(override_config(model.config, {"sliding_window": int(context)}), _do_init=False)
    shorter.generation_config = model.generation_config
    return shorter, params


def copied(source: str | os.PathLike | None, folder: Path) -> tuple[list[str], str | None]:
    """Copies the files of the tokenizer; returns their names, and the licence that the model card names."""
    if source is None:
        return [], None
    place, names = Source.locate(source), []
    for name in TOKENIZER_FILES:
        found = place.find(name)
        if found is not None:
            shutil.copyfile(found, folder / name)
            names.append(name)
    card = place.find("README.md")
    return names, None if card is None else licence_of(Path(card).read_text("utf-8", errors="replace"))


def licence_of(card: str) -> str | None:
    """The licence in the front matter of a model card."""
    lines = card.splitlines()
    if not lines or lines[0] != "---":
        return None
    for line in lines[1:]:
        if line == "---":
            return None
        if line.startswith("license:"):
            return line.removeprefix("license:").strip() or None
    return None


def described(step: Step) -> dict[str, Any]:
    """What the manifest says of a step."""
    graph = step.graph
    state = {entry.name for entry in step.state}

    def tensors(found: dict[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, Any]:
        return {name: {"shape": list(shape), "dtype": dtype.name} for name, (shape, dtype) in found.items()}

    return {
        "file": f"{graph.name}.onnx",
        "inputs": tensors({name: found for name, found in graph.inputs.items() if name not in state}),
        "outputs": tensors({name: found for name, found in graph.outputs.items() if not name.startswith(NEXT)}),
        "state": [
            {
                "name": entry.name,
                "shape": list(entry.shape),
                "dtype": entry.dtype,
                "initial": entry.initial,
                "in_place": entry.in_place,
            }
            for entry in step.state
        ],
        "uniforms": [
            {"input": draw.name, "stream": draw.stream, "part": draw.part, "count": draw.count} for draw in step.draws
        ],
    }
