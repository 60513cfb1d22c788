"""The encoder of Whisper against upstream's with the same weights, its spectrogram, its files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.configs import tiny_whisper_config
from tests.torch_oracle import Pair, assert_close, make_pair, randomize, save_upstream
from transformers_moshi_flax import FlaxAutoModel, FlaxWhisperEncoder, LoraConfig, QuantizationConfig
from transformers_moshi_flax.checkpoints.formats import TensorFile
from transformers_moshi_flax.models.whisper import log_mel

ASKED = {"output_hidden_states": True, "output_attentions": True}


def pair_of(config: Any, directory: Path, dtype: str = "float32", seed: int = 0) -> Pair:
    return make_pair(WhisperEncoder, FlaxWhisperEncoder, config, directory, dtype, seed)


def draw_features(config: Any, dtype: str = "float32", rows: int = 2) -> np.ndarray:
    shape = (rows, config.num_mel_bins, 2 * config.max_source_positions)
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def assert_same_outputs(pair: Pair) -> None:
    features = draw_features(pair.ours.config, pair.dtype)
    expected, found = pair.upstream(torch.tensor(features), **ASKED), pair.ours(features, **ASKED)
    assert set(found) == set(expected)
    for name in expected:
        assert_close(found[name], expected[name], pair.tol, name)


# ----------------------------------------------------------------------------------------------------------- encoder


def test_equals_upstream_in_double(x64: None, tmp_path: Path):
    assert_same_outputs(pair_of(tiny_whisper_config(), tmp_path, "float64"))


@st.composite
def configs(draw: st.DrawFn) -> Any:
    heads = draw(st.sampled_from((1, 2, 3)))
    return tiny_whisper_config(
        d_model=6 * draw(st.integers(1, 3)),
        encoder_attention_heads=heads,
        encoder_layers=draw(st.integers(1, 3)),
        encoder_ffn_dim=draw(st.sampled_from((3, 20))),
        num_mel_bins=draw(st.sampled_from((1, 5))),
        max_source_positions=draw(st.sampled_from((1, 8, 13))),
        activation_function=draw(st.sampled_from(("gelu", "relu", "gelu_new"))),
        scale_embedding=draw(st.booleans()),
    )


@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(config=configs(), seed=st.integers(0, 9))
def test_drawn_configurations(tmp_path_factory: pytest.TempPathFactory, config: Any, seed: int):
    assert_same_outputs(pair_of(config, tmp_path_factory.mktemp("drawn"), seed=seed))


def test_training(tmp_path: Path):
    """Positions have no gradient, the rest has upstream's; dropout and LayerDrop are drawn by the key."""
    pair = pair_of(tiny_whisper_config(encoder_layers=1), tmp_path)
    features = draw_features(pair.ours.config)
    (pair.theirs(torch.tensor(features)).last_hidden_state ** 3).sum().backward()
    grads = jax.grad(lambda params: jnp.sum(pair.ours(features, params=params).last_hidden_state ** 3))(
        pair.ours.params
    )
    assert not np.asarray(grads["embed_positions"]["embedding"]).any()
    theirs = {name: weight.grad for name, weight in pair.theirs.named_parameters()}
    assert_close(grads["conv1"]["kernel"], theirs["conv1.weight"].permute(2, 1, 0), 1e-5)
    query = grads["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    assert_close(query, theirs["layers.0.self_attn.q_proj.weight"].T, 1e-5)

    model = FlaxWhisperEncoder.from_pretrained(tmp_path, dropout=0.5)
    first, again, other = (
        np.asarray(model(features, train=True, dropout_rng=jax.random.key(seed)).last_hidden_state)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    with pytest.raises(ValueError, match="`train=True` with `dropout` > 0 needs `dropout_rng`"):
        model(features, train=True)


def test_new_positions_are_upstreams():
    config = tiny_whisper_config()
    ours = FlaxWhisperEncoder(config).params["embed_positions"]["embedding"]
    assert_close(ours, WhisperEncoder(config).embed_positions.weight, 1e-5)


# ------------------------------------------------------------------------------------------------------- spectrogram


def recordings(samples: int) -> np.ndarray:
    """Noise, a voice-like sum of tones that decays, and silence but for a click."""
    rng = np.random.default_rng(0)
    time = np.arange(samples) / 16_000
    tones = sum(np.sin(2 * np.pi * 130 * k * time + k) / k for k in range(1, 25)) * np.exp(-time)
    click = np.zeros(samples)
    click[samples // 3] = 0.5
    noise = 0.01 * rng.normal(size=(3, samples))
    return (np.stack([rng.normal(size=samples), tones, click]) * 0.2 + noise).astype(np.float32)


@pytest.mark.parametrize("bins, samples", [(80, 16_000), (128, 12_345), (80, 1_759)])
def test_log_mel_is_the_feature_extractors(bins: int, samples: int):
    extractor = WhisperFeatureExtractor(feature_size=bins, chunk_length=1)
    audio = recordings(samples)
    expected = extractor(list(audio), sampling_rate=16_000, return_tensors="np").input_features
    padded = np.pad(audio, ((0, 0), (0, 16_000 - samples)))
    found = np.asarray(log_mel(padded, bins))
    assert found.shape == expected.shape == (3, bins, 100) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_log_mel_keeps_what_is_far_below_the_rest(x64: None):
    """In float32, the numbers of float64: upstream's own are up to 5e-6 away from them here."""
    audio = np.pad(recordings(12_345), ((0, 0), (0, 3_655)))
    exact = log_mel(jnp.asarray(audio, jnp.float64), 128)
    assert exact.dtype == jnp.float64
    np.testing.assert_allclose(log_mel(jnp.asarray(audio), 128), exact, rtol=0, atol=5e-7)


def test_features_of_the_model_and_lengths():
    """Padded to what it hears at once: a padded row is the row alone."""
    model = FlaxWhisperEncoder(tiny_whisper_config(max_source_positions=50, num_mel_bins=80), _do_init=False)
    assert (model.hop_length, model.max_samples) == (320, 16_000)
    audio = recordings(9_999)
    np.testing.assert_array_equal(model.features(audio), log_mel(np.pad(audio, ((0, 0), (0, 16_000 - 9_999))), 80))
    np.testing.assert_array_equal(model.output_lengths(np.array([1, 320, 321, 16_000])), [1, 1, 2, 50])
    extractor = WhisperFeatureExtractor(chunk_length=1)
    mask = extractor(
        [audio[0], audio[1, :321]], sampling_rate=16_000, return_attention_mask=True, return_tensors="np"
    ).attention_mask
    theirs = WhisperForConditionalGeneration._get_feat_extract_output_lengths(model, mask.sum(1))
    np.testing.assert_array_equal(model.output_lengths(np.array([9_999, 321])), theirs)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("upstream", [WhisperModel, WhisperForConditionalGeneration])
def test_only_the_encoder_is_read(upstream: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_whisper_config()
    whole = randomize(upstream._from_config(config, attn_implementation="eager"))
    save_upstream(whole, tmp_path / "whole")
    fetched = []
    fetch = TensorFile.__getitem__
    monkeypatch.setattr(TensorFile, "__getitem__", lambda self, key: (fetched.append(key), fetch(self, key))[1])
    model = FlaxAutoModel.from_pretrained(tmp_path / "whole")
    assert type(model) is FlaxWhisperEncoder and fetched
    assert all(key.removeprefix("model.").startswith("encoder.") for key in fetched)
    features = draw_features(config)
    with torch.no_grad():
        expected = whole.get_encoder()(torch.tensor(features)).last_hidden_state
    assert_close(model(features).last_hidden_state, expected, 1e-5)
    model.save_pretrained(tmp_path / "part", to_pt=True)
    assert json.loads((tmp_path / "part/config.json").read_text())["architectures"] == ["WhisperEncoder"]
    keys = set(load_file(tmp_path / "part/model.safetensors"))
    assert keys == {key.removeprefix("model.").removeprefix("encoder.") for key in fetched}
    theirs, info = WhisperEncoder.from_pretrained(tmp_path / "part", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert_close(theirs(torch.tensor(features)).last_hidden_state, expected, 1e-5)


def test_adapters_and_quantized_weights(tmp_path: Path):
    pair = pair_of(tiny_whisper_config(), tmp_path / "base")
    features = draw_features(pair.ours.config)
    quantization = QuantizationConfig("nf4", group_size=2)
    model = FlaxWhisperEncoder.from_pretrained(tmp_path / "base", quantization=quantization)
    quantized = np.asarray(model(features).last_hidden_state)
    assert 0 < np.abs(quantized - pair.ours(features).last_hidden_state).max()
    model.add_adapter(LoraConfig(r=2, target_modules=["k_proj", "fc2"], init_lora_weights=False))
    adapted = np.asarray(model(features).last_hidden_state)
    assert np.abs(adapted - quantized).max() > 1e-3
    model.save_adapter(tmp_path / "adapter")
    again = FlaxWhisperEncoder.from_pretrained(tmp_path / "base", quantization=quantization)
    again.load_adapter(tmp_path / "adapter")
    assert_close(again(features).last_hidden_state, adapted, 1e-5)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"encoder_attention_heads": 5}, "`encoder_attention_heads`.*is 5.*does not divide the 24 channels.*change"),
        ({"d_model": 9, "encoder_attention_heads": 3}, "`d_model`.*is 9.*take an even one"),
        ({"activation_function": "swoosh"}, "`activation_function`.*'swoosh'.*use one of"),
    ],
)
def test_configurations_that_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        FlaxWhisperEncoder(tiny_whisper_config(**fields), _do_init=False)


FEATURES = np.zeros((2, 10, 22), np.float32)


@pytest.mark.parametrize(
    "features, message",
    [
        (None, "`input_features` is None: give a spectrogram"),
        (FEATURES[:, :, 1:], r"`input_features` must have the shape \(batch, 10, 22\).*pad audio"),
        (FEATURES.astype(int), "`input_features` must hold floats, but has the dtype int"),
        (FEATURES + np.inf, "`input_features` has values that are NaN or infinite"),
    ],
)
def test_bad_calls(features: Any, message: str):
    model = FlaxWhisperEncoder(tiny_whisper_config(), _do_init=False)
    with pytest.raises(ValueError, match=message):
        model(features, params=model.params_shape_tree)


@pytest.mark.parametrize(
    "audio, message",
    [
        (np.zeros((1, 3521), np.float32), "`audio` has 3521 samples, but the encoder hears 3520 at once: cut it"),
        (np.zeros(3520, np.float32), r"`audio` must have the shape \(batch, samples\)"),
        (np.zeros((1, 3520), np.int16), "`audio` must be floats"),
    ],
)
def test_audio_that_is_refused(audio: np.ndarray, message: str):
    model = FlaxWhisperEncoder(tiny_whisper_config(), _do_init=False)
    with pytest.raises(ValueError, match=message):
        model.features(audio)
