"""Calls of any length share programs and give what they would alone; padded rows are heard from their own start."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiForCausalLM, FlaxMoshiForConditionalGeneration, FlaxMoshiModel

FRAME = 16
RNG = np.random.default_rng(0)
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}


@pytest.fixture(scope="module")
def model() -> FlaxMoshiForConditionalGeneration:
    """Its codebooks are not of zeros, which would give one code whatever is heard."""
    model = FlaxMoshiForConditionalGeneration(tiny_moshi_config())
    model.params["audio_encoder"]["quantizer"] = jax.tree.map(
        lambda leaf: leaf + np.random.default_rng(1).standard_normal(leaf.shape).astype(np.float32) ** 2,
        model.params["audio_encoder"]["quantizer"],
    )
    return model


def streams(frames: int) -> dict[str, Any]:
    codes = RNG.integers(0, 32, (2, 4, frames))
    return {
        "input_ids": RNG.integers(0, 60, (2, frames)),
        "user_audio_codes": codes,
        "moshi_audio_codes": codes,
        "attention_mask": np.arange(frames) < np.array([[frames], [frames - 2]]),
    }


def check_same(
    call: Callable[..., Any],
    inputs: dict[str, Any],
    of: Callable[[Any], Any] = lambda outputs: outputs,
    tolerance: float = 1e-5,
) -> None:
    """Eagerly, in a bucket, as inside of ``jax.jit``, where nothing is rounded."""
    rounded, exact = jax.tree.leaves(of(call(**inputs))), jax.tree.leaves(of(jax.jit(lambda: call(**inputs))()))
    assert [leaf.shape for leaf in rounded] == [leaf.shape for leaf in exact]
    for one, other in zip(rounded, exact):
        scale = max(1.0, float(np.abs(np.asarray(other)).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def test_padding_to_a_bucket(model: FlaxMoshiForConditionalGeneration) -> None:
    check_same(model, {**streams(9), **EVERYTHING})


@pytest.mark.parametrize("keep", [0, 1, 4, 20])
def test_text_alone(keep: int) -> None:
    ids = streams(9)["input_ids"]
    causal = FlaxMoshiForCausalLM(tiny_moshi_config())
    check_same(causal, {"input_ids": ids, "logits_to_keep": keep, **EVERYTHING})
    if not keep:
        check_same(causal, {"input_ids": ids, "labels": ids})
        check_same(FlaxMoshiModel(tiny_moshi_config()), {"input_ids": ids, "position_ids": np.arange(1, 10)[None]})


def labels_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"text_labels": inputs["input_ids"], "audio_labels": inputs["moshi_audio_codes"]}


@pytest.fixture
def exact(model: FlaxMoshiForConditionalGeneration, x64: None) -> Callable[..., Any]:
    """The model in float64: attentions are sharp, and show the noise of float32."""
    double = FlaxMoshiForConditionalGeneration(model.config, dtype=jnp.float64, _do_init=False)
    return partial(double, params=jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.params))


@pytest.mark.parametrize("masked", [True, False])
def test_losses(exact: Callable[..., Any], masked: bool) -> None:
    inputs = streams(9)
    if not masked:
        del inputs["attention_mask"]
    check_same(exact, {**inputs, **labels_of(inputs), **EVERYTHING}, tolerance=1e-10)


def test_rows_that_begin_with_padding(exact: Callable[..., Any]) -> None:
    """What their padding holds means nothing, and is not compared."""
    inputs = streams(9)
    inputs["attention_mask"] = inputs["attention_mask"][:, ::-1]
    check_same(
        exact,
        {**inputs, **labels_of(inputs)},
        lambda outputs: (outputs.loss, outputs.logits[0], outputs.logits[1, 2:], outputs.audio_logits[1, 2:]),
        tolerance=1e-10,
    )
    causal = FlaxMoshiForCausalLM(tiny_moshi_config())
    text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    check_same(causal, {**text, "labels": text["input_ids"]})


@pytest.mark.parametrize("slots", [40, 13])
def test_with_a_cache(model: FlaxMoshiForConditionalGeneration, slots: int) -> None:
    """One call after the other, the second one up to the last slot; the mask may be of all slots."""
    inputs = streams(slots if slots == 13 else 20)
    exact = np.asarray(jax.jit(lambda: model(**inputs).logits)())
    for of_all_slots in (False, True):
        cache, logits = model.init_cache(2, slots), []
        for start, end in ((0, 9), (9, exact.shape[1])):
            given = {name: value[..., start:end] for name, value in inputs.items()}
            if of_all_slots:
                mask = inputs["attention_mask"]
                given["attention_mask"] = np.pad(mask, ((0, 0), (0, slots - mask.shape[1])), constant_values=True)
            outputs = model(**given, cache=cache, **EVERYTHING)
            cache = outputs.cache
            logits.append(outputs.logits)
            assert int(cache.length) == end and outputs.attentions[0].shape[2:] == (end - start, slots)
        close = {"rtol": 0, "atol": 1e-5 * np.abs(exact).max()}
        np.testing.assert_allclose(np.concatenate(logits, axis=1), exact, **close)


def test_lengths_of_a_bucket_share_programs(
    model: FlaxMoshiForConditionalGeneration, count_compilations: Callable[[], int]
) -> None:
    def call(frames: int) -> None:
        inputs = streams(frames)
        model(**inputs)
        model(**inputs, **labels_of(inputs))
        model(**{**inputs, "attention_mask": inputs["attention_mask"][:, ::-1]})
        cache = model(**inputs, cache=model.init_cache(2, 40), **EVERYTHING).cache
        model(**streams(20 - frames), cache=cache)
        sound = (0.1 * RNG.standard_normal((2, 1, frames * FRAME))).astype(np.float32)
        model(user_input_values=sound, **EVERYTHING)

    call(9)
    count_compilations()
    for frames in (10, 11):
        call(frames)
    assert count_compilations() == 0


@pytest.mark.parametrize("samples", [5 * FRAME, 5 * FRAME - 3], ids=["whole frames", "a part of one"])
def test_rows_are_heard_from_their_own_start(model: FlaxMoshiForConditionalGeneration, samples: int) -> None:
    """What stands in the padding before a row, sound even, has no part in its codes."""
    padding, options = 2, {"max_new_tokens": 3, "do_sample": False, "depth_decoder_do_sample": False}
    sound = (0.1 * RNG.standard_normal((2, 1, samples))).astype(np.float32)
    inputs = {
        "input_ids": RNG.integers(0, 60, (2, 5)).astype(np.int32),
        "user_input_values": sound,
        "moshi_input_values": sound[::-1].copy(),
        "attention_mask": np.array([[1] * 5, [0] * padding + [1] * (5 - padding)]),
    }
    alone = {
        name: value[1:, ..., padding * (FRAME if name.endswith("values") else 1) :] for name, value in inputs.items()
    }

    def logits(inputs: dict[str, Any]) -> jax.Array:
        return model(**inputs).logits[-1, 2 - 5 :]

    scale = 1e-5 * float(np.abs(np.asarray(logits(alone))).max())
    np.testing.assert_allclose(logits(inputs), logits(alone), rtol=0, atol=scale)
    np.testing.assert_allclose(jax.jit(logits)(inputs), logits(alone), rtol=0, atol=scale)

    generate = model.generate
    single, batch = (generate(**given, **options, return_audio_codes=True) for given in (alone, inputs))
    traced = jax.jit(lambda given: generate(**given, **options, return_audio_codes=True))(inputs)
    for found in (batch, traced):
        np.testing.assert_array_equal(found.sequences[1, -3:], single.sequences[0, -3:])
        end = padding + int(single.audio_lengths[0])
        np.testing.assert_array_equal(found.audio_codes[1, :, padding:end], single.audio_codes[0])
