"""SIGTERM and SIGINT during a run: noted for the loop, and heard within a long call where nothing can be lost.

Python runs the handler of a signal between two of its own instructions. A program that is being compiled is one of
them, however long that takes; and who preempts a job waits for half a minute.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

NUMBERS = (signal.SIGTERM, signal.SIGINT)

PATIENCE = 3.0
"""Seconds after a SIGTERM in which the main thread may end the run by itself."""


class Signals(contextlib.AbstractContextManager):
    """While the context lasts, the first SIGTERM or SIGINT is noted; a second one ends the process at once.

    In a thread that is not the main one no signal is heard.

    Attributes:
        number: of the signal that came, 0 if none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._finish: Callable[[int], None] | None = None
        self._lock = threading.Lock()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._told, self._tell = os.pipe()
            os.set_blocking(self._tell, False)
            self._wakeup = signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._receive) for number in NUMBERS}
            self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._tell)  # which ends the thread
            self._watcher.join()
            os.close(self._told)

    def _receive(self, number: int, frame: object) -> None:
        self.number = self.number or number
        for each in NUMBERS:
            signal.signal(each, signal.SIG_DFL)

    @contextlib.contextmanager
    def expendable(self, finish: Callable[[int], None]) -> Iterator[None]:
        """A block whose work may be lost: SIGTERM ends the process in the midst of a call.

        Args:
            finish: called in another thread with the number of the signal before the process ends.
        """
        with self._lock:
            before, self._finish = self._finish, finish
        try:
            yield
        finally:
            with self._lock:
                self._finish = before

    def _watch(self) -> None:
        """Runs in a thread, which the interpreter tells of a signal at once, and the main thread when it can."""
        heard = 0
        while True:
            ready, _, _ = select.select([self._told], [], [], PATIENCE if heard == signal.SIGTERM else None)
            if ready:
                byte = os.read(self._told, 1)
                if not byte:
                    return
                if byte[0] in NUMBERS and heard:  # the main thread has not come to its handler yet
                    os._exit(128 + byte[0])
                heard = byte[0] if byte[0] in NUMBERS else heard
                continue
            with self._lock:
                if self._finish is not None:
                    try:
                        self._finish(heard)
                    finally:
                        os._exit(128 + heard)
