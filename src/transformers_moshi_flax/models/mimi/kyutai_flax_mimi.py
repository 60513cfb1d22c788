"""Mimi in Kyutai's own files: how configuration and tensors map to ours, and back.

The values, and the defaults of what a configuration leaves out, are those of the ``moshi`` package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import MimiConfig

from ...checkpoints.configs import build_config
from ...checkpoints.rules import IDENTITY, REVERSED, Rule, interleaved_heads

KYUTAI_MIMI: dict[str, Any] = {
    "sample_rate": 24000,
    "channels": 1,
    "frame_rate": 12.5,
    "seanet": {
        "channels": 1,
        "dimension": 512,
        "causal": True,
        "n_filters": 64,
        "n_residual_layers": 1,
        "activation": "ELU",
        "compress": 2,
        "dilation_base": 2,
        "disable_norm_outer_blocks": 0,
        "kernel_size": 7,
        "residual_kernel_size": 3,
        "last_kernel_size": 3,
        "norm": "none",
        "pad_mode": "constant",
        "ratios": [8, 6, 5, 4],
        "true_skip": True,
    },
    "quantizer": {"dimension": 256, "n_q": 32, "bins": 2048, "input_dimension": 512, "output_dimension": 512},
    "transformer": {
        "d_model": 512,
        "num_heads": 8,
        "num_layers": 8,
        "causal": True,
        "layer_scale": 0.01,
        "context": 250,
        "conv_layout": True,
        "max_period": 10000,
        "gating": "none",
        "norm": "layer_norm",
        "positional_embedding": "rope",
        "dim_feedforward": 2048,
        "input_dimension": 512,
        "output_dimensions": [512],
    },
}
"""The configuration of the published Mimi, which a checkpoint without ``mimi_config_name`` has."""

CODEBOOKS = r"quantizer\.rvq_\w+\.vq\.layers\.\d+\._codebook\."
"""As of ``checkpoint_flax_mimi.py``, in Kyutai's files."""

# What the constructors take for a field that is left out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "": {},
    "seanet": {
        "channels": 1,
        "dimension": 128,
        "n_filters": 32,
        "n_residual_layers": 3,
        "ratios": [8, 5, 4, 2],
        "activation": "ELU",
        "activation_params": {"alpha": 1.0},
        "norm": "none",
        "kernel_size": 7,
        "last_kernel_size": 7,
        "residual_kernel_size": 3,
        "dilation_base": 2,
        "causal": False,
        "pad_mode": "reflect",
        "true_skip": True,
        "compress": 2,
    },
    "quantizer": {"dimension": 128, "n_q": 8, "bins": 1024, "n_q_semantic": 1},
    "transformer": {
        "dim_feedforward": 2048,
        "causal": False,
        "context": None,
        "positional_embedding": "sin",
        "max_period": 10000,
        "norm": "layer_norm",
        "layer_scale": None,
        "gating": "none",
        "kv_repeat": 1,
        "conv_layout": False,
    },
}
# The only value of a field that this architecture can express.
_ONLY: dict[str, dict[str, Any]] = {
    "": {},
    "seanet": {
        "activation": "ELU",
        "activation_params": {"alpha": 1.0},
        "norm": "none",
        "causal": True,
        "pad_mode": "constant",
        "true_skip": True,
    },
    "quantizer": {},
    "transformer": {
        "causal": True,
        "positional_embedding": "rope",
        "norm": "layer_norm",
        "gating": "none",
        "conv_layout": True,
        "cross_attention": False,
        "skip_self_attn": False,
        "weights_per_step": 0,
        "quantize": False,
    },
}
_INTEGERS: dict[str, tuple[str, ...]] = {
    "": ("sample_rate", "channels"),
    "seanet": (
        "channels",
        "dimension",
        "n_filters",
        "n_residual_layers",
        "kernel_size",
        "last_kernel_size",
        "residual_kernel_size",
        "dilation_base",
        "compress",
    ),
    "quantizer": ("dimension", "n_q", "bins", "n_q_semantic"),
    "transformer": ("d_model", "num_heads", "num_layers", "dim_feedforward", "context", "kv_repeat"),
}
_NUMBERS: dict[str, tuple[str, ...]] = {
    "": ("frame_rate",),
    "seanet": (),
    "quantizer": (),
    "transformer": ("layer_scale", "max_period"),
}
# Fields that are checked on their own, or that change nothing outside training.
_FREE: dict[str, tuple[str, ...]] = {
    "": ("seanet", "quantizer", "transformer"),
    "seanet": ("ratios", "norm_params", "disable_norm_outer_blocks"),
    "quantizer": (
        "input_dimension",
        "output_dimension",
        "q_dropout",
        "no_quantization_rate",
        "decay",
        "threshold_usage_ratio",
        "replaced_usage_ratio",
    ),
    "transformer": (
        "input_dimension",
        "output_dimensions",
        "positional_scale",
        "betas",
        "checkpointing",
    ),
}


