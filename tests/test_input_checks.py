"""Whether something is traced, told without looking at every array; one rule for audio at every entry."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.configs import tiny_mimi_config, tiny_moshi_config
from transformers_moshi_flax import FlaxMimiModel, FlaxMoshiForConditionalGeneration, MoshiProcessor, PcmDialogue
from transformers_moshi_flax.cli.checkpoints import EMBEDDED_MODEL
from transformers_moshi_flax.input_checks import LOUDEST, check_audio, check_samples, is_tracing
from transformers_moshi_flax.models.mimi import FlaxMimiEncoderModel
from transformers_moshi_flax.models.moshi.pcm import PcmBuffer


def test_outside_of_jit_nothing_is_made(monkeypatch: pytest.MonkeyPatch):
    def refused(*_):
        raise AssertionError("an array was made to find out")

    monkeypatch.setattr(jnp, "zeros", refused)
    assert not is_tracing() and not is_tracing({"a": [np.ones(2)]}, 3)


def test_inside_of_jit_everything_is_traced():
    told = []
    jax.jit(lambda: told.append(is_tracing()))()
    jax.eval_shape(lambda x: told.append(is_tracing()), 1.0)
    assert told == [True, True] and not is_tracing()


@pytest.mark.parametrize("transformed", [jax.vmap, jax.grad])
def test_inside_of_other_transformations_their_arrays_are(transformed):
    told = []

    def function(x: jax.Array) -> jax.Array:
        told.extend([is_tracing(x), is_tracing(), is_tracing(np.ones(2))])
        return x

    transformed(function)(jnp.ones(2) if transformed is jax.vmap else 1.0)
    assert told == [True, False, False]


def test_imported_inside_of_jit():
    code = """
import jax
def function():
    from transformers_moshi_flax.input_checks import is_tracing
    assert is_tracing()
jax.jit(function)()
from transformers_moshi_flax.input_checks import is_tracing
assert not is_tracing()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


# --------------------------------------------------------------------------------------------------------------- audio

LOUD = np.full((1, 1, 32), 32768, np.float32)
"""Samples of int16 that nobody has scaled; two frames."""


@pytest.fixture(scope="module")
def entries() -> dict[str, Callable[[np.ndarray], Any]]:
    """All that take audio in arrays."""
    model = FlaxMoshiForConditionalGeneration(tiny_moshi_config())
    mimi_config = tiny_mimi_config()
    mimi, encoder = FlaxMimiModel(mimi_config), FlaxMimiEncoderModel(mimi_config.encoder_config)
    processor = MoshiProcessor.from_pretrained(EMBEDDED_MODEL)
    stream, ids = model.streaming(), np.full((1, 2), 3)
    silence = np.zeros_like(LOUD)
    return {
        "processor, user": lambda x: processor(user_audio=x[0, 0], sampling_rate=24_000),
        "processor, Moshi": lambda x: processor(moshi_audio=x[0, 0], sampling_rate=24_000),
        "call, user": lambda x: model(ids, user_input_values=x),
        "call, Moshi": lambda x: model(ids, moshi_input_values=x),
        "generate, user": lambda x: model.generate(
            ids, user_input_values=x, moshi_input_values=silence, max_new_tokens=1
        ),
        "generate, Moshi": lambda x: model.generate(
            ids, user_input_values=silence, moshi_input_values=x, max_new_tokens=1
        ),
        "stream": lambda x: stream.step(stream.init(), user_audio=x[..., :16]),
        "PCM": lambda x: PcmDialogue(stream).feed(x[0, 0]),
        "PCM buffer": lambda x: PcmBuffer(1, 16).feed(x[0]),
        "mimi": lambda x: mimi(x),
        "mimi.encode": lambda x: mimi.encode(x),
        "mimi.encode, stream": lambda x: mimi.encode(x, use_streaming=True),
        "mimi.encode_step": lambda x: mimi.encode_step(mimi.init_encoder_state(1), x),
        "encoder": lambda x: encoder(x),
        "encoder, stream": lambda x: encoder(x, use_streaming=True),
    }


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (LOUD, r"samples of up to 3.28e\+04, but must be in \[-1, 1\]: scale them"),
        (-LOUD.astype(np.float64), r"samples of up to 3.28e\+04, but must be in \[-1, 1\]: scale them"),
        (LOUD.astype(np.float16) * np.float16(1 / 256), r"samples of up to 128, but must be in \[-1, 1\]"),
        (LOUD * np.nan, "samples that are NaN or infinite"),
        (LOUD * -np.inf, "samples that are NaN or infinite"),
        (LOUD.astype(np.int32), "must be floats.*int32"),
    ],
    ids=["loud", "loud, double", "loud, half", "NaN", "infinite", "integers"],
)
def test_audio_by_every_entry(entries: dict[str, Callable[[np.ndarray], Any]], audio: np.ndarray, message: str):
    taken = []
    for name, entry in entries.items():
        try:
            entry(audio)
        except ValueError as error:
            assert re.search(message, str(error)), f"{name}: {error}"
        else:
            taken.append(name)
    assert not taken


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_floats_may_go_beyond_full_scale(dtype: Any):
    check_samples("it", np.array([-LOUDEST, 0, 1.5, LOUDEST], dtype))
    with pytest.raises(ValueError, match=r"^it has samples of up to"):
        check_samples("it", np.array([0, -1.01 * LOUDEST], dtype))


def test_audio_of_rows_that_do_not_count():
    rows = np.array([False, True])
    audio = np.array([[np.nan, 1e30], [0.5, 0.5]])
    check_audio("x", audio, {"batch": 2, "samples": None}, rows)
    with pytest.raises(ValueError, match="`x` has samples"):
        check_audio("x", audio, {"batch": 2, "samples": None}, ~rows)


def test_traced_audio_is_checked_as_far_as_it_is_known():
    def refused(message: str, shape: tuple[int, ...], dtype: Any = np.float32) -> None:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda x: check_audio("x", x, {"batch": None, "channels": 1, "samples": None}),
                jax.ShapeDtypeStruct(shape, dtype),
            )

    refused(r"`x` must have the shape \(batch, 1, samples\), but has the shape \(2, 3\)", (2, 3))
    refused(r"`x` must have the shape \(batch, 1, samples\), but has the shape \(2, 2, 3\)", (2, 2, 3))
    refused("`x` is empty", (2, 1, 0))
    refused("`x` must be floats.*int16", (2, 1, 3), np.int16)
