"""The common tests on Mimi's classes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from transformers.models.mimi import modeling_mimi

from tests.configs import tiny_mimi_config
from tests.test_modeling_flax_common import Case, FlaxModelTesterMixin
from transformers_moshi_flax import FlaxMimiDecoderModel, FlaxMimiEncoderModel, FlaxMimiModel

BATCH, FRAMES = 2, 6
# They lack `padding_cache`, without which no stream can go on.
STREAMING = frozenset({"encoder_cache", "decoder_cache"})


def _config() -> Any:
    """One layer and one stage: these tests are about the frame around the model."""
    return tiny_mimi_config(num_hidden_layers=1, upsampling_ratios=[2], num_quantizers=3)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _audio(config: Any) -> dict[str, np.ndarray]:
    return {"input_values": 0.3 * _normal(BATCH, config.audio_channels, FRAMES * config.frame_size - 3)}


def _latents(config: Any) -> dict[str, np.ndarray]:
    return {"latents": _normal(BATCH, config.hidden_size, FRAMES)}


HALVES = ("encoder", "decoder")


def _layers(config: Any) -> dict[str, tuple[int, int]]:
    return {"hidden_states": (config.num_hidden_layers, config.hidden_size)}


def _heads(config: Any) -> dict[str, tuple[int, int]]:
    return {"attentions": (config.num_hidden_layers, config.num_attention_heads)}


ENCODER = Case(
    FlaxMimiEncoderModel,
    modeling_mimi.MimiEncoderModel,
    lambda: _config().encoder_config,
    _audio,
    "latents",
    _layers,
    _heads,
)
DECODER = Case(
    FlaxMimiDecoderModel,
    modeling_mimi.MimiDecoderModel,
    lambda: _config().decoder_config,
    _latents,
    "audio_values",
    _layers,
    _heads,
    only_ours=("use_cache",),
)
CODEC = Case(
    FlaxMimiModel,
    modeling_mimi.MimiModel,
    _config,
    _audio,
    "audio_values",
    lambda config: {f"{half}_{name}": size for half in HALVES for name, size in _layers(config).items()},
    lambda config: {f"{half}_{name}": size for half in HALVES for name, size in _heads(config).items()},
    not_ours=STREAMING,
)


class TestFlaxMimiCommon(FlaxModelTesterMixin):
    cases = (ENCODER, DECODER, CODEC)

    def test_halves_load_from_the_whole(self, tmp_path_factory: pytest.TempPathFactory):
        whole = self.load(CODEC, tmp_path_factory)
        for case in (ENCODER, DECODER):
            model = case.ours.from_pretrained(whole.directory)
            part = {name: whole.model.params[name] for name in model.params}
            jax.tree.map(np.testing.assert_array_equal, model.params, part)
