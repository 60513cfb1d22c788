"""How much of a stretch of time JAX spent on compiling."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

COMPILATION = "/jax/core/compile/"


class CompilationTime:
    """Seconds spent on tracing, lowering and compiling, filled in when :func:`compilation_time` ends."""

    seconds: float = 0.0


@contextmanager
def compilation_time() -> Iterator[CompilationTime]:
    """Measure JAX's compilation inside the block, whichever thread of whichever call it happens in."""
    import jax

    spans: list[tuple[float, float]] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(COMPILATION):
            end = time.perf_counter()
            spans.append((end - duration_secs, end))

    measured = CompilationTime()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield measured
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        measured.seconds = covered(spans)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The time covered by ``spans`` of (begin, end), which may lie in one another: the tracing of a function reports
    that of the functions it calls again."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
