"""What ``generate`` can return beside the tokens: scores, logits, hidden states and attentions of every step.

Inside the program they are arrays over all steps; :func:`unrolled` makes the nested tuples of ``transformers`` of
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ..ops.precision import at_least_float32
from .arrays import on_host

STEP_NAMES = ("scores", "logits")
FRAME_NAMES = ("hidden_states", "attentions")


class Recording(NamedTuple):
    """What to record: ``names`` among ``STEP_NAMES`` and ``FRAME_NAMES``, for at most ``steps`` new tokens."""

    names: tuple[str, ...] = ()
    steps: int = 0

    @property
    def has_attentions(self) -> bool:
        return "attentions" in self.names


def empty_records(recording: Recording, outputs: Mapping[str, Any], capacity: int) -> dict[str, Array]:
    """Zeros to be filled in, shaped after the (abstract) outputs of one step.

    Steps are ``(batch, steps, vocab)``; hidden states ``(batch, layers + 1, capacity, hidden)``; attentions
    ``(batch, layers, heads, capacity, capacity)``.
    """
    records = {}
    for name in recording.names:
        if name in STEP_NAMES:
            batch_size, _, vocab_size = outputs["logits"].shape
            shape, dtype = (batch_size, recording.steps, vocab_size), outputs["logits"].dtype
            if name == "scores":
                dtype = at_least_float32(dtype)
        else:
            layers = outputs[name]
            first = layers[0]
            shape, dtype = (first.shape[0], len(layers), *first.shape[1:-2], capacity, first.shape[-1]), first.dtype
        records[name] = jnp.zeros(shape, dtype)
    return records


def record_step(
    recording: Recording, records: dict[str, Array], name: str, values: Array, step: Int[Array, ""]
) -> dict[str, Array]:
    """Writes the ``(batch, vocab)`` values of a step, if they are to be recorded."""
    if name not in recording.names:
        return records
    return records | {name: lax.dynamic_update_slice_in_dim(records[name], values[:, None], step, axis=1)}


def record_frames(
    recording: Recording, records: dict[str, Array], outputs: Any, start: Int[Array, ""]
) -> dict[str, Array]:
    """Writes hidden states and attentions of the steps from ``start`` on, if they are to be recorded."""
    for name in FRAME_NAMES:
        if name in recording.names:
            values = jnp.stack(outputs[name], axis=1)
            written = lax.dynamic_update_slice_in_dim(records[name], values, start, axis=values.ndim - 2)
            records = records | {name: written}
    return records


def unrolled(records: dict[str, jax.Array], prompt_length: int, length: int) -> dict[str, tuple]:
    """The records as ``transformers`` returns them: a tuple over the new tokens.

    Scores and logits are ``(batch, vocab)``. Hidden states and attentions are tuples over the layers; the first step's
    are those of the whole prompt, ``(batch, prompt, hidden)`` and ``(batch, heads, prompt, prompt)``, later ones of
    one step, ``(batch, 1, hidden)`` and ``(batch, heads, 1, steps so far)``.
    """
    results: dict[str, tuple] = {}
    for name, values in records.items():
        values = on_host(values)
        if name in STEP_NAMES:
            results[name] = tuple(jax.device_put(values[:, step]) for step in range(length - prompt_length))
            continue
        steps = []
        for end in range(prompt_length, length):
            begin = 0 if end == prompt_length else end - 1
            frames = values[..., begin:end, :] if name == "hidden_states" else values[..., begin:end, :end]
            steps.append(tuple(jax.device_put(frames[:, layer]) for layer in range(frames.shape[1])))
        results[name] = tuple(steps)
    return results
