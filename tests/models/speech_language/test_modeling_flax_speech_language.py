"""The joined model: equal to upstream's Voxtral, and what it is made of."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import VoxtralForConditionalGeneration

from tests.configs import (
    AUDIO_TOKEN,
    TOWERS,
    tiny_llama_config,
    tiny_mimi_config,
    tiny_speech_language_config,
    tiny_voxtral_config,
    tiny_whisper_config,
)
from tests.torch_oracle import (
    TOLERANCE,
    Pair,
    assert_close,
    load_ours,
    oracle_precision,
    randomize,
    save_upstream,
    to_double,
)
from transformers_moshi_flax import (
    FlaxAutoModelForMultimodalLM,
    FlaxLlamaForCausalLM,
    FlaxLlamaModel,
    FlaxMimiModel,
    FlaxSpeechLanguageModel,
    FlaxWhisperEncoder,
    LoraConfig,
    QuantizationConfig,
    SpeechLanguageConfig,
)
from transformers_moshi_flax.checkpoints.configs import meaning

NF4 = QuantizationConfig("nf4", group_size=2, skip=["multi_modal_projector"])


# ------------------------------------------------------------------------------------------------------------ Voxtral


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Rows of unequal lengths, padded on the left, and their recordings."""

    ids: np.ndarray
    mask: np.ndarray
    features: np.ndarray

    @property
    def ours(self) -> dict[str, Any]:
        return {"input_ids": self.ids, "input_features": self.features, "attention_mask": self.mask}

    def theirs(self, dtype: str = "float32") -> dict[str, torch.Tensor]:
        of_ours = {"input_ids": self.ids.astype(np.int64), "attention_mask": self.mask.astype(np.int64)}
        tensors = {name: torch.tensor(array) for name, array in of_ours.items()}
        return {**tensors, "input_features": torch.tensor(self.features, dtype=getattr(torch, dtype))}


def draw_prompt() -> Prompt:
    """Two recordings in the first row, one in the second, of four tokens each."""
    rng = np.random.default_rng(0)
    ids = rng.integers(8, 99, (2, 14), dtype=np.int32)
    mask = np.ones_like(ids)
    ids[0, 2:6] = ids[0, 8:12] = ids[1, 5:9] = AUDIO_TOKEN
    ids[1, :3] = mask[1, :3] = 0
    return Prompt(ids, mask, rng.normal(size=(3, 6, 32)).astype(np.float32))


