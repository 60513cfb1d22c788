"""Audio files in and out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from transformers_moshi_flax.cli.errors import UserMistake

AUDIO_OUT = (".wav", ".flac")
"""What audio can be written as."""


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
    check_suffix("--output", path, AUDIO_OUT)
    for file in (path, path.with_suffix(".json")):
        check_place("--output", file)


def check_suffix(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Raises :class:`UserMistake` unless ``path`` ends in one of ``suffixes``, in capitals or not."""
    if path.suffix.lower() not in suffixes:
        raise UserMistake(f"{option}: {str(path)!r} does not end in {' or '.join(suffixes)}; give such a name")


def check_place(option: str, path: Path) -> None:
    """Make sure that a file can be written at ``path``; missing parent directories are made.

    Raises:
        UserMistake: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserMistake(f"{option}: cannot make the directory {str(path.parent)!r} ({error})") from error
    if path.is_dir():
        raise UserMistake(f"{option}: {str(path)!r} is a directory; give the name of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserMistake(f"{option}: no permission to write {str(path)!r}; give another place")


def write_audio(path: Path, samples: Float[np.ndarray, "samples *channels"], sampling_rate: int) -> None:
    """Write 16-bit ``samples``, atomically; beyond [-1, 1] they are clipped, as the format demands."""
    import soundfile

    from transformers_moshi_flax.checkpoints.writing import atomic_file

    with atomic_file(path) as temporary:
        kind = path.suffix[1:].upper()
        soundfile.write(temporary, np.clip(samples, -1.0, 1.0), sampling_rate, subtype="PCM_16", format=kind)
