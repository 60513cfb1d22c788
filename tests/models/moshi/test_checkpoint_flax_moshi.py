"""Checkpoints of the whole model, to PyTorch and from it, through real files of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.torch import load_file

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import (
    FlaxMimiModel,
    FlaxMoshiDepthDecoder,
    FlaxMoshiForCausalLM,
    FlaxMoshiForConditionalGeneration,
    FlaxMoshiModel,
)
from transformers_moshi_flax.checkpoints.formats import TensorFile


@pytest.fixture(scope="module")
def model() -> FlaxMoshiForConditionalGeneration:
    return FlaxMoshiForConditionalGeneration(tiny_moshi_config(), seed=3)


def equal(left: Any, right: Any) -> bool:
    left, right = flatten_dict(left, sep="/"), flatten_dict(right, sep="/")
    return left.keys() == right.keys() and all(
        left[path].dtype == right[path].dtype and np.asarray(left[path]).tobytes() == np.asarray(right[path]).tobytes()
        for path in left
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shards_load_in_pytorch(model: FlaxMoshiForConditionalGeneration, dtype: Any, tmp_path: Path) -> None:
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    for _ in range(2):  # the second save names its shards anew
        model.save_pretrained(tmp_path, params=params, to_pt=True, max_shard_size="100KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) >= 2
        upstream, info = transformers.MoshiForConditionalGeneration.from_pretrained(
            tmp_path, dtype="auto", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert upstream.dtype == (torch.float32 if dtype == jnp.float32 else torch.bfloat16)
    expected = np.asarray(params["depth_decoder"]["layers"]["1"]["mlp"]["fc1"]["2"]["kernel"].astype(jnp.float32))
    np.testing.assert_array_equal(upstream.depth_decoder.layers[1].mlp.fc1.weight[2].T.float().detach(), expected)
    # and back, from the shards that upstream writes
    upstream.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    again = FlaxMoshiForConditionalGeneration.from_pretrained(tmp_path / "theirs").params

    def without_flags(tree: Any) -> Any:  # upstream keeps the flags of its codebooks in float32
        return {path: leaf for path, leaf in flatten_dict(tree, sep="/").items() if not path.endswith("initialized")}

    assert equal(without_flags(again), without_flags(params))


def test_pickles_of_pytorch(model: FlaxMoshiForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, to_pt=True)
    weights = tmp_path / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
    weights.unlink()
    assert equal(FlaxMoshiForConditionalGeneration.from_pretrained(tmp_path, from_pt=True).params, model.params)


@pytest.mark.parametrize(
    "part_class, path, prefix",
    [
        (FlaxMoshiForCausalLM, ("decoder",), "decoder."),
        (FlaxMoshiModel, ("decoder", "model"), "decoder.model."),
        (FlaxMoshiDepthDecoder, ("depth_decoder",), "depth_decoder."),
        (FlaxMimiModel, ("audio_encoder",), "audio_encoder."),
    ],
)
@pytest.mark.parametrize("to_pt", [True, False])
def test_parts_of_a_whole_read_only_their_tensors(
    model: FlaxMoshiForConditionalGeneration,
    part_class: Any,
    path: tuple[str, ...],
    prefix: str,
    to_pt: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model.save_pretrained(tmp_path, to_pt=to_pt)
    read = []
    monkeypatch.setattr(TensorFile, "__getitem__", lambda self, key: (read.append(key), self._tensors[key])[1])
    part = part_class.from_pretrained(tmp_path)
    expected = model.params
    for name in path:
        expected = expected[name]
    assert equal(part.params, expected)
    assert read and all(key.startswith(prefix) for key in read)