def inexpressible(
    values: Mapping[str, Any], only: Mapping[str, Any], free: Iterable[str], prefix: str = ""
) -> list[str]:
    """What of ``values`` this architecture has no place for, each as ``"field=value (expected ...)"``.

    Args:
        values: the fields of a configuration, defaults included.
        only: field -> the only value that can be expressed; a field that is not there is fine, and so is any other
            empty value where an empty one is expected.
        free: the other fields that are known.
        prefix: of the fields in the messages.
    """
    problems = []
    for field, value in values.items():
        if field in only and value != only[field] and (value or only[field]):
            problems.append(f"{prefix}{field}={value!r} (only {only[field]!r} can be expressed)")
        elif field not in {*only, *free}:
            problems.append(f"{prefix}{field}={value!r} (unknown)")
    return problems


def ill_typed(
    values: Mapping[str, Any], integers: Iterable[str], numbers: Iterable[str] = (), prefix: str = ""
) -> list[str]:
    """Which fields are not there, or no positive integer or number, each as ``"field=value (expected ...)"``."""
    problems = []
    for fields, types, expected in ((integers, (int,), "integer"), (numbers, (int, float), "number")):
        for field in fields:
            value: Any = values.get(field)
            if type(value) not in types or not value > 0:
                problems.append(f"{prefix}{field}={value!r} (expected a positive {expected})")
    return problems


def mimi_config_from_kyutai(values: Mapping[str, Any]) -> MimiConfig:
    """Our configuration for the one of Kyutai's loader, in the form of :data:`KYUTAI_MIMI`.

    Raises:
        ValueError: fields that this architecture cannot express, all of them with their values.
    """
    absent = [part for part in ("seanet", "quantizer", "transformer") if not isinstance(values.get(part), Mapping)]
    if absent:
        raise ValueError(f"the configuration of Mimi lacks {absent}; write them as the `moshi` package does")
    parts = {part: {**_DEFAULTS[part], **(values[part] if part else values)} for part in _DEFAULTS}
    problems, wrong_types = [], []
    for part, fields in parts.items():
        dotted = f"{part}." if part else ""
        known = (*_INTEGERS[part], *_NUMBERS[part], *_FREE[part])
        problems += inexpressible(fields, _ONLY[part], known, dotted)
        wrong_types += ill_typed(fields, _INTEGERS[part], _NUMBERS[part], dotted)
    whole, seanet, quantizer, transformer = parts.values()
    if not (
        isinstance(seanet["ratios"], list) and all(type(ratio) is int and ratio > 0 for ratio in seanet["ratios"])
    ):
        wrong_types.append(f"seanet.ratios={seanet['ratios']!r} (expected a list of positive integers)")
    problems += wrong_types
    dimension: Any = seanet["dimension"]
    heads: Any = transformer.get("num_heads")
    if not wrong_types:
        agreed = {
            "channels": (whole["channels"], seanet["channels"]),
            "frame_rate": (whole.get("frame_rate"), whole["sample_rate"] / math.prod(seanet["ratios"]) / 2),
            "quantizer.input_dimension": (quantizer.get("input_dimension") or quantizer["dimension"], dimension),
            "quantizer.output_dimension": (quantizer.get("output_dimension") or quantizer["dimension"], dimension),
            "transformer.d_model": (transformer["d_model"], dimension),
            "transformer.input_dimension": (transformer.get("input_dimension"), dimension),
            "transformer.output_dimensions": (transformer.get("output_dimensions"), [dimension]),
        }
        problems += [f"{name}={got!r} (only {want!r})" for name, (got, want) in agreed.items() if got != want]
        if dimension % (2 * heads):
            problems.append(f"transformer.num_heads={heads} (must divide {dimension} into even parts)")
        if heads % transformer["kv_repeat"]:
            problems.append(f"transformer.kv_repeat={transformer['kv_repeat']} (must divide num_heads={heads})")
    if problems:
        raise ValueError(f"the configuration of Mimi cannot be expressed here: {'; '.join(problems)}")
    return build_config(
        MimiConfig,
        {
            "sampling_rate": whole["sample_rate"],
            "audio_channels": whole["channels"],
            "hidden_size": dimension,
            "num_filters": seanet["n_filters"],
            "num_residual_layers": seanet["n_residual_layers"],
            "upsampling_ratios": list(seanet["ratios"]),
            "kernel_size": seanet["kernel_size"],
            "last_kernel_size": seanet["last_kernel_size"],
            "residual_kernel_size": seanet["residual_kernel_size"],
            "dilation_growth_rate": seanet["dilation_base"],
            "compress": seanet["compress"],
            "codebook_size": quantizer["bins"],
            "codebook_dim": quantizer["dimension"],
            "vector_quantization_hidden_dimension": quantizer["dimension"],
            "num_quantizers": quantizer["n_q"],
            "num_semantic_quantizers": quantizer["n_q_semantic"],
            "upsample_groups": dimension,
            "num_hidden_layers": transformer["num_layers"],
            "intermediate_size": transformer["dim_feedforward"],
            "num_attention_heads": heads,
            "num_key_value_heads": heads // transformer["kv_repeat"],
            "rope_parameters": {"rope_type": "default", "rope_theta": float(transformer["max_period"])},
            "sliding_window": transformer["context"],
            "layer_scale_initial_scale": float(transformer["layer_scale"]),
        },
    )


