"""Steps in real time, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


class Pace:
    """When steps begin and end. In real time, step ``k`` begins once the last sample of frame ``k`` would have come.

    Its deadline is the end of frame ``k + 1``: then the next step is due, and what plays the reply, one frame behind
    the user, runs dry.

    Args:
        period: seconds a frame.
        realtime: whether to wait; otherwise every step begins at once.
        clock, sleep: for seconds that are no real ones.
    """

    def __init__(
        self,
        period: float,
        realtime: bool,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._period, self._realtime = period, realtime
        self._clock, self._sleep = clock, sleep
        self._origin: float | None = None
        self._begun: list[float] = []
        self._ended: list[float] = []

    def begin(self) -> None:
        """Before a step; the first call is the time at which frame 0 begins."""
        if self._origin is None:
            self._origin = self._clock()
        if self._realtime:
            due = self._origin + (len(self._begun) + 1) * self._period
            # time.sleep may not take a negative time
            self._sleep(max(0.0, due - self._clock()))
        self._begun.append(self._clock())

    def end(self) -> None:
        """After it, once the reply is there."""
        self._ended.append(self._clock())

    @property
    def lateness(self) -> list[float]:
        """Seconds by which each step has missed its deadline; 0 where it has not."""
        origin = self._origin or 0.0
        return [max(0.0, end - origin - (frame + 2) * self._period) for frame, end in enumerate(self._ended)]

    @property
    def realtime_factor(self) -> float:
        """Seconds of work for a second of dialogue."""
        work = sum(end - begin for begin, end in zip(self._begun, self._ended))
        return work / (len(self._ended) * self._period)

    def report(self) -> str:
        """One line: the time of a step, and the deadlines in real time or else the real-time factor."""
        steps = [1000 * (end - begin) for begin, end in zip(self._begun, self._ended)]
        p50, p95, p99 = np.percentile(steps, (50, 95, 99))
        line = f"ms a step: p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f}, max {max(steps):.1f}; "
        if not self._realtime:
            return line + f"real-time factor {self.realtime_factor:.3f}"
        late = self.lateness
        missed = sum(seconds > 0 for seconds in late)
        return line + f"deadline misses: {missed} of {len(late)}, worst lateness {1000 * max(late):.1f} ms"
