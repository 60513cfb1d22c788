"""One random checkpoint in the formats of all sides, and prompts for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from transformers import MoshiConfig, MoshiForConditionalGeneration

from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.models.moshi.delay_pattern import delay

from .settings import SIZES, Setting

FRAME_SIZE = 1920
"""Samples of a frame at 24 kHz."""


@dataclass(frozen=True)
class Checkpoint:
    """Random weights, float32, written in two formats.

    Attributes:
        folder: of ``transformers``; its subfolder ``kyutai`` has Kyutai's format.
        config: of the model.
        silence: the codes of one silent frame, ``(num_codebooks,)``.
        parameters, with_mimi: counts without Mimi and with it (its codebooks are no parameters upstream).
        weight_bytes: what a frame must read: layers, norms, projections and heads of both decoders, each once, without
            the embeddings, of which it reads some rows only.
    """

    folder: Path
    config: MoshiConfig
    silence: Int[np.ndarray, "codebooks"]
    parameters: int
    with_mimi: int
    weight_bytes: int

    @property
    def kyutai(self) -> Path:
        return self.folder / "kyutai"

    def cache_bytes(self, setting: Setting) -> float:
        """Keys and values of the backbone that a frame of a run must read, on the average.

        Those of the depth decoder are made within the frame and stay in the processor's cache.
        """
        config = self.config
        slots = setting.context + np.arange(setting.frames)
        slots = np.minimum(slots, config.sliding_window).mean()
        width = config.num_key_value_heads * config.head_dim
        return 2 * 4 * setting.batch * config.num_hidden_layers * width * float(slots)


def write_checkpoint(size: str, seed: int, folder: Path) -> Checkpoint:
    """Draws the weights of a model and writes them for all sides."""
    torch.manual_seed(seed)
    fields = SIZES[size].config
    # the constructor fills in the sub-configurations in place
    config = MoshiConfig(**{name: dict(value) if isinstance(value, dict) else value for name, value in fields.items()})
    if config.audio_encoder_config.frame_size != FRAME_SIZE:
        raise ValueError(f"Mimi must have {FRAME_SIZE} samples a frame, not {config.audio_encoder_config.frame_size}.")
    model = MoshiForConditionalGeneration(config).float().eval()
    model.save_pretrained(folder)
    with torch.inference_mode():
        silence = model.audio_encoder.encode(torch.zeros(1, 1, FRAME_SIZE), num_quantizers=config.num_codebooks)[0]
    counts = {name: weight.numel() for name, weight in model.named_parameters()}
    own = {name: count for name, count in counts.items() if not name.startswith("audio_encoder.")}
    read = sum(count for name, count in own.items() if "embed_tokens" not in name)
    del model
    FlaxMoshiForConditionalGeneration.from_pretrained(folder).save_kyutai(folder / "kyutai")
    return Checkpoint(folder, config, silence[0, :, 0].numpy(), sum(own.values()), sum(counts.values()), 4 * read)


@dataclass(frozen=True)
class Prompt:
    """Random frames after the start frame; the codes are undelayed. After it the user is silent.

    Attributes:
        text: ``(batch, frames)``.
        user, moshi: ``(batch, num_codebooks, frames)``.
        silence: ``(num_codebooks,)``.
        start_code: of the start frame.
    """

    text: Int[np.ndarray, "batch frames"]
    user: Int[np.ndarray, "batch codebooks frames"]
    moshi: Int[np.ndarray, "batch codebooks frames"]
    silence: Int[np.ndarray, "codebooks"]
    start_code: int

    def delayed(self) -> Int[np.ndarray, "batch streams frames"]:
        """The inputs of all frames as Kyutai orders them: text, Moshi's codes, the user's."""
        streams = [np.asarray(delay(codes, self.start_code)) for codes in (self.moshi, self.user)]
        return np.concatenate([self.text[:, None], *streams], axis=1)

    def undelayed(self) -> Int[np.ndarray, "batch streams frames"]:
        """The same without the delay."""
        return np.concatenate([self.text[:, None], self.moshi, self.user], axis=1)


def draw_prompt(checkpoint: Checkpoint, setting: Setting) -> Prompt:
    """The prompt of a setting, always the same."""
    config, rng = checkpoint.config, np.random.default_rng(0)
    text = rng.integers(0, config.vocab_size, (setting.batch, setting.context))
    user, moshi = rng.integers(0, config.audio_vocab_size, (2, setting.batch, config.num_codebooks, setting.context))
    text[:, 0], user[..., 0], moshi[..., 0] = config.vocab_size, config.audio_vocab_size, config.audio_vocab_size
    return Prompt(text, user, moshi, checkpoint.silence, config.audio_vocab_size)
