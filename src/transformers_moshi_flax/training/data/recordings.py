"""Stereo recordings as blocks of samples, read and resampled as they are needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from ...audio_files import AudioFile

Block = Float32[np.ndarray, "2 samples"]


class BadRecording(ValueError):
    """A recording that gives no conversation; the message is the reason."""


@dataclass(frozen=True)
class Listed:
    """A line of a manifest.

    Attributes:
        id: the path as the manifest has it.
        path: of the audio.
    """

    id: str
    path: Path

    def files(self) -> list[list[int] | None]:
        """Size and time of change (ns) of the audio and of the JSON beside it; None for what is not there."""
        return [_status(self.path), _status(words_path(self.path))]


def words_path(audio: Path) -> Path:
    """Where the words of a recording are."""
    return audio.parent / f"{audio.stem}.json"


def _status(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError for names that no file can have
        return None
    return [status.st_size, status.st_mtime_ns]


def read_blocks(
    path: Path, sampling_rate: int, size: int, problems: list[str] | None = None
) -> Iterator[tuple[Block, bool]]:
    """Blocks of ``size`` samples of both channels, and whether it is the last one, which may be shorter.

    Another rate is resampled by soxr (high quality); memory does not grow with the length. What cannot be read of a
    file is told in a warning, and in ``problems`` by the last block; see :class:`AudioFile`.

    Raises:
        BadRecording: no such file, no audio, not stereo, empty, samples that are not finite or far beyond [-1, 1].
    """
    import soxr

    name = repr(str(path))
    try:
        file = AudioFile(path)
        rate, channels = file.sampling_rate, file.channels
        if channels != 2:
            raise BadRecording(f"it has {channels} channels, but must have 2: Moshi on the left, the user right")
        resampler = None if rate == sampling_rate else soxr.ResampleStream(rate, sampling_rate, 2, dtype="float32")
        waiting = np.zeros((0, 2), np.float32)
        empty = True
        for read in itertools.chain(file.blocks(), [None]):
            ended = read is None
            empty = empty and ended
            read = np.zeros((0, 2), np.float32) if ended else read
            if resampler is not None:
                read = resampler.resample_chunk(read, last=ended)
            waiting = np.concatenate([waiting, read])
            # one sample stays behind, so that the last block is known to be the last
            while len(waiting) > size:
                yield np.ascontiguousarray(waiting[:size].T), False
                waiting = waiting[size:]
    except ValueError as error:
        raise BadRecording(str(error).replace(name, "it", 1)) from error
    if empty:
        raise BadRecording("it holds no samples")
    if problems is not None:
        problems += file.problems
    yield np.ascontiguousarray(waiting.T), True
