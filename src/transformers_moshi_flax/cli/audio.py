"""Audio files in and out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float

from transformers_moshi_flax.cli.errors import UserMistake


def read_audio(path: Path, sampling_rate: int) -> Float[np.ndarray, "samples"]:
    """Read WAV, FLAC or whatever else libsndfile knows, as mono at ``sampling_rate``.

    Channels are averaged. Resampling is soxr's high quality.

    Returns:
        ``(samples,)`` float32 in [-1, 1] (a float file may exceed that, and is then left as it is).

    Raises:
        UserMistake: the file is missing, no audio, empty, or has samples that are not finite.
    """
    import soundfile
    import soxr

    if not path.is_file():
        raise UserMistake(f"--user-audio: {str(path)!r} is not a file; give the path of a WAV or FLAC file")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise UserMistake(
            f"--user-audio: {str(path)!r} cannot be read as audio ({error}); give a WAV or FLAC file"
        ) from error
    mono = samples.mean(axis=1)
    if rate != sampling_rate:
        mono = soxr.resample(mono, rate, sampling_rate)
    if mono.size == 0:
        raise UserMistake(f"--user-audio: {str(path)!r} holds no samples; give a file with at least one")
    if not np.isfinite(mono).all():
        raise UserMistake(f"--user-audio: {str(path)!r} holds NaN or infinite samples; give finite audio")
    return np.ascontiguousarray(mono, dtype=np.float32)


def check_output(path: Path) -> None:
    """Make sure, before any work is done, that ``path`` and the JSON beside it can be written.

    Missing parent directories are made.

    Raises:
        UserMistake: the suffix is not ``.wav`` or ``.flac``, or the place cannot be written to.
    """
    if path.suffix.lower() not in (".wav", ".flac"):
        raise UserMistake(f"--output: {str(path)!r} does not end in .wav or .flac; give such a name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserMistake(f"--output: cannot make the directory {str(path.parent)!r} ({error})") from error
    for file in (path, path.with_suffix(".json")):
        if file.is_dir():
            raise UserMistake(f"--output: {str(file)!r} is a directory; give the name of a file")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise UserMistake(f"--output: no permission to write {str(file)!r}; give another place")


def write_audio(path: Path, samples: Float[np.ndarray, "samples"], sampling_rate: int) -> None:
    """Write 16-bit ``samples``; beyond [-1, 1] they are clipped, as the format demands."""
    import soundfile

    soundfile.write(path, np.clip(samples, -1.0, 1.0), sampling_rate, subtype="PCM_16")
