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
from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax import FlaxMimiModel, FlaxMoshiForConditionalGeneration, MoshiProcessor, PcmDialogue
from transformers_moshi_flax.input_checks import LOUDEST, Input, check_input, check_inputs, check_samples, is_tracing
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
    processor = MoshiProcessor.from_pretrained(RANDOM_MODEL)
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


def audio_input(**axes: Any) -> Input:
    return Input({**axes, "samples": None}, "audio")


def test_audio_of_rows_that_do_not_count():
    rows = np.array([False, True])
    audio = np.array([[np.nan, 1e30], [0.5, 0.5]])
    check_input("x", audio, audio_input(batch=2), rows=rows)
    with pytest.raises(ValueError, match="`x` has samples"):
        check_input("x", audio, audio_input(batch=2), rows=~rows)


def test_traced_audio_is_checked_as_far_as_it_is_known():
    def refused(message: str, shape: tuple[int, ...], dtype: Any = np.float32) -> None:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                lambda x: check_input("x", x, audio_input(batch=None, channels=1)),
                jax.ShapeDtypeStruct(shape, dtype),
            )

    refused(r"`x` must have the shape \(batch, 1, samples\), but has the shape \(2, 3\)", (2, 3))
    refused(r"`x` must have the shape \(batch, 1, samples\), but has the shape \(2, 2, 3\)", (2, 2, 3))
    refused("`x` is empty", (2, 1, 0))
    refused("`x` must be floats.*int16", (2, 1, 3), np.int16)


# --------------------------------------------------------------------------------------------------- tables of inputs

TABLE = {
    "ids": Input({"batch": None, "frames": None}, "ids", 5, allowed=(-1,), remedy="-1 is free."),
    "codes": Input({"batch": None, "books": 2, "frames": None}, "ids", 5, may_go_on=True, hint="pad it"),
    "sound": Input({"batch": None, "samples": None}, "audio", frame_size=4),
    "mask": Input({"batch": None, "frames": (None, 8)}, "mask"),
    "forced": Input({"batch": None, "new": range(1, 4)}, "ids"),
    "rows": Input({"batch": None}, "bools", called="booleans, one a row"),
    "which": Input({"batch": (None, 1)}, "ids", at_trace_time="selects weights"),
}
GOOD = {
    "ids": np.array([[0, 4, -1]] * 2),
    "codes": np.ones((2, 2, 5), int),
    "sound": np.zeros((2, 9)),
    "mask": np.ones((2, 8)),
    "forced": np.ones((2, 3), int),
    "rows": np.ones(2, bool),
    "which": np.zeros(1, int),
}


def test_a_call_that_is_as_described():
    assert check_inputs(TABLE, GOOD) == {"batch": 2, "frames": 3, "new": 3}
    assert check_inputs(TABLE, {"sound": GOOD["sound"], "ids": None}) == {"batch": 2, "frames": 3}


WRONG = {
    "rank": ({"ids": np.ones(3, int)}, r"`ids` must have the shape \(batch, frames\), but has the shape \(3,\)\."),
    "id": ({"ids": GOOD["ids"] + 1}, r"`ids` has the id 5, .*\[0, 5\) \(or one of \(-1,\)\)\. -1 is free\."),
    "fewer": ({"codes": np.ones((2, 2, 2), int)}, r"`codes` must have the shape \(2, 2, at least 3\), .*: pad it\."),
    "fixed": (
        {"codes": np.ones((2, 3, 3), int)},
        r"`codes` must .* \(2, 2, at least 3\), but has the shape \(2, 3, 3\)",
    ),
    "samples": (
        {"sound": np.zeros((2, 13))},
        r"`sound` must have the shape \(2, 3 \* 4\), but has the shape \(2, 13\)",
    ),
    "batch": ({"mask": np.ones((3, 3))}, r"`mask` must have the shape \(2, 3 or 8\), but has the shape \(3, 3\)"),
    "mask": ({"mask": np.full((2, 3), 2)}, "`mask` must hold only 0"),
    "range": ({"forced": np.ones((2, 4), int)}, r"`forced` must have the shape \(2, 1 to 3 new\)"),
    "called": ({"rows": np.ones(3, bool)}, r"`rows` must be booleans, one a row, of the shape \(2,\), but .* \(3,\)"),
    "dtype": ({"rows": np.ones(2, int)}, "`rows` must be booleans, one a row, but has the dtype int64"),
    "parameters": ({"ids": {"kernel": 1}}, "`ids` is a dictionary, as parameters are"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_is_not(name: str):
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        check_inputs(TABLE, {**GOOD, **changes})


def test_what_may_not_be_traced():
    with pytest.raises(ValueError, match="`which` selects weights: it must be known at trace time"):
        jax.eval_shape(lambda which: check_inputs(TABLE, {"which": which}), GOOD["which"])
