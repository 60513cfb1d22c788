"""Files of the language models, in both directions and both layouts."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.configs import LLAMAS
from tests.models.llama.pairs import tiny_pair
from tests.test_modeling_flax_common import assert_same_params
from tests.torch_oracle import Pair
from transformers_moshi_flax import (
    FlaxAutoModel,
    FlaxAutoModelForCausalLM,
    FlaxLlamaForCausalLM,
    FlaxLlamaModel,
    FlaxMoshiForCausalLM,
)
from transformers_moshi_flax.model_card import model_card


@pytest.fixture(scope="module", params=LLAMAS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return tiny_pair(request.param, tmp_path_factory.mktemp(request.param))


def test_upstream_loads_what_we_save(pair: Pair, tmp_path: Path):
    pair.ours.save_pretrained(tmp_path, to_pt=True)
    original, written = (load_file(folder / "model.safetensors") for folder in (pair.directory, tmp_path))
    assert written.keys() == original.keys()
    assert all(written[key].tobytes() == tensor.tobytes() for key, tensor in original.items())
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is type(pair.theirs) and not any(info.values())
    for key, tensor in pair.theirs.state_dict().items():
        assert (theirs.state_dict()[key] == tensor).all(), key


def test_configurations_stay(pair: Pair, tmp_path: Path):
    """Those of upstream, with its name of the model."""
    pair.ours.save_pretrained(tmp_path)
    saved, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, pair.directory))
    assert saved == original
    assert_same_params(FlaxLlamaForCausalLM.from_pretrained(tmp_path).params, pair.ours.params)


def test_a_model_card(pair: Pair, tmp_path: Path):
    """Upstream's name of the model, and no word of speech."""
    pair.ours.save_pretrained(tmp_path, to_pt=True)
    card = model_card(pair.ours, pair.ours.params, tmp_path, ["model.safetensors"], "someone/something")
    assert f"from transformers import {type(pair.theirs).__name__}\n" in card
    assert "pipeline_tag: text-generation\n" in card and "speech" not in card


def test_shards_and_the_auto_classes(pair: Pair, tmp_path: Path):
    pair.theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole = FlaxAutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(whole) is FlaxLlamaForCausalLM and type(whole.config) is type(pair.theirs.config)
    assert_same_params(whole.params, pair.ours.params)
    base = FlaxAutoModel.from_pretrained(tmp_path)
    assert type(base) is FlaxLlamaModel
    assert_same_params(base.params, pair.ours.params["model"])
    assert type(whole.model) is FlaxLlamaModel


def test_a_head_that_is_the_table_of_embeddings(tmp_path: Path):
    """Files may hold it twice all the same."""
    pair = tiny_pair("llama", tmp_path / "tied", tie_word_embeddings=True)
    assert set(pair.ours.params) == {"model"}
    tensors = load_file(pair.directory / "model.safetensors")
    assert "lm_head.weight" not in tensors
    (tmp_path / "twice").mkdir()
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "twice/model.safetensors"
    )
    pair.ours.config.save_pretrained(tmp_path / "twice")
    model, info = FlaxLlamaForCausalLM.from_pretrained(tmp_path / "twice", output_loading_info=True)
    assert info["missing_keys"] == []
    assert_same_params(model.params, pair.ours.params)


def test_a_mesh(tmp_path: Path):
    """Every parameter has its place; the head and embeddings of two tables, too."""
    pair = tiny_pair("qwen3", tmp_path)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"))
    model = FlaxLlamaForCausalLM.from_pretrained(tmp_path, sharding=mesh)
    layer = model.params["model"]["layers"]["0"]
    assert layer["mlp"]["gate_proj"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert layer["mlp"]["down_proj"]["kernel"].sharding.spec == PartitionSpec("tensor", "fsdp")
    ids = np.array([[1, 2, 3]])
    np.testing.assert_allclose(model(ids).logits, pair.ours(ids).logits, rtol=0, atol=1e-5)


def test_another_models_files(pair: Pair):
    model_type = pair.theirs.config.model_type
    with pytest.raises(ValueError, match=f"model_type='{model_type}', which neither is nor contains 'moshi'"):
        FlaxMoshiForCausalLM.from_pretrained(pair.directory)
