"""Lengths share programs: what was compiled for one serves its bucket, and padding makes no difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from tests.configs import tiny_mimi_config
from transformers_moshi_flax import FlaxMimiModel
from transformers_moshi_flax.models.mimi import FlaxMimiDecoderModel, FlaxMimiEncoderModel

FRAME = 16
RNG = np.random.default_rng(0)
SOUND = (0.1 * RNG.standard_normal((2, 1, 16 * FRAME))).astype(np.float32)
CODES = RNG.integers(0, 32, (2, 6, 16)).astype(np.int32)
EVERYTHING = {"output_hidden_states": True, "output_attentions": True}


def model_of(**overrides: Any) -> FlaxMimiModel:
    """Codebooks of a new Mimi are zeros, which give one code whatever is heard."""
    model = FlaxMimiModel(tiny_mimi_config(**overrides))
    model.params["quantizer"] = jax.tree.map(
        lambda leaf: leaf + np.random.default_rng(1).standard_normal(leaf.shape).astype(np.float32) ** 2,
        model.params["quantizer"],
    )
    return model


@pytest.fixture(scope="module")
def model() -> FlaxMimiModel:
    return model_of()


def check_same(call: Callable[[], Any]) -> None:
    """Eagerly, in a bucket, as inside of ``jax.jit``, where nothing is rounded."""
    rounded, exact = jax.tree.leaves(call()), jax.tree.leaves(jax.jit(call)())
    assert [leaf.shape for leaf in rounded] == [leaf.shape for leaf in exact]
    for one, other in zip(rounded, exact):
        scale = max(1.0, float(np.abs(np.asarray(other)).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale)


def right_padded(lengths: list[int], samples: int) -> np.ndarray:
    return np.arange(samples) < np.array(lengths)[:, None]


@pytest.mark.parametrize("samples", [9 * FRAME, 10 * FRAME - 5], ids=["whole frames", "a part of one"])
def test_encode(model: FlaxMimiModel, samples: int) -> None:
    check_same(lambda: model.encode(SOUND[..., :samples], **EVERYTHING))
    assert model.encode(SOUND[..., :samples]).audio_codes.shape == (2, 6, -(-samples // FRAME))


def test_encode_padded_rows(model: FlaxMimiModel) -> None:
    mask = right_padded([150, 37], 150)
    own = [10, 3]  # frames; those after them mean nothing
    rounded, exact = (run(lambda: model.encode(SOUND[..., :150], mask).audio_codes) for run in (run_eagerly, run_jit))
    for row, frames in enumerate(own):
        np.testing.assert_array_equal(rounded[row, :, :frames], exact[row, :, :frames])


def run_eagerly(call: Callable[[], Any]) -> np.ndarray:
    return np.asarray(call())


def run_jit(call: Callable[[], Any]) -> np.ndarray:
    return np.asarray(jax.jit(call)())


@pytest.mark.parametrize(
    "mask",
    [None, right_padded([150, 70], 150), right_padded([130, 70], 130), right_padded([170, 40], 170)],
    ids=["no mask", "padded", "cut", "longer than the codes"],
)
def test_decode(model: FlaxMimiModel, mask: np.ndarray | None) -> None:
    def audio() -> jax.Array:
        return model.decode(CODES[..., :10], mask, **EVERYTHING)

    if mask is None:
        check_same(audio)
    rounded, exact = run_eagerly(lambda: audio().audio_values), run_jit(lambda: audio().audio_values)
    assert rounded.shape == exact.shape
    lengths = [rounded.shape[-1]] * 2 if mask is None else mask.sum(axis=-1)
    for row, length in enumerate(lengths):
        scale = float(np.abs(exact[row]).max())
        np.testing.assert_allclose(rounded[row, :, :length], exact[row, :, :length], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "overrides",
    [{"use_causal_conv": False}, {"pad_mode": "reflect"}, {"trim_right_ratio": 0.5}, {"pad_mode": "replicate"}],
    ids=str,
)
def test_codecs_that_hear_what_follows(overrides: dict[str, Any]) -> None:
    model = model_of(**overrides)
    check_same(lambda: model.encode(SOUND[..., : 9 * FRAME]).audio_codes)
    check_same(lambda: model.decode(CODES[..., :9]).audio_values)


def test_whole_codec_and_halves(model: FlaxMimiModel) -> None:
    check_same(lambda: model(SOUND[..., :150]))
    check_same(lambda: model(SOUND[..., :150], audio_codes=CODES[..., :10]))
    check_same(lambda: model(audio_codes=CODES[..., :9]))
    encoder = FlaxMimiEncoderModel(model.config.encoder_config)
    decoder = FlaxMimiDecoderModel(model.config.decoder_config)
    check_same(lambda: encoder(SOUND[..., :150], **EVERYTHING))
    latents = RNG.standard_normal((2, 32, 9)).astype(np.float32)
    check_same(lambda: decoder(latents, **EVERYTHING))


def test_lengths_of_a_bucket_share_programs(model: FlaxMimiModel, count_compilations: Callable[[], int]) -> None:
    calls: dict[str, Callable[[int], Any]] = {
        "encode": lambda frames: model.encode(SOUND[..., : frames * FRAME], num_quantizers=2),
        "encode a part": lambda frames: model.encode(SOUND[..., : frames * FRAME - frames], num_quantizers=2),
        "decode": lambda frames: model.decode(CODES[..., :frames]),
        "call": lambda frames: model(SOUND[..., : frames * FRAME]),
        "states": lambda frames: model.decode(CODES[..., :frames], **EVERYTHING),
    }
    counted = {}
    for name, call in calls.items():
        call(9)
        count_compilations()
        for frames in (10, 11, 15, 16):
            call(frames)
        counted[name] = count_compilations()
    assert counted == dict.fromkeys(calls, 0)
