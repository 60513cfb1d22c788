"""What configurations and calls are refused for, before weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.configs import tiny_wav2vec2_config
from tests.models.wav2vec2.pairs import tiny_pair
from transformers_moshi_flax import FlaxHubertModel, FlaxWav2Vec2Model
from transformers_moshi_flax.checkpoints.formats import TensorFile
from transformers_moshi_flax.models.wav2vec2.topology import check_config, output_length, samples_for


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        ("wav2vec2", {"add_adapter": True}, "`add_adapter`.*'wav2vec2'.*True.*set it to False"),
        ("wav2vec2", {"adapter_attn_dim": 4}, "`adapter_attn_dim`.*4.*set it to None"),
        ("hubert", {"conv_pos_batch_norm": True}, "`conv_pos_batch_norm`.*'hubert'.*True.*set it to False"),
        ("wav2vec2", {"feat_extract_norm": "batch"}, "`feat_extract_norm`.*'batch'.*'group' or 'layer'"),
        ("wav2vec2", {"feat_extract_activation": "swoosh"}, "`feat_extract_activation`.*'swoosh'.*use one of"),
        ("hubert", {"hidden_act": "swoosh"}, "`hidden_act`.*'swoosh'.*use one of"),
        ("hubert", {"conv_stride": (5, 2)}, r"`conv_stride`.*\(5, 2\), but must be 3 positive"),
        ("hubert", {"conv_kernel": (5, 2, 0)}, r"`conv_kernel`.*\(5, 2, 0\), but must be 3 positive"),
        ("hubert", {"num_attention_heads": 5}, "`num_attention_heads`.*5.*does not divide the 24.*change one"),
        ("hubert", {"num_conv_pos_embedding_groups": 5}, "`num_conv_pos_embedding_groups`.*5.*does not divide the 24"),
        ("hubert", {"num_conv_pos_embeddings": 0}, "`num_conv_pos_embeddings`.*0.*at least 1"),
        ("wav2vec2", {"mask_time_prob": 1.5}, r"`mask_time_prob`.*1.5.*in \[0, 1\]"),
        (
            "wav2vec2",
            {"mask_feature_prob": 0.1, "mask_feature_length": 25},
            r"`mask_feature_length`.*25.*in \[1, 24\]",
        ),
    ],
)
def test_what_is_refused(model_type: str, changes: dict[str, Any], message: str):
    config = tiny_wav2vec2_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        check_config(config)


def test_it_is_refused_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_pair("wav2vec2", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "add_adapter": True}))
    monkeypatch.setattr(TensorFile, "__getitem__", lambda self, key: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="`add_adapter`"):
        FlaxWav2Vec2Model.from_pretrained(tmp_path)


def test_lengths():
    config = tiny_wav2vec2_config()
    least = samples_for(config, 3)
    assert output_length(config, least) == 3 and output_length(config, least - 1) == 2
    np.testing.assert_array_equal(output_length(config, np.array([0, 1, samples_for(config, 1)])), [0, 0, 1])


AUDIO = np.zeros((2, 100), np.float32)
MASK = np.ones((2, 100), np.int32)
SHORT, LEFT = MASK.copy(), MASK.copy()
SHORT[1, 20:] = 0
LEFT[0, 0] = 0


@pytest.mark.parametrize(
    "call, message",
    [
        ({"input_values": None}, "`input_values` is None: give audio"),
        (
            {"input_values": AUDIO[0]},
            r"`input_values` must be audio of one channel.*\(batch, samples\), but.*\(100,\)",
        ),
        ({"input_values": AUDIO.astype(np.int16)}, "`input_values` must be audio.*dtype int16"),
        ({"input_values": AUDIO * np.nan}, "`input_values` has values that are NaN or infinite"),
        ({"input_values": AUDIO[:, :20]}, "`input_values` has 20 samples, but a frame takes 30: give longer audio"),
        ({"attention_mask": MASK[:, 1:]}, "`attention_mask` must have the shape"),
        ({"attention_mask": 2 * MASK}, "`attention_mask` must hold only 0"),
        ({"attention_mask": LEFT}, "`attention_mask` has padding before audio: pad on the right"),
        ({"attention_mask": SHORT}, "`attention_mask` has 20 samples in row 1, but a frame takes 30"),
        ({"mask_time_indices": np.zeros((2, 5), bool)}, r"`mask_time_indices` must have the shape \(2, 4\)"),
        ({"mask_time_indices": np.zeros((2, 4), int)}, "`mask_time_indices` must hold bools"),
    ],
)
def test_bad_calls(call: dict[str, Any], message: str):
    model = FlaxHubertModel(tiny_wav2vec2_config("hubert"), _do_init=False)
    with pytest.raises(ValueError, match=message):
        model(**{"input_values": AUDIO, **call}, params=model.params_shape_tree)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"apply_spec_augment": False}, "`mask_time_indices` has no effect with `apply_spec_augment=False`"),
        ({"mask_time_prob": 0.0}, "`mask_time_indices` needs the vector `masked_spec_embed`"),
    ],
)
def test_frames_to_mask_that_nothing_can_be_done_with(fields: dict[str, Any], message: str):
    model = FlaxWav2Vec2Model(tiny_wav2vec2_config(**fields), _do_init=False)
    with pytest.raises(ValueError, match=message):
        model(AUDIO, mask_time_indices=np.zeros((2, 4), bool), params=model.params_shape_tree)
