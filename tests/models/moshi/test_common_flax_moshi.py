"""The common tests on Moshi's classes, and what their caches must do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers.models.moshi import modeling_moshi

from tests.configs import tiny_moshi_config
from tests.test_modeling_flax_common import Case, FlaxModelTesterMixin, Loaded
from tests.torch_oracle import assert_close, randomize, save_upstream
from transformers_moshi_flax import (
    FlaxMoshiDepthDecoder,
    FlaxMoshiForCausalLM,
    FlaxMoshiForConditionalGeneration,
    FlaxMoshiModel,
)

BATCH, FRAMES = 2, 5


def _config() -> Any:
    mimi = {"num_hidden_layers": 1, "upsampling_ratios": [2], "num_quantizers": 3}
    return tiny_moshi_config(num_codebooks=3, audio_encoder_config=mimi)


def _ids(size: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, size, shape, dtype=np.int32)


def _text(config: Any) -> dict[str, np.ndarray]:
    return {"input_ids": _ids(config.vocab_size, BATCH, FRAMES), "attention_mask": np.ones((BATCH, FRAMES), np.int32)}


def _text_with_labels(config: Any) -> dict[str, np.ndarray]:
    return {**_text(config), "labels": _ids(config.vocab_size, BATCH, FRAMES, seed=1)}


def _frame(config: Any) -> dict[str, np.ndarray]:
    codes = _ids(config.audio_vocab_size, BATCH, config.num_codebooks - 1)
    return {
        "input_ids": np.concatenate([_ids(config.vocab_size, BATCH, 1), codes], axis=1),
        "last_hidden_state": np.random.default_rng(1).normal(size=(BATCH, 1, config.input_size)).astype(np.float32),
        "labels": _ids(config.audio_vocab_size, BATCH, config.num_codebooks, seed=2),
    }


def _dialogue(config: Any) -> dict[str, np.ndarray]:
    shape = (BATCH, config.num_codebooks, FRAMES)
    return {
        "input_ids": _ids(config.vocab_size, BATCH, FRAMES),
        "user_audio_codes": _ids(config.audio_vocab_size, *shape, seed=1),
        "moshi_audio_codes": _ids(config.audio_vocab_size, *shape, seed=2),
        "text_labels": _ids(config.vocab_size, BATCH, FRAMES, seed=3),
        "audio_labels": _ids(config.audio_vocab_size, *shape, seed=4),
    }


def _layers(config: Any) -> dict[str, tuple[int, int]]:
    return {"hidden_states": (config.num_hidden_layers, config.hidden_size)}


def _heads(config: Any) -> dict[str, tuple[int, int]]:
    return {"attentions": (config.num_hidden_layers, config.num_attention_heads)}


def _both(function: Any) -> Any:
    def of_both(config: Any) -> dict[str, tuple[int, int]]:
        depth = {f"depth_{name}": value for name, value in function(config.depth_decoder_config).items()}
        return {**function(config), **depth}

    return of_both


MODEL = Case(FlaxMoshiModel, modeling_moshi.MoshiModel, _config, _text, "last_hidden_state", _layers, _heads)
CAUSAL_LM = Case(
    FlaxMoshiForCausalLM,
    modeling_moshi.MoshiForCausalLM,
    _config,
    _text_with_labels,
    "logits",
    _layers,
    _heads,
)
DEPTH_DECODER = Case(
    FlaxMoshiDepthDecoder,
    modeling_moshi.MoshiDepthDecoder,
    lambda: _config().depth_decoder_config,
    _frame,
    "logits",
    _layers,
    _heads,
)
WHOLE = Case(
    FlaxMoshiForConditionalGeneration,
    modeling_moshi.MoshiForConditionalGeneration,
    _config,
    _dialogue,
    "audio_logits",
    _both(_layers),
    _both(_heads),
    only_ours=("audio_encoder_padding_mask",),
)


class TestFlaxMoshiCommon(FlaxModelTesterMixin):
    cases = (MODEL, CAUSAL_LM, DEPTH_DECODER, WHOLE)
    base_and_head = (MODEL, CAUSAL_LM)

    def test_parts_load_from_the_whole(self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path):
        whole = self.load(WHOLE, tmp_path_factory)
        whole.model.save_pretrained(tmp_path)
        params = whole.model.params
        for directory in (whole.directory, tmp_path):
            for case, part in (
                (MODEL, params["decoder"]["model"]),
                (CAUSAL_LM, params["decoder"]),
                (DEPTH_DECODER, params["depth_decoder"]),
            ):
                model = case.ours.from_pretrained(directory)
                jax.tree.map(np.testing.assert_array_equal, model.params, part)

    def test_single_codebook_round_trip(self, tmp_path: Path):
        # Upstream keeps the MLPs of a single codebook without the codebook axis, everything else with it.
        config = tiny_moshi_config(num_codebooks=1).depth_decoder_config
        save_upstream(randomize(modeling_moshi.MoshiDepthDecoder(config)), tmp_path)
        FlaxMoshiDepthDecoder.from_pretrained(tmp_path).save_pretrained(tmp_path / "ours", to_pt=True)
        original, written = (load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "ours"))
        assert {key: tensor.shape for key, tensor in written.items()} == {k: t.shape for k, t in original.items()}
        assert all(written[key].tobytes() == tensor.tobytes() for key, tensor in original.items())

    @pytest.mark.parametrize("backbone", [MODEL, CAUSAL_LM], ids=["FlaxMoshiModel", "FlaxMoshiForCausalLM"])
    @pytest.mark.parametrize("padding", [0, 2])
    def test_cached_equals_uncached(self, backbone: Case, padding: int, tmp_path_factory: pytest.TempPathFactory):
        loaded = self.load(backbone, tmp_path_factory)
        model, ids = loaded.model, loaded.inputs["input_ids"]
        mask = np.ones_like(ids)
        mask[0, :padding] = 0
        uncached = model(ids, mask)
        # A prefill of several frames, then one at a time: under jit, as generation does it.
        step = jax.jit(lambda ids, mask, cache: model(ids, mask, cache=cache))
        cache = model.init_cache(BATCH, FRAMES + 3)
        pieces = []
        for start, stop in ((0, 3), (3, 4), (4, 5)):
            outputs = step(ids[:, start:stop], mask[:, start:stop], cache)
            cache = outputs.cache
            pieces.append(outputs.last_hidden_state)
        cached = np.concatenate(pieces, axis=1)
        kept = mask.astype(bool)
        assert_close(cached[kept], np.asarray(uncached.last_hidden_state)[kept], 1e-5)
        assert int(cache.length) == FRAMES

    def test_depth_decoder_cached_equals_uncached(self, tmp_path_factory: pytest.TempPathFactory):
        loaded = self.load(DEPTH_DECODER, tmp_path_factory)
        model = loaded.model
        ids, hidden = loaded.inputs["input_ids"], loaded.inputs["last_hidden_state"]
        uncached = model(ids, hidden).logits
        cache = model.init_cache(BATCH, ids.shape[1])
        pieces = []
        for index in range(ids.shape[1]):
            outputs = model(ids[:, index : index + 1], hidden, cache=cache)
            cache = outputs.cache
            pieces.append(outputs.logits)
        assert_close(jnp.concatenate(pieces, axis=1), uncached, 1e-5)

    def test_cache_is_not_changed_in_place(self, tmp_path_factory: pytest.TempPathFactory):
        loaded: Loaded = self.load(CAUSAL_LM, tmp_path_factory)
        cache = loaded.model.init_cache(BATCH, FRAMES)
        first = loaded.model(loaded.inputs["input_ids"], cache=cache)
        second = loaded.model(loaded.inputs["input_ids"], cache=cache)
        assert int(cache.length) == 0 and int(first.cache.length) == FRAMES
        np.testing.assert_array_equal(np.asarray(first.logits), np.asarray(second.logits))
