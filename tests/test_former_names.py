"""Caches by the names that ``transformers`` had for them up to 5.23, beside those of today."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from tests.configs import tiny_mimi_config, tiny_moshi_config
from transformers_moshi_flax import (
    FlaxMimiDecoderModel,
    FlaxMimiEncoderModel,
    FlaxMimiModel,
    FlaxMoshiDepthDecoder,
    FlaxMoshiForCausalLM,
    FlaxMoshiForConditionalGeneration,
    FlaxMoshiModel,
)
from transformers_moshi_flax.former_names import accept_former_names

IDS = np.array([[1, 2]])


@pytest.fixture(scope="module")
def text_model() -> FlaxMoshiForCausalLM:
    return FlaxMoshiForCausalLM(tiny_moshi_config())


@pytest.fixture(scope="module")
def codec() -> FlaxMimiModel:
    return FlaxMimiModel(tiny_mimi_config())


def test_a_text_model_takes_both_names(text_model: FlaxMoshiForCausalLM):
    now = text_model(IDS, cache=text_model.init_cache(1, 4))
    former = text_model(IDS, past_key_values=text_model.init_cache(1, 4))
    np.testing.assert_array_equal(now.logits, former.logits)
    assert now.past_key_values is now.cache is now["past_key_values"] is now["cache"] is now.get("past_key_values")
    assert "past_key_values" in now and "past_key_values" not in now.keys()
    assert int(former.cache.length) == 2
    assert "past_key_values" not in text_model(IDS) and text_model(IDS).past_key_values is None


def test_both_names_at_once_are_refused(text_model: FlaxMoshiForCausalLM):
    cache = text_model.init_cache(1, 4)
    with pytest.raises(ValueError, match="`past_key_values` is the former name of `cache`, and both are given"):
        text_model(IDS, cache=cache, past_key_values=cache)
    assert text_model(IDS, cache=cache, past_key_values=None).cache is not None


def test_a_stream_of_mimi_takes_both_names(codec: FlaxMimiModel):
    size = codec.config.frame_size
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 1, 2 * size)).astype(np.float32)
    first = codec.encode(audio[..., :size], use_streaming=True)
    given = {"padding_cache": first.padding_cache}
    now = codec.encode(audio[..., size:], encoder_cache=first.encoder_cache, **given)
    former = codec.encode(audio[..., size:], encoder_past_key_values=first.encoder_past_key_values, **given)
    np.testing.assert_array_equal(now.audio_codes, former.audio_codes)
    sound = codec.decode(first.audio_codes, use_cache=True)
    now = codec.decode(now.audio_codes, decoder_cache=sound.decoder_cache)
    former = codec.decode(former.audio_codes, decoder_past_key_values=sound["decoder_past_key_values"])
    np.testing.assert_array_equal(now.audio_values, former.audio_values)


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (FlaxMoshiModel.__call__, {"cache"}),
        (FlaxMoshiForCausalLM.__call__, {"cache"}),
        (FlaxMoshiDepthDecoder.__call__, {"cache"}),
        (FlaxMoshiForConditionalGeneration.__call__, {"cache"}),
        (FlaxMimiEncoderModel.__call__, {"cache", "padding_cache"}),
        (FlaxMimiDecoderModel.__call__, {"cache"}),
        (FlaxMimiModel.encode, {"encoder_cache", "padding_cache"}),
        (FlaxMimiModel.decode, {"decoder_cache"}),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_signatures_have_todays_names(method, names: set[str]):
    parameters = inspect.signature(method).parameters
    assert {name for name in parameters if name.endswith("cache") and name != "use_cache"} == names


def test_other_keywords_pass_unchanged():
    @accept_former_names
    def function(*, cache=None, other=None):
        return cache, other

    assert function(past_key_values=1, other=2) == (1, 2)
    with pytest.raises(TypeError, match="decoder_past_key_values"):
        function(decoder_past_key_values=1)