@pytest.fixture(scope="module")
def voxtral(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("voxtral")
    theirs = randomize(VoxtralForConditionalGeneration._from_config(tiny_voxtral_config()))
    save_upstream(theirs, directory)
    return Pair(theirs, load_ours(FlaxSpeechLanguageModel, directory), directory, "float32")


def assert_equal_to_upstream(theirs: Any, ours: FlaxSpeechLanguageModel, dtype: str) -> None:
    prompt = draw_prompt()
    with oracle_precision(dtype):
        expected = theirs(**prompt.theirs(dtype), output_hidden_states=True)
        features = theirs.get_audio_features(prompt.theirs(dtype)["input_features"]).pooler_output
    outputs = ours(**{**prompt.ours, "input_features": prompt.features.astype(dtype)}, output_hidden_states=True)
    found, counts = ours.get_audio_features(prompt.features.astype(dtype))
    np.testing.assert_array_equal(counts, [4, 4, 4])
    tol, counted = TOLERANCE[dtype], prompt.mask.astype(bool)
    assert_close(found.reshape(features.shape), features, tol)
    assert_close(outputs.logits[counted], expected.logits[torch.tensor(counted)], tol)
    for state, upstream in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert_close(state[counted], upstream[torch.tensor(counted)], tol)


def test_equal_to_upstream(voxtral: Pair):
    assert_equal_to_upstream(voxtral.theirs, voxtral.ours, "float32")


def test_equal_to_upstream_in_float64(voxtral: Pair, x64: None):
    ours = load_ours(FlaxSpeechLanguageModel, voxtral.directory, "float64")
    assert_equal_to_upstream(to_double(voxtral.theirs), ours, "float64")


def test_greedy_tokens_are_upstreams(voxtral: Pair):
    prompt = draw_prompt()
    expected = voxtral.theirs.generate(**prompt.theirs(), max_new_tokens=24, do_sample=False, pad_token_id=0)
    found = voxtral.ours.generate(**prompt.ours, max_new_tokens=24)
    np.testing.assert_array_equal(found.sequences, expected)


def test_generation_has_what_that_of_text_has(voxtral: Pair):
    """Beams, also with an audio token behind the vocabulary, which nothing is looked up for; streamers."""
    prompt, model = draw_prompt(), voxtral.ours
    expected = voxtral.theirs.generate(**prompt.theirs(), max_new_tokens=4, num_beams=2, pad_token_id=0)
    found = model.generate(**prompt.ours, max_new_tokens=4, num_beams=2)
    np.testing.assert_array_equal(found.sequences, expected)
    config = tiny_voxtral_config()
    config.audio_token_id = 103
    other = FlaxSpeechLanguageModel(config, _do_init=False)
    ids = np.where(prompt.ids == AUDIO_TOKEN, 103, prompt.ids)

    class Streamer(list):
        put = list.append

        def end(self) -> None:
            pass

    streamer = Streamer()
    arguments = {**prompt.ours, "input_ids": ids, "params": model.params, "max_new_tokens": 24}
    again = other.generate(**arguments, repetition_penalty=1.0, streamer=streamer)
    greedy = model.generate(**prompt.ours, max_new_tokens=24).sequences[:, 14:]
    np.testing.assert_array_equal(again.sequences[:, 14:], greedy)
    np.testing.assert_array_equal(np.stack(streamer[1:], axis=1), greedy)


def test_parts_are_models(voxtral: Pair, tmp_path: Path):
    """On the same parameters; the encoder is read on its own as well."""
    model, prompt = voxtral.ours, draw_prompt()
    assert isinstance(model.audio_tower, FlaxWhisperEncoder) and isinstance(model.language_model, FlaxLlamaForCausalLM)
    with torch.no_grad():
        expected = voxtral.theirs.model.audio_tower(torch.tensor(prompt.features)).last_hidden_state
    alone = FlaxWhisperEncoder.from_pretrained(voxtral.directory)
    assert alone.upstream_name == "VoxtralEncoder"
    for encoder in (model.audio_tower, alone):
        assert_close(encoder(prompt.features).last_hidden_state, expected, 1e-5)
    assert model.language_model.params is model.params["language_model"]
    assert type(FlaxAutoModelForMultimodalLM.from_pretrained(voxtral.directory)) is FlaxSpeechLanguageModel


# ----------------------------------------------------------------------------------------------------------- encoders


@dataclasses.dataclass(frozen=True)
class Heard:
    """Three recordings of unequal lengths as an encoder takes them, and a prompt with two of them in the first row."""

    audio: np.ndarray
    mask: np.ndarray
    counts: np.ndarray
    name: str
    ids: np.ndarray
    text_mask: np.ndarray

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        audio = {self.name: self.audio, "audio_attention_mask": self.mask}
        return {"input_ids": self.ids, "attention_mask": self.text_mask, **audio}


# steps of the input of each recording, and the tokens that they make, every two frames
STEPS = {
    "whisper": ([22, 9, 4], [6, 3, 1]),
    "wav2vec2": ([400, 150, 90], [10, 4, 2]),
    "hubert": ([400, 150, 90], [10, 4, 2]),
    "mimi": ([400, 150, 90], [13, 5, 3]),
}


def heard(kind: str) -> Heard:
    rng = np.random.default_rng(0)
    steps, counts = STEPS[kind]
    mask = (np.arange(steps[0])[None] < np.array(steps)[:, None]).astype(np.int32)
    shape = {"whisper": (3, 10, 22), "mimi": (3, 1, 400)}.get(kind, (3, 400))
    audio = 0.3 * rng.normal(size=shape).astype(np.float32)
    length = counts[0] + counts[1] + 5
    ids = rng.integers(8, 99, (2, length), dtype=np.int32)
    text_mask = np.ones_like(ids)
    ids[0, 1 : 1 + counts[0]] = ids[0, 2 + counts[0] : 2 + counts[0] + counts[1]] = AUDIO_TOKEN
    start = length - counts[2] - 2
    ids[1, start:-2] = AUDIO_TOKEN
    text_mask[1, : start - 1] = 0
    name = "input_features" if kind == "whisper" else "input_values"
    return Heard(audio, mask, np.array(counts), name, ids, text_mask)


@pytest.mark.parametrize("kind", TOWERS)
def test_encoders(kind: str):
    """Frames of the encoder itself, stacked with numpy, through the layers; a padded row is what it is alone."""
    model, inputs = FlaxSpeechLanguageModel(tiny_speech_language_config(kind)), heard(kind)
    features, counts = model.get_audio_features(inputs.audio, inputs.mask)
    np.testing.assert_array_equal(counts, inputs.counts)
    mask = {} if kind == "whisper" else {"padding_mask" if kind == "mimi" else "attention_mask": inputs.mask}
    outputs = model.audio_tower(inputs.audio, **mask)
    states = np.asarray(outputs.latents.swapaxes(1, 2) if kind == "mimi" else outputs.last_hidden_state)
    layers = model.params["multi_modal_projector"]
    for row, count in enumerate(inputs.counts):
        frames = model.tower.frames(int(inputs.mask[row].sum()))
        padded = np.concatenate([states[row, :frames], np.zeros((5, states.shape[2]), np.float32)])
        stacks = np.stack([padded[2 * token : 2 * token + 3].reshape(-1) for token in range(count)])
        inner = jax.nn.gelu(stacks @ layers["linear_1"]["kernel"], approximate=False)
        assert_close(features[row, :count], inner @ layers["linear_2"]["kernel"], 1e-5)
    start = int(np.argmax(inputs.text_mask[1]))
    alone = model(inputs.ids[1:, start:], **{inputs.name: inputs.audio[2:], "audio_attention_mask": inputs.mask[2:]})
    assert_close(model(**inputs.inputs).logits[1, start:], alone.logits[0], 1e-5)


def test_one_linear_layer():
    config = tiny_speech_language_config("wav2vec2", projector="linear", projector_bias=True, stack_factor=1)
    model, inputs = FlaxSpeechLanguageModel(config), heard("wav2vec2")
    layers = model.params["multi_modal_projector"]
    assert jax.tree.map(jnp.shape, layers) == {"linear": {"kernel": (24, 48), "bias": (48,)}}
    features, _ = model.get_audio_features(inputs.audio)
    states = model.audio_tower(inputs.audio).last_hidden_state
    assert_close(features, states[:, ::2] @ layers["linear"]["kernel"], 1e-5)


# --------------------------------------------------------------------------------------------- files, and what trains


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a Mimi and a language model, joined; beside it the two."""
    directory = tmp_path_factory.mktemp("joined")
    FlaxMimiModel(tiny_mimi_config(num_hidden_layers=1)).save_pretrained(directory / "encoder")
    text = tiny_llama_config("qwen3", num_hidden_layers=1, max_window_layers=0)
    FlaxLlamaForCausalLM(text).save_pretrained(directory / "decoder")
    model = FlaxSpeechLanguageModel.from_encoder_decoder_pretrained(
        directory / "encoder", directory / "decoder", audio_token_id=AUDIO_TOKEN, stack_factor=3, stack_stride=2
    )
    model.save_pretrained(directory, max_shard_size="50KB")
    return directory


def test_joined_from_two_checkpoints(joined: Path):
    model = FlaxSpeechLanguageModel.from_pretrained(joined)
    assert len(list(joined.glob("flax_model-*.safetensors"))) > 1
    assert isinstance(model.config, SpeechLanguageConfig) and model.config.stack_factor == 3
    assert meaning(SpeechLanguageConfig.from_dict(model.config.to_dict())) == meaning(model.config)
    parts = {
        "audio_tower": type(model.audio_tower).from_pretrained(joined / "encoder"),
        "language_model": FlaxLlamaForCausalLM.from_pretrained(joined / "decoder"),
    }
    for name, part in parts.items():
        jax.tree.map(np.testing.assert_array_equal, model.params[name], part.params)


def loss_by(model: FlaxSpeechLanguageModel, inputs: Heard) -> Any:
    labels = np.where(inputs.ids == AUDIO_TOKEN, -100, inputs.ids)

    @jax.jit
    def gradients(leaves: dict[str, Any], params: Any) -> dict[str, Any]:
        def loss(leaves: dict[str, Any]) -> jax.Array:
            return model(**inputs.inputs, labels=labels, params=model.with_trainable(leaves, params)).loss

        return jax.grad(loss)(leaves)

    return lambda leaves: gradients(leaves, model.params)


def test_what_is_trained(joined: Path, tmp_path: Path):
    """An adapter of both sides beside quantized weights and the projector, which is not quantized."""
    model = FlaxSpeechLanguageModel.from_pretrained(joined, quantization=NF4)
    assert set(model.audio_tower.params["encoder_transformer"]["layers"]["0"]["mlp"]["fc1"]) == {
        "kernel_nf4",
        "scales",
    }
    own = 3 * 32 * 48 + 48 * 48
    assert model.num_parameters(only_trainable=True) == own
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    leaves = model.trainable()
    assert model.num_parameters(only_trainable=True) == own + 2 * ((32 + 32) + (48 + 64))
    gradients = loss_by(model, heard("mimi"))(leaves)
    assert all(np.asarray(gradients[path]).any() for path in leaves if not path.endswith("lora_A"))
    before = model.get_audio_features(heard("mimi").audio)[0]
    model.set_trainable({path: leaf + 0.1 for path, leaf in leaves.items()})
    assert np.abs(np.asarray(model.get_audio_features(heard("mimi").audio)[0] - before)).max() > 1e-3
    for path, leaf in model.trainable().items():
        np.testing.assert_array_equal(leaf, leaves[path] + 0.1)
    model.save_adapter(tmp_path)
    again = FlaxSpeechLanguageModel.from_pretrained(joined, quantization=NF4)
    again.load_adapter(tmp_path)
    for path, leaf in again.adapter_leaves().items():
        np.testing.assert_array_equal(leaf, leaves[path] + 0.1)
    with pytest.raises(ValueError, match=r"`finetune` has 'audio_tower', whose weights are quantized.*skip="):
        model.finetune = ["audio_tower"]
    with pytest.raises(ValueError, match=r"an adapter of an audio encoder's layers .* cannot be one row's alone"):
        model.adapted_params(adapter_names=["default", None])


def test_parts_that_are_trained():
    """All of it, but for Whisper's table of positions."""
    model = FlaxSpeechLanguageModel(tiny_speech_language_config("whisper"), _do_init=False)
    model._is_initialized, model._params = True, model.params_shape_tree
    assert model.finetune == ("multi_modal_projector",)
    model.finetune = ["language_model", "audio_tower", "multi_modal_projector"]
    assert model.num_parameters(only_trainable=True) == model.num_parameters() - 11 * 24
    model.finetune = ()
    assert model.trainable() == {}
    for wrong in ("audio_tower", ["encoder"]):
        with pytest.raises(ValueError, match=r"`finetune` is .*, but must be a list of some of 'audio_tower'"):
            model.finetune = wrong


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"audio_token_id": None}, "`audio_token_id` .* is None, but must be the id of the token"),
        ({"projector": "conv"}, "`projector` .* is 'conv', but must be 'mlp' or 'linear'"),
        ({"stack_factor": 0}, "`stack_factor` .* is 0, but must be a whole number"),
        ({"projector_hidden_act": "elu"}, "`projector_hidden_act` .* is 'elu', which is not supported: use one of"),
        ({"audio_config": {"model_type": "bert"}}, "`audio_config` has model_type='bert'.*use one of whisper"),
        ({"text_config": {"model_type": "gpt2"}}, "`text_config` .* has model_type='gpt2'.*use one of llama"),
        (
            {"audio_config": {"model_type": "ear"}},
            "`audio_config` has model_type='ear', which `transformers` does not",
        ),
    ],
)
def test_configurations_that_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        FlaxSpeechLanguageModel(SpeechLanguageConfig(**{"audio_token_id": AUDIO_TOKEN, **fields}), _do_init=False)


