"""Calls of any number of frames, operation by operation, with few programs: padded to a bucket, and cut again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..nn.embedding import IGNORE_INDEX
from .arrays import cut, on_device, padded
from .buckets import small_bucket

FRAME_AXES = {
    "input_ids": 1,
    "attention_mask": 1,
    "position_ids": 1,
    "inputs_embeds": 1,
    "user_audio_codes": 2,
    "moshi_audio_codes": 2,
    "labels": 1,
    "text_labels": 1,
    "audio_labels": 2,
}
LABELS = ("labels", "text_labels", "audio_labels")


def in_bucket(run: Callable[[dict[str, Any]], Any], inputs: dict[str, Any]) -> Any:
    """``run(inputs)``, whose inputs are padded behind their frames to a bucket, or to what the cache has room for.

    No frame sees those behind it, losses leave them out, and the next call overwrites them in the cache. What frames
    hold that are padding themselves means nothing, with or without a bucket.

    Args:
        run: of a module; returns its output.
        inputs: by the names of its arguments; those that are not in :data:`FRAME_AXES` have no frames. A cache is a
            ``LinearCache``.
    """
    cache = inputs.get("cache")
    given = {name: inputs[name] for name in FRAME_AXES if inputs.get(name) is not None}
    batch_size, frames = next(
        (value.shape[0], value.shape[FRAME_AXES[name]]) for name, value in given.items() if name != "attention_mask"
    )
    capacity = small_bucket(frames)
    past = 0
    if cache is not None:
        past = int(cache.length)
        capacity = min(capacity, cache.max_length - past)
    begun = "attention_mask" not in given or np.all(np.asarray(given["attention_mask"])[:, 0])
    # of text alone, the first frame is predicted from the padding before it
    if capacity == frames or ("labels" in given and not begun):
        return run(inputs)
    if cache is not None or not given.keys().isdisjoint(LABELS):
        given.setdefault("attention_mask", np.ones((batch_size, frames), bool))
    if "attention_mask" in given and given["attention_mask"].shape[1] != frames:  # of all the cache's slots
        del given["attention_mask"]
    changed: dict[str, Any] = {
        name: on_device(padded(value, capacity, IGNORE_INDEX if name in LABELS else 0, FRAME_AXES[name]))
        for name, value in given.items()
    }
    keep, kept = inputs.get("logits_to_keep", 0), (0, frames)
    if keep:
        keep = min(keep, frames)
        changed["logits_to_keep"] = small_bucket(capacity - frames + keep)
        kept = (min(changed["logits_to_keep"], capacity) - (capacity - frames) - keep, keep)
    outputs = shortened(run({**inputs, **changed}), batch_size, frames, kept, cache is not None)
    if cache is None:
        return outputs
    return outputs.replace(cache=outputs.cache.replace(length=on_device(past + frames, np.int32)))


def shortened(outputs: Any, batch_size: int, frames: int, kept: tuple[int, int], cached: bool) -> Any:
    """The outputs of the first ``frames``; of logits and states, from one on and as many as ``kept`` says.

    Attentions over a cache have all of its slots, and the depth decoder's outputs one frame less.
    """

    def of_pairs(array: jax.Array) -> jax.Array:
        pairs = np.asarray(array).reshape(batch_size, -1, *array.shape[1:])[:, : frames - 1]
        return on_device(pairs.reshape(-1, *array.shape[1:]))

    cuts: dict[str, Callable[[jax.Array], jax.Array]] = {
        "logits": lambda array: cut(array, kept[1], 1, kept[0]),
        "last_hidden_state": lambda array: cut(array, kept[1], 1, kept[0]),
        "hidden_states": lambda array: cut(array, frames, 1),
        "attentions": lambda array: cut(array if cached else cut(array, frames, 3), frames, 2),
        "audio_logits": lambda array: cut(array, frames - 1, 1),
        "depth_hidden_states": of_pairs,
        "depth_attentions": of_pairs,
    }
    found = {name: getattr(outputs, name, None) for name in cuts}
    return outputs.replace(
        **{name: jax.tree.map(cuts[name], value) for name, value in found.items() if value is not None}
    )
