"""Tiny configurations shared by the tests: quick to run, with no two sizes equal by accident."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, MimiConfig, MoshiConfig, PreTrainedConfig, VoxtralConfig, WhisperConfig

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


_TINY_LLAMA = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

_TINY_GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "final_logit_softcapping": 4.0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

_TINY_LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma2": {**_TINY_GEMMA, "attn_logit_softcapping": 2.0},
    "gemma3_text": {
        **_TINY_GEMMA,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "helium": {"head_dim": 12},
}

LLAMAS = tuple(_TINY_LLAMAS)
"""The ``model_type`` of the language models."""


def tiny_llama_config(model_type: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """A language model of 48 x 3 without special tokens; windows are of five tokens. ``overrides`` replace single
    fields."""
    return CONFIG_MAPPING[model_type](**{**_TINY_LLAMA, **_TINY_LLAMAS[model_type], **overrides})


def drawn_rope(seed: int, theta: float) -> dict[str, Any]:
    """Rotary parameters: every fifth seed stretches positions, every fifth (another one) frequencies."""
    kinds = {
        2: {"rope_type": "linear", "factor": 2.5},
        4: {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 16},
    }
    return kinds.get(seed % 5, {"rope_type": "default"}) | {"rope_theta": theta}


_TINY_WAV2VEC2 = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "conv_dim": (8, 6, 10),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 2),
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 3,
    "mask_time_length": 4,
    "mask_feature_length": 5,
    "initializer_range": 0.2,
}

WAV2VEC2S = ("wav2vec2", "hubert")
"""The ``model_type`` of the encoders that share Wav2Vec2's modules."""


def tiny_wav2vec2_config(model_type: str = "wav2vec2", **overrides: Any) -> PreTrainedConfig:
    """A Wav2Vec2 or HuBERT of 24 x 3, a frame every 20 samples; ``overrides`` replace single fields."""
    return CONFIG_MAPPING[model_type](**{**_TINY_WAV2VEC2, **overrides})


_TINY_WHISPER = {
    "vocab_size": 30,
    "d_model": 24,
    "num_mel_bins": 10,
    "max_source_positions": 11,
    "max_target_positions": 9,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 36,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}


def tiny_whisper_config(**overrides: Any) -> WhisperConfig:
    """A Whisper whose encoder is 24 x 3, of eleven frames at once; ``overrides`` replace single fields."""
    return WhisperConfig(**{**_TINY_WHISPER, **overrides})


AUDIO_TOKEN = 7
"""Of the tiny joined models."""


def tiny_voxtral_config(**overrides: Any) -> VoxtralConfig:
    """A Voxtral of 24 x 1 and 48 x 1, which hears 16 frames at once, four of them a token."""
    audio = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    audio |= {"num_mel_bins": 6, "max_source_positions": 16}
    text = {"model_type": "llama", **_TINY_LLAMA, "head_dim": 16, "num_hidden_layers": 1}
    return VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=AUDIO_TOKEN, **overrides)


TOWERS = ("whisper", "wav2vec2", "hubert", "mimi")
"""The ``model_type`` of the encoders that can be joined."""


def tiny_speech_language_config(kind: str = "whisper", **overrides: Any) -> PreTrainedConfig:
    """The tiny encoder of this ``model_type`` before a Qwen 3 of 48 x 1; ``overrides`` replace single fields."""
    from transformers_moshi_flax import SpeechLanguageConfig  # checked as the other classes of the package

    audio = {
        "whisper": lambda: tiny_whisper_config(encoder_layers=1),
        "mimi": lambda: tiny_mimi_config(num_hidden_layers=1).encoder_config,
    }.get(kind, lambda: tiny_wav2vec2_config(kind, num_hidden_layers=1, feat_extract_norm="layer"))()
    text = tiny_llama_config("qwen3", num_hidden_layers=1, max_window_layers=0)
    fields = {"stack_factor": 3, "stack_stride": 2, "projector_hidden_size": 20, "audio_token_id": AUDIO_TOKEN}
    return SpeechLanguageConfig(audio_config=audio, text_config=text, **{**fields, **overrides})
