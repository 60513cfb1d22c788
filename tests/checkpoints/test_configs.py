"""Configurations with values that no model can have are refused by name, from a file and as an object."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import MoshiConfig

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.checkpoints.configs import build_config, load_config
from transformers_moshi_flax.checkpoints.files import Source


@pytest.mark.parametrize("value", [0, -1, [], True, "many"])
@pytest.mark.parametrize(
    "path",
    [
        ("num_attention_heads",),
        ("head_dim",),
        ("vocab_size",),
        ("num_hidden_layers",),
        ("depth_decoder_config", "ffn_dim"),
        ("audio_encoder_config", "compress"),
        ("audio_encoder_config", "vector_quantization_hidden_dimension"),
        ("audio_encoder_config", "_frame_rate"),
    ],
)
def test_sizes_are_positive_numbers(path: tuple[str, ...], value: Any) -> None:
    values = tiny_moshi_config().to_dict()
    part = values
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    with pytest.raises(ValueError, match=f"make a MoshiConfig: {re.escape('.'.join(path))} must be a .*number"):
        build_config(MoshiConfig, values)


def test_all_of_them_are_told(tmp_path: Path) -> None:
    values = tiny_moshi_config().to_dict() | {"vocab_size": 0}
    values["audio_encoder_config"] |= {"model_type": "encodec", "num_residual_layers": -1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError) as error:
        load_config(MoshiConfig, Source.locate(tmp_path))
    for problem in (
        "vocab_size must be a whole number, at least 1, but is 0",
        "audio_encoder_config.model_type must be 'mimi', but is 'encodec'",
        "audio_encoder_config.num_residual_layers must be a whole number, at least 0, but is -1",
        "Repair config.json",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("model_type", []), ("dtype", []), ("model_type", {})])
def test_other_values_are_our_errors_too(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_moshi_config().to_dict() | {name: value}))
    with pytest.raises(ValueError, match=r"model_type|do not make a MoshiConfig"):
        load_config(MoshiConfig, Source.locate(tmp_path))


def test_a_changed_object_is_looked_at() -> None:
    config = tiny_moshi_config()
    config.depth_decoder_config.num_attention_heads = 0
    with pytest.raises(ValueError, match=r"depth_decoder_config\.num_attention_heads must be a whole number"):
        FlaxMoshiForConditionalGeneration(config, _do_init=False)
