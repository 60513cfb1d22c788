"""Nothing widens a dtype or adds an axis unasked: whole programs are traced while JAX refuses both.

Tracing needs no weights and compiles nothing, so this is quick and reaches the options that programs branch on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import normalization

from tests.configs import (
    tiny_mimi_config,
    tiny_moshi_config,
    tiny_speech_language_config,
    tiny_wav2vec2_config,
    tiny_whisper_config,
)
from tests.training.codec import runs as codec_runs
from tests.training.examples import draw_batch, make_module, small_config
from transformers_moshi_flax import (
    FlaxHubertModel,
    FlaxMimiModel,
    FlaxMoshiForCausalLM,
    FlaxMoshiForConditionalGeneration,
    FlaxSpeechLanguageModel,
    FlaxWav2Vec2Model,
    FlaxWhisperEncoder,
)
from transformers_moshi_flax.models.whisper import log_mel
from transformers_moshi_flax.training import (
    ObjectiveConfig,
    OptimizerConfig,
    create_train_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
    split_params,
    stack_layers,
)
from transformers_moshi_flax.training.codec.quantizer import CODEBOOKS
from transformers_moshi_flax.training.codec.step import (
    Codec,
    Phase,
    create_codec_state,
    make_codec_eval_step,
    make_codec_train_step,
)
from transformers_moshi_flax.training.train_state import split_paths

ROWS, FRAMES = 2, 6
DTYPES = [jnp.float32, jnp.bfloat16]
SEED = jax.random.PRNGKey(0)


def in_standard_ways(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """But inside of flax's own LayerNorm, which asks what bfloat16 and float32 are together."""
    for name in ("_compute_stats", "_normalize"):
        monkeypatch.setattr(normalization, name, in_standard_ways(getattr(normalization, name)))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def dialogue(num_codebooks: int) -> dict[str, jax.Array]:
    codes = jnp.zeros((ROWS, num_codebooks, FRAMES), jnp.int32)
    ids = jnp.zeros((ROWS, FRAMES), jnp.int32)
    mask = jnp.ones((ROWS, FRAMES), jnp.int32)
    return {"input_ids": ids, "moshi_audio_codes": codes, "user_audio_codes": codes, "attention_mask": mask}


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_gradients_and_outputs(dtype: Any) -> None:
    model = FlaxMoshiForConditionalGeneration(tiny_moshi_config(), dtype=dtype, _do_init=False)
    inputs = dialogue(model.config.num_codebooks)
    labels = {"text_labels": inputs["input_ids"], "audio_labels": inputs["user_audio_codes"]}
    records = {"output_attentions": True, "output_hidden_states": True}
    gradients = jax.eval_shape(
        jax.grad(lambda params: model(**inputs, **labels, params=params).loss), model.params_shape_tree
    )
    outputs = jax.eval_shape(lambda params: dict(model(**inputs, **records, params=params)), model.params_shape_tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    assert outputs["logits"].dtype == dtype


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.7},
        {"num_beams": 2},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2, "length_penalty": 0.5},
        {"output_scores": True, "output_logits": True, "output_attentions": True, "output_hidden_states": True},
        {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 2, "eos_token_id": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_generation_with_audio(dtype: Any, options: dict[str, Any]) -> None:
    model = FlaxMoshiForConditionalGeneration(tiny_moshi_config(), dtype=dtype, _do_init=False)
    inputs = dialogue(model.config.num_codebooks)

    def generate(params: Any) -> jax.Array:
        return model.generate(**inputs, max_new_tokens=4, prng_key=SEED, params=params, **options).audio_sequences

    assert jax.eval_shape(generate, model.params_shape_tree).dtype == jnp.float32


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
        {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True},
        {"suppress_tokens": [3], "begin_suppress_tokens": [4], "min_length": 9, "eos_token_id": [5, 6]},
        {"forced_bos_token_id": 4, "forced_eos_token_id": 5, "eos_token_id": 5},
        {"exponential_decay_length_penalty": (3, 1.1), "eos_token_id": 5, "repetition_penalty": 1.3},
        {"bad_words_ids": [[3, 4], [7]], "sequence_bias": [[[5], 1.0], [[6, 7], -2.0]]},
    ],
    ids=str,
)
def test_generation_of_text(options: dict[str, Any]) -> None:
    model = FlaxMoshiForCausalLM(tiny_moshi_config(), _do_init=False)
    ids = jnp.zeros((ROWS, FRAMES), jnp.int32)

    def generate(params: Any) -> jax.Array:
        return model.generate(ids, max_new_tokens=5, prng_key=SEED, params=params, **options).sequences

    assert jax.eval_shape(generate, model.params_shape_tree).dtype == jnp.int32


