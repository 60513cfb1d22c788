"""Features of an encoder of ``transformers`` at the frames of a codec."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, Wav2Vec2Config, Wav2Vec2Model

from transformers_moshi_flax.training.codec.teacher import TransformersTeacher, pooled


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder of 50 features a second."""
    torch.manual_seed(0)
    strides, kernels = (5, 2, 2, 2, 2, 2, 2), (10, 3, 3, 3, 3, 2, 2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": [8] * 7, "conv_stride": strides, "conv_kernel": kernels}
    config = Wav2Vec2Config(
        **sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, initializer_range=0.2
    )
    folder = tmp_path_factory.mktemp("encoder")
    Wav2Vec2Model(config).save_pretrained(folder)
    return folder


def test_pooling_equals_a_plain_loop() -> None:
    states = np.random.default_rng(0).standard_normal((2, 12, 3))
    expected = [states[:, max(4 * k - 2, 0) : 4 * k + 6].mean(axis=1) for k in range(3)]
    np.testing.assert_allclose(pooled(states, 4), np.stack(expected, axis=1), atol=1e-12)
    np.testing.assert_allclose(pooled(states, 1)[:, -1], states[:, -1])


def test_there_is_a_vector_a_frame(encoder: Path) -> None:
    teacher = TransformersTeacher(str(encoder), 1, 24_000, 12.5)
    audio = np.random.default_rng(1).uniform(-1, 1, (2, 1920 * 5)).astype(np.float32)
    features = teacher(audio)
    assert features.shape == (2, 5, 16)
    np.testing.assert_allclose(teacher(audio[:1]), features[:1], atol=1e-4)
    # loudness is normalised
    np.testing.assert_allclose(teacher(audio * 0.5), features, atol=1e-3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(teacher))(audio), features)
    assert not np.allclose(TransformersTeacher(str(encoder), None, 24_000, 12.5)(audio), features, atol=1e-4)


def test_what_is_no_teacher(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 50 features a second, which is no multiple of the codec's 12 frames"):
        TransformersTeacher(str(encoder), None, 24_000, 12.0)
    with pytest.raises(ValueError, match=r"`layer` is 3, but .* has 0 .before all layers. to 2"):
        TransformersTeacher(str(encoder), 3, 24_000, 12.5)
    small = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(small).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\(bert\) takes no waveforms; give one such as WavLM"):
        TransformersTeacher(str(tmp_path), None, 24_000, 12.5)
