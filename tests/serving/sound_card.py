"""A sound card for clients that play and record with ``sounddevice``."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.serving.fake_stream import FRAME


class Device(threading.Thread):
    """Calls back every frame's time or sooner, from a thread of its own.

    Args:
        callback: of the client, as ``sounddevice`` has it.
        data: the frames that it records; None plays, to ``played``.
        block: samples that are asked for at once.
    """

    def __init__(self, callback: Callable[..., None], data: Iterable[np.ndarray] | None, block: int = FRAME):
        super().__init__(daemon=True)
        self._callback, self._data, self._block = callback, data, block
        self._open = True
        self.played: list[np.ndarray] = []

    def __enter__(self) -> Device:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._open = False
        self.join()

    def run(self) -> None:
        for frame in () if self._data is None else self._data:
            if not self._open:
                break
            self._callback(frame[:, None].copy(), FRAME, None, None)
            time.sleep(0.01)
        while self._data is None and self._open:
            # what was in it is not the client's
            block = np.ones((self._block, 1), np.float32)
            self._callback(block, self._block, None, None)
            if block.any():
                self.played.append(block[:, 0])
            else:
                time.sleep(0.01)


def sound_card(monkeypatch: pytest.MonkeyPatch, said: np.ndarray, block: int = FRAME) -> dict[str, Device]:
    """Put it into this computer; its devices by direction, ``in`` and ``out``, once they are opened.

    Args:
        monkeypatch: takes it out again.
        said: what the microphone hears, ``(frames, FRAME)`` float32.
        block: samples that the speakers ask for at once.
    """
    opened: dict[str, Device] = {}
    stub: Any = ModuleType("sounddevice")

    def opening(name: str, data: np.ndarray | None) -> Callable[..., Device]:
        def open_stream(callback: Callable[..., None], **options: Any) -> Device:
            assert options == {"samplerate": 24_000, "channels": 1, "blocksize": FRAME}
            return opened.setdefault(name, Device(callback, data, block))

        return open_stream

    stub.InputStream, stub.OutputStream = opening("in", said), opening("out", None)
    monkeypatch.setitem(sys.modules, "sounddevice", stub)
    return opened