@pytest.mark.parametrize("dtype", DTYPES)
def test_codec(dtype: Any) -> None:
    model = FlaxMimiModel(tiny_mimi_config(), dtype=dtype, _do_init=False)
    audio, mask = jnp.zeros((ROWS, 1, 4000)), jnp.ones((ROWS, 1, 4000), jnp.int32)

    def reconstruct(params: Any) -> tuple[jax.Array, jax.Array]:
        outputs = model(audio, padding_mask=mask, params=params)
        return outputs.audio_codes, outputs.audio_values

    codes, values = jax.eval_shape(reconstruct, model.params_shape_tree)
    assert codes.dtype == jnp.int32 and values.dtype == dtype


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9}], ids=str)
def test_a_step_of_a_stream(options: dict[str, Any]) -> None:
    model = FlaxMoshiForConditionalGeneration(tiny_moshi_config(), _do_init=False)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.params_shape_tree)
    stream = model.streaming(ROWS, params=params, **options)
    audio = np.zeros((ROWS, 1, stream.frame_size), np.float32)
    _, frame = jax.eval_shape(stream.step, stream.init(), audio)
    assert frame.audio.dtype == jnp.float32


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_training(dtype: Any, scanned: bool) -> None:
    config = small_config()
    module, params = make_module(config, dtype=dtype)
    if scanned:
        module, params = module.clone(scan_layers=True, gradient_checkpointing=True), stack_layers(params)
    trainable, frozen = split_params(params)
    optimizer, schedule = make_optimizer(OptimizerConfig(), 10, trainable)
    state = jax.eval_shape(lambda: create_train_state(trainable, frozen, optimizer))
    batch = draw_batch(config, (FRAMES, FRAMES - 1), FRAMES)
    step = make_train_step(module, ObjectiveConfig(), optimizer, schedule, accumulation_steps=ROWS)
    new_state, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert metrics["loss"].dtype == jnp.float32
    jax.eval_shape(make_eval_step(module, ObjectiveConfig()), state, batch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_a_codec_s_training(dtype: str, tmp_path: Path) -> None:
    losses = {"losses__adversarial": 1.0, "losses__feature_matching": 1.0}
    training = codec_runs.run_config(tmp_path, model__dtype=dtype, losses__waveform_l1=0.1, **losses)
    codec = Codec(codec_runs.small_config(), training)
    shapes = FlaxMimiModel(codec.config, _do_init=False).params_shape_tree
    weights, _ = split_paths(shapes, (CODEBOOKS,))
    optimizer, schedule = make_optimizer(training.optimizer, 10, weights)
    created = partial(create_codec_state, codec=codec, optimizer=optimizer, seed=0)
    state = jax.eval_shape(lambda params: created(params, {}), shapes)
    batch = {"audio": jnp.zeros((ROWS, 1, 480)), "weights": jnp.ones((ROWS,))}
    plain = Phase(quantizes=False, trains_encoder=True, is_judged=False)
    whole = Phase(quantizes=True, trains_encoder=True, is_judged=True)
    for phase in (plain, whole):
        step = make_codec_train_step(codec, phase, optimizer, schedule)
        new_state, metrics = jax.eval_shape(step, state, batch)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert metrics["loss"].dtype == jnp.float32
    jax.eval_shape(make_codec_eval_step(codec, whole), state, batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["group", "layer", "whisper"])
def test_encoders(kind: str, dtype: Any) -> None:
    """In training, with everything random."""
    if kind == "whisper":
        rates = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout", "encoder_layerdrop"), 0.1)
        model = FlaxWhisperEncoder(tiny_whisper_config(**rates), dtype=dtype, _do_init=False)
        inputs = {"input_features": jnp.zeros((ROWS, 10, 22))}
    else:
        fields = {"feat_extract_norm": kind, "do_stable_layer_norm": kind == "layer", "mask_feature_prob": 0.1}
        cls = FlaxHubertModel if kind == "layer" else FlaxWav2Vec2Model
        config = tiny_wav2vec2_config(cls.config_class.model_type, feat_proj_dropout=0.1, **fields)
        model = cls(config, dtype=dtype, _do_init=False)
        inputs = {"input_values": jnp.zeros((ROWS, 300)), "attention_mask": jnp.ones((ROWS, 300), jnp.int32)}

    def call(params: Any, **options: Any) -> Any:
        return dict(model(**inputs, params=params, output_attentions=True, output_hidden_states=True, **options))

    def loss(params: Any) -> jax.Array:
        return jnp.sum(call(params, train=True, dropout_rng=SEED)["last_hidden_state"].astype(jnp.float32))

    outputs = jax.eval_shape(call, model.params_shape_tree)
    gradients = jax.eval_shape(jax.grad(loss), model.params_shape_tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("kind", ["mimi", "wav2vec2"])
def test_joined_models(kind: str) -> None:
    dtype = jnp.bfloat16
    config = tiny_speech_language_config(kind)
    model = FlaxSpeechLanguageModel(config, dtype=dtype, _do_init=False)
    tower = model.tower
    shape = (ROWS, *((1, 300) if kind == "mimi" else (300,)))
    inputs = {"input_ids": jnp.zeros((ROWS, 12), jnp.int32), tower.input_name: jnp.zeros(shape)}
    inputs["audio_attention_mask"] = jnp.ones((ROWS, shape[-1]), jnp.int32)

    def call(params: Any, inputs: Any, **options: Any) -> Any:
        return dict(model(**inputs, params=params, output_hidden_states=True, **options))

    def loss(params: Any, inputs: Any) -> jax.Array:
        labels = inputs["input_ids"]
        return call(params, inputs, labels=labels, train=True, dropout_rng=SEED)["loss"].astype(jnp.float32)

    outputs = jax.eval_shape(call, model.params_shape_tree, inputs)
    gradients = jax.eval_shape(jax.grad(loss), model.params_shape_tree, inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_spectrogram(dtype: Any) -> None:
    assert jax.eval_shape(log_mel, jax.ShapeDtypeStruct((ROWS, 800), dtype)).dtype == dtype
