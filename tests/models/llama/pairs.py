"""Upstream's language models and ours with the same weights, and inputs for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.configs import tiny_llama_config
from tests.torch_oracle import Pair, load_ours, randomize, save_upstream, to_double
from transformers_moshi_flax import FlaxLlamaForCausalLM


def pair_of(config: Any, directory: Path, dtype: str = "float32", seed: int = 0) -> Pair:
    """Models with a head (float64 needs x64 on)."""
    theirs = randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), seed)
    save_upstream(theirs, directory)
    ours = load_ours(FlaxLlamaForCausalLM, directory, dtype)
    return Pair(to_double(theirs) if dtype == "float64" else theirs, ours, Path(directory), dtype)


def tiny_pair(model_type: str, directory: Path, dtype: str = "float32", **overrides: Any) -> Pair:
    return pair_of(tiny_llama_config(model_type, **overrides), directory, dtype)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of unequal lengths, padded on the left.

    Attributes:
        ids, mask: ``(batch, length)``.
    """

    ids: np.ndarray
    mask: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Where tokens are that count."""
        return self.mask.astype(bool)

    @property
    def for_torch(self) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor(self.ids).long(), "attention_mask": torch.tensor(self.mask).long()}


def draw_batch(vocab_size: int, lengths: tuple[int, ...], seed: int = 0) -> Batch:
    """Random ids; padding is id 0."""
    ids = np.random.default_rng(seed).integers(1, vocab_size, (len(lengths), max(lengths)), dtype=np.int32)
    mask = (np.arange(max(lengths))[None] >= max(lengths) - np.array(lengths)[:, None]).astype(np.int32)
    return Batch(ids * mask, mask)
