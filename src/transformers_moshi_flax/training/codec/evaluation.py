"""What a codec's run is measured by: sums over held-out crops, and whole recordings that are decoded and heard."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile
import soxr
from jaxtyping import Float, Float32

from ...checkpoints.writing import atomic_file, write_text
from ...generation.buckets import bucket
from .losses import si_sdr
from .quantizer import BRANCHES, codebooks_of, project, quantized_codes, unquantized
from .recognition import Recognizer, word_accuracy
from .recordings import Recording
from .step import Codec


def add_sums(step: Callable[[Any, Any], Any], state: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of all batches, in float64."""
    total: Any = None
    for batch in batches:
        sums = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(step(state, batch)))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    return total


@dataclasses.dataclass(frozen=True)
class Sample:
    """A recording and what the codec makes of it.

    Attributes:
        voices: left the recording, right the codec, ``(samples, 2)`` float32.
        record: ``id``, ``seconds``, ``si_sdr`` in dB; ``stoi`` where ``pystoi`` is installed; and where the text is
            known and ``pocketsphinx`` is installed: ``text``, what was ``heard`` of the codec, and the shares of words
            that were heard right, ``word_accuracy`` and ``word_accuracy_of_the_recording``.
    """

    voices: Float32[np.ndarray, "samples 2"]
    record: dict[str, Any]


def sample_figures(
    codec: Codec, params: Mapping[str, Any], recordings: Sequence[Recording], most: int, quantizes: bool
) -> list[Sample]:
    """Decode recordings, the first ``most`` samples of each, and measure what comes out."""
    samples, rate = [], codec.config.sampling_rate
    speak = _speaker(codec, quantizes)
    for recording in recordings:
        whole = recording.length(rate) <= most
        audio = recording.read(rate, 0, min(recording.length(rate), most))
        spoken = speak(params, audio)
        record: dict[str, Any] = {"id": recording.id, "seconds": audio.shape[-1] / rate}
        record["si_sdr"] = float(si_sdr(jnp.asarray(spoken)[None], jnp.asarray(audio)[None])[0])
        record |= stoi(audio[0], spoken[0], rate)
        if whole and recording.text is not None and (recognizer := free_recognizer()) is not None:
            text, heard = recording.text, recognizer(spoken[0], rate)
            record |= {"text": text, "heard": heard, "word_accuracy": word_accuracy([text], [heard])}
            record["word_accuracy_of_the_recording"] = word_accuracy([text], [recognizer(audio[0], rate)])
        samples.append(Sample(np.stack([audio[0], spoken[0]], axis=-1), record))
    return samples


@cache
def _speaker(codec: Codec, quantizes: bool) -> Callable[[Any, Float32[np.ndarray, "channels samples"]], Any]:
    """Audio of audio, by a program that serves all lengths of a bucket."""

    @jax.jit
    def program(params: Mapping[str, Any], audio: Any) -> Any:
        latents = codec.encode(params, audio)
        if quantizes:
            latents = decoded_latents(params["quantizer"], quantized_codes(params["quantizer"], latents, codec.config))
        else:
            latents = unquantized(params["quantizer"], latents)
        return codec.decode(params, latents).astype(jnp.float32)

    def speak(params: Mapping[str, Any], audio: Float32[np.ndarray, "channels samples"]) -> Any:
        size, length = codec.frame_samples, audio.shape[-1]
        # causal or not, what follows the end is silence
        padded = np.pad(audio, ((0, 0), (0, bucket(-(-length // size)) * size - length)))
        return np.asarray(program(params, padded[None]))[0, :, :length]

    return speak


def decoded_latents(quantizer: Mapping[str, Any], codes: Any) -> Float[Any, "batch frames hidden_size"]:
    """Latents of codes ``(batch, codebooks, frames)``."""
    total: Any = 0.0
    number = 0
    for branch in BRANCHES:
        tables = codebooks_of(quantizer[branch], jnp.float32)
        found: Any = sum(table[codes[:, number + place]] for place, table in enumerate(tables))
        number += len(tables)
        total = total + project(quantizer[branch], "output_proj", found)
    return total


def stoi(audio: Float32[np.ndarray, "samples"], spoken: Float32[np.ndarray, "samples"], rate: int) -> dict[str, float]:
    """Short-time objective intelligibility, 0 to 1, as ``{"stoi": …}``; none without ``pystoi`` or 0.4 s of sound."""
    if importlib.util.find_spec("pystoi") is None or len(audio) < 0.4 * rate or not np.abs(audio).max() > 0:
        return {}
    from pystoi import stoi as measure

    audio, spoken = (soxr.resample(each, rate, 10_000) for each in (audio, spoken))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of recordings that are nearly all silence, whose figure is 1e-5
        return {"stoi": float(measure(audio, spoken, 10_000))}


@cache
def free_recognizer() -> Recognizer | None:
    """For any English words; None without ``pocketsphinx``."""
    return None if importlib.util.find_spec("pocketsphinx") is None else Recognizer()


def write_samples(samples: Iterable[Sample], folder: Path, sampling_rate: int) -> None:
    """Write each sample as ``N.wav`` (left the recording, right the codec), and its record as ``N.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        with atomic_file(folder / f"{number}.wav") as path:
            soundfile.write(path, sample.voices, sampling_rate, format="WAV")
        write_text(folder / f"{number}.json", json.dumps(sample.record, ensure_ascii=False) + "\n")
