"""The arguments of Kyutai's language model as our configuration, and back.

They are those of ``LMModel`` of the ``moshi`` package, which a ``config.json`` lists; what it leaves out has the
default of that class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, MimiConfig, MoshiConfig

from ...checkpoints.configs import build_config
from ..mimi.kyutai_flax_mimi import check_expressible, ill_typed, inexpressible, rope_theta

TEXT_PAD, TEXT_END_OF_PAD = 3, 0


def delays_of(num_codebooks: int) -> list[int]:
    """The delays in frames of text, Moshi's codebooks and the user's: one frame for all but text and the first."""
    return [0] + 2 * [0, *[1] * (num_codebooks - 1)]


KYUTAI_MOSHI: dict[str, Any] = {
    "dim": 4096,
    "text_card": 32000,
    "existing_text_padding_id": TEXT_PAD,
    "n_q": 16,
    "dep_q": 8,
    "card": 2048,
    "num_heads": 32,
    "num_layers": 32,
    "hidden_scale": 4.125,
    "causal": True,
    "layer_scale": None,
    "context": 3000,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 1024,
    "depformer_dim_feedforward": 4224,
    "depformer_num_heads": 16,
    "depformer_num_layers": 6,
    "depformer_layer_scale": None,
    "depformer_multi_linear": True,
    "depformer_context": 8,
    "depformer_max_period": 10000,
    "depformer_gating": "silu",
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": delays_of(8),
}
"""The arguments of moshiko and moshika, which a checkpoint without ``config.json`` has."""

PERSONAPLEX = "personaplex"
"""``model_type`` of a ``config.json`` that leaves out all else."""

PERSONAPLEX_IDLE_CODES: dict[str, list[int]] = {
    "moshi": [948, 243, 1178, 546, 1736, 1030, 1978, 2008],
    "user": [430, 1268, 381, 1611, 1095, 1495, 56, 472],
}
"""Codes of a frame in which Moshi is silent, and of one in which the user only hums, as its prompts have them."""

FILE_FIELDS = ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "model_id")
"""Fields of ``config.json`` that say nothing of the model itself."""

_DEFAULTS: dict[str, Any] = {
    "delays": [0],
    "n_q": 8,
    "dep_q": 8,
    "card": 1024,
    "text_card": 32000,
    "dim": 128,
    "num_heads": 8,
    "hidden_scale": 4,
    "norm": "layer_norm",
    "depformer_dim": 256,
    "depformer_dim_feedforward": None,
    "depformer_multi_linear": False,
    "depformer_weights_per_step": False,
    "depformer_pos_emb": "sin",
    "context": None,
    "positional_embedding": "sin",
    "max_period": 10000,
    "gating": "none",
    "kv_repeat": 1,
}
# What the depth decoder takes from the backbone unless it has a value of its own.
_INHERITED = ("num_layers", "gating", "kv_repeat")
# The only value of a field that this architecture can express.
_ONLY: dict[str, Any] = {
    "model_type": "moshi",
    "demux_second_stream": False,
    "demux_second_text_stream": False,
    "norm": "rms_norm_f32",
    "norm_emb": False,
    "bias_proj": False,
    "layer_scale": None,
    "causal": True,
    "skip_self_attn": False,
    "cross_attention": False,
    "conditioners": None,
    "fuser": None,
    "lora": False,
    "lora_name": None,
    "extra_heads_num_heads": 0,
    "existing_text_padding_id": TEXT_PAD,
    "existing_text_end_padding_id": TEXT_END_OF_PAD,
    "depformer_multi_linear": True,
    "depformer_weights_per_step": True,
    "depformer_low_rank_embeddings": None,
    "depformer_pos_emb": "none",
    "depformer_norm": None,
    "depformer_layer_scale": None,
    "depformer_skip_self_attn": False,
    "depformer_cross_attention": False,
    "tts_config": None,
    "stt_config": None,
}
_INTEGERS = (
    "n_q",
    "dep_q",
    "card",
    "text_card",
    "dim",
    "num_heads",
    "num_layers",
    "context",
    "kv_repeat",
    "depformer_dim",
    "depformer_num_heads",
    "depformer_num_layers",
    "depformer_kv_repeat",
)
_NUMBERS = ("hidden_scale", "max_period")
# Fields that are checked on their own, or that ``LMModel`` does not use in such a model.
_FREE = (
    *FILE_FIELDS,
    "delays",
    "gating",
    "positional_embedding",
    "text_card_out",
    "lm_gen_config",
    "depformer_dim_feedforward",
    "depformer_gating",
    "depformer_weights_per_step_schedule",
    "betas",
    "depformer_betas",
    "depformer_causal",
    "depformer_context",
    "depformer_max_period",
    "depformer_positional_scale",
    "extra_heads_dim",
    "gradient_checkpointing",
    "quantize",
    "lora_rank",
    "lora_scaling",
    "positional_scale",
)
# Activations that both sides know under the same name.
_GATINGS = ("gelu", "leaky_relu", "mish", "relu", "sigmoid", "silu", "tanh")
# Sampling of ``LMGen``: its argument -> (its default, ours, whether it is the depth decoder's).
_SAMPLING = {
    "temp_text": (0.7, "temperature", False),
    "top_k_text": (25, "top_k", False),
    "temp": (0.8, "temperature", True),
    "top_k": (250, "top_k", True),
}


def made_whole(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
    """The arguments of a ``config.json`` as of a model that makes its own voice, and its further depth steps.

    PersonaPlex's has a step for each codebook of the user too. Those come after Moshi's own, which do not see them;
    nothing is made of them where the user is heard.
    """
    if values.get("model_type") != PERSONAPLEX:
        return values, 0
    whole = {**KYUTAI_MOSHI, "dep_q": values.get("n_q", KYUTAI_MOSHI["n_q"]), **values, "model_type": "moshi"}
    if whole["dep_q"] != whole["n_q"] or type(whole["n_q"]) is not int:
        return whole, 0
    own = whole["n_q"] // 2
    return {**whole, "dep_q": own}, whole["n_q"] - own


def with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with what ``LMModel`` takes for those that are left out."""
    filled = {**_DEFAULTS, **values}
    inherited = {f"depformer_{name}": filled[name] for name in _INHERITED if name in filled}
    return {**inherited, **filled}


