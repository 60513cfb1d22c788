"""Draws of Moshi configurations and inputs that cover the corners: grouped heads, one codebook, small windows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from transformers import MoshiConfig

from tests.configs import drawn_rope, tiny_moshi_config


@dataclasses.dataclass(frozen=True)
class Inputs:
    """NumPy inputs of one forward pass; ``attention_mask`` is None or 0 at padding frames."""

    input_ids: np.ndarray
    moshi_audio_codes: np.ndarray
    user_audio_codes: np.ndarray
    attention_mask: np.ndarray | None

    @property
    def valid(self) -> np.ndarray:
        """True at the frames whose outputs mean something, ``(batch, frames)``."""
        return np.ones(self.input_ids.shape, bool) if self.attention_mask is None else self.attention_mask == 1

    def as_dict(self) -> dict[str, np.ndarray]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}


def draw_config(seed: int) -> MoshiConfig:
    """A configuration drawn from ``seed``; every third has a sliding window shorter than the inputs."""
    rng = np.random.default_rng(seed)

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    def attention(heads: int) -> dict[str, int]:
        groups = pick(*[kv for kv in range(1, heads + 1) if heads % kv == 0])
        return {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": pick(4, 6, 8, 10)}

    heads, depth_heads = pick(1, 2, 4, 6), pick(1, 2, 4)
    codebooks = 1 if seed % 8 == 5 else pick(2, 3, 4, 6)
    return tiny_moshi_config(
        hidden_size=heads * pick(4, 8),
        num_hidden_layers=pick(1, 2, 3),
        **attention(heads),
        ffn_dim=2 * pick(5, 12, 31),
        vocab_size=pick(17, 41, 60),
        audio_vocab_size=pick(8, 16, 32),
        num_codebooks=codebooks,
        # 2 and more: with 1, upstream's cache keeps everything (it cuts at -0)
        sliding_window=pick(2, 3, 4) if seed % 3 == 0 else 64,
        hidden_act=pick("silu", "gelu"),
        rms_norm_eps=pick(1e-8, 1e-5),
        rope_parameters=drawn_rope(seed, pick(100.0, 10000.0)),
        depth_decoder_config={
            "hidden_size": depth_heads * pick(4, 6),
            "num_hidden_layers": pick(1, 2),
            **attention(depth_heads),
            "ffn_dim": 2 * pick(7, 18),
            "hidden_act": pick("silu", "gelu"),
        },
        audio_encoder_config={"num_hidden_layers": 1, "num_quantizers": max(2, codebooks)},
    )


def draw_inputs(config: MoshiConfig, seed: int, masked: bool | None = None) -> Inputs:
    """Codes, text and, if ``masked`` (default: as the seed says), a mask with left- and right-padded rows."""
    rng = np.random.default_rng(1000 + seed)
    batch, frames = int(rng.integers(1, 4)), int(rng.integers(4, 10))
    masked = seed % 3 == 1 if masked is None else masked
    attention_mask = None
    if masked:
        batch = max(batch, 2)
        attention_mask = np.ones((batch, frames), np.int32)
        attention_mask[0, : rng.integers(1, 3)] = 0
        attention_mask[1, -rng.integers(1, 3) :] = 0
    codes = (batch, config.num_codebooks, frames)
    return Inputs(
        input_ids=rng.integers(0, config.vocab_size + 1, (batch, frames)).astype(np.int32),
        moshi_audio_codes=rng.integers(0, config.audio_vocab_size + 1, codes).astype(np.int32),
        user_audio_codes=rng.integers(0, config.audio_vocab_size + 1, codes).astype(np.int32),
        attention_mask=attention_mask,
    )
