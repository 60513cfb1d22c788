"""Folders of ``moshi-flax export``: held against the model, and what is told of that."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from transformers_moshi_flax.cli.audio import read_audio
from transformers_moshi_flax.cli.checkpoints import EMBEDDED_QUESTION, name_of, read_config
from transformers_moshi_flax.cli.console import slow
from transformers_moshi_flax.cli.errors import BadCheckpoint, UserMistake, as_mistake, hub_errors
from transformers_moshi_flax.cli.parts import readable_bytes

FRAMES = 100
"""Of a dialogue at least; a recording that is shorter is followed by silence."""


def load_for_export(option: str, source: str) -> Any:
    """The Moshi of a checkpoint, in float32, its weights too.

    Raises:
        UserMistake: there is no such checkpoint, it is of another model, or cannot be read.
    """
    config = read_config(option, source)
    if config.get("model_type") != "moshi":
        raise UserMistake(f"{option}: {source!r} is a {config.get('model_type')!r} checkpoint; give a Moshi one")
    from transformers_moshi_flax import FlaxMoshiForConditionalGeneration

    with (
        as_mistake(f"{option}: cannot load {source!r}", *hub_errors(), ValueError),
        slow(f"loading {name_of(source)}"),
    ):
        model = FlaxMoshiForConditionalGeneration.from_pretrained(source, dtype=np.float32)
        if model.quantization is not None:
            model.dequantize()
        return model


def verified(option: str, model: Any, folder: Path, audio: Path | None) -> dict[str, Any]:
    """How far a model and its export agree in a dialogue of :data:`FRAMES` frames or as long as ``audio``.

    Raises:
        UserMistake: onnxruntime is not installed, the audio cannot be read, the export is of another model.
        BadCheckpoint: the export is damaged.
    """
    try:
        from transformers_moshi_flax.runtime import BadExport, OnnxMoshi
    except ImportError as error:
        raise UserMistake(f"{option}: exports need onnxruntime; install transformers-moshi-flax[onnx]") from error
    from transformers_moshi_flax.export.verifying import compare

    try:
        exported = OnnxMoshi(folder)
    except BadExport as error:
        raise BadCheckpoint(f"{option}: {error}") from error
    samples = read_audio(audio or EMBEDDED_QUESTION, exported.sampling_rate, "--audio")
    samples = np.pad(samples, (0, max(0, FRAMES * exported.frame_size - len(samples))))
    with as_mistake(f"{option}: cannot compare with {str(folder)!r}", ValueError), slow(f"running {folder}"):
        agreement = compare(model, exported, samples)
    size = sum(file["bytes"] for file in exported.manifest["files"].values())
    return {
        "export": str(folder),
        "quantization": exported.manifest["quantization"],
        "bytes": size,
        **dataclasses.asdict(agreement),
    }


def show_agreement(report: dict[str, Any], console: Console) -> None:
    """The report of :func:`verified` as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("frames", f"{report['frames']}, the same in the first {report['same_frames']}")
    for name in ("text_ids", "audio_codes"):
        table.add_row(f"equal {name}", f"{100 * report[name]:.2f} %")
    for name in ("text_logits", "audio"):
        table.add_row(
            f"largest difference of {name}", f"{report[name]:.1e} of the largest (≤ {report['tolerance']:g})"
        )
    table.add_row("signal to noise", f"{report['snr']:.1f} dB")
    table.add_row("size", readable_bytes(report["bytes"]))
    table.add_row("a frame", f"{report['export_ms']:.1f} ms, in JAX {report['model_ms']:.1f} ms (medians)")
    table.add_row("", "agrees" if report["agrees"] else "[red]differs[/red]")
    console.print(table)
