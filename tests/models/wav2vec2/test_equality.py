"""Wav2Vec2 and HuBERT against upstream's with the same weights, which went through real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.configs import WAV2VEC2S, tiny_wav2vec2_config
from tests.models.wav2vec2.pairs import ASKED, Recordings, draw_recordings, pair_of, tiny_pair
from tests.torch_oracle import Pair, assert_close

LENGTHS = (173, 101, 40)


def assert_same_outputs(pair: Pair, recordings: Recordings, masked: bool = True) -> None:
    """All outputs, those of padded frames too; the first row alone without a mask."""
    theirs = recordings.for_torch(pair.dtype)
    ours = {"input_values": recordings.audio.astype(pair.dtype), "attention_mask": recordings.mask}
    if not masked:
        ours, theirs = ({"input_values": inputs["input_values"][:1]} for inputs in (ours, theirs))
    expected = pair.upstream(**theirs, **ASKED)
    found = pair.ours(**ours, **ASKED)
    assert set(found) == set(expected)
    for name in expected:
        assert_close(found[name], expected[name], pair.tol, name)


KINDS = pytest.mark.parametrize(
    "model_type, norm, stable", [("wav2vec2", "group", False), ("hubert", "layer", True), ("wav2vec2", "layer", False)]
)
"""The kinds that there are checkpoints of; :func:`configs` draws the others as well."""


@KINDS
def test_equals_upstream(model_type: str, norm: str, stable: bool, tmp_path: Path):
    pair = tiny_pair(model_type, tmp_path, feat_extract_norm=norm, do_stable_layer_norm=stable)
    assert_same_outputs(pair, draw_recordings(LENGTHS))
    assert_same_outputs(pair, draw_recordings(LENGTHS), masked=False)


@KINDS
def test_equals_upstream_in_double(model_type: str, norm: str, stable: bool, x64: None, tmp_path: Path):
    fields = {"feat_extract_norm": norm, "do_stable_layer_norm": stable, "conv_bias": stable, "num_hidden_layers": 2}
    pair = tiny_pair(model_type, tmp_path, "float64", **fields)
    assert_same_outputs(pair, draw_recordings(LENGTHS))


@st.composite
def configs(draw: st.DrawFn) -> Any:
    heads, groups = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 6)))
    layers = draw(st.integers(1, 3))
    sizes = st.lists(st.integers(1, 4), min_size=layers, max_size=layers)
    model_type = draw(st.sampled_from(WAV2VEC2S))
    fields = {"feat_proj_layer_norm": draw(st.booleans())} if model_type == "hubert" else {}
    return tiny_wav2vec2_config(
        model_type,
        hidden_size=6 * draw(st.integers(1, 3)),
        num_attention_heads=heads,
        intermediate_size=draw(st.sampled_from((3, 20))),
        num_hidden_layers=draw(st.integers(1, 2)),
        conv_dim=tuple(2 + size for size in draw(sizes)),
        conv_kernel=tuple(draw(sizes)),
        conv_stride=tuple(draw(sizes)),
        conv_bias=draw(st.booleans()),
        feat_extract_norm=draw(st.sampled_from(("group", "layer"))),
        feat_extract_activation=draw(st.sampled_from(("gelu", "relu", "gelu_new"))),
        hidden_act=draw(st.sampled_from(("gelu", "silu"))),
        do_stable_layer_norm=draw(st.booleans()),
        num_conv_pos_embeddings=draw(st.integers(1, 9)),
        num_conv_pos_embedding_groups=groups,
        layer_norm_eps=draw(st.sampled_from((1e-5, 1e-2))),
        mask_time_prob=draw(st.sampled_from((0.0, 0.5))),
        **fields,
    )


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(config=configs(), seed=st.integers(0, 9))
def test_drawn_configurations(tmp_path_factory: pytest.TempPathFactory, config: Any, seed: int):
    pair = pair_of(config, tmp_path_factory.mktemp("drawn"), seed=seed)
    lengths = (pair.ours.hop_length * 7 + 65, 66)
    frames = pair.theirs._get_feat_extract_output_lengths(torch.tensor(lengths))
    np.testing.assert_array_equal(pair.ours.output_lengths(np.array(lengths)), frames)
    assert_same_outputs(pair, draw_recordings(lengths, seed))


def test_a_padded_row_is_the_row_alone(tmp_path: Path):
    pair = tiny_pair("wav2vec2", tmp_path, feat_extract_norm="layer")
    recordings = draw_recordings(LENGTHS)
    states = pair.ours(recordings.audio, recordings.mask, output_hidden_states=True).hidden_states
    alone = pair.ours(recordings.audio[1:2, : LENGTHS[1]], output_hidden_states=True).hidden_states
    frames = pair.ours.output_lengths(LENGTHS[1])
    assert alone[0].shape[1] == frames == 4
    assert_close([state[1:2, :frames] for state in states], [np.asarray(state) for state in alone], 1e-5)


def test_frames_that_are_masked(tmp_path: Path):
    """Given ones, also without training."""
    pair = tiny_pair("wav2vec2", tmp_path)
    audio = draw_recordings((173,)).audio
    chosen = np.arange(pair.ours.output_lengths(173))[None] % 3 == 1
    theirs = pair.upstream(torch.tensor(audio), mask_time_indices=torch.tensor(chosen)).last_hidden_state
    ours = pair.ours(audio, mask_time_indices=chosen).last_hidden_state
    assert_close(ours, theirs, 1e-5)
    assert np.abs(np.asarray(ours - pair.ours(audio).last_hidden_state)).max() > 0.1


def test_gradients(tmp_path: Path):
    """Of the feature extractor, of both parts of the positions' kernel, and of a layer, by a call with a mask."""
    pair = tiny_pair("hubert", tmp_path, num_hidden_layers=1)
    recordings = draw_recordings((120, 71))
    (pair.theirs(**recordings.for_torch()).last_hidden_state ** 3).sum().backward()
    grads = jax.grad(
        lambda params: jnp.sum(pair.ours(recordings.audio, recordings.mask, params=params).last_hidden_state ** 3)
    )(pair.ours.params)
    theirs = {name: weight.grad for name, weight in pair.theirs.named_parameters()}
    conv, name = grads["encoder"]["pos_conv_embed"]["conv"], "encoder.pos_conv_embed.conv.parametrizations.weight."
    first = grads["feature_extractor"]["conv_layers"]["0"]["conv"]["kernel"]
    query = grads["encoder"]["layers"]["0"]["attention"]["q_proj"]["kernel"]
    assert_close(conv["scale"], theirs[name + "original0"][0, 0], 1e-5)
    assert_close(conv["kernel"], theirs[name + "original1"].permute(2, 1, 0), 1e-5)
    assert_close(first, theirs["feature_extractor.conv_layers.0.conv.weight"].permute(2, 1, 0), 1e-5)
    assert_close(query, theirs["encoder.layers.0.attention.q_proj.weight"].T, 1e-5)
