"""Audio files in and out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from transformers_moshi_flax.cli.console import notes_of_warnings
from transformers_moshi_flax.cli.errors import UserMistake, as_mistake

AUDIO_OUT = (".wav", ".flac")
"""What audio can be written as."""


LONGEST = 86_400.0
"""Seconds of a recording that a command takes."""


def read_audio(path: Path, sampling_rate: int, option: str = "--user-audio") -> Float[np.ndarray, "samples"]:
    """Read WAV, FLAC or whatever else libsndfile knows, as mono at ``sampling_rate``; see :mod:`..audio_files`.

    Warnings (of what cannot be read, or of channels that cannot be mixed) are printed as notes on standard error.

    Returns:
        ``(samples,)`` float32 in [-1, 1] (a float file may exceed that, and is then left as it is).

    Raises:
        UserMistake: the file is missing, no audio, empty, longer than a day, or has samples that are none.
    """
    from transformers_moshi_flax.audio_files import read_mono

    with as_mistake(option, ValueError), notes_of_warnings():
        return read_mono(path, sampling_rate, LONGEST)


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
    """Write 16-bit ``samples``, atomically; beyond [-1, 1] they are clipped, as the format demands.

    A FLAC file cannot say that it has none, and libsndfile then writes nothing at all: it gets one of silence.
    """
    import soundfile

    from transformers_moshi_flax.checkpoints.writing import atomic_file

    kind = path.suffix[1:].upper()
    if kind == "FLAC" and not len(samples):
        samples = np.zeros((1, *samples.shape[1:]), np.float32)
    with atomic_file(path) as temporary:
        soundfile.write(temporary, np.clip(samples, -1.0, 1.0), sampling_rate, subtype="PCM_16", format=kind)
