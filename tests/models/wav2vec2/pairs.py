"""Upstream's Wav2Vec2 and HuBERT and ours with the same weights, and recordings for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import HubertModel, Wav2Vec2Model

from tests.configs import tiny_wav2vec2_config
from tests.torch_oracle import Pair, make_pair
from transformers_moshi_flax import FlaxHubertModel, FlaxWav2Vec2Model

CLASSES = {"hubert": (HubertModel, FlaxHubertModel), "wav2vec2": (Wav2Vec2Model, FlaxWav2Vec2Model)}

ASKED = {"output_hidden_states": True, "output_attentions": True}


def pair_of(config: Any, directory: Path, dtype: str = "float32", seed: int = 0) -> Pair:
    return make_pair(*CLASSES[config.model_type], config, directory, dtype, seed)


def tiny_pair(model_type: str, directory: Path, dtype: str = "float32", **overrides: Any) -> Pair:
    return pair_of(tiny_wav2vec2_config(model_type, **overrides), directory, dtype)


@dataclasses.dataclass(frozen=True)
class Recordings:
    """Rows of unequal lengths, padded on the right.

    Attributes:
        audio: ``(batch, samples)``.
        mask: the same shape, 1 for samples.
    """

    audio: np.ndarray
    mask: np.ndarray

    def for_torch(self, dtype: str = "float32") -> dict[str, torch.Tensor]:
        return {"input_values": torch.tensor(self.audio.astype(dtype)), "attention_mask": torch.tensor(self.mask)}


def draw_recordings(lengths: tuple[int, ...], seed: int = 0) -> Recordings:
    mask = (np.arange(max(lengths))[None] < np.array(lengths)[:, None]).astype(np.int32)
    audio = np.random.default_rng(seed).normal(size=mask.shape).astype(np.float32)
    return Recordings(audio * mask.astype(np.float32), mask)
