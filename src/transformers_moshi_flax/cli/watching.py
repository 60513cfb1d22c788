"""Generation that is watched: a bar moves with the frames, and Ctrl-C or SIGTERM keeps what there is."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from transformers_moshi_flax.generation import StopGeneration


class Watcher:
    """A streamer of ``generate`` that counts frames and can end generation.

    Args:
        begin: called when the prompt has been heard.
        advance: told how many frames there are more.

    Attributes:
        interrupted: whether a signal has ended it.
        terminated: whether that was SIGTERM, after which nothing else is to be begun.
    """

    def __init__(self, begin: Callable[[], Any], advance: Callable[[int], Any]):
        self._begin = begin
        self._advance = advance
        self.interrupted = self.terminated = False

    def put(self, value: np.ndarray) -> None:
        """Takes the ids of the prompt, ``(batch, frames)``, and then of every new frame, ``(batch,)``."""
        if value.ndim == 2:
            self._begin()
            return
        self._advance(1)
        if self.interrupted:
            raise StopGeneration

    def end(self) -> None:
        """Nothing is kept back."""


@contextmanager
def stopped_by_interrupt(watcher: Watcher) -> Iterator[None]:
    """While the block runs, the first Ctrl-C or SIGTERM ends generation after the present frame; the second one is as
    always."""

    def handle(number: int, frame: Any) -> None:
        watcher.interrupted, watcher.terminated = True, number == signal.SIGTERM
        as_before()

    def as_before() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        as_before()
