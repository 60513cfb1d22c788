"""The language model as ``moshi_mlx`` loads it, from the parameters here.

It takes ``model.q4.safetensors`` to be in groups of 32 and ``model.q8.safetensors`` to be in groups of 64; its widths
follow from ``config.json`` by rules of its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from transformers import MoshiConfig

from ...checkpoints.rules import Rule, table_tensors
from ...nn.linear import CODES, OFFSETS, SCALES
from ...quantization.config import QuantizationConfig
from ...quantization.tree import quantized_leaves
from .kyutai_quantized_flax_moshi import is_embedding, quantized_rules

logger = logging.getLogger(__name__)

GRIDS = {
    "model.q4.safetensors": QuantizationConfig("int4", group_size=32, skip=["audio_encoder"], offsets=True),
    "model.q8.safetensors": QuantizationConfig("int8", group_size=64, skip=["audio_encoder"], offsets=True),
}
"""How files of these names are quantized."""

_STEP = r"depformer.slices"
_RENAMED = (
    (r"emb\.(\d+)\.weight", r"audio_embs.\1.weight"),
    (r"depformer_text_emb\.weight", rf"{_STEP}.0.emb.weight"),
    (r"depformer_in\.(\d+)\.weight", rf"{_STEP}.\1.linear_in.weight"),
    (r"linears\.(\d+)\.weight", rf"{_STEP}.\1.linear_out.weight"),
    (r"depformer\.layers\.(\d+)\.gating\.(\d+)\.(.*)", rf"{_STEP}.\2.transformer.layers.\1.gating.\3"),
    (r"(.*\.self_attn\.in_proj)_weight", r"\1.weight"),
    (r"(.*norm[12]?)\.alpha", r"\1.weight"),
)
"""Names of the published floats -> those of MLX."""


def check_widths(config: MoshiConfig, depth_feedforward: int) -> None:
    """ValueError for a model that ``moshi_mlx`` would make with other widths, all fields listed.

    Args:
        config: of the model.
        depth_feedforward: ``depformer_dim_feedforward`` of its ``config.json``.
    """
    depth = config.depth_decoder_config
    wanted = {
        "ffn_dim": (config.ffn_dim, 2 * (11 * config.hidden_size // 4)),
        "hidden_act": (config.hidden_act, "silu"),
        "num_key_value_heads": (config.num_key_value_heads, config.num_attention_heads),
        "depth_decoder_config.hidden_act": (depth.hidden_act, "silu"),
        "depth_decoder_config.num_key_value_heads": (depth.num_key_value_heads, depth.num_attention_heads),
    }
    if depth_feedforward == 4 * depth.hidden_size:
        wanted["depth_decoder_config.ffn_dim"] = (depth.ffn_dim, 2 * (11 * depth.hidden_size // 4))
    wrong = [f"{name}={found!r} (only {only!r})" for name, (found, only) in wanted.items() if found != only]
    if wrong:
        raise ValueError(f"moshi_mlx cannot express this configuration of Moshi: {'; '.join(wrong)}")


def mlx_tensors(params: Mapping[str, Any], rules: tuple[Rule, ...], steps: int) -> dict[str, np.ndarray]:
    """The tensors of a file for ``moshi_mlx``.

    Args:
        params: of the language model, its linear layers as one of :data:`GRIDS`, or floats. Then the embeddings are
            quantized alike, which is told, as it rounds them.
        rules: of the published floats.
        steps: of the depth decoder.
    """
    arrays = {tensor.key: tensor.build() for tensor in table_tensors(params, quantized_rules(rules))}
    scales = {key.removesuffix(f".{SCALES}") for key in arrays if key.endswith(f".{SCALES}")}
    if scales:
        head = {name: arrays[f"text_linear.weight.{name}"] for name in (SCALES, OFFSETS)}
        kind = "int4" if arrays["text_linear.weight"].dtype == np.uint8 else "int8"
        columns = arrays["text_linear.weight"].shape[1] * (2 if kind == "int4" else 1)
        config = QuantizationConfig(kind, group_size=columns // head[SCALES].shape[1], offsets=True)
        logger.warning(f"moshi_mlx has quantized embeddings: they are rounded to {config}")
        for key in [key for key in arrays if is_embedding(key)]:
            arrays |= _quantized_embedding(key, arrays[key], config)
            scales.add(key)
    tensors: dict[str, np.ndarray] = {}
    for key, array in arrays.items():
        if key in scales:
            of_groups = arrays[f"{key}.{SCALES}"], arrays[f"{key}.{OFFSETS}"]
            parts = _packed(array, *of_groups)
        elif key.rpartition(".")[0] in scales:
            continue
        else:
            parts = {"weight": array.reshape(-1) if key.endswith(".alpha") else array}
        for part, rows in parts.items():
            tensors |= {f"{name.removesuffix('weight')}{part}": each for name, each in _named(key, rows, steps)}
    return tensors


def _quantized_embedding(key: str, embedding: np.ndarray, config: QuantizationConfig) -> dict[str, np.ndarray]:
    """Of a table ``(entries, inputs)`` what a matrix ``(outputs, inputs)`` has."""
    leaves = quantized_leaves("", jnp.asarray(embedding).T, config, embedding.shape[1] // int(config.group_size or 1))
    names = {f"/{CODES[str(config.kind)]}": key, f"/{SCALES}": f"{key}.{SCALES}", f"/{OFFSETS}": f"{key}.{OFFSETS}"}
    return {name: np.asarray(leaves[path].T, order="C") for path, name in names.items()}


def _packed(codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> dict[str, np.ndarray]:
    """What MLX has of a matrix, whose codes are from 0 on."""
    middle = 8 if codes.dtype == np.uint8 else 128
    words = codes if codes.dtype == np.uint8 else codes.view(np.uint8) ^ np.uint8(128)
    return {"weight": words.view(np.uint32), "scales": scales, "biases": offsets - np.float32(middle) * scales}


def _named(key: str, rows: np.ndarray, steps: int) -> list[tuple[str, np.ndarray]]:
    """A tensor of the published floats under its names in MLX: what steps share, or have joined, once for each."""
    if match := re.fullmatch(r"depformer_emb\.(\d+)\.weight", key):
        return [(f"{_STEP}.{int(match[1]) + 1}.emb.weight", rows)]
    for pattern, template in _RENAMED:
        key = re.sub(f"^{pattern}$", template, key)
    match = re.fullmatch(r"depformer\.(layers\.\d+\.(?:self_attn|norm[12])\..*)", key)
    if match is None:
        return [(key, rows)]
    own = np.split(rows, steps) if ".self_attn." in key else [rows] * steps
    return [(f"{_STEP}.{step}.transformer.{match[1]}", each) for step, each in enumerate(own)]