def mimi_config_to_kyutai(config: MimiConfig) -> dict[str, Any]:
    """The inverse of :func:`mimi_config_from_kyutai`.

    Raises:
        ValueError: fields that Kyutai's Mimi cannot express, all of them with their values.
    """
    dimension, heads = config.hidden_size, config.num_attention_heads
    expected = {
        "hidden_act": "gelu",
        "norm_eps": 1e-5,
        "pad_mode": "constant",
        "use_causal_conv": True,
        "use_conv_shortcut": False,
        "trim_right_ratio": 1.0,
        "attention_bias": False,
        "head_dim": dimension // heads,
        "upsample_groups": dimension,
        "codebook_dim": config.vector_quantization_hidden_dimension,
        "frame_rate": config.sampling_rate / config.frame_size,
    }
    check_expressible("Mimi", config, expected)
    if config.encoder_config is None or config.decoder_config is None:
        raise ValueError("Kyutai's Mimi has both halves, but this configuration has dropped one: write the whole")
    values = {
        "sample_rate": config.sampling_rate,
        "channels": config.audio_channels,
        "frame_rate": config.frame_rate,
        "seanet": {
            **KYUTAI_MIMI["seanet"],
            "channels": config.audio_channels,
            "dimension": dimension,
            "n_filters": config.num_filters,
            "n_residual_layers": config.num_residual_layers,
            "compress": config.compress,
            "dilation_base": config.dilation_growth_rate,
            "kernel_size": config.kernel_size,
            "residual_kernel_size": config.residual_kernel_size,
            "last_kernel_size": config.last_kernel_size,
            "ratios": list(config.upsampling_ratios),
        },
        "quantizer": {
            "dimension": config.vector_quantization_hidden_dimension,
            "n_q": config.num_quantizers,
            "bins": config.codebook_size,
            "input_dimension": dimension,
            "output_dimension": dimension,
        },
        "transformer": {
            **KYUTAI_MIMI["transformer"],
            "d_model": dimension,
            "num_heads": heads,
            "num_layers": config.num_hidden_layers,
            "layer_scale": config.layer_scale_initial_scale,
            "context": config.sliding_window,
            "max_period": rope_theta(config),
            "dim_feedforward": config.intermediate_size,
            "input_dimension": dimension,
            "output_dimensions": [dimension],
        },
    }
    # Left out where they are the defaults, as in the published configuration.
    if config.num_semantic_quantizers != 1:
        values["quantizer"]["n_q_semantic"] = config.num_semantic_quantizers
    if config.num_key_value_heads != heads:
        values["transformer"]["kv_repeat"] = heads // config.num_key_value_heads
    return values


