"""What tests of language models' training share: a tokenizer of words, texts, a tiny model, a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.configs import tiny_llama_config
from transformers_moshi_flax.training.configuration import build_configuration

WORDS = 40
COUNTS = (3, 17, 9, 1, 25, 6, 12, 30, 8, 5)


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Words are w1, w2, …; w0 ends a text."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0")
    tokenizer.save_pretrained(folder)
    return tokenizer


def draw_texts(counts: tuple[int, ...] = COUNTS) -> list[str]:
    """Of so many words each."""
    draw = np.random.default_rng(len(counts))
    return [" ".join(f"w{number}" for number in draw.integers(1, WORDS, count)) for count in counts]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "source": "drawn"}) + "\n" for text in texts))
    return path


def write_inputs(folder: Path, model_type: str = "llama", **overrides: Any) -> None:
    """What a run needs: ``model/config.json`` and a tokenizer beside it, and ``train.jsonl``."""
    config = {"vocab_size": WORDS, "num_hidden_layers": 2, "eos_token_id": 0, **overrides}
    tiny_llama_config(model_type, **config).save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    write_lines(folder / "train.jsonl", draw_texts())


def run_values(folder: Path, **overrides: Any) -> dict[str, Any]:
    """The configuration of a run as YAML has it; ``overrides`` such as ``run__steps=3`` replace single values."""
    values: dict[str, Any] = {
        "task": "text",
        "model": {"config": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl"), "evaluation_share": 0.2, "max_length": 12, "batch_size": 4},
        # Adam divides small gradients by themselves: without a larger eps their rounding would be all that is compared
        "optimizer": {"learning_rate": 0.1, "eps": 1.0, "schedule": "constant"},
        "run": {
            **{"output_dir": str(folder / "run"), "steps": 6, "log_every": 1, "checkpoint_every": 2},
            **{"evaluate_every": 3, "prompts": ["w3 w5"], "sample_tokens": 4, "sample_temperature": 0.0},
        },
    }
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return values


def run_config(folder: Path, **overrides: Any) -> Any:
    """As :func:`run_values`, built."""
    return build_configuration(run_values(folder, **overrides))
