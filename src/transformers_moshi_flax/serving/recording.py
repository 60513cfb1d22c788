"""Dialogues kept on disk: a folder each, which is there once all of it is."""

from __future__ import annotations

import datetime
import json
import os
import secrets
import shutil
import tempfile
import threading
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from jaxtyping import Int

from ..checkpoints.writing import sync_all
from ..models.moshi.pcm import from_float
from ..training.data.alignment import MAIN_SPEAKER
from .engine import Said
from .logs import LOGGER, log_event
from .metrics import Metrics

PENDING_FRAMES = 750
"""Frames of a dialogue, a minute, that wait for the disk before its recording is given up."""

FRAME_BYTES = 4
"""Of a sample of both voices."""

LARGEST_SECONDS = (2**32 - 1024) // (24_000 * FRAME_BYTES)
"""What a WAV holds at most."""

STOP_SECONDS = 30.0


def check_folder(folder: Path) -> None:
    """Make it where there is none. Raises ``OSError`` where nothing can be written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as probe:
        (Path(probe) / "probe").write_bytes(b"0")


class Recorder:
    """Writes dialogues in a thread of its own: neither the disk nor its faults touch a dialogue.

    Args:
        folder: made where there is none.
        words: of one text id a frame, with ``text``, and ``start`` and ``end`` in seconds.
        metrics: what is counted.

    Raises:
        OSError: nothing can be written there.
    """

    def __init__(self, folder: Path, words: Callable[[Int[np.ndarray, "frames"]], Sequence[Any]], metrics: Metrics):
        check_folder(folder)
        self.folder, self._words, self._metrics = folder, words, metrics
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="moshi-recorder", daemon=True)
        self._thread.start()

    def begin(self, dialogue: int, settings: dict[str, Any]) -> Recording:
        """A dialogue's recording, of which there is nothing on disk before its first frame.

        Args:
            dialogue: its number in the log.
            settings: to be kept with it.
        """
        return Recording(self, dialogue, settings)

    def stop(self) -> None:
        """Write what there is, and end; not for ever, if the disk does not answer."""
        self._jobs.put(None)
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            LOGGER.error("recordings are not all written: the disk does not answer")

    def do(self, job: Callable[[], None]) -> None:
        """Do it in the thread, after what was to be done before."""
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def finish(self, tape: _Tape, dialogue: int, settings: dict[str, Any], reason: str) -> None:
        """Complete a recording and give it its name."""
        words = self._words(np.array(tape.text_ids, np.int32))
        name = tape.finish(
            {
                "begin": tape.begin.isoformat(timespec="milliseconds"),
                "end_reason": reason,
                "frames": len(tape.text_ids),
                "channels": ["moshi", "user"],
                **settings,
                "text_ids": tape.text_ids,
                "words": [{"text": word.text, "start": word.start, "end": word.end} for word in words],
                # beside its WAV, this is what a model can be fine-tuned with
                "alignments": [[word.text, [word.start, word.end], MAIN_SPEAKER] for word in words],
            }
        )
        self._metrics.recordings.labels("written").inc()
        log_event("recorded", dialogue=dialogue, name=name)

    def fail(self, dialogue: int, error: BaseException | str) -> None:
        """Say that there is no recording of a dialogue, or only of what it was before it began anew."""
        self._metrics.recordings.labels("failed").inc()
        LOGGER.error("a dialogue is not recorded", extra={"fields": {"dialogue": dialogue, "error": str(error)}})


class Recording:
    """What one caller and Moshi say. A dialogue that begins anew is another recording."""

    def __init__(self, recorder: Recorder, dialogue: int, settings: dict[str, Any]):
        self._recorder, self._dialogue, self._settings = recorder, dialogue, settings
        self._room = threading.Semaphore(PENDING_FRAMES)
        self._tape: _Tape | None = None
        self._failed = False

    def put(self, said: Said) -> None:
        """Add a frame; never waits."""
        if self._failed:
            return
        if self._room.acquire(blocking=False):
            self._recorder.do(lambda: self._attempt(lambda: self._write(said)))
        else:
            self._failed = True
            self._recorder.do(lambda: self._give_up("the disk does not keep up"))

    def end(self, reason: str) -> None:
        """The dialogue is over, and why."""
        self._recorder.do(lambda: self._attempt(lambda: self._finish(reason)))

    def _attempt(self, step: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            step()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: BaseException | str) -> None:
        self._failed = True
        if self._tape is not None:
            self._tape.discard()
            self._tape = None
        self._recorder.fail(self._dialogue, error)

    def _write(self, said: Said) -> None:
        self._room.release()
        if said.number == 0:
            self._finish("restart")
        if self._tape is None:
            self._tape = _Tape.new(self._recorder.folder, self._settings["sample_rate"])
        self._tape.write(said)

    def _finish(self, reason: str) -> None:
        if self._tape is not None:
            self._recorder.finish(self._tape, self._dialogue, self._settings, reason)
            self._tape = None


@dataclass
class _Tape:
    """A recording that is being written, under a name that begins with a dot."""

    folder: Path
    begin: datetime.datetime
    wav: wave.Wave_write
    text_ids: list[int] = field(default_factory=list)

    @classmethod
    def new(cls, folder: Path, rate: int) -> _Tape:
        begin = datetime.datetime.now(datetime.UTC)
        staged = folder / f".{begin:%Y%m%dT%H%M%S}Z-{secrets.token_hex(4)}"
        staged.mkdir(mode=0o700)
        wav = wave.open(str(staged / "dialogue.wav"), "wb")
        wav.setparams((2, 2, rate, 0, "NONE", ""))
        return cls(staged, begin, wav)

    def write(self, said: Said) -> None:
        voices = np.stack([said.audio, said.heard], axis=1)
        self.wav.writeframesraw(from_float(voices, np.int16).astype("<i2").tobytes())
        self.text_ids.append(said.text_id)

    def finish(self, record: dict[str, Any]) -> str:
        self.wav.close()
        (self.folder / "dialogue.json").write_text(json.dumps(record, ensure_ascii=False), "utf-8")
        sync_all(self.folder)
        name = self.folder.name.removeprefix(".")
        os.rename(self.folder, self.folder.parent / name)
        sync_all(self.folder.parent, deep=False)
        return name

    def discard(self) -> None:
        try:
            self.wav.close()
        except OSError:
            pass  # what it could not write is not wanted
        shutil.rmtree(self.folder, ignore_errors=True)