@pytest.mark.parametrize(
    "part, field, value, message",
    [
        ("audio_config", "intermediate_size", 100, "`audio_config.intermediate_size` is 100, but the projector takes"),
        ("audio_config", "max_source_positions", 15, "`audio_config.max_source_positions` is 15, but 4 frames"),
        ("text_config", "tie_word_embeddings", True, "`text_config.tie_word_embeddings` is True"),
    ],
)
def test_voxtrals_that_are_refused(part: str, field: str, value: Any, message: str):
    config = tiny_voxtral_config()
    setattr(getattr(config, part), field, value)
    with pytest.raises(ValueError, match=message):
        FlaxSpeechLanguageModel(config, _do_init=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_values": np.zeros((3, 100))}, "`input_values` is not what an encoder 'voxtral_encoder' hears"),
        ({"input_features": None}, r"`input_ids` has audio tokens \(id 7\), but no recording is there"),
        ({"input_features": np.zeros((2, 6, 32), np.float32)}, "has 12 audio tokens .* but the 2 recordings make 8"),
        ({"input_features": np.zeros((3, 6, 30), np.float32)}, "`input_features` must have the shape"),
        ({"input_features": np.full((3, 6, 32), np.nan)}, "`input_features` has values that are NaN or infinite"),
        ({"input_ids": np.where(np.arange(14) < 6, AUDIO_TOKEN, np.full((2, 14), 9))}, "in row 0 end within a record"),
        ({"input_ids": None}, "audio needs `input_ids`"),
        ({"inputs_embeds": np.zeros((2, 14, 48), np.float32)}, "audio needs `input_ids`.* and no `inputs_embeds`"),
        ({"audio_attention_mask": np.zeros((3, 32), np.int32)}, "too little audio for a frame in recording 0"),
        ({"audio_attention_mask": np.eye(3, 32, dtype=np.int32)}, "padding before audio: pad on the right"),
    ],
)
@pytest.mark.parametrize("method", ["__call__", "generate"])
def test_calls_that_are_refused(voxtral: Pair, method: str, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        getattr(voxtral.ours, method)(**{**draw_prompt().ours, **changes})


def test_joining_that_is_refused(joined: Path, tmp_path: Path):
    join, token = FlaxSpeechLanguageModel.from_encoder_decoder_pretrained, {"audio_token_id": AUDIO_TOKEN}
    encoder, decoder = joined / "encoder", joined / "decoder"
    FlaxLlamaModel(tiny_llama_config("llama"), _do_init=False).config.save_pretrained(tmp_path)
    tiny_whisper_config().save_pretrained(tmp_path / "whisper")
    for arguments, message in (
        ((tmp_path, decoder, token), "model_type='llama', which neither is nor contains 'whisper' or"),
        ((encoder, tmp_path / "whisper", token), "model_type='whisper', which neither is nor contains 'llama' or"),
        ((encoder, decoder, {**token, "stackfactor": 2}), "no keyword argument 'stackfactor'; did you mean 'stack_f"),
        ((encoder, decoder, {**token, "decoder_quantization": "nf4"}), "`decoder_quantization`: join floats"),
        ((encoder, decoder, {**token, "stack_factor": -1}), "`stack_factor` .* is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            join(*arguments[:2], **arguments[2])
    with pytest.raises(ValueError, match="to_pt=True writes what upstream's class loads"):
        FlaxSpeechLanguageModel.from_pretrained(joined).save_pretrained(tmp_path / "pt", to_pt=True)
