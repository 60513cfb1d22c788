"""What happens at random in training, and what is refused there."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.configs import tiny_wav2vec2_config
from tests.models.wav2vec2.pairs import draw_recordings, tiny_pair
from transformers_moshi_flax import FlaxHubertModel, FlaxWav2Vec2Model

KEY = jax.random.key(3)
STILL = dict.fromkeys(
    ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop", "mask_time_prob"),
    0.0,
)


def test_masking_is_what_training_does(tmp_path: Path):
    """Without dropout, the frames that differ in the input of the encoder are the masked ones."""
    pair = tiny_pair("wav2vec2", tmp_path, **STILL | {"mask_time_prob": 0.5, "mask_feature_prob": 0.2})
    model, recordings = pair.ours, draw_recordings((400, 300))
    call = {"attention_mask": recordings.mask, "output_hidden_states": True}
    plain = model(recordings.audio, **call).last_hidden_state
    trained = model(recordings.audio, **call, train=True, dropout_rng=KEY).last_hidden_state
    again = model(recordings.audio, **call, train=True, dropout_rng=KEY).last_hidden_state
    other = model(recordings.audio, **call, train=True, dropout_rng=jax.random.key(4)).last_hidden_state
    np.testing.assert_array_equal(trained, again)
    assert np.abs(np.asarray(trained - plain)).max() > 0.1 < np.abs(np.asarray(trained - other)).max()
    still = FlaxWav2Vec2Model.from_pretrained(pair.directory, apply_spec_augment=False)
    np.testing.assert_allclose(still(recordings.audio, **call, train=True).last_hidden_state, plain, atol=1e-5)


def test_layers_are_dropped(tmp_path: Path):
    pair = tiny_pair("hubert", tmp_path, **STILL | {"layerdrop": 1.0}, do_stable_layer_norm=True)
    states = pair.ours(
        draw_recordings((150,)).audio, train=True, dropout_rng=KEY, output_hidden_states=True
    ).hidden_states
    for state in states[1:]:
        np.testing.assert_array_equal(state, states[0])


@pytest.mark.parametrize("field", ["hidden_dropout", "layerdrop", "mask_time_prob"])
def test_what_is_random_needs_a_key(field: str):
    model = FlaxHubertModel(tiny_wav2vec2_config("hubert", **STILL | {field: 0.5}), _do_init=False)
    with pytest.raises(ValueError, match=f"`train=True` with `{field}` > 0 needs `dropout_rng`"):
        model(draw_recordings((150,)).audio, params=model.params_shape_tree, train=True)


def test_spans_longer_than_the_audio():
    model = FlaxWav2Vec2Model(tiny_wav2vec2_config(mask_time_length=10))
    with pytest.raises(ValueError, match=r"`mask_time_length` is 10, but there are 7 frames.*longer audio"):
        model(draw_recordings((150,)).audio, train=True, dropout_rng=KEY)


def test_spans_of_hubert_lie_within_the_rows(tmp_path: Path):
    """Upstream draws them over the width of the batch: where a row is short, they are mostly lost in its padding."""
    pair = tiny_pair("hubert", tmp_path, **STILL | {"mask_time_prob": 1.0, "mask_time_min_masks": 1})
    recordings = draw_recordings((1200, 120))
    call = {"attention_mask": recordings.mask, "output_hidden_states": True}
    plain = pair.ours(recordings.audio, **call).last_hidden_state
    for seed in range(3):
        trained = pair.ours(recordings.audio, **call, train=True, dropout_rng=jax.random.key(seed)).last_hidden_state
        assert np.abs(np.asarray(trained - plain))[1, :5].max() > 0.1