def check_expressible(name: str, config: Any, expected: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` that lists the fields of ``config`` that have not the ``expected`` value."""
    pairs = [(field, getattr(config, field), value) for field, value in expected.items()]
    wrong = [f"{field}={found!r} (only {value!r})" for field, found, value in pairs if found != value]
    if wrong:
        raise ValueError(f"Kyutai's format cannot express this configuration of {name}: {'; '.join(wrong)}")


def rope_theta(config: Any) -> int | float:
    """The period of the rotary embedding as Kyutai writes it, an integer if it is one; ValueError for another type."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"Kyutai's format cannot express rope_type={rope['rope_type']!r}, only 'default'")
    theta = rope["rope_theta"]
    return int(theta) if theta == int(theta) else theta


def attention_rules(path: str, key: str, head_dim: int | None, per_codebook: bool = False) -> tuple[Rule, ...]:
    """The rules of a self-attention.

    Args:
        path: regular expression of the attention's path, without ``codebook``.
        key: template of its key.
        head_dim: if the file has rotary embeddings that turn neighbouring rows, otherwise None.
        per_codebook: the projections have one kernel per codebook.
    """
    # ``linear`` is only there in Moshi
    kernel = r"(?:/linear)?" + (r"/(?P<codebook>\d+)" if per_codebook else "") + "/kernel"
    index = r"\g<codebook>" if per_codebook else "0"
    turned = REVERSED if head_dim is None else interleaved_heads(head_dim)
    parts = (("q", turned), ("k", turned), ("v", REVERSED))
    return (
        *(
            Rule(
                f"{path}/{name}_proj{kernel}",
                rf"{key}.in_proj_weight",
                transform,
                joined=True,
                part=part,
                other_keys=(rf"{key}.in_projs.{index}.weight", rf"{key}.in_proj.weight"),
            )
            for part, (name, transform) in enumerate(parts)
        ),
        Rule(
            f"{path}/o_proj{kernel}",
            rf"{key}.out_proj.weight",
            REVERSED,
            joined=True,
            other_keys=(rf"{key}.out_projs.{index}.weight",),
        ),
    )


def kyutai_mimi_rules(config: MimiConfig) -> tuple[Rule, ...]:
    """The table of Mimi in Kyutai's files."""
    stage = 2 + config.num_residual_layers
    upsampling = "|".join(str(2 + stage * index) for index in range(len(config.upsampling_ratios)))
    layer, their_layer = r"((?:en|de)coder_transformer)/layers/(\d+)", r"\1.transformer.layers.\2"
    rvq = {"semantic": "first", "acoustic": "rest"}
    return (
        Rule(rf"decoder/layers/({upsampling})/conv/kernel", r"decoder.model.\1.convtr.convtr.weight", REVERSED),
        Rule(rf"decoder/layers/({upsampling})/conv/bias", r"decoder.model.\1.convtr.convtr.bias"),
        Rule(
            r"((?:en|de)coder)/layers/(\d+)/block/(\d+)/conv/kernel",
            r"\1.model.\2.block.\3.conv.conv.weight",
            REVERSED,
        ),
        Rule(r"((?:en|de)coder)/layers/(\d+)/block/(\d+)/conv/bias", r"\1.model.\2.block.\3.conv.conv.bias"),
        Rule(r"((?:en|de)coder)/layers/(\d+)/conv/kernel", r"\1.model.\2.conv.conv.weight", REVERSED),
        Rule(r"((?:en|de)coder)/layers/(\d+)/conv/bias", r"\1.model.\2.conv.conv.bias"),
        *attention_rules(f"{layer}/self_attn", rf"{their_layer}.self_attn", config.head_dim),
        Rule(rf"{layer}/input_layernorm/scale", rf"{their_layer}.norm1.weight"),
        Rule(rf"{layer}/input_layernorm/bias", rf"{their_layer}.norm1.bias"),
        Rule(rf"{layer}/post_attention_layernorm/scale", rf"{their_layer}.norm2.weight"),
        Rule(rf"{layer}/post_attention_layernorm/bias", rf"{their_layer}.norm2.bias"),
        Rule(rf"{layer}/mlp/fc([12])/kernel", rf"{their_layer}.linear\3.weight", REVERSED),
        Rule(rf"{layer}/self_attn_layer_scale/scale", rf"{their_layer}.layer_scale_1.scale"),
        Rule(rf"{layer}/mlp_layer_scale/scale", rf"{their_layer}.layer_scale_2.scale"),
        Rule(r"downsample/conv/kernel", r"downsample.conv.conv.conv.weight", REVERSED),
        Rule(r"upsample/conv/kernel", r"upsample.convtr.convtr.convtr.weight", REVERSED),
        *(
            rule
            for ours, theirs in rvq.items()
            for rule in (
                Rule(
                    rf"quantizer/{ours}_residual_vector_quantizer/(input|output)_proj/kernel",
                    rf"quantizer.rvq_{theirs}.\1_proj.weight",
                    REVERSED,
                ),
                *(
                    Rule(
                        rf"quantizer/{ours}_residual_vector_quantizer/layers/(\d+)/codebook/{ours_name}",
                        rf"quantizer.rvq_{theirs}.vq.layers.\1._codebook.{their_name}",
                        IDENTITY,
                    )
                    for ours_name, their_name in (
                        ("embed_sum", "embedding_sum"),
                        ("cluster_usage", "cluster_usage"),
                        ("initialized", "_initialized"),
                    )
                ),
            )
        ),
    )
