"""Audio and codes of any length by few programs: inputs are padded to a bucket of frames, outputs are cut again.

Padding makes no difference: a causal codec does not hear what follows, and otherwise a mask says where a row ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import MimiConfig

from ...generation.arrays import cut, padded
from ...generation.buckets import small_bucket
from ...modeling_flax_outputs import FlaxModelOutput
from ...ops.convolution import output_length
from .streaming_flax_mimi import is_causal
from .topology import samples_per_frame, steps_per_frame

Inputs = dict[str, Any]
Lengths = dict[str, int]
"""Of outputs, by name; ``steps`` are those of the transformer."""


def rounded(config: MimiConfig, inputs: Mapping[str, Any]) -> tuple[Inputs, Lengths]:
    """The inputs of one of Mimi's methods, padded, and how long its outputs are without padding."""
    given = {name: value for name, value in inputs.items() if value is not None}
    for name in ("audio_codes", "latents"):
        if name in given:
            return _rounded_codes(config, name, given)
    return _rounded_audio(config, given)


def _rounded_audio(config: MimiConfig, inputs: Inputs) -> tuple[Inputs, Lengths]:
    audio, size = inputs["input_values"], samples_per_frame(config)
    rows, _, samples = audio.shape
    frames = int(output_length(samples, size))
    mask = _mask_of(inputs)
    counts = np.full(rows, samples) if mask is None else mask.sum(axis=-1)
    capacity = small_bucket(frames) * size
    # without a mask half of the work is saved
    masked = mask is not None or samples % size or not is_causal(config)
    inputs = {
        "input_values": padded(audio, capacity, 0),
        "padding_mask": np.arange(capacity) < counts[:, None] if masked else None,
    }
    steps = int(output_length(samples, math.prod(config.upsampling_ratios)))
    lengths = {"audio_codes": frames, "latents": frames, "audio_values": samples, "steps": steps}
    return inputs, {**lengths, "decoder_steps": frames * steps_per_frame(config)}


def _rounded_codes(config: MimiConfig, name: str, inputs: Inputs) -> tuple[Inputs, Lengths]:
    codes, size = inputs[name], samples_per_frame(config)
    rows, _, frames = codes.shape
    mask = _mask_of(inputs)
    counts, samples = np.full(rows, frames), frames * size
    if mask is not None:
        samples, lengths = min(samples, mask.shape[-1]), mask.sum(axis=-1)
        # a row without padding has all frames: the mask says where to cut, not how many there are
        counts = np.where(lengths < mask.shape[-1], np.minimum(output_length(lengths, size), frames), frames)
    elif "input_values" in inputs:
        samples = min(samples, inputs["input_values"].shape[-1])
    capacity = small_bucket(frames)
    masked = mask is not None or not is_causal(config)
    inputs = {
        name: padded(codes, capacity, 0),
        "padding_mask": np.arange(capacity * size) < counts[:, None] * size if masked else None,
    }
    return inputs, {"audio_codes": frames, "audio_values": samples, "steps": frames * steps_per_frame(config)}


def _mask_of(inputs: Inputs) -> np.ndarray | None:
    if "padding_mask" not in inputs:
        return None
    mask: np.ndarray = np.asarray(inputs["padding_mask"])
    return mask if mask.ndim == 2 else np.asarray(mask.any(axis=1))


def shortened(outputs: FlaxModelOutput, lengths: Lengths) -> FlaxModelOutput:
    """The outputs without what belongs to padding."""
    found = {
        name: cut(getattr(outputs, name), length) for name, length in lengths.items() if outputs.get(name) is not None
    }
    steps = lengths["steps"]
    halves = {"": steps, "encoder_": steps, "decoder_": lengths.get("decoder_steps", steps)}
    for half, length in halves.items():
        for name, axes in ((f"{half}hidden_states", (1,)), (f"{half}attentions", (2, 3))):
            layers = outputs.get(name)
            for axis in axes if layers is not None else ():
                layers = tuple(cut(layer, length, axis) for layer in layers)
            found[name] = layers
    return outputs.replace(**{name: value for name, value in found.items() if value is not None})
