"""What was measured, as markdown."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .checkpoints import Checkpoint
from .compilation import ProgramCost
from .first_call import KINDS
from .limit import Bandwidth
from .settings import SIZES, Setting
from .sides import SIDES, Run

PACKAGES = ("jax", "flax", "torch", "transformers", "moshi", "moshi_mlx", "mlx")


@dataclass
class Measurement:
    """A setting: the runs of every side, and the reasons of those that have none."""

    setting: Setting
    weight_bytes: float
    cache_bytes: float
    runs: dict[str, list[Run]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def milliseconds(self, key: str) -> tuple[float, float]:
        """The least and the median of a side's runs, for one frame of all rows."""
        frames = [1e3 * run.seconds / self.setting.frames for run in self.runs[key]]
        return min(frames), statistics.median(frames)

    def agreement(self, key: str) -> int:
        """For how many frames the text of a side is that of this library, in all rows."""
        equal = (self.runs[key][0].text == self.runs["ours"][0].text).all(axis=0)
        return len(equal) if equal.all() else int(equal.argmin())

    def summary(self) -> str:
        """One line for the screen."""
        figures = [f"{SIDES[key].name} {self.milliseconds(key)[0]:.3f} ms" for key in self.runs]
        return ", ".join(figures + [f"{SIDES[key].name}: {reason}" for key, reason in self.missing.items()])


@dataclass
class Report:
    """All results of a call of the program, which ``started`` when ``time.monotonic`` said so."""

    options: argparse.Namespace
    started: float
    loads: list[float]
    bandwidths: list[Bandwidth]
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    costs: dict[Setting, tuple[ProgramCost, ProgramCost]] = field(default_factory=dict)
    first_calls: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def markdown(self) -> str:
        """The whole report."""
        parts = [self.conditions(), self.models(), self.speeds()]
        if self.costs:
            parts.append(self.compilations())
        if self.first_calls:
            parts.append(self.fresh_processes())
        return "\n\n".join(parts) + "\n"

    def conditions(self) -> str:
        bandwidth = max(self.bandwidths)
        versions = ", ".join(f"{package} {found}" for package, found in installed(PACKAGES))
        return (
            f"float32, {self.options.threads} thread(s) on all sides, at most {self.options.repeats} counted run(s) "
            f"each in turns; {processor()}; memory reads {bandwidth.bytes_per_second / 1e9:.1f} GB/s "
            f"({bandwidth.way}); load average {self.loads[0]:.2f} before, {self.loads[-1]:.2f} after; {versions}; "
            f"{(time.monotonic() - self.started) / 60:.1f} minutes in all."
        )

    def models(self) -> str:
        rows = [
            [
                size,
                f"{checkpoint.parameters:,}",
                f"{checkpoint.with_mimi:,}",
                f"{checkpoint.weight_bytes / 1e6:,.1f}",
                SIZES[size].frames,
            ]
            for size, checkpoint in self.checkpoints.items()
        ]
        names = ["model", "parameters", "with Mimi", "weights that a frame reads, MB", "timed frames a run"]
        return table(names, rows)

    def speeds(self) -> str:
        names = ["model", "batch", "context", "decoding", "side", "runs", "ms a frame, min", "median"]
        names += ["frames/s in all, best", "of the limit", "time over ours, min", "median", "same text, frames"]
        rows: list[list[Any]] = []
        for measurement in self.measurements:
            setting = measurement.setting
            context = f"{setting.context}" + (f" (capacity {setting.capacity})" if setting.capacity else "")
            where = [setting.size, setting.batch, context, setting.decoding]
            limit = self.limit(measurement)
            for key in SIDES:
                if key in measurement.missing:
                    rows.append([*where, SIDES[key].name, measurement.missing[key], *[""] * 7])
                elif key in measurement.runs:
                    rows.append([*where, *self.speed(measurement, key, limit)])
            if limit is not None:
                read = f"limit: {measurement.weight_bytes / 1e6:,.0f} + {measurement.cache_bytes / 1e6:,.1f} MB"
                rows.append([*where, read, "", f"{limit:.2f}", "", f"{1e3 * setting.batch / limit:,.1f}", *[""] * 4])
        return table(names, rows)

    def limit(self, measurement: Measurement) -> float | None:
        """Milliseconds that reading a frame's bytes takes, or None where they may come from the processor's cache."""
        if not SIZES[measurement.setting.size].memory_bound:
            return None
        total = measurement.weight_bytes + measurement.cache_bytes
        return 1e3 * total / max(self.bandwidths).bytes_per_second

    def speed(self, measurement: Measurement, key: str, limit: float | None) -> list[Any]:
        least, median = measurement.milliseconds(key)
        cells = [SIDES[key].name, len(measurement.runs[key]), f"{least:.3f}", f"{median:.3f}"]
        cells.append(f"{1e3 * measurement.setting.batch / least:,.1f}")
        cells.append("" if limit is None else f"{limit / least:.0%}")
        if key == "ours" or "ours" not in measurement.runs:
            return [*cells, "", "", ""]
        ours = measurement.milliseconds("ours")
        agreement = "" if measurement.setting.sampled else measurement.agreement(key)
        return [*cells, f"{least / ours[0]:.2f}", f"{median / ours[1]:.2f}", agreement]

    def compilations(self) -> str:
        names = ["setting", "program", "tracing, s", "lowering, s", "XLA, s", "in all, s"]
        names += ["temporaries, MB", "of the weights without Mimi"]
        rows = []
        for setting, costs in self.costs.items():
            weights = 4 * self.checkpoints[setting.size].parameters
            for cost in costs:
                seconds = [f"{value:.2f}" for value in (*cost.stages.values(), sum(cost.stages.values()))]
                memory = cost.temporary_bytes
                rows.append([setting, cost.program, *seconds, f"{memory / 1e6:,.2f}", f"{memory / weights:.2%}"])
        return "Compilation of the prompt (`start`) and of the loop (`advance`):\n\n" + table(names, rows)

    def fresh_processes(self) -> str:
        names = ["side", "processes", "first frame after, s, min", "median", "model loaded after, s, median"]
        names += ["tracing, s", "lowering, s", "XLA, s", "longest programs, s", "peak RSS, GB"]
        rows = []
        for kind, results in self.first_calls.items():

            def median(name: str, results: list[dict[str, Any]] = results) -> str:
                return f"{statistics.median(result[name] for result in results):.2f}" if name in results[0] else ""

            least = f"{min(result['seconds'] for result in results):.2f}"
            peak = f"{max(result['peak_bytes'] for result in results) / 1e9:.2f}"
            stages = [median(stage) for stage in ("tracing", "lowering", "XLA")]
            programs = ", ".join(f"{name} {seconds:.1f}" for name, seconds in results[0].get("programs", {}).items())
            times = [least, median("seconds"), median("until loaded")]
            rows.append([KINDS[kind], len(results), *times, *stages, programs, peak])
        return "First frame of a fresh process, 523M (peak after 32 more frames):\n\n" + table(names, rows)


def table(names: list[str], rows: Iterable[list[Any]]) -> str:
    """A table in markdown."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def installed(packages: Iterable[str]) -> list[tuple[str, str]]:
    """Those of ``packages`` that are there, with their versions."""
    found = []
    for package in packages:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
