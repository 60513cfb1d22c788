"""Tiny configurations shared by the tests: quick to run, with no two sizes equal by accident."""

from __future__ import annotations

from typing import Any

from transformers import MimiConfig, MoshiConfig

_TINY_MIMI = {
    "sampling_rate": 24_000,
    "hidden_size": 32,
    "num_filters": 4,
    "num_residual_layers": 1,
    "upsampling_ratios": [4, 2],
    "codebook_size": 32,
    "codebook_dim": 12,
    "vector_quantization_hidden_dimension": 12,
    "num_quantizers": 6,
    "num_semantic_quantizers": 1,
    "upsample_groups": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 500,
    "sliding_window": 20,
}

_TINY_DEPTH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "ffn_dim": 72,
}

_TINY_MOSHI = {
    "vocab_size": 60,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "sliding_window": 128,
    "ffn_dim": 144,
    "num_codebooks": 4,
}


def tiny_mimi_config(**overrides: Any) -> MimiConfig:
    """A Mimi of 16 samples a frame and six codebooks of 32 entries; ``overrides`` replace single fields."""
    return MimiConfig(**{**_TINY_MIMI, **overrides})


def tiny_moshi_config(**overrides: Any) -> MoshiConfig:
    """A Moshi of 64 x 2 with a depth decoder of 32 x 2, four codebooks of 32 entries and the tiny Mimi.

    ``overrides`` replace single fields; the dictionaries ``depth_decoder_config`` and ``audio_encoder_config`` are
    merged into the tiny ones. ``audio_vocab_size`` also sets Mimi's codebook size.
    """
    overrides = dict(overrides)
    mimi = {**_TINY_MIMI, **overrides.pop("audio_encoder_config", {})}
    if "audio_vocab_size" in overrides:
        mimi["codebook_size"] = overrides["audio_vocab_size"]
    fields = {**_TINY_MOSHI, **overrides}
    codebooks = fields["num_codebooks"]
    depth = {**_TINY_DEPTH, "max_position_embeddings": codebooks + 1, "sliding_window": codebooks + 1}
    depth.update(fields.pop("depth_decoder_config", {}))
    return MoshiConfig(**fields, audio_encoder_config={"model_type": "mimi", **mimi}, depth_decoder_config=depth)
