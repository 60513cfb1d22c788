"""The language model as those packages load it that have a transformer for each step of the depth decoder.

These are ``moshi_mlx``, and Kyutai's Rust, which is made with candle. ``moshi_mlx`` takes ``model.q4.safetensors`` to
be in groups of 32 and ``model.q8.safetensors`` to be in groups of 64; its widths follow from ``config.json`` by rules
of its own. For candle quantized weights are GGUF of the type Q8_0, floats are safetensors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
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

MLX_GRIDS = {
    "model.q4.safetensors": QuantizationConfig("int4", group_size=32, skip=["audio_encoder"], offsets=True),
    "model.q8.safetensors": QuantizationConfig("int8", group_size=64, skip=["audio_encoder"], offsets=True),
}
CANDLE_GRIDS = {"model.q8.gguf": QuantizationConfig("int8", group_size=32, skip=["audio_encoder"])}
"""How files of these names are quantized."""


def _renamed(step: str) -> tuple[tuple[str, str], ...]:
    """Names of the published floats -> those of a package that calls a step of the depth decoder ``step``."""
    return (
        (r"depformer_text_emb\.weight", rf"{step}.0.emb.weight"),
        (r"depformer_in\.(\d+)\.weight", rf"{step}.\1.linear_in.weight"),
        (r"linears\.(\d+)\.weight", rf"{step}.\1.linear_out.weight"),
        (r"depformer\.layers\.(\d+)\.gating\.(\d+)\.(.*)", rf"{step}.\2.transformer.layers.\1.gating.\3"),
    )


_MLX_STEP, _CANDLE_STEP = "depformer.slices", "depformer"
_MLX_NAMES = (
    *_renamed(_MLX_STEP),
    (r"emb\.(\d+)\.weight", r"audio_embs.\1.weight"),
    (r"(.*\.self_attn\.in_proj)_weight", r"\1.weight"),
    (r"(.*norm[12]?)\.alpha", r"\1.weight"),
)


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
        params: of the language model, its linear layers as one of :data:`MLX_GRIDS`, or floats. Then the embeddings
            are quantized alike, which is told, as it rounds them.
        rules: of the published floats.
        steps: of the depth decoder.
    """
    tensors: dict[str, np.ndarray] = {}
    for key, array, groups in _matrices(params, rules, "moshi_mlx"):
        if groups:
            parts = _packed(array, groups[SCALES], groups[OFFSETS])
        else:
            parts = {"weight": array.reshape(-1) if key.endswith(".alpha") else array}
        for part, rows in parts.items():
            named = _named(key, rows, steps, _MLX_STEP, _MLX_NAMES)
            tensors |= {f"{name.removesuffix('weight')}{part}": each for name, each in named}
    return tensors


def candle_tensors(params: Mapping[str, Any], rules: tuple[Rule, ...], steps: int) -> dict[str, np.ndarray]:
    """The tensors of a file for candle: of a quantized matrix ``X`` the blocks of codes, and float16 ``X.scales``, as
    :func:`~transformers_moshi_flax.checkpoints.writing.write_gguf` takes them.

    Args:
        params: of the language model, its linear layers as the one of :data:`CANDLE_GRIDS`, or floats. Then the
            embeddings are quantized alike; that, and scales that are rounded, is told.
        rules, steps: as of :func:`mlx_tensors`.
    """
    tensors: dict[str, np.ndarray] = {}
    rounded = False
    for key, array, groups in _matrices(params, rules, "candle"):
        parts = {"": array}
        if groups:
            scales = groups[SCALES].astype(np.float16)
            rounded |= not np.array_equal(scales.astype(np.float32), groups[SCALES])
            parts = {"": array.reshape(*scales.shape, -1), f".{SCALES}": scales}
        for part, rows in parts.items():
            named = _named(key, rows, steps, _CANDLE_STEP, _renamed(_CANDLE_STEP))
            tensors |= {f"{name}{part}": each for name, each in named}
    if rounded:
        logger.warning("candle has scales in float16: they are rounded to it")
    return tensors


def _matrices(
    params: Mapping[str, Any], rules: tuple[Rule, ...], package: str
) -> Iterator[tuple[str, np.ndarray, dict[str, np.ndarray]]]:
    """Name, array, and, where it holds codes, the scales and offsets, of every tensor of the published floats."""
    arrays = {tensor.key: tensor.build() for tensor in table_tensors(params, quantized_rules(rules))}
    quantized = {key.removesuffix(f".{SCALES}") for key in arrays if key.endswith(f".{SCALES}")}
    if quantized:
        config = _grid_of(arrays, "text_linear.weight")
        logger.warning(f"{package} has quantized embeddings: they are rounded to {config}")
        for key in [key for key in arrays if is_embedding(key)]:
            arrays |= _quantized_embedding(key, arrays[key], config)
            quantized.add(key)
    for key, array in arrays.items():
        if key.rpartition(".")[0] not in quantized:
            found = {name: arrays.get(f"{key}.{name}") for name in (SCALES, OFFSETS)} if key in quantized else {}
            yield key, array, {name: each for name, each in found.items() if each is not None}


def _grid_of(arrays: Mapping[str, np.ndarray], key: str) -> QuantizationConfig:
    """How a matrix is quantized."""
    kind = "int4" if arrays[key].dtype == np.uint8 else "int8"
    columns = arrays[key].shape[1] * (2 if kind == "int4" else 1)
    group_size = columns // arrays[f"{key}.{SCALES}"].shape[1]
    return QuantizationConfig(kind, group_size=group_size, offsets=f"{key}.{OFFSETS}" in arrays)


def _quantized_embedding(key: str, embedding: np.ndarray, config: QuantizationConfig) -> dict[str, np.ndarray]:
    """Of a table ``(entries, inputs)`` what a matrix ``(outputs, inputs)`` has."""
    leaves = quantized_leaves("", jnp.asarray(embedding).T, config, embedding.shape[1] // int(config.group_size or 1))
    names = {f"/{CODES[str(config.kind)]}": key, f"/{SCALES}": f"{key}.{SCALES}", f"/{OFFSETS}": f"{key}.{OFFSETS}"}
    return {names[path]: np.asarray(leaf.T, order="C") for path, leaf in leaves.items()}


def _packed(codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> dict[str, np.ndarray]:
    """What MLX has of a matrix, whose codes are from 0 on."""
    middle = 8 if codes.dtype == np.uint8 else 128
    words = codes if codes.dtype == np.uint8 else codes.view(np.uint8) ^ np.uint8(128)
    return {"weight": words.view(np.uint32), "scales": scales, "biases": offsets - np.float32(middle) * scales}


def _named(
    key: str, rows: np.ndarray, steps: int, step_name: str, names: tuple[tuple[str, str], ...]
) -> list[tuple[str, np.ndarray]]:
    """A published tensor under its names in a package: what steps share, or have joined, once for each."""
    if match := re.fullmatch(r"depformer_emb\.(\d+)\.weight", key):
        return [(f"{step_name}.{int(match[1]) + 1}.emb.weight", rows)]
    for pattern, template in names:
        key = re.sub(f"^{pattern}$", template, key)
    match = re.fullmatch(r"depformer\.(layers\.\d+\.(?:self_attn|norm[12])\..*)", key)
    if match is None:
        return [(key, rows)]
    own = np.split(rows, steps) if ".self_attn." in key else [rows] * steps
    return [(f"{step_name}.{step}.transformer.{match[1]}", each) for step, each in enumerate(own)]
