"""Stereo recordings as blocks of samples, read and resampled as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

Block = Float32[np.ndarray, "2 samples"]

_READ_SAMPLES = 2**18

_LOUDEST = 100
"""Full scale is 1. Floats may go beyond it, but not by 40 dB: those are no samples, or integers that nobody scaled."""


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


def read_blocks(path: Path, sampling_rate: int, size: int) -> Iterator[tuple[Block, bool]]:
    """Blocks of ``size`` samples of both channels, and whether it is the last one, which may be shorter.

    Another rate is resampled by soxr (high quality); memory does not grow with the length.

    Raises:
        BadRecording: no such file, no audio, not stereo, empty, samples that are not finite or far beyond [-1, 1].
    """
    import soundfile
    import soxr

    try:
        if not path.is_file():
            raise BadRecording("there is no such file")
        if path.suffix.lower() == ".raw":
            raise BadRecording("a .raw file does not say its rate and channels; give it as .wav or .flac")
        with soundfile.SoundFile(path) as file:
            rate, channels = file.samplerate, file.channels
            if channels != 2:
                raise BadRecording(f"it has {channels} channels, but must have 2: Moshi on the left, the user right")
            resampler = None if rate == sampling_rate else soxr.ResampleStream(rate, sampling_rate, 2, dtype="float32")
            waiting = np.zeros((0, 2), np.float32)
            length = 0
            while True:
                read = file.read(_READ_SAMPLES, dtype="float32", always_2d=True)
                if not np.isfinite(read).all():
                    raise BadRecording("it has samples that are NaN or infinite")
                loudest = np.abs(read).max(initial=0)
                if loudest > _LOUDEST:
                    raise BadRecording(f"it has samples of up to {loudest:.3g}, but must be in [-1, 1]: scale it")
                ended = len(read) == 0
                if resampler is not None:
                    read = resampler.resample_chunk(read, last=ended)
                waiting = np.concatenate([waiting, read])
                length += len(read)
                # one sample stays behind, so that the last block is known to be the last
                while len(waiting) > size:
                    yield np.ascontiguousarray(waiting[:size].T), False
                    waiting = waiting[size:]
                if ended:
                    break
    except (soundfile.SoundFileError, OSError) as error:
        raise BadRecording(f"it cannot be read as audio ({error})") from error
    if not length:
        raise BadRecording("it holds no samples")
    yield np.ascontiguousarray(waiting.T), True
