"""Audio of any rate and format that libsndfile reads, as crops for the training of a codec.

What a file holds is what :mod:`~transformers_moshi_flax.audio_files` finds, whatever its header says.

What a batch holds depends on the seed and its number alone, so that a run goes on where it was left, and several
processes can make their own rows of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from jaxtyping import Float, Float32

from ...audio_files import AudioFile, mix_crops

logger = logging.getLogger(__name__)

SILENT = 1e-4
"""A crop whose samples all are nearer to 0 teaches nothing."""

SUFFIXES = frozenset(f".{name.lower()}" for name in soundfile.available_formats()) - {".raw"} | set(
    ".aac .ac3 .aif .aifc .amr .ape .m4a .mka .mp2 .mp4 .mpga .oga .opus .snd .sph .wave .webm .wma .wv".split()
)
"""Of what is audio by its name, also where it is of a format that is not read, which is told."""

_TRIES = 50
_MARGIN_SECONDS = 0.02
_LOUDEST = 100

Teacher = Callable[[Float32[np.ndarray, "rows samples"]], Float[np.ndarray, "rows frames dim"]]
"""What codebook 0 is to be like: features of audio, one vector a frame of the codec."""


@dataclass(frozen=True)
class Recording:
    """One channel of a file, or all of them where the codec has as many.

    Attributes:
        id: the path as the manifest, or the folder, has it.
        path: of the file.
        channel: which one; None for all.
        rate: of the file, in hertz.
        samples: of the file.
        file: reads it.
        text: what is said, if it is known.
    """

    id: str
    path: Path
    channel: int | None
    rate: int
    samples: int
    file: AudioFile
    text: str | None = None

    @property
    def seconds(self) -> float:
        """Of the file."""
        return self.samples / self.rate

    def read(
        self, sampling_rate: int, start: int = 0, size: int | None = None
    ) -> Float32[np.ndarray, "channels size"]:
        """Samples at ``sampling_rate``, from ``start`` on; zeros behind the end.

        Raises:
            ValueError: the file cannot be read, or has samples that are not finite or beyond 100.
        """
        length = self.length(sampling_rate)
        size = length - start if size is None else size
        margin = 0 if self.rate == sampling_rate else math.ceil(_MARGIN_SECONDS * sampling_rate)
        first = max(start - margin, 0)
        ratio = self.rate / sampling_rate
        begin, end = math.floor(first * ratio), math.ceil((start + size + margin) * ratio)
        with _reason_alone(self.path):
            found = self.file.read(begin, end)
        if not np.isfinite(found).all():
            raise ValueError("it has samples that are NaN or infinite")
        if np.abs(found).max(initial=0) > _LOUDEST:
            raise ValueError(f"it has samples of up to {np.abs(found).max():.3g}, but must be in [-1, 1]: scale it")
        if self.channel is not None:
            found = found[:, [self.channel]]
        if margin:
            found = soxr.resample(found, self.rate, sampling_rate).astype(np.float32)
            # where the first sample that was read lies, in samples of the result
            found = found[max(round(start - begin / ratio), 0) :]
        out = np.zeros((found.shape[1], size), np.float32)
        out[:, : min(size, len(found))] = found[:size].T
        return out

    def length(self, sampling_rate: int) -> int:
        """Samples at ``sampling_rate``."""
        return math.floor(self.samples * sampling_rate / self.rate)


@dataclass(frozen=True)
class RecordingSet:
    """What a folder or a manifest has.

    Attributes:
        recordings: in the order of their ids.
        skipped: reasons, by the ids of the files.
    """

    recordings: tuple[Recording, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.recordings)

    @property
    def seconds(self) -> float:
        """Of all channels together."""
        return sum(recording.seconds for recording in self.recordings)

    @property
    def fingerprint(self) -> str:
        """Of what there is to draw from."""
        told = [(each.id, each.channel, each.rate, each.samples) for each in self.recordings]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def open_recordings(path: str | Path, audio_channels: int = 1, least_seconds: float = 0.5) -> RecordingSet:
    """The recordings of a folder (of all folders in it), or of a manifest.

    Args:
        path: a folder (what in it, and in all folders in it, has one of :data:`SUFFIXES`, behind links too), or a
            manifest: JSON lines with ``{"path": …, "text": …}``, whose paths are relative to it and whose text may
            lack.
        audio_channels: of the codec. For a codec of one channel, every channel of a file is a recording of its own.
        least_seconds: files that are shorter are skipped.

    Raises:
        ValueError: there is no such file; a line of the manifest is none; none of the files can be used.
    """
    path = Path(path)
    recordings: list[Recording] = []
    skipped: dict[str, str] = {}
    if path.is_dir():
        listed: list[tuple[str, Path, str | None]] = [
            (str(file.relative_to(path)), file, None) for file in _audio_in(path, skipped)
        ]
    elif path.is_file():
        listed = _manifest(path)
    else:
        raise ValueError(f"{str(path)!r} is not there; give a folder of audio, or a manifest (JSON lines)")
    for name, file, text in listed:
        try:
            recordings += _channels(name, file, text, audio_channels, least_seconds)
        except ValueError as error:
            skipped[name] = str(error)
    if not recordings:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"{str(path)!r} has no audio that can be used{f' ({reasons})' if reasons else ''}")
    return RecordingSet(tuple(recordings), skipped)


def _audio_in(path: Path, skipped: dict[str, str]) -> list[Path]:
    """Audio in a folder and those in it, each of which is looked through once; what cannot be is ``skipped``."""

    def skip(error: OSError) -> None:
        skipped[os.path.relpath(error.filename, path)] = f"it cannot be looked through ({error.strerror})"

    found, seen = [], set()
    for folder, folders, names in os.walk(path, onerror=skip, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        found += [Path(folder, name) for name in names if Path(name).suffix.lower() in SUFFIXES]
    return sorted(found)


def _manifest(path: Path) -> list[tuple[str, Path, str | None]]:
    listed, seen = [], set()
    try:
        # a text may have what else str.splitlines() takes for the end of a line
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}); give JSON lines") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["path"], entry.get("text")
            if not isinstance(name, str) or not isinstance(text, str | None):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f'{str(path)!r}, line {number}: {line:.80} must be {{"path": "…"}}, with a "text" if it is known'
            ) from None
        if name in seen:
            raise ValueError(f"{str(path)!r}, line {number}: {name!r} is listed twice; leave one out")
        seen.add(name)
        listed.append((name, path.parent / name, text))
    return sorted(listed)


def _channels(name: str, path: Path, text: str | None, audio_channels: int, least_seconds: float) -> list[Recording]:
    with _reason_alone(path):
        file = AudioFile(path)
        rate, channels, samples = file.sampling_rate, file.channels, file.count()
    if samples < least_seconds * rate:
        raise ValueError(f"it has {samples / rate:.2f} s, fewer than data.least_seconds")
    if audio_channels == 1:
        return [Recording(name, path, number, rate, samples, file, text) for number in range(channels)]
    if channels != audio_channels:
        raise ValueError(f"it has {channels} channels, but the codec has {audio_channels}")
    return [Recording(name, path, None, rate, samples, file, text)]


@contextmanager
def _reason_alone(path: Path) -> Iterator[None]:
    """Messages that name the file speak of "it", as they are told beside its id."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(repr(str(path)), "it", 1)) from error


