"""One function makes a frame, and what programs look like for accelerators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.configs import tiny_moshi_config
from tests.lowering import counted, lowered
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.models.moshi import frame_flax_moshi, generation_flax_moshi, streaming_flax_moshi
from transformers_moshi_flax.models.moshi.streaming_flax_moshi import FlaxMoshiStream

FRAMES = 4
OPTIONS = {"max_new_tokens": FRAMES, "do_sample": False, "return_audio_waveforms": False, "return_audio_codes": True}
ACCELERATORS = ["cuda", "tpu"]


@pytest.fixture(scope="module")
def model() -> FlaxMoshiForConditionalGeneration:
    return FlaxMoshiForConditionalGeneration(tiny_moshi_config())


def silence(stream: FlaxMoshiStream) -> np.ndarray:
    return np.zeros((stream.batch_size, stream.channels, stream.frame_size), np.float32)


def spoken(model: FlaxMoshiForConditionalGeneration) -> dict[str, np.ndarray]:
    """The codes that each way of generation makes."""
    stream = model.streaming(do_sample=False, return_audio_waveforms=False)
    state = stream.init(jax.random.key(0))
    frames = []
    for _ in range(FRAMES):
        state, frame = stream.step(state, silence(stream))
        frames.append(np.asarray(frame.audio_codes))
    return {
        "greedy": np.asarray(model.generate(**OPTIONS).audio_codes),
        "sampled": np.asarray(model.generate(**{**OPTIONS, "do_sample": True}).audio_codes),
        "beams": np.asarray(model.generate(**OPTIONS, num_beams=2).audio_codes),
        "stream": np.stack(frames, axis=-1),
    }


def test_one_function_makes_every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced, it changes all that is generated."""
    real = frame_flax_moshi.frame_step
    honest = spoken(FlaxMoshiForConditionalGeneration(tiny_moshi_config()))

    def replaced(*args: Any, **kwargs: Any) -> Any:
        outputs, chosen, codes = real(*args, **kwargs)
        return outputs, chosen, jnp.full_like(codes, 3)

    for user in (generation_flax_moshi, streaming_flax_moshi):
        monkeypatch.setattr(user, "frame_step", replaced)
    for name, codes in spoken(FlaxMoshiForConditionalGeneration(tiny_moshi_config())).items():
        assert (honest[name] != 3).any(), name
        assert (codes == 3).all(), name


@pytest.mark.parametrize("waveforms", [False, True])
def test_one_program_and_several_make_the_same_step(
    model: FlaxMoshiForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, waveforms: bool
) -> None:
    def frames(several: bool) -> list[Any]:
        monkeypatch.setattr(streaming_flax_moshi, "steps_in_several_programs", lambda: several)
        stream = model.streaming(batch_size=2, return_audio_waveforms=waveforms)
        state, kept = stream.init(jax.random.key(1)), []
        audio = np.random.default_rng(0).uniform(-0.5, 0.5, (3, *silence(stream).shape)).astype(np.float32)
        for number in range(3):
            active = np.array([True, number != 1])
            state, frame = stream.step(state, audio[number], active=active)
            kept.append(jax.tree.map(np.asarray, frame))
        state, frame = stream.step(state, user_audio_codes=np.zeros((2, stream.num_codebooks), np.int32))
        return [*kept, jax.tree.map(np.asarray, frame)]

    for one, other in zip(frames(True), frames(False), strict=True):
        np.testing.assert_array_equal(one.audio_codes, other.audio_codes)
        np.testing.assert_array_equal(one.text_ids, other.text_ids)
        if waveforms:
            np.testing.assert_allclose(one.audio, other.audio, atol=1e-5)


# ------------------------------------------------------------------------------- what accelerators are given to run


def example_inputs(frames: int = 3) -> dict[str, jax.Array]:
    ids, codes = jnp.zeros((1, frames), jnp.int32), jnp.zeros((1, 4, frames), jnp.int32)
    return {"input_ids": ids, "user_audio_codes": codes, "moshi_audio_codes": codes}


def forward(model: FlaxMoshiForConditionalGeneration) -> tuple[Callable[..., Any], Any]:
    inputs = example_inputs()
    labels = {"text_labels": inputs["input_ids"], "audio_labels": inputs["user_audio_codes"]}
    return lambda params: model(**inputs, **labels, params=params).loss, model.params


def gradient(model: FlaxMoshiForConditionalGeneration) -> tuple[Callable[..., Any], Any]:
    loss, params = forward(model)
    return jax.grad(loss), params


def generation(model: FlaxMoshiForConditionalGeneration) -> tuple[Callable[..., Any], Any]:
    return lambda params: model.generate(params=params, **OPTIONS).sequences, model.params


def dialogue(model: FlaxMoshiForConditionalGeneration) -> tuple[Callable[..., Any], Any]:
    stream = model.streaming(batch_size=2, do_sample=False)
    return lambda state: stream.step(state, silence(stream)), stream.init(jax.random.key(0))


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize("program", [forward, gradient, generation, dialogue])
def test_no_branches_and_no_complex_numbers(
    model: FlaxMoshiForConditionalGeneration, program: Callable[..., Any], platform: str
) -> None:
    function, argument = program(model)
    operations = lowered(function, platform, argument)
    assert not any(op.is_branch or op.has_complex for op in operations)


@pytest.mark.parametrize("platform", ACCELERATORS)
def test_one_product_for_a_projection(model: FlaxMoshiForConditionalGeneration, platform: str) -> None:
    """Of the backbone: four of attention, two of the MLP, two of the attention itself, a layer; and the head."""
    config = model.config
    inputs = example_inputs(1)
    cache = model.init_cache(1, 2048)  # a large one, of which CPUs leave out what is not in use

    def step(params: Any, cache: Any) -> jax.Array:
        return model(**inputs, params=params, cache=cache).logits

    operations = counted(lowered(step, platform, model.params, cache))
    assert operations["dot_general"] == 8 * config.num_hidden_layers + 1
