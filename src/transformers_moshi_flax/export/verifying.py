"""A model and its export side by side: the same dialogue in JAX and in onnxruntime."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from ..runtime.onnx_moshi import OnnxMoshi
from .folder import checked, with_context

TOLERANCES = {"none": 1e-4, "int8": 5e-2}
"""By the kind of quantization: the largest differences of logits and audio, as shares of the largest number."""
EXACT = ("none",)
"""Kinds with which all tokens must be the same. With the others a dialogue may take another turn, and what both have
said until then is compared."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two runs of a dialogue agree.

    Attributes:
        frames: of the dialogue.
        same_frames: from the beginning, those in which all tokens are the same.
        text_ids, audio_codes: shares of equal ones, in [0, 1].
        text_logits, audio: largest differences, as shares of the largest number, as far as both have said the same.
        snr: of the whole audio in dB, with JAX's as the signal; infinite where both are the same.
        model_ms, export_ms: of a step, the median.
        tolerance: what ``text_logits`` and ``audio`` may differ by.
        agrees: whether they do not differ by more, and, where weights are not quantized, all tokens are the same.
    """

    frames: int
    same_frames: int
    text_ids: float
    audio_codes: float
    text_logits: float
    audio: float
    snr: float
    model_ms: float
    export_ms: float
    tolerance: float
    agrees: bool


@dataclasses.dataclass
class _Run:
    """What was made of a dialogue, each by frames, and how long each step took, in ms."""

    text_ids: np.ndarray
    audio_codes: np.ndarray
    text_logits: np.ndarray
    audio: np.ndarray
    times: np.ndarray


def compare(model: Any, exported: OnnxMoshi, audio: Float[np.ndarray, "samples"], seed: int = 0) -> Agreement:
    """Has both hear the same recording and say what they choose.

    Args:
        model: the ``FlaxMoshiForConditionalGeneration`` that was exported, in float32.
        exported: what was written of it.
        audio: mono, at the rate of both, at least a frame; the rest behind the last whole frame is left out.
        seed: of what is drawn.

    Raises:
        ValueError: the export is of another configuration; audio of less than a frame.
    """
    manifest = exported.manifest
    model, params = with_context(checked(model), manifest["context"])
    stream = model.streaming(exported.batch_size, params=params, **manifest["options"])
    for name in ("frame_size", "sampling_rate", "num_codebooks", "channels"):
        if getattr(stream, name) != getattr(exported, name):
            raise ValueError(f"the export is of another model: it has {name} {getattr(exported, name)}.")
    if model.config.vocab_size != exported.vocab_size:
        raise ValueError(f"the export is of another model: it has vocab_size {exported.vocab_size}.")
    count = len(audio) // stream.frame_size
    if not count:
        raise ValueError(f"`audio` has {len(audio)} samples, but a frame has {stream.frame_size}.")
    heard = audio[: count * stream.frame_size].reshape(count, 1, 1, -1)
    # rows hear different things
    shape = (count, exported.batch_size, exported.channels, stream.frame_size)
    heard = np.broadcast_to(heard, shape) * np.linspace(1, 0.5, shape[1], dtype=np.float32)[None, :, None, None]
    return agreement(_with_jax(stream, heard, seed), _with_onnx(exported, heard, seed), manifest["quantization"])


def _with_jax(stream: Any, heard: np.ndarray, seed: int) -> _Run:
    state, frames, times = stream.init(jax.random.key(seed)), [], []
    for audio in heard:
        begin = time.perf_counter()
        state, frame = stream.step(state, user_audio=audio)
        frames.append(jax.tree.map(np.asarray, frame))
        times.append(1000 * (time.perf_counter() - begin))
    return _run(frames, times)


def _with_onnx(exported: OnnxMoshi, heard: np.ndarray, seed: int) -> _Run:
    stream, frames, times = exported.streaming(seed), [], []
    for audio in heard:
        begin = time.perf_counter()
        frames.append(stream.step(audio))
        times.append(1000 * (time.perf_counter() - begin))
    return _run(frames, times)


def _run(frames: list[Any], times: list[float]) -> _Run:
    names = ("text_ids", "audio_codes", "text_logits", "audio")
    made = {name: np.stack([getattr(frame, name) for frame in frames]) for name in names}
    return _Run(**made, times=np.array(times))


def agreement(model: _Run, exported: _Run, quantization: str) -> Agreement:
    """Of two runs, the second with weights that are quantized so."""
    tolerance = TOLERANCES[quantization]
    frames = len(model.text_ids)
    same = (model.text_ids == exported.text_ids).all(1) & (model.audio_codes == exported.audio_codes).all((1, 2))
    first = frames if same.all() else int(np.argmin(same))
    largest = {}
    for name in ("text_logits", "audio"):
        one, other = getattr(model, name), getattr(exported, name)
        # logits of a step belong to the next frame: those of the first that differs are of what was said before
        until = first + (name == "text_logits")
        scale = max(float(np.abs(one).max()), 1e-30)
        largest[name] = float(np.abs(one - other)[:until].max(initial=0)) / scale
    error = float(np.square(model.audio - exported.audio, dtype=np.float64).sum())
    signal = float(np.square(model.audio, dtype=np.float64).sum())
    return Agreement(
        frames=frames,
        same_frames=first,
        text_ids=float((model.text_ids == exported.text_ids).mean()),
        audio_codes=float((model.audio_codes == exported.audio_codes).mean()),
        **largest,
        snr=float("inf") if not error else 10 * float(np.log10(max(signal, 1e-30) / error)),
        model_ms=float(np.median(model.times)),
        export_ms=float(np.median(exported.times)),
        tolerance=tolerance,
        agrees=(first == frames or quantization not in EXACT) and max(largest.values()) <= tolerance,
    )