class CropPlan:
    """Which samples of which recordings are in which batch.

    A crop is drawn by length: every second of the set is as likely as any other. An epoch is as many batches as it
    would take to hear everything once.

    Attributes:
        batches_per_epoch: see above.
        fingerprint: of data and settings.
    """

    def __init__(self, recordings: RecordingSet, *, batch_size: int, samples: int, sampling_rate: int, seed: int):
        lengths = np.array([max(each.length(sampling_rate), samples) for each in recordings.recordings], np.int64)
        self._ends = np.cumsum(lengths)
        self._lengths, self._samples, self._seed = lengths, samples, seed
        self.batches_per_epoch = max(1, int(self._ends[-1] // (batch_size * samples)))
        settings = (int(batch_size), int(samples), int(sampling_rate), int(seed))
        self.fingerprint = hashlib.sha256(f"{recordings.fingerprint} {settings}".encode()).hexdigest()

    def generator(self, number: int, row: int) -> np.random.Generator:
        """Of all that is random in a row of a batch."""
        return np.random.default_rng([self._seed, number, row])

    def draw(self, generator: np.random.Generator) -> tuple[int, int]:
        """A recording and the sample at which its crop begins."""
        which = int(np.searchsorted(self._ends, generator.integers(self._ends[-1]), side="right"))
        return which, int(generator.integers(self._lengths[which] - self._samples + 1))


@dataclass(frozen=True)
class CropMaker:
    """Makes this process's rows of a batch of training.

    Attributes:
        recordings, plan: what is drawn from, and how.
        rows: of this process, first and behind the last.
        samples: of a crop.
        sampling_rate: of the codec.
        gain_db: a crop is made louder or softer by as much at most.
        noise_probability: the share of crops that get white noise.
        noise_snr_db: the least ratio of signal to noise; the most is 20 dB more.
        teacher: of codebook 0.
    """

    recordings: RecordingSet
    plan: CropPlan
    rows: tuple[int, int]
    samples: int
    sampling_rate: int
    gain_db: float = 0.0
    noise_probability: float = 0.0
    noise_snr_db: float = 20.0
    teacher: Teacher | None = None

    def __call__(self, number: int) -> dict[str, Any]:
        """``audio`` ``(rows, channels, samples)`` float32, and ``features`` of a teacher.

        Raises:
            ValueError: what is drawn again and again is silent or cannot be read; the teacher's features do not fit.
        """
        audio = np.stack([self._crop(number, row) for row in range(*self.rows)])
        if self.teacher is None:
            return {"audio": audio}
        return {"audio": audio, "features": np.asarray(self.teacher(mix_crops(audio)), np.float32)}

    def _crop(self, number: int, row: int) -> Float32[np.ndarray, "channels samples"]:
        generator = self.plan.generator(number, row)
        reason = ""
        for _ in range(_TRIES):
            which, start = self.plan.draw(generator)
            recording = self.recordings.recordings[which]
            try:
                crop = recording.read(self.sampling_rate, start, self.samples)
            except ValueError as error:
                reason = f"{recording.id}: {error}"
                _warn_once(reason)
                continue
            if np.abs(crop).max() >= SILENT:
                return self._augmented(crop, generator)
            reason = f"{recording.id} is silent at {start / self.sampling_rate:.1f} s"
        raise ValueError(
            f"{_TRIES} crops one after another cannot be used, the last of them: {reason}; remove such files"
        )

    def _augmented(
        self, crop: Float32[np.ndarray, "channels samples"], generator: np.random.Generator
    ) -> Float32[np.ndarray, "channels samples"]:
        crop = crop * 10 ** (generator.uniform(-self.gain_db, self.gain_db) / 20)
        if generator.random() < self.noise_probability:
            ratio = 10 ** ((self.noise_snr_db + generator.uniform(0, 20)) / 20)
            noise = generator.standard_normal(crop.shape)
            crop = crop + noise * np.sqrt(np.mean(np.square(crop))) / ratio
        return (crop / max(1.0, np.abs(crop).max())).astype(np.float32)


_told: set[str] = set()


def _warn_once(reason: str) -> None:
    if reason not in _told:
        _told.add(reason)
        logger.warning("a recording is left out: %s", reason)


def evaluation_crops(
    recordings: RecordingSet,
    *,
    batch_size: int,
    samples: int,
    sampling_rate: int,
    most: int,
    rows: tuple[int, int],
    teacher: Teacher | None = None,
) -> Sequence[Callable[[], dict[str, Any]]]:
    """The batches of an evaluation, each made when it is called: crops one after another, the last rows filled up.

    With more crops than ``most``, as many are taken from all over the set. ``weights`` ``(rows,)`` is 1 for crops and
    0 for rows that are filling; recordings that cannot be read are filling, too.
    """
    places = [
        (recording, start)
        for recording in recordings.recordings
        for start in range(0, max(recording.length(sampling_rate) - samples // 2, 1), samples)
    ]
    if len(places) > most:
        places = [places[index] for index in np.linspace(0, len(places) - 1, most).round().astype(int)]
    batches = [places[start : start + batch_size] for start in range(0, len(places), batch_size)]

    def make(batch: list[tuple[Recording, int]]) -> dict[str, Any]:
        channels = 1 if batch[0][0].channel is not None else batch[0][0].file.channels
        audio = np.zeros((rows[1] - rows[0], channels, samples), np.float32)
        weights = np.zeros(rows[1] - rows[0], np.float32)
        for row, (recording, start) in enumerate(batch[rows[0] : rows[1]]):
            try:
                audio[row], weights[row] = recording.read(sampling_rate, start, samples), 1
            except ValueError as error:
                _warn_once(f"{recording.id}: {error}")
        made = {"audio": audio, "weights": weights}
        if teacher is not None:
            made["features"] = np.asarray(teacher(mix_crops(audio)), np.float32)
        return made

    return [partial(make, batch) for batch in batches]
