"""The encoders under one interface: sizes, calls, and what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.configs import tiny_llama_config, tiny_wav2vec2_config, tiny_whisper_config
from transformers_moshi_flax import (
    FlaxAudioEncoder,
    FlaxHubertModel,
    FlaxLlamaModel,
    FlaxWav2Vec2Model,
    FlaxWhisperEncoder,
    LoraConfig,
    QuantizationConfig,
)

CLASSES = {"hubert": FlaxHubertModel, "wav2vec2": FlaxWav2Vec2Model, "whisper": FlaxWhisperEncoder}
NF4 = QuantizationConfig("nf4", group_size=2)
LORA = LoraConfig(r=2, target_modules=["q_proj"])
AUDIO = 0.3 * np.random.default_rng(0).normal(size=(2, 400)).astype(np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of all kinds."""
    found = {}
    for kind, cls in CLASSES.items():
        if kind == "whisper":
            config = tiny_whisper_config(encoder_layers=2)
        else:
            config = tiny_wav2vec2_config(kind, num_hidden_layers=2, feat_extract_norm="layer")
        found[kind] = tmp_path_factory.mktemp(kind)
        cls(config).save_pretrained(found[kind])
    return found


def loss(encoder: FlaxAudioEncoder, params: Any) -> jax.Array:
    return jnp.sum(encoder(AUDIO, params=params).last_hidden_state ** 3)


@pytest.mark.parametrize("kind", CLASSES)
def test_sizes_and_states(kind: str, folders: dict[str, Path]):
    encoder = FlaxAudioEncoder.from_pretrained(folders[kind])
    assert type(encoder.model) is CLASSES[kind]
    assert (encoder.hidden_size, encoder.num_layers) == (24, 2)
    assert encoder.frame_rate == (50 if kind == "whisper" else 800)
    outputs = encoder(AUDIO)
    assert [state.shape for state in outputs.hidden_states] == [outputs.last_hidden_state.shape] * 3
    frames = encoder.output_lengths(np.array([400, 150]))
    np.testing.assert_array_equal(frames, [2, 1] if kind == "whisper" else [19, 7])
    assert outputs.last_hidden_state.shape == (2, 11 if kind == "whisper" else frames[0], 24)
    # frozen: nothing is trained, and nothing has a gradient
    assert encoder.trainable() == {} and encoder.num_parameters(only_trainable=True) == 0
    gradients = jax.grad(lambda params: loss(encoder, params))(encoder.model.params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


def test_long_audio_is_heard_in_windows(folders: dict[str, Path]):
    """Each by itself, their frames one after another; one window is what it is without the option."""
    encoder = FlaxAudioEncoder.from_pretrained(folders["whisper"])
    most = encoder.model.max_samples
    audio = 0.3 * np.random.default_rng(1).normal(size=(2, 2 * most + 170)).astype(np.float32)
    found = encoder(audio, chunk_audio=True)
    windows = [encoder(audio[:, start : start + most]) for start in range(0, audio.shape[1], most)]
    for place, states in enumerate(found.hidden_states):
        alone = np.concatenate([window.hidden_states[place] for window in windows], axis=1)
        np.testing.assert_allclose(states, alone, atol=1e-5 * np.abs(alone).max())
    assert found.last_hidden_state.shape == (2, 33, 24) and encoder.output_lengths(audio.shape[1]) == 23
    short = encoder(AUDIO, chunk_audio=True)
    np.testing.assert_array_equal(short.last_hidden_state, encoder(AUDIO).last_hidden_state)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_adapter_beside_quantized_weights(kind: str, folders: dict[str, Path], tmp_path: Path):
    """It alone has gradients; saved and loaded, it is the same."""
    encoder = FlaxAudioEncoder.from_pretrained(folders[kind], lora=LORA, quantization=NF4)
    leaves = encoder.trainable()
    assert encoder.num_parameters(only_trainable=True) == 2 * 2 * (24 + 24) < encoder.num_parameters()
    gradients = jax.grad(lambda leaves: loss(encoder, encoder.with_trainable(leaves)))(leaves)
    assert all(np.asarray(gradients[path]).any() for path in leaves if path.endswith("lora_B"))
    encoder.set_trainable({path: leaf + 0.1 for path, leaf in leaves.items()})
    encoder.save_pretrained(tmp_path)
    again = FlaxAudioEncoder.from_pretrained(folders[kind], lora=tmp_path, quantization=NF4)
    np.testing.assert_array_equal(again(AUDIO).last_hidden_state, encoder(AUDIO).last_hidden_state)


@pytest.mark.parametrize("kind", ["hubert", "whisper"])
def test_all_weights(kind: str, folders: dict[str, Path], tmp_path: Path):
    """But for Whisper's positions."""
    encoder = FlaxAudioEncoder.from_pretrained(folders[kind], finetune=True)
    leaves = encoder.trainable()
    lacking = 11 * 24 if kind == "whisper" else 0
    assert encoder.num_parameters(only_trainable=True) == encoder.num_parameters() - lacking
    gradients = jax.grad(lambda leaves: loss(encoder, encoder.with_trainable(leaves)))(leaves)
    key = "encoder/layers/0/attention/q_proj/kernel" if kind == "hubert" else "layers/0/self_attn/q_proj/kernel"
    assert np.asarray(gradients[key]).any()
    encoder.set_trainable({path: leaf + 0.1 for path, leaf in leaves.items()})
    encoder.save_pretrained(tmp_path)
    again = FlaxAudioEncoder.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(AUDIO).last_hidden_state, encoder(AUDIO).last_hidden_state)
    with pytest.raises(ValueError, match="`leaves` are missing, too many, or of another shape"):
        encoder.with_trainable({})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"finetune": True, "lora": LORA}, "`finetune` is True, but `lora` is .*leave one out"),
        ({"finetune": True, "quantization": "nf4"}, "`finetune` is True, but `quantization` is 'nf4'.*give `lora`"),
        ({"_do_init": False}, "`_do_init` and `output_loading_info` are of the class"),
        ({"fine_tune": True}, "no keyword argument 'fine_tune'"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str, folders: dict[str, Path]):
    with pytest.raises(ValueError, match=message):
        FlaxAudioEncoder.from_pretrained(folders["hubert"], **options)


def test_models_and_calls_that_are_refused(folders: dict[str, Path], tmp_path: Path, unchecked_types: None):
    tiny_llama_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type='llama'.*knows hubert, wav2vec2, whisper"):
        FlaxAudioEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`model` must be an encoder of audio, but is a FlaxLlamaModel"):
        FlaxAudioEncoder(FlaxLlamaModel(tiny_llama_config(), _do_init=False))
    with pytest.raises(ValueError, match="`attention_mask` has no effect on Whisper"):
        FlaxAudioEncoder.from_pretrained(folders["whisper"])(AUDIO, np.ones((2, 400), np.int32))
    with pytest.raises(ValueError, match="`chunk_audio` has no effect on an encoder that hears any length"):
        FlaxAudioEncoder.from_pretrained(folders["hubert"])(AUDIO, chunk_audio=True)
    whisper = FlaxAudioEncoder.from_pretrained(folders["whisper"])
    most = whisper.model.max_samples
    with pytest.raises(ValueError, match=f"hears {most} at once: cut it in pieces, as .*chunk_audio=True"):
        whisper(np.zeros((1, most + 1), np.float32))
    with pytest.raises(ValueError, match="`audio`"):
        whisper(np.zeros((1, 80, 22), np.float32), chunk_audio=True)
