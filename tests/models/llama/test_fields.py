"""What configurations ask for, and what is refused before weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import MoshiConfig

from tests.configs import tiny_llama_config
from tests.models.llama.pairs import tiny_pair
from transformers_moshi_flax import FlaxLlamaForCausalLM, FlaxLlamaModel
from transformers_moshi_flax.checkpoints.formats import TensorFile
from transformers_moshi_flax.models.llama.fields_flax_llama import fields_of


def test_windows_and_frequencies_of_the_layers():
    layers = fields_of(tiny_llama_config("gemma3_text")).layers
    assert [kind.window for kind in layers] == [5, None, 5]
    assert [dict(kind.rope)["rope_type"] for kind in layers] == ["default", "linear", "default"]
    assert [kind.window for kind in fields_of(tiny_llama_config("qwen2")).layers] == [None, 5, 5]
    assert [kind.window for kind in fields_of(tiny_llama_config("mistral")).layers] == [5] * 3
    assert [kind.window for kind in fields_of(tiny_llama_config("mistral", sliding_window=None)).layers] == [None] * 3


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        ("llama", {"rope_parameters": {"rope_type": "su"}}, "`rope_parameters` has rope_type='su'.*use one of"),
        ("llama", {"rope_parameters": None}, "`rope_parameters` has None.*give a rope_type"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"rope_type": "x"}}},
            "has None for layers of 'sliding",
        ),
        ("llama", {"hidden_act": "swoosh"}, "`hidden_act` is 'swoosh'.*use one of"),
        ("llama", {"num_key_value_heads": 3}, "`num_key_value_heads`.*'llama'.*is 3.*does not divide the 4 heads"),
        ("llama", {"head_dim": 5}, "`head_dim`.*is 5.*take an even one"),
        ("qwen2", {"hidden_size": 50}, "`hidden_size`.*'qwen2'.*is 50.*change one"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "`layer_types` has 2 layers.*is 3"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "`layer_types` has 'chunked_attention'.*use 'full_"),
        ("qwen3", {"sliding_window": None}, "`layer_types` has 'sliding_attention'.*`sliding_window` is None"),
        ("gemma2", {"use_bidirectional_attention": True}, "`use_bidirectional_attention`.*True.*set it to False"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "`attn_logit_softcapping`.*50.0.*set it to None"),
        ("helium", {"head_dim": 16}, "`head_dim`.*'helium'.*is 16, but must be .* = 12: set it"),
    ],
)
def test_what_is_refused(model_type: str, changes: dict[str, Any], message: str):
    config = tiny_llama_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        fields_of(config)


def test_it_is_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_pair("llama", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["rope_parameters"] |= {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    values["rope_parameters"]["factor"] = 2.0
    (tmp_path / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr(TensorFile, "__getitem__", lambda self, key: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="rope_type='longrope'"):
        FlaxLlamaForCausalLM.from_pretrained(tmp_path)


def test_another_models_configuration():
    with pytest.raises(ValueError, match=r"config must be a LlamaConfig or .* got MoshiConfig"):
        FlaxLlamaModel(MoshiConfig())
