"""What the streaming benchmark measured, as markdown."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from typing import Any

from .report import installed, processor, table
from .settings import Setting
from .steadiness import PERIOD, RESETS, WARM_UP, Endurance, Paced, Spread
from .streams import BOTH, STEP, Stream

PACKAGES = ("jax", "flax", "torch", "transformers", "moshi", "rustymimi")
SPREAD = ["steps", "ms, p50", "p95", "p99", "max", "p99 / p50"]

Times = dict[str, list[float]]
"""Seconds of every step by part."""


@dataclass
class StreamingReport:
    """All results of a call of the program, which ``started`` when ``time.monotonic`` said so.

    Attributes:
        codecs: by batch and runner.
        dialogues: by setting and runner.
        paced: by size and side.
        endurance: the size, and its long dialogue.
        missing: reasons by side and size.
    """

    options: argparse.Namespace
    started: float
    loads: list[float]
    codecs: dict[int, dict[str, Times]] = field(default_factory=dict)
    dialogues: dict[Setting, dict[str, Times]] = field(default_factory=dict)
    paced: dict[str, dict[str, Paced]] = field(default_factory=dict)
    endurance: tuple[str, Endurance] | None = None
    missing: dict[tuple[str, str], str] = field(default_factory=dict)

    def markdown(self) -> str:
        """The whole report."""
        parts = [self.conditions()]
        parts.append("Mimi alone, a frame:\n\n" + self.coding())
        parts.append("A step of the dialogue, audio to audio:\n\n" + self.steps())
        if self.paced:
            parts.append(f"Steps paced at {1e3 * PERIOD:.0f} ms, batch 1, from a frame's arrival:\n\n" + self.pacing())
        if self.endurance is not None:
            parts.append(self.lasting(*self.endurance))
        if self.missing:
            reasons = (f"{name}, {size}: {reason}" for (name, size), reason in self.missing.items())
            parts.append(f"Missing: {'; '.join(reasons)}.")
        return "\n\n".join(parts) + "\n"

    def conditions(self) -> str:
        versions = ", ".join(f"{package} {found}" for package, found in installed(PACKAGES))
        return (
            f"float32, greedy, {self.options.threads} thread(s) on all sides (torch by `set_num_threads`, XLA by the "
            f"affinity of the process, rayon of `rustymimi` by `RAYON_NUM_THREADS`), in {self.options.rounds} turn(s) "
            f"of each side; {processor()}; load average {self.loads[0]:.2f} before, {self.loads[-1]:.2f} after; "
            f"{versions}; {(time.monotonic() - self.started) / 60:.1f} minutes in all."
        )

    def coding(self) -> str:
        rows = []
        for batch, sides in self.codecs.items():
            rows += [[batch, *row] for row in spreads(sides)]
        return table(["batch", "side", "part", *SPREAD, "p50 over ours"], rows)

    def steps(self) -> str:
        rows = []
        for setting, sides in self.dialogues.items():
            rows += [[setting.size, setting.batch, *row] for row in spreads(sides)]
        return table(["model", "batch", "side", "part", *SPREAD, "p50 over ours"], rows)

    def pacing(self) -> str:
        rows = []
        for size, sides in self.paced.items():
            for name, paced in sides.items():
                rows.append([size, name, *cells(paced.steps, paced.latency), paced.misses])
        return table(["model", "side", *SPREAD, "late"], rows)

    def lasting(self, size: str, run: Endurance) -> str:
        spikes = ", ".join(
            f"{spike.milliseconds:.2f} ms (step {spike.step}{', with a collection' * bool(spike.collections)})"
            for spike in run.spikes
        )
        compiled = f"{len(run.compiled)}" + (f" ({', '.join(run.compiled)})" if run.compiled else "")
        rows = [
            ["a step, ms: p50, p95, p99, max", ", ".join(f"{value:.2f}" for value in run.times)],
            ["p99 / p50", f"{run.times.p99 / run.times.p50:.2f}"],
            ["longest steps", spikes],
            ["compilations", compiled],
            ["collections of garbage by generation", ", ".join(map(str, run.collections))],
            ["longest collection, ms", f"{run.collecting:.2f}"],
            ["resident memory, MB", ", ".join(f"{value / 1e6:.1f}" for value in run.resident)],
            ["JAX's arrays, MB", ", ".join(f"{value / 1e6:.3f}" for value in run.live)],
            ["JAX's arrays, number", ", ".join(map(str, run.arrays))],
        ]
        return (
            f"{run.steps} steps of the {size} model after {WARM_UP} that do not count, with a reset every {RESETS}; "
            "memory before and after every tenth:\n\n" + table(["", ""], rows)
        )

    def summary(self, setting: Setting) -> str:
        """One line for the screen: the medians of the whole."""
        found = {"Mimi of " + name: times[BOTH] for name, times in self.codecs.get(setting.batch, {}).items()}
        found |= {name: times[STEP] for name, times in self.dialogues[setting].items() if STEP in times}
        figures = ", ".join(f"{name} {Spread.of(times).p50:.2f} ms" for name, times in found.items())
        return f"{setting.size}, batch {setting.batch}: {figures}"


def spreads(sides: dict[str, Times]) -> list[list[Any]]:
    """Lines of all sides and parts; this library's parts are the measure of the others'."""
    ours = {
        part: Spread.of(seconds).p50
        for name, times in sides.items()
        if name.startswith(Stream.name)
        for part, seconds in times.items()
    }
    rows = []
    for name, times in sides.items():
        for part, seconds in times.items():
            spread = Spread.of(seconds)
            mine = name.startswith(Stream.name) or part not in ours
            ratio = "" if mine else f"{spread.p50 / ours[part]:.2f}"
            rows.append([name, part, *cells(len(seconds), spread), ratio])
    return rows


def cells(steps: int, spread: Spread) -> list[Any]:
    return [steps, *(f"{value:.2f}" for value in spread), f"{spread.p99 / spread.p50:.2f}"]