def moshi_config_from_kyutai(values: Mapping[str, Any], mimi: MimiConfig) -> MoshiConfig:
    """Our configuration for the content of Kyutai's ``config.json``, in the form of :data:`KYUTAI_MOSHI`.

    Args:
        values: the fields of the file.
        mimi: configuration of the audio codec.

    Raises:
        ValueError: fields that this architecture cannot express, all of them with their values.
    """
    whole, _ = made_whole(values)
    fields = with_defaults(whole)
    wrong_types = ill_typed(fields, _INTEGERS, _NUMBERS)
    problems = inexpressible(fields, _ONLY, (*_INTEGERS, *_NUMBERS, *_FREE)) + wrong_types
    if not wrong_types:
        problems += _disagreements(fields, mimi)
    if problems:
        raise ValueError(f"config.json describes a model that cannot be expressed here: {'; '.join(problems)}")
    dep_q, heads, depth_heads = fields["dep_q"], fields["num_heads"], fields["depformer_num_heads"]
    depth_feedforward = fields["depformer_dim_feedforward"]
    if isinstance(depth_feedforward, list):
        depth_feedforward = depth_feedforward[0]
    if depth_feedforward is None:
        depth_feedforward = int(fields["hidden_scale"] * fields["depformer_dim"])
    idle = {"idle_codes": PERSONAPLEX_IDLE_CODES} if values.get("model_type") == PERSONAPLEX and dep_q == 8 else {}
    return build_config(
        MoshiConfig,
        {
            **idle,
            "vocab_size": fields["text_card"],
            "hidden_size": fields["dim"],
            "num_hidden_layers": fields["num_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": heads // fields["kv_repeat"],
            "audio_vocab_size": fields["card"],
            "max_position_embeddings": fields["context"],
            "rope_parameters": {"rope_type": "default", "rope_theta": float(fields["max_period"])},
            "hidden_act": fields["gating"],
            "sliding_window": fields["context"],
            "ffn_dim": _ffn_dim(fields["dim"], int(fields["hidden_scale"] * fields["dim"])),
            "rms_norm_eps": 1e-8,
            "num_codebooks": dep_q,
            "audio_encoder_config": mimi.to_dict(),
            "depth_decoder_config": {
                "hidden_size": fields["depformer_dim"],
                "num_hidden_layers": fields["depformer_num_layers"],
                "num_attention_heads": depth_heads,
                "num_key_value_heads": depth_heads // fields["depformer_kv_repeat"],
                "max_position_embeddings": dep_q + 1,
                "hidden_act": fields["depformer_gating"],
                "sliding_window": dep_q,
                "ffn_dim": _ffn_dim(fields["depformer_dim"], depth_feedforward),
                "rms_norm_eps": 1e-8,
            },
        },
    )


def _disagreements(fields: Mapping[str, Any], mimi: MimiConfig) -> list[str]:
    """What fields, each fine by its type, say together that cannot be expressed."""
    dep_q = fields["dep_q"]
    problems = []

    def want(field: str, fine: bool, expected: str) -> None:
        if not fine:
            problems.append(f"{field}={fields.get(field)!r} ({expected})")

    if fields["n_q"] == dep_q and dep_q % 2 == 0:
        dep_q //= 2
        want(
            "dep_q",
            fine=False,
            expected=f"it makes the user's stream as well; only Moshi's own, {dep_q}, can be expressed",
        )
    else:
        want("n_q", fields["n_q"] == 2 * dep_q, f"expected twice dep_q={dep_q}: Moshi's codebooks and the user's")
    want("delays", fields["delays"] == delays_of(dep_q), f"only {delays_of(dep_q)} can be expressed")
    want("card", fields["card"] == mimi.codebook_size, f"Mimi's codebooks have {mimi.codebook_size} entries")
    want("dep_q", dep_q <= mimi.num_quantizers, f"Mimi has only {mimi.num_quantizers} codebooks")
    want("text_card_out", fields.get("text_card_out") in (None, fields["text_card"]), "only text_card")
    want("positional_embedding", fields["positional_embedding"] in ("rope", "rope_concat"), "only 'rope'")
    for prefix in ("", "depformer_"):
        heads, dim = fields[f"{prefix}num_heads"], fields[f"{prefix}dim"]
        want(f"{prefix}gating", fields[f"{prefix}gating"] in _GATINGS, f"only one of {', '.join(_GATINGS)}")
        want(f"{prefix}num_heads", dim % (2 * heads) == 0, f"must divide {prefix}dim={dim} into even parts")
        want(f"{prefix}kv_repeat", heads % fields[f"{prefix}kv_repeat"] == 0, f"must divide {prefix}num_heads={heads}")
    schedule = fields.get("depformer_weights_per_step_schedule")
    want(
        "depformer_weights_per_step_schedule",
        schedule in (None, list(range(dep_q))),
        "weights shared by codebooks cannot be expressed",
    )
    feedforward = fields["depformer_dim_feedforward"]
    sizes = feedforward if isinstance(feedforward, list) and len(feedforward) == dep_q else [feedforward]
    want(
        "depformer_dim_feedforward",
        feedforward is None or all(type(size) is int and size == sizes[0] > 0 for size in sizes),
        "expected one positive integer for all codebooks",
    )
    return problems


def moshi_config_to_kyutai(config: MoshiConfig) -> dict[str, Any]:
    """The inverse of :func:`moshi_config_from_kyutai`, without Mimi.

    Raises:
        ValueError: fields that Kyutai's model cannot express, all of them with their values.
    """
    depth, codebooks = config.depth_decoder_config, config.num_codebooks
    check_expressible(
        "Moshi",
        config,
        {
            "rms_norm_eps": 1e-8,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "hidden_act": config.hidden_act if config.hidden_act in _GATINGS else " or ".join(_GATINGS),
            "audio_vocab_size": config.audio_encoder_config.codebook_size,
            "tie_word_embeddings": False,
        },
    )
    check_expressible(
        "Moshi's depth decoder",
        depth,
        {
            "rms_norm_eps": 1e-8,
            "head_dim": depth.hidden_size // depth.num_attention_heads,
            "hidden_act": depth.hidden_act if depth.hidden_act in _GATINGS else " or ".join(_GATINGS),
            "sliding_window": max(depth.sliding_window, codebooks),
            "input_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "audio_vocab_size": config.audio_vocab_size,
            "num_codebooks": codebooks,
        },
    )
    values = {
        **KYUTAI_MOSHI,
        "dim": config.hidden_size,
        "text_card": config.vocab_size,
        "n_q": 2 * codebooks,
        "dep_q": codebooks,
        "card": config.audio_vocab_size,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
        "hidden_scale": _hidden_scale(config.hidden_size, _feedforward(config.hidden_size, config.ffn_dim)),
        "context": config.sliding_window,
        "max_period": rope_theta(config),
        "gating": config.hidden_act,
        "depformer_dim": depth.hidden_size,
        "depformer_dim_feedforward": _feedforward(depth.hidden_size, depth.ffn_dim),
        "depformer_num_heads": depth.num_attention_heads,
        "depformer_num_layers": depth.num_hidden_layers,
        "depformer_context": codebooks,
        "depformer_gating": depth.hidden_act,
        "delays": delays_of(codebooks),
    }
    # Left out where they are the defaults, as in the published configuration.
    repeats = {
        "kv_repeat": config.num_attention_heads // config.num_key_value_heads,
        "depformer_kv_repeat": depth.num_attention_heads // depth.num_key_value_heads,
    }
    return {**values, **repeats} if set(repeats.values()) != {1} else values


def generation_config_from_kyutai(values: Any) -> GenerationConfig:
    """How Kyutai's ``LMGen`` samples with the ``lm_gen_config`` of a ``config.json``, as a generation configuration.

    Raises:
        ValueError: no JSON object, or options of ``LMGen`` that ``generate`` has not.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"lm_gen_config must be an object with the arguments of LMGen, got {values!r}")
    values = dict(values)
    do_sample = values.pop("use_sampling", True)
    options: tuple[dict[str, Any], dict[str, Any]] = ({"do_sample": do_sample}, {"do_sample": do_sample})
    for field, (default, name, of_depth) in _SAMPLING.items():
        value = values.pop(field, default)
        if do_sample:
            options[of_depth][name] = value
    if values:
        raise ValueError(
            f"lm_gen_config has {values}, which `generate` has not; only {['use_sampling', *_SAMPLING]} are read"
        )
    text, depth = options
    return GenerationConfig(**text, depth_decoder_config=depth)


def _ffn_dim(dim: int, feedforward: int) -> int:
    """Width of both halves of a gated MLP, by the rule of the ``moshi`` package that keeps the number of weights."""
    return 2 * (21 * dim // 8 if feedforward == 4 * dim else 2 * feedforward // 3)


def _feedforward(dim: int, ffn_dim: int) -> int:
    """A ``dim_feedforward`` for which :func:`_ffn_dim` gives ``ffn_dim``; ValueError if there is none."""
    least = math.ceil(3 * ffn_dim / 4)
    for feedforward in (least, least + 1, 4 * dim):
        if _ffn_dim(dim, feedforward) == ffn_dim:
            return feedforward
    raise ValueError(f"Kyutai's format cannot express ffn_dim={ffn_dim} with hidden_size={dim}; take another")


def _hidden_scale(dim: int, feedforward: int) -> float:
    """A factor that makes ``feedforward`` of ``dim`` when the product is cut to an integer."""
    scale = feedforward / dim
    return scale if int(scale * dim) == feedforward else math.nextafter(scale, math.inf)
