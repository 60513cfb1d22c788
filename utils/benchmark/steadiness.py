"""Whether a stream keeps pace: how its times spread, deadlines it misses, and what a long dialogue leaves behind."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from transformers_moshi_flax.models.moshi.streaming_flax_moshi import FlaxMoshiStream

from .compilation import stage_seconds
from .streams import frames_of_noise

PERIOD = 0.08
"""Seconds of a frame."""
WARM_UP = 200
"""Steps of the long dialogue before anything is counted."""
RESETS = 1000
"""Steps between two resets of the long dialogue."""
SPIKES = 5


class Spread(NamedTuple):
    """Milliseconds: percentiles and the largest."""

    p50: float
    p95: float
    p99: float
    most: float

    @classmethod
    def of(cls, seconds: Sequence[float] | np.ndarray) -> Spread:
        return cls(*(1e3 * float(value) for value in np.percentile(seconds, [50, 95, 99, 100], method="higher")))


class Paced(NamedTuple):
    """A run in real time: milliseconds from a frame's arrival until the answer, and how many answers were late."""

    steps: int
    latency: Spread
    misses: int


def pace(step: Callable[[], Any], steps: int, period: float = PERIOD) -> Paced:
    """Calls ``step`` whenever a period has passed; an answer is late when the next frame has come before it.

    A frame that comes during a step waits for its end, so that one long step may make several answers late.
    """
    latencies = np.zeros(steps)
    start = time.perf_counter()
    for k in range(steps):
        arrival = start + k * period
        time.sleep(max(0.0, arrival - time.perf_counter()))
        step()
        latencies[k] = time.perf_counter() - arrival
    return Paced(steps, Spread.of(latencies), int((latencies > period).sum()))


class Spike(NamedTuple):
    """One of the longest steps: its number, its milliseconds, and the collections of garbage within it."""

    step: int
    milliseconds: float
    collections: int


@dataclass(frozen=True)
class Endurance:
    """A dialogue of many steps after a warm-up.

    Attributes:
        steps: how many.
        times: of the steps.
        spikes: the longest steps, the longest first.
        compiled: programs that XLA compiled.
        collections: of garbage, by generation.
        collecting: milliseconds of the longest of them.
        resident: bytes of memory of the process after the warm-up, and after every tenth of the steps.
        live: bytes of JAX's arrays at the same times.
        arrays: how many these were.
    """

    steps: int
    times: Spread
    spikes: list[Spike]
    compiled: list[str]
    collections: tuple[int, ...]
    collecting: float
    resident: list[int]
    live: list[int]
    arrays: list[int]


def endure(stream: FlaxMoshiStream, steps: int) -> Endurance:
    """One row's dialogue of ``steps`` steps, each until its audio is there; it begins anew every :data:`RESETS`."""
    stream.warmup()
    audio = frames_of_noise(1)
    state, rows = stream.init(), np.ones(1, dtype=bool)
    for k in range(WARM_UP):
        state, frame = stream.step(state, audio[k % len(audio)])
        np.asarray(frame.audio)
    seconds, within = np.zeros(steps), np.zeros(steps, dtype=int)
    resident, live, arrays = [], [], []

    def note() -> None:
        buffers = jax.live_arrays()
        resident.append(resident_bytes())
        live.append(sum(buffer.nbytes for buffer in buffers))
        arrays.append(len(buffers))

    gc.collect()
    note()
    with collections() as collected, stage_seconds() as stages:
        for k in range(steps):
            if k and k % RESETS == 0:
                state = stream.reset(state, rows)
            before = len(collected)
            begin = time.perf_counter()
            state, frame = stream.step(state, audio[k % len(audio)])
            np.asarray(frame.audio)
            seconds[k] = time.perf_counter() - begin
            within[k] = len(collected) - before
            if (k + 1) % max(1, steps // 10) == 0:
                note()
    generations = [generation for generation, _ in collected]
    longest = np.argsort(seconds)[: -SPIKES - 1 : -1]
    return Endurance(
        steps,
        Spread.of(seconds),
        [Spike(int(k), 1e3 * float(seconds[k]), int(within[k])) for k in longest],
        [program for program, stage in stages if stage == "XLA"],
        tuple(generations.count(generation) for generation in range(3)),
        1e3 * max((took for _, took in collected), default=0.0),
        resident,
        live,
        arrays,
    )


@contextmanager
def collections() -> Iterator[list[tuple[int, float]]]:
    """Python's collections of garbage inside: the generation and the seconds of each."""
    collected: list[tuple[int, float]] = []
    begin = 0.0

    def listen(phase: str, info: dict[str, int]) -> None:
        nonlocal begin
        if phase == "start":
            begin = time.perf_counter()
        else:
            collected.append((info["generation"], time.perf_counter() - begin))

    gc.callbacks.append(listen)
    try:
        yield collected
    finally:
        gc.callbacks.remove(listen)


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
