"""Calls of any number of frames, operation by operation, with few programs: padded to a bucket, and cut again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ...generation.arrays import cut, on_device, padded
from ...generation.buckets import small_bucket
from .layers_flax_moshi import IGNORE_INDEX

# the axis of the frames, and what stands behind them
INPUTS = {
    "input_ids": (1, 0),
    "attention_mask": (1, 0),
    "position_ids": (1, 0),
    "inputs_embeds": (1, 0),
    "user_audio_codes": (2, 0),
    "moshi_audio_codes": (2, 0),
    "labels": (1, IGNORE_INDEX),
    "text_labels": (1, IGNORE_INDEX),
    "audio_labels": (2, IGNORE_INDEX),
}
LABELS = ("labels", "text_labels", "audio_labels")


def in_bucket(run: Callable[[dict[str, Any]], Any], inputs: dict[str, Any]) -> Any:
    """``run(inputs)``, whose inputs are padded behind their frames to a bucket; no frame sees those behind it.

    Args:
        run: of a module without a cache; returns its output.
        inputs: by the names of its arguments; those that are not in :data:`INPUTS` have no frames.
    """
    given = {name: inputs[name] for name in INPUTS if inputs.get(name) is not None}
    rows, frames = next((value.shape[0], value.shape[INPUTS[name][0]]) for name, value in given.items())
    capacity = small_bucket(frames)
    # a frame that sees nothing, before a row begins, has the mean of all there is
    begun = "attention_mask" not in given or np.all(np.asarray(given["attention_mask"])[:, 0])
    if capacity == frames or not begun:
        return run(inputs)
    if "attention_mask" not in given and any(name in given for name in LABELS):
        given["attention_mask"] = np.ones((rows, frames), np.int32)  # padding has no part in the losses
    changed: dict[str, Any] = {}
    for name, value in given.items():
        axis, fill = INPUTS[name]
        changed[name] = on_device(padded(value, capacity, fill, axis))
    keep, kept = inputs.get("logits_to_keep", 0), (0, frames)
    if keep:
        keep = min(keep, frames)
        changed["logits_to_keep"] = small_bucket(capacity - frames + keep)
        kept = (min(changed["logits_to_keep"], capacity) - (capacity - frames) - keep, keep)
    return shortened(run({**inputs, **changed}), rows, frames, kept)


def shortened(outputs: Any, rows: int, frames: int, kept: tuple[int, int]) -> Any:
    """The outputs of the first ``frames``; of logits and states, as many from there on as ``kept`` says."""

    def of_pairs(array: jax.Array) -> jax.Array:
        # of the depth decoder, which has run for every frame but the last of every row
        array = np.asarray(array).reshape(rows, -1, *array.shape[1:])[:, : frames - 1]
        return on_device(array.reshape(-1, *array.shape[2:]))

    cuts: dict[str, Callable[[jax.Array], jax.Array]] = {
        "logits": lambda array: cut(array, kept[1], 1, kept[0]),
        "last_hidden_state": lambda array: cut(array, kept[1], 1, kept[0]),
        "hidden_states": lambda array: cut(array, frames, 1),
        "attentions": lambda array: cut(cut(array, frames, 2), frames, 3),
        "audio_logits": lambda array: cut(array, frames - 1, 1),
        "depth_hidden_states": of_pairs,
        "depth_attentions": of_pairs,
    }
    found = {name: getattr(outputs, name, None) for name in cuts}
    return outputs.replace(
        **{name: jax.tree.map(cuts[name], value) for name, value in found.items() if value is not None}
    )
