"""The common tests on the classes of language models."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.models.llama import modeling_llama

from tests.configs import tiny_llama_config
from tests.test_modeling_flax_common import Case, FlaxModelTesterMixin
from transformers_moshi_flax import FlaxLlamaForCausalLM, FlaxLlamaModel

SHAPE = (2, 5)


def _config() -> Any:
    return tiny_llama_config(num_hidden_layers=2, attention_bias=True)


def _ids(config: Any) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, config.vocab_size, SHAPE, dtype=np.int32)
    return {"input_ids": ids, "attention_mask": np.ones(SHAPE, np.int32)}


def _ids_and_labels(config: Any) -> dict[str, np.ndarray]:
    return {**_ids(config), "labels": _ids(config)["input_ids"][:, ::-1].copy()}


def _layers(config: Any) -> dict[str, tuple[int, int]]:
    return {"hidden_states": (config.num_hidden_layers, config.hidden_size)}


def _heads(config: Any) -> dict[str, tuple[int, int]]:
    return {"attentions": (config.num_hidden_layers, config.num_attention_heads)}


MODEL = Case(FlaxLlamaModel, modeling_llama.LlamaModel, _config, _ids, "last_hidden_state", _layers, _heads)
CAUSAL_LM = Case(
    FlaxLlamaForCausalLM, modeling_llama.LlamaForCausalLM, _config, _ids_and_labels, "logits", _layers, _heads
)


class TestFlaxLlamaCommon(FlaxModelTesterMixin):
    cases = (MODEL, CAUSAL_LM)
    base_and_head = (MODEL, CAUSAL_LM)
