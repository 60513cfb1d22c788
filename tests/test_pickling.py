"""What goes to other processes (joblib, Ray, multiprocessing) and comes back: all but compiled programs."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

from tests.configs import tiny_mimi_config, tiny_moshi_config
from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax import (
    FlaxLogitsProcessorList,
    FlaxMimiDecoderModel,
    FlaxMimiEncoderModel,
    FlaxMimiModel,
    FlaxMoshiDepthDecoder,
    FlaxMoshiForCausalLM,
    FlaxMoshiForConditionalGeneration,
    FlaxMoshiModel,
    FlaxNoRepeatNGramLogitsProcessor,
    FlaxTemperatureLogitsWarper,
    MoshiProcessor,
    PcmBuffer,
    PcmDialogue,
)
from transformers_moshi_flax.checkpoints.files import CheckpointNotFoundError
from transformers_moshi_flax.cli.errors import UserMistake
from transformers_moshi_flax.training import (
    ConfigurationError,
    DamagedCheckpointError,
    Interrupted,
    NotFiniteError,
    WorkerError,
)
from transformers_moshi_flax.training.data.preparing import UnusableFolder
from transformers_moshi_flax.training.data.recordings import BadRecording

FRAME = 16

IDS = np.array([[5, 6, 7]])
AUDIO = (0.1 * np.random.default_rng(0).standard_normal((1, 1, FRAME))).astype(np.float32)
CODES = np.arange(6).reshape(1, 6, 1)


def by_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


WAYS = (by_pickle, copy.deepcopy, copy.copy)


@pytest.fixture(scope="module")
def moshi() -> FlaxMoshiForConditionalGeneration:
    model = FlaxMoshiForConditionalGeneration(tiny_moshi_config())
    model.generate(max_new_tokens=3)
    return model


def text(model: FlaxMoshiForCausalLM, params: Any = None) -> Any:
    return model.generate(IDS, max_new_tokens=3, do_sample=True, params=params)


def encoder_step(model: FlaxMimiModel) -> Any:
    return model.encode_step(model.init_encoder_state(1), AUDIO)


def depth(model: FlaxMoshiDepthDecoder) -> Any:
    return model(IDS, np.zeros((1, 1, model.config.input_size), np.float32))


def latents(model: FlaxMimiDecoderModel) -> Any:
    return model(np.ones((1, model.config.hidden_size, 2), np.float32))


USES: tuple[tuple[type, Callable, tuple[Callable, ...]], ...] = (
    (FlaxMoshiModel, tiny_moshi_config, (lambda model: model(IDS),)),
    (
        FlaxMoshiForCausalLM,
        tiny_moshi_config,
        (text, lambda model: model.generate(IDS, max_new_tokens=2, num_beams=2)),
    ),
    (FlaxMoshiDepthDecoder, lambda: tiny_moshi_config().depth_decoder_config, (depth,)),
    (
        FlaxMimiModel,
        tiny_mimi_config,
        (lambda model: model.encode(AUDIO), lambda model: model.decode(CODES), encoder_step),
    ),
    (FlaxMimiEncoderModel, lambda: tiny_mimi_config().encoder_config, (lambda model: model(AUDIO),)),
    (FlaxMimiDecoderModel, lambda: tiny_mimi_config().decoder_config, (latents,)),
)


def assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if jax.dtypes.issubdtype(getattr(left, "dtype", np.int32), jax.dtypes.prng_key):
            left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


@pytest.mark.parametrize(
    ("model_class", "config", "uses"), USES, ids=[model_class.__name__ for model_class, *_ in USES]
)
def test_models_in_use(model_class: type, config: Callable, uses: tuple[Callable, ...]) -> None:
    model = model_class(config())
    unused = len(pickle.dumps(model))
    results = [use(model) for use in uses]
    assert len(pickle.dumps(model)) < 1.01 * unused
    for way in WAYS:
        other = way(model)
        assert other.generation_config == model.generation_config and other.config.to_dict() == model.config.to_dict()
        assert other.dtype == model.dtype and other.name_or_path == model.name_or_path
        assert_same(other.params, model.params)
    other = by_pickle(model)
    for use, result in zip(uses, results):
        assert_same(use(other), result)


def test_the_original_keeps_its_programs(count_compilations: Callable[[], int]) -> None:
    model = FlaxMoshiForCausalLM(tiny_moshi_config())
    before = text(model)
    copies = by_pickle(model), copy.deepcopy(model), copy.copy(model)
    count_compilations()
    text(model)
    assert count_compilations() == 0
    # and a copy that is changed changes nothing in it
    copies[0].enable_gradient_checkpointing()
    copies[1].params["lm_head"]["kernel"] = 0 * copies[1].params["lm_head"]["kernel"]
    assert not model.module.gradient_checkpointing and copies[0].module.gradient_checkpointing
    assert_same(text(copies[2]), before)
    assert_same(text(model), before)


def test_in_another_process() -> None:
    """The parameters, which this model does not keep, go as an argument."""
    model, params = FlaxMoshiForCausalLM.from_pretrained(RANDOM_MODEL, _do_init=False)
    result = text(model, params)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert_same(pool.submit(text, model, params).result(), result)


def test_dialogues_go_on(moshi: FlaxMoshiForConditionalGeneration) -> None:
    """A stream, its state and frames, and PCM that waits for its frame."""
    stream = moshi.streaming(do_sample=True)
    dialogue = PcmDialogue(stream)
    dialogue.feed(AUDIO[0])
    dialogue.step()
    dialogue.feed(AUDIO[0, :, :10])
    others = [way(dialogue) for way in (by_pickle, copy.deepcopy)]
    for other in others:
        assert other.stream is not stream and other.input.buffered_samples.tolist() == [10]
    for _ in range(2):
        for each in (dialogue, *others):
            each.feed(AUDIO[0])
        frame, *frames = (each.step() for each in (dialogue, *others))
        for other in frames:
            np.testing.assert_array_equal(frame.audio[0], other.audio[0])
            assert frame.text_ids == other.text_ids
    for other in others:
        assert_same(dialogue.state, other.state)
    state, frame = stream.step(by_pickle(dialogue.state), AUDIO)
    for thing in (state, frame):
        assert type(by_pickle(thing)) is type(thing)
        assert_same(by_pickle(thing), thing)


def test_a_stream_on_a_mesh_says_why_not(moshi: FlaxMoshiForConditionalGeneration) -> None:
    stream = moshi.streaming(mesh=jax.make_mesh((1,), ("data",)))
    with pytest.raises(TypeError, match="send the model"):
        pickle.dumps(stream)


def test_buffers() -> None:
    buffer = PcmBuffer(1, 4)
    buffer.feed(AUDIO[0, 0, :3])
    for way in (by_pickle, copy.deepcopy):
        other = way(buffer)
        other.feed(AUDIO[0, 0, 3:5])
        np.testing.assert_array_equal(other.take()[0, 0], AUDIO[0, 0, :4])
    assert buffer.buffered_samples.tolist() == [3]


def test_what_goes_in_and_comes_out(moshi: FlaxMoshiForConditionalGeneration) -> None:
    processor = MoshiProcessor.from_pretrained(RANDOM_MODEL)
    audio = {"user_audio": AUDIO[0, 0], "sampling_rate": 24_000, "text": "a"}
    inputs = processor(**audio)
    outputs = moshi.generate(max_new_tokens=3, output_scores=True)
    processors = FlaxLogitsProcessorList([FlaxTemperatureLogitsWarper(0.5), FlaxNoRepeatNGramLogitsProcessor(2)])
    for way in WAYS:
        assert_same(dict(way(processor)(**audio)), dict(way(inputs)))
        for things in (outputs, moshi.get_unconditional_inputs(), moshi.init_cache(1, 2), processors):
            assert type(way(things)) is type(things)
            assert_same(way(things), things)
        assert way(moshi.config).to_dict() == moshi.config.to_dict()
        assert way(moshi.generation_config) == moshi.generation_config
        assert [type(each) for each in way(processors)] == [type(each) for each in processors]


@pytest.mark.parametrize(
    "error",
    [
        Interrupted(15, 3),
        *(
            kind("told")
            for kind in (
                BadRecording,
                CheckpointNotFoundError,
                ConfigurationError,
                DamagedCheckpointError,
                NotFiniteError,
                UnusableFolder,
                UserMistake,
                WorkerError,
            )
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors(error: Exception) -> None:
    """A worker's error reaches who waits for it."""
    for way in WAYS:
        other = way(error)
        assert type(other) is type(error) and str(other) == str(error) and vars(other) == vars(error)
