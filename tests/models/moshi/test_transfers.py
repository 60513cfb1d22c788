"""What passes between host and device while ``generate`` runs: nothing unasked, and back only how far it came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiForCausalLM, FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.modeling_flax_outputs import FlaxModelOutput

IDS = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
MASK = np.array([[0, 1, 1], [1, 1, 1]])
CODES = np.ones((2, 4, 3), np.int32)
SOUND = np.full((2, 1, 3 * 16), 0.1, np.float32)


class Reads:
    """Reads of arrays of JAX on the host.

    JAX's guard sees transfers to the device on every platform, but none from it where the host can read its memory in
    place, as on CPUs. So they are counted: ``jax.device_get`` as asked for, with what it returned; ``numpy.asarray``,
    ``numpy.array`` and what Python makes numbers with (``int``, ``bool``, ``float``, ``tolist``) as not asked for.

    Attributes:
        asked: what each call of ``jax.device_get`` returned.
        unasked: the shapes of arrays that were read otherwise.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.asked: list[Any] = []
        self.unasked: list[tuple[int, ...]] = []
        inside, device_get, value = [], jax.device_get, ArrayImpl._value

        def get(tree: Any) -> Any:
            inside.append(True)
            try:
                self.asked.append(device_get(tree))
            finally:
                inside.pop()
            return self.asked[-1]

        def note(array: Any) -> None:
            if isinstance(array, jax.Array) and not inside:
                self.unasked.append(array.shape)

        def noting(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(array: Any, *args: Any, **kwargs: Any) -> Any:
                note(array)
                return function(array, *args, **kwargs)

            return call

        def read(array: Any) -> Any:
            note(array)
            return value.fget(array)

        monkeypatch.setattr(jax, "device_get", get)
        monkeypatch.setattr(np, "asarray", noting(np.asarray))
        monkeypatch.setattr(np, "array", noting(np.array))
        monkeypatch.setattr(ArrayImpl, "_value", property(read))


def test_every_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    array, number = jnp.arange(3), jnp.int32(1)
    with monkeypatch.context() as patched:
        reads = Reads(patched)
        for read in (np.asarray, np.array, lambda array: array.tolist()):
            read(array)
        int(number), bool(number)
        jax.device_get((array, number))
    assert reads.unasked == [(3,)] * 3 + [()] * 2 and len(reads.asked) == 1


def is_of_output(fetched: Any, outputs: FlaxModelOutput) -> bool:
    """Whether what was fetched is one of the outputs, or more of it."""
    if not isinstance(fetched, dict) or len(fetched) != 1:
        return False
    (array,) = fetched.values()
    found = [np.asarray(value) for value in outputs.values()]
    return any(
        array.ndim == value.ndim and np.array_equal(array[tuple(map(slice, value.shape))], value) for value in found
    )


def checked(
    monkeypatch: pytest.MonkeyPatch, generate: Callable[..., FlaxModelOutput], inputs: dict[str, Any]
) -> FlaxModelOutput:
    with monkeypatch.context() as patched:
        reads = Reads(patched)
        with jax.transfer_guard("disallow"):
            outputs = generate(**inputs, max_new_tokens=4)
    assert reads.unasked == []
    others = [fetched for fetched in reads.asked if not is_of_output(fetched, outputs)]
    assert len(others) == 1, "more than how far generation came"
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(others)) <= 5
    return outputs


PROMPTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "codes": {"input_ids": IDS, "user_audio_codes": CODES, "moshi_audio_codes": CODES},
    "waveforms, padded, drawn": {
        "input_ids": IDS,
        "user_input_values": SOUND,
        "moshi_input_values": SOUND,
        "attention_mask": MASK,
        "do_sample": True,
        "temperature": 0.9,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "eos_token_id": 7,
    },
}


@pytest.fixture(scope="module")
def model() -> FlaxMoshiForConditionalGeneration:
    return FlaxMoshiForConditionalGeneration(tiny_moshi_config())


@pytest.mark.parametrize("name", PROMPTS)
def test_nested(model: FlaxMoshiForConditionalGeneration, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = checked(monkeypatch, model.generate, {**PROMPTS[name], "return_audio_codes": True})
    assert isinstance(outputs.audio_codes, jax.Array) and outputs.audio_codes.shape[-1] >= 3


def test_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FlaxMoshiForCausalLM(tiny_moshi_config())
    outputs = checked(monkeypatch, model.generate, {"input_ids": IDS, "attention_mask": MASK, "num_beams": 2})
    assert isinstance(outputs.sequences, jax.Array) and outputs.sequences.shape == (2, 7)
