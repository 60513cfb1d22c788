"""A user's mistake is a ``ValueError`` that names the argument and what was found; nothing is clamped silently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import (
    FlaxMoshiDepthDecoder,
    FlaxMoshiForCausalLM,
    FlaxMoshiForConditionalGeneration,
    FlaxMoshiModel,
)

FRAME = 16  # samples, in the tiny configuration


@pytest.fixture(scope="module")
def model() -> FlaxMoshiForConditionalGeneration:
    return FlaxMoshiForConditionalGeneration(tiny_moshi_config())


@pytest.fixture(scope="module")
def text_model() -> FlaxMoshiForCausalLM:
    return FlaxMoshiForCausalLM(tiny_moshi_config())


@pytest.fixture(scope="module")
def depth_decoder() -> FlaxMoshiDepthDecoder:
    return FlaxMoshiDepthDecoder(tiny_moshi_config().depth_decoder_config)


def ids(*shape: int, value: int = 1) -> np.ndarray:
    return np.full(shape, value, np.int32)


def streams(**changes: Any) -> dict[str, Any]:
    """Good inputs of three frames, with some replaced; None removes one."""
    good = {"input_ids": ids(2, 3), "user_audio_codes": ids(2, 4, 3), "moshi_audio_codes": ids(2, 4, 3)}
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def audio(frames: int, fill: float = 0.1, batch: int = 2) -> np.ndarray:
    return np.full((batch, 1, frames * FRAME), fill, np.float32)


STREAMS = {
    "rank of ids": (streams(input_ids=ids(3)), "input_ids"),
    "rank of user codes": (streams(user_audio_codes=ids(4, 3)), "user_audio_codes"),
    "rank of moshi codes": (streams(moshi_audio_codes=ids(2, 3)), "moshi_audio_codes"),
    "rank of waveform": (streams(user_audio_codes=None, user_input_values=audio(3)[:, 0]), "user_input_values"),
    "moshi shorter than text": (streams(moshi_audio_codes=ids(2, 4, 2)), "moshi_audio_codes"),
    "moshi longer than text": (streams(moshi_audio_codes=ids(2, 4, 4)), "moshi_audio_codes"),
    "moshi waveform shorter": (streams(moshi_audio_codes=None, moshi_input_values=audio(2)), "moshi_input_values"),
    "user shorter": (streams(user_audio_codes=ids(2, 4, 2)), "user_audio_codes"),
    "user waveform shorter": (streams(user_audio_codes=None, user_input_values=audio(2)), "user_input_values"),
    "other batch": (streams(user_audio_codes=ids(3, 4, 3)), "user_audio_codes"),
    "too few codebooks": (streams(user_audio_codes=ids(2, 3, 3)), "user_audio_codes"),
    "too many codebooks": (streams(moshi_audio_codes=ids(2, 5, 3)), "moshi_audio_codes"),
    "text id above": (streams(input_ids=ids(2, 3, value=61)), "input_ids"),
    "text id below": (streams(input_ids=ids(2, 3, value=-1)), "input_ids"),
    "code above": (streams(user_audio_codes=ids(2, 4, 3, value=33)), "user_audio_codes"),
    "code below": (streams(moshi_audio_codes=ids(2, 4, 3, value=-2)), "moshi_audio_codes"),
    "ids are floats": (streams(input_ids=np.ones((2, 3), np.float32)), "input_ids"),
    "codes are floats": (streams(moshi_audio_codes=np.ones((2, 4, 3), np.float32)), "moshi_audio_codes"),
    "empty audio": (streams(user_audio_codes=None, user_input_values=audio(0)), "user_input_values"),
    "NaN in audio": (streams(user_audio_codes=None, user_input_values=audio(3, np.nan)), "user_input_values"),
    "infinite audio": (streams(moshi_audio_codes=None, moshi_input_values=audio(3, np.inf)), "moshi_input_values"),
    "stereo": (
        streams(user_audio_codes=None, user_input_values=np.zeros((2, 2, 3 * FRAME), np.float32)),
        "user_input_values",
    ),
    "mask of other length": (streams(attention_mask=ids(2, 4)), "attention_mask"),
    "mask of other values": (streams(attention_mask=ids(2, 3, value=2)), "attention_mask"),
    "wrong embedding size": (streams(input_ids=None, inputs_embeds=np.zeros((2, 3, 63), np.float32)), "inputs_embeds"),
    "rank of embeddings": (streams(input_ids=None, inputs_embeds=np.zeros((2, 64), np.float32)), "inputs_embeds"),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("method", ["__call__", "generate"])
def test_streams(model: FlaxMoshiForConditionalGeneration, method: str, name: str) -> None:
    inputs, argument = STREAMS[name]
    options = {"max_new_tokens": 2} if method == "generate" else {}
    with pytest.raises(ValueError, match=f"`{argument}`"):
        getattr(model, method)(**inputs, **options)


@pytest.mark.parametrize("missing", ["input_ids", "user_audio_codes", "moshi_audio_codes"])
def test_missing_stream_of_generate(model: FlaxMoshiForConditionalGeneration, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        model.generate(**streams(**{missing: None}), max_new_tokens=2)


def test_no_input_at_all(model: FlaxMoshiForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="input_ids"):
        model()


LABELS = {
    "shape of text": ({"text_labels": ids(2, 4)}, "text_labels"),
    "text above": ({"text_labels": ids(2, 3, value=60)}, "text_labels"),
    "text below": ({"text_labels": ids(2, 3, value=-1)}, "text_labels"),
    "shape of audio": ({"text_labels": ids(2, 3), "audio_labels": ids(2, 3, 4)}, "audio_labels"),
    "audio above": ({"text_labels": ids(2, 3), "audio_labels": ids(2, 4, 3, value=33)}, "audio_labels"),
    "audio below": ({"text_labels": ids(2, 3), "audio_labels": ids(2, 4, 3, value=-1)}, "audio_labels"),
    "audio without text": ({"audio_labels": ids(2, 4, 3)}, "text_labels"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels(model: FlaxMoshiForConditionalGeneration, name: str) -> None:
    labels, argument = LABELS[name]
    with pytest.raises(ValueError, match=f"`{argument}`"):
        model(**streams(), **labels)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"max_new_token": 3}, "max_new_token.*max_new_tokens"),
    "unknown of the depth decoder": ({"depth_decoder_temprature": 0.5}, "`depth_decoder_temprature"),
    "no new tokens": ({"max_new_tokens": 0}, "`max_new_tokens`"),
    "negative new tokens": ({"max_new_tokens": -1}, "`max_new_tokens`"),
    "length within the prompt": ({"max_length": 3}, "`max_length`"),
    "temperature zero": ({"do_sample": True, "temperature": 0.0}, "`temperature`"),
    "negative temperature": ({"do_sample": True, "temperature": -1.0}, "`temperature`"),
    "negative top-k": ({"do_sample": True, "top_k": -1}, "`top_k`"),
    "top-p above one": ({"do_sample": True, "top_p": 1.5}, "`top_p`"),
    "top-p zero": ({"do_sample": True, "top_p": 0.0}, "`top_p`"),
    "depth temperature": (
        {"depth_decoder_do_sample": True, "depth_decoder_temperature": 0.0},
        "`depth_decoder_temperature`",
    ),
    "depth top-k": ({"depth_decoder_do_sample": True, "depth_decoder_top_k": -3}, "`depth_decoder_top_k`"),
    "end outside the vocabulary": ({"eos_token_id": 61}, "`eos_token_id`"),
    "padding outside the vocabulary": ({"eos_token_id": 5, "pad_token_id": -1}, "`pad_token_id`"),
    "not supported": ({"num_beam_groups": 3}, "num_beam_groups"),
    "keys for another batch": ({"do_sample": True, "prng_key": jax.random.split(jax.random.key(0), 3)}, "`prng_key`"),
    "a processor of two": (
        {"logits_processor": lambda ids, scores: scores},
        r"`logits_processor` must be .*cur_len\)",
    ),
    "a processor that cuts": (
        {"logits_processor": lambda ids, scores, length: scores[:, :5]},
        r"`logits_processor`: .* must return scores of the shape \(2, 60\), but returned \(2, 5\)",
    ),
    "forced for another batch": ({"forced_text_ids": ids(3, 1)}, r"`forced_text_ids` must have the shape \(2, 1 to"),
    "forced for too long": ({"forced_text_ids": ids(2, 21)}, r"`forced_text_ids` must have .*\(2, 21\): pass fewer"),
    "forced and unknown": ({"forced_text_ids": ids(2, 1, value=60)}, r"`forced_text_ids` has the id 60.* -1 leaves"),
    "no params": ({"params": {}}, r"params lack .* give all of required_params, such as model\.params"),
    "params in a collection": ({"params": {"params": {}}}, "params lack .* itself, without the level 'params'"),
    "params of no tree": ({"params": [1]}, "params must be a nested dict .* but is list"),
    "numbers for a key": ({"do_sample": True, "prng_key": jnp.zeros(2)}, "`prng_key`.*float32"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(model: FlaxMoshiForConditionalGeneration, name: str) -> None:
    options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        model.generate(**streams(), **options)


@pytest.mark.parametrize("name", [name for name in OPTIONS if "depth" not in name])
def test_options_for_text(text_model: FlaxMoshiForCausalLM, name: str) -> None:
    options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        text_model.generate(ids(2, 3), **options)


WRONG_TYPES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "generation config": (
        lambda model: model.generate(ids(2, 3), generation_config={"do_sample": True}),
        "`generation_config` must be a `transformers.GenerationConfig`, but is {'do_sample': True}: .* as keywords",
    ),
    "key": (lambda model: model.warmup(2, 3, 2, prng_key="seed"), "`prng_key` must be a key of .* is 'seed'"),
    "data of a key": (
        lambda model: model.warmup(2, 3, 2, prng_key=np.zeros(3, np.uint32)),
        "`prng_key` must be a key",
    ),
    "rows of warmup": (lambda model: model.warmup("a"), "`batch_size` must be a whole number of at least 1, .* 'a'"),
    "prompt of warmup": (lambda model: model.warmup(1, 2.5), "`prompt_.*` must be a whole number .* is 2.5"),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_types(
    model: FlaxMoshiForConditionalGeneration, text_model: FlaxMoshiForCausalLM, name: str, unchecked_types: None
) -> None:
    call, message = WRONG_TYPES[name]
    for either in (model, text_model):
        with pytest.raises(ValueError, match=message):
            call(either)


TEXT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "rank": (lambda model: model(ids(3)), "`input_ids`"),
    "id above": (lambda model: model(ids(1, 3, value=61)), "`input_ids`.* 61"),
    "id below": (lambda model: model(ids(1, 3, value=-7)), "`input_ids`.* -7"),
    "both inputs": (lambda model: model(ids(1, 3), inputs_embeds=np.zeros((1, 3, 64), np.float32)), "`inputs_embeds`"),
    "no input": (lambda model: model(), "`input_ids`"),
    "mask": (lambda model: model(ids(1, 3), attention_mask=ids(1, 2)), "`attention_mask`"),
    "positions": (lambda model: model(ids(1, 3), position_ids=ids(1, 2)), "`position_ids`"),
    "beyond the cache": (
        lambda model: model(ids(1, 5), cache=model.init_cache(1, 4)),
        "`cache`.* 4 .*init_cache",
    ),
    "cache of another batch": (
        lambda model: model(ids(2, 3), cache=model.init_cache(1, 4)),
        "`cache`",
    ),
    "empty cache": (lambda model: model.init_cache(1, 0), "`max_length`"),
    "cache for nobody": (lambda model: model.init_cache(0, 1), "`batch_size`"),
}


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("our_class", [FlaxMoshiModel, FlaxMoshiForCausalLM])
def test_text(text_model: FlaxMoshiForCausalLM, our_class: type, name: str) -> None:
    model = text_model if our_class is FlaxMoshiForCausalLM else our_class(text_model.config)
    call, message = TEXT[name]
    with pytest.raises(ValueError, match=message):
        call(model)


def test_second_chunk_beyond_the_cache(text_model: FlaxMoshiForCausalLM) -> None:
    cache = text_model(ids(1, 3), cache=text_model.init_cache(1, 4)).cache
    with pytest.raises(ValueError, match=r"`cache`.*3 of them used"):
        text_model(ids(1, 2), cache=cache)


def test_labels_of_text(text_model: FlaxMoshiForCausalLM) -> None:
    for labels in (ids(1, 4), ids(1, 3, value=60), ids(1, 3, value=-1)):
        with pytest.raises(ValueError, match="`labels`"):
            text_model(ids(1, 3), labels=labels)
    with pytest.raises(ValueError, match="`logits_to_keep`"):
        text_model(ids(1, 3), logits_to_keep=-1)


def test_empty_prompt(text_model: FlaxMoshiForCausalLM) -> None:
    with pytest.raises(ValueError, match="`input_ids`"):
        text_model.generate(ids(1, 0))


CONTEXT = np.zeros((2, 1, 64), np.float32)
DEPTH: dict[str, tuple[dict[str, Any], str]] = {
    "no context": ({"input_ids": ids(2, 4)}, "`last_hidden_state`"),
    "context of another size": (
        {"input_ids": ids(2, 4), "last_hidden_state": np.zeros((2, 1, 32), np.float32)},
        "`last_hidden_state`",
    ),
    "rank of context": (
        {"input_ids": ids(2, 4), "last_hidden_state": np.zeros((2, 64), np.float32)},
        "`last_hidden_state`",
    ),
    "rank": ({"input_ids": ids(4), "last_hidden_state": CONTEXT}, "`input_ids`"),
    "too many codebooks": ({"input_ids": ids(2, 5), "last_hidden_state": CONTEXT}, "`input_ids`.*5"),
    "text id": ({"input_ids": ids(2, 1, value=61), "last_hidden_state": CONTEXT}, "`input_ids`.*61"),
    "code": (
        {"input_ids": np.array([[60, 33, 1, 1]] * 2, np.int32), "last_hidden_state": CONTEXT},
        "`input_ids`.*33",
    ),
    "labels": ({"input_ids": ids(2, 4), "last_hidden_state": CONTEXT, "labels": ids(2, 3)}, "`labels`"),
    "label": ({"input_ids": ids(2, 4), "last_hidden_state": CONTEXT, "labels": ids(2, 4, value=33)}, "`labels`"),
    "mask": ({"input_ids": ids(2, 4), "last_hidden_state": CONTEXT, "attention_mask": ids(2, 3)}, "`attention_mask`"),
}


@pytest.mark.parametrize("name", DEPTH)
def test_depth_decoder(depth_decoder: FlaxMoshiDepthDecoder, name: str) -> None:
    inputs, message = DEPTH[name]
    with pytest.raises(ValueError, match=message):
        depth_decoder(**inputs)


def test_more_codebooks_than_the_encoder_has() -> None:
    config = tiny_moshi_config()
    config.num_codebooks = 7  # the configuration checks itself only when it is made
    with pytest.raises(ValueError, match=r"`num_codebooks` is 7.* 6 "):
        FlaxMoshiForConditionalGeneration(config)


def test_traced_ids_are_found_by_checkify(text_model: FlaxMoshiForCausalLM) -> None:
    """Inside jit values are unknown; ``checkify`` finds what the eager check would have found."""

    @jax.jit
    def logits(input_ids: jax.Array) -> jax.Array:
        return text_model(input_ids).logits

    error, _ = checkify.checkify(logits)(jnp.full((1, 3), 61))
    assert "input_ids" in (error.get() or "")
    error, _ = checkify.checkify(logits)(jnp.full((1, 3), 60))
    assert error.get() is None
