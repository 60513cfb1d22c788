"""Microphone and speakers, by the ``sounddevice`` package."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from .protocol import FRAME, RATE

AHEAD_SECONDS = 2.0
"""Most sound that waits to be played; older sound is left out."""


class Speakers:
    """Plays what is given, in its order.

    ``sounddevice`` asks for sound in a thread of its own.
    """

    def __init__(self) -> None:
        self._waiting: deque[Float[np.ndarray, "samples"]] = deque()
        self._length = 0
        self._lock = threading.Lock()

    def play(self, samples: Float[np.ndarray, "samples"]) -> None:
        """Play it when all before it has been played; what waits too long is left out."""
        with self._lock:
            self._waiting.append(samples)
            self._length += len(samples)
            while self._length > AHEAD_SECONDS * RATE:
                self._length -= len(self._waiting.popleft())

    def fill(self, out: Any, frames: int, time: Any, status: Any) -> None:
        """A callback of ``sounddevice``: silence where there is nothing to play."""
        out[:] = 0
        filled = 0
        with self._lock:
            while self._waiting and filled < frames:
                piece = self._waiting.popleft()
                part = piece[: frames - filled]
                out[filled : filled + len(part), 0] = part
                filled += len(part)
                self._length -= len(part)
                if len(part) < len(piece):
                    self._waiting.appendleft(piece[len(part) :])


@contextlib.contextmanager
def opened() -> Iterator[tuple[AsyncIterator[Float[np.ndarray, "samples"]], Speakers]]:
    """The computer's microphone, frame by frame, and its speakers, while the block lasts.

    Raises:
        ImportError: ``sounddevice`` is not installed.
        OSError: neither it nor PortAudio finds a device.
    """
    import sounddevice

    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[np.ndarray] = asyncio.Queue()
    speakers = Speakers()

    def record(data: Any, frames: int, time: Any, status: Any) -> None:
        loop.call_soon_threadsafe(heard.put_nowait, np.array(data[:, 0], np.float32))

    async def microphone() -> AsyncIterator[Float[np.ndarray, "samples"]]:
        while True:
            yield await heard.get()

    options = {"samplerate": RATE, "channels": 1, "blocksize": FRAME}
    try:
        with (
            sounddevice.InputStream(callback=record, **options),
            sounddevice.OutputStream(callback=speakers.fill, **options),
        ):
            yield microphone(), speakers
    except getattr(sounddevice, "PortAudioError", OSError) as error:
        raise OSError(f"there is no microphone, or no speakers: {error}") from error
