"""Adapters and quantized weights of the language models: their linear layers are those of all models."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from tests.models.llama.pairs import draw_batch, tiny_pair
from tests.torch_oracle import Pair, assert_close
from transformers_moshi_flax import FlaxLlamaForCausalLM, LoraConfig, QuantizationConfig

IDS = draw_batch(99, (6,)).ids


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return tiny_pair("qwen2", tmp_path, num_hidden_layers=2)


def logits(model: FlaxLlamaForCausalLM) -> np.ndarray:
    return np.asarray(jax.jit(lambda ids: model(ids).logits)(IDS))


def test_an_adapter(pair: Pair):
    model = pair.ours
    before = logits(model)
    model.add_adapter(LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert model.num_parameters(only_trainable=True) > 0
    with_adapter = logits(model)
    assert np.abs(with_adapter - before).max() > 0.1
    model.merge_adapter()
    assert_close(logits(model), with_adapter, 1e-5)
    model.unmerge_adapter()
    model.disable_adapters()
    assert_close(logits(model), before, 1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_quantized_layers(pair: Pair, kind: str):
    model = FlaxLlamaForCausalLM.from_pretrained(pair.directory, quantization=QuantizationConfig(kind, group_size=8))
    layer = model.params["model"]["layers"]["0"]
    assert {f"kernel_{kind}", "scales", "bias"} == set(layer["self_attn"]["q_proj"])
    quantized = logits(model)
    assert model.generate(IDS, max_new_tokens=2).sequences[0, 6] == quantized[0, -1].argmax()
    assert 0 < np.abs(quantized - logits(pair.ours)).max()
    model.dequantize()
    assert_close(quantized, logits(model), 1e-5)


def test_an_adapter_beside_quantized_layers(pair: Pair):
    model = FlaxLlamaForCausalLM.from_pretrained(pair.directory, quantization=QuantizationConfig("nf4", group_size=8))
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    assert model.num_parameters(only_trainable=True) == 2 * 2 * ((48 + 48) + (88 + 48))
    adapted = logits(model)
    model.disable_adapters()
    assert np.abs(adapted - logits(model)).max() > 1e-3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_pefts_adapter(pair: Pair, tmp_path: Path):
    """PEFT finds the layers of our file by upstream's names, and computes the same."""
    peft = pytest.importorskip("peft", reason="PEFT, the oracle, is not installed")
    pair.ours.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", init_lora_weights=False))
    pair.ours.save_adapter(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(pair.theirs, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(IDS).long()).logits
    assert_close(logits(pair.ours), expected, 1e-5)
