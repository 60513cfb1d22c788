"""What tests of whole runs share: a tiny model, conversations of noise, a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.configs import tiny_moshi_config
from transformers_moshi_flax.training.configuration import TrainingConfig, build_configuration

LENGTHS = (17, 9, 12, 8, 15, 11)


def smaller_config(num_hidden_layers: int = 1) -> Any:
    """A tiny Moshi that compiles in little time."""
    codec = {"num_hidden_layers": 1, "num_quantizers": 2}
    depth = {"num_hidden_layers": 1}
    return tiny_moshi_config(
        num_hidden_layers=num_hidden_layers, num_codebooks=2, audio_encoder_config=codec, depth_decoder_config=depth
    )


def write_conversations(folder: Path, lengths: tuple[int, ...] = LENGTHS, codebooks: int = 2) -> None:
    """A file a conversation."""
    draw = np.random.default_rng(len(lengths))
    folder.mkdir(parents=True)
    for number, frames in enumerate(lengths):
        np.savez(
            folder / f"{number}.npz",
            moshi_text_tokens=draw.integers(4, 60, frames),
            moshi_audio_tokens=draw.integers(0, 32, (codebooks, frames)),
            user_audio_tokens=draw.integers(0, 32, (codebooks, frames)),
        )


def write_inputs(folder: Path) -> None:
    """What a run needs: ``model/config.json``, ``train/`` and ``held-out/``."""
    smaller_config().save_pretrained(folder / "model")
    write_conversations(folder / "train")
    write_conversations(folder / "held-out", LENGTHS[:3])


def run_values(folder: Path, **overrides: Any) -> dict[str, dict[str, Any]]:
    """The configuration of a run as YAML has it; ``overrides`` such as ``run__steps=3`` replace single values."""
    values: dict[str, dict[str, Any]] = {
        "model": {"config": str(folder / "model")},
        "data": {"train": str(folder / "train"), "max_length": 12, "min_length": 2, "batch_size": 2},
        "optimizer": {"learning_rate": 0.01},
        "run": {"output_dir": str(folder / "run"), "steps": 6, "log_every": 1, "checkpoint_every": 2, "samples": 0},
    }
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return values


def run_config(folder: Path, **overrides: Any) -> TrainingConfig:
    """As :func:`run_values`, built."""
    return build_configuration(run_values(folder, **overrides))
