"""Calls of any number of frames, operation by operation, with few programs: padded to a bucket, and cut again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ...generation.arrays import cut, on_device, padded
from ...generation.buckets import small_bucket

FRAME_AXES = {
    "input_ids": 1,
    "attention_mask": 1,
    "position_ids": 1,
    "inputs_embeds": 1,
    "user_audio_codes": 2,
    "moshi_audio_codes": 2,
}
LABELS = ("labels", "text_labels", "audio_labels")


def in_bucket(run: Callable[[dict[str, Any]], Any], inputs: dict[str, Any]) -> Any:
    """``run(inputs)``, whose inputs are padded behind their frames to a bucket; no frame sees those behind it.

    Losses, and rows that begin with padding, are computed as they are: there frames would count that are none.

    Args:
        run: of a module without a cache; returns its output.
        inputs: by the names of its arguments; those that are not in :data:`FRAME_AXES` have no frames.
    """
    given = {name: inputs[name] for name in FRAME_AXES if inputs.get(name) is not None}
    frames = next(value.shape[FRAME_AXES[name]] for name, value in given.items())
    capacity = small_bucket(frames)
    begun = "attention_mask" not in given or np.all(np.asarray(given["attention_mask"])[:, 0])
    if capacity == frames or not begun or any(inputs.get(name) is not None for name in LABELS):
        return run(inputs)
    changed: dict[str, Any] = {
        name: on_device(padded(value, capacity, 0, FRAME_AXES[name])) for name, value in given.items()
    }
    keep, kept = inputs.get("logits_to_keep", 0), (0, frames)
    if keep:
        keep = min(keep, frames)
        changed["logits_to_keep"] = small_bucket(capacity - frames + keep)
        kept = (min(changed["logits_to_keep"], capacity) - (capacity - frames) - keep, keep)
    return shortened(run({**inputs, **changed}), frames, kept)


def shortened(outputs: Any, frames: int, kept: tuple[int, int]) -> Any:
    """The outputs of the first ``frames``; of logits and states, from one on and as many as ``kept`` says."""
    cuts: dict[str, Callable[[jax.Array], jax.Array]] = {
        "logits": lambda array: cut(array, kept[1], 1, kept[0]),
        "last_hidden_state": lambda array: cut(array, kept[1], 1, kept[0]),
        "hidden_states": lambda array: cut(array, frames, 1),
        "attentions": lambda array: cut(cut(array, frames, 2), frames, 3),
    }
    found = {name: getattr(outputs, name, None) for name in cuts}
    return outputs.replace(
        **{name: jax.tree.map(cuts[name], value) for name, value in found.items() if value is not None}
    )
