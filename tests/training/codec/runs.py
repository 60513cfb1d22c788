"""What tests of whole runs share: a tiny codec, recordings of tones and noise, a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tests.configs import tiny_mimi_config
from transformers_moshi_flax.training.codec.configuration import CodecTrainingConfig
from transformers_moshi_flax.training.configuration import build_configuration

RATE = 24_000


def small_config(**overrides: Any) -> Any:
    """The tiny Mimi with one layer in each transformer and three codebooks."""
    return tiny_mimi_config(**{"num_hidden_layers": 1, "num_quantizers": 3, **overrides})


def write_recordings(folder: Path, number: int, seconds: float = 0.6) -> None:
    """Files of tones in noise, and a manifest that says which tones."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(number)
    time = np.arange(round(seconds * RATE)) / RATE
    lines = []
    for place in range(number):
        hertz = rng.integers(200, 2000)
        audio = 0.4 * np.sin(2 * np.pi * hertz * time) + 0.02 * rng.standard_normal(len(time))
        soundfile.write(folder / f"{place}.wav", audio, RATE)
        lines.append(json.dumps({"path": f"{place}.wav", "text": "tone"}))
    (folder / "all.jsonl").write_text("\n".join(lines) + "\n")


def write_inputs(folder: Path) -> None:
    """What a run needs: ``model/config.json``, ``train/`` and ``held-out/``."""
    small_config().save_pretrained(folder / "model")
    write_recordings(folder / "train", 5)
    write_recordings(folder / "held-out", 2)


def run_values(folder: Path, **overrides: Any) -> dict[str, dict[str, Any]]:
    """The configuration of a run as YAML has it; ``overrides`` such as ``run__steps=3`` replace single values."""
    values: dict[str, dict[str, Any]] = {
        "model": {"config": str(folder / "model")},
        "data": {"train": str(folder / "train"), "crop_seconds": 0.02, "batch_size": 4},
        "losses": {"windows": [32, 64], "waveform_l2": 0.1},
        "quantizer": {"start_step": 2, "kmeans_batches": 2, "kmeans_iterations": 5},
        "optimizer": {"learning_rate": 0.01, "schedule": "constant"},
        "run": {"output_dir": str(folder / "run"), "steps": 6, "log_every": 1, "checkpoint_every": 100, "samples": 0},
    }
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return values


def run_config(folder: Path, **overrides: Any) -> CodecTrainingConfig:
    """As :func:`run_values`, built."""
    return build_configuration(run_values(folder, **overrides), kind=CodecTrainingConfig)
