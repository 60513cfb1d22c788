"""What a run tells while it goes on: a progress bar, ``metrics.jsonl``, TensorBoard, Weights & Biases.

A line of ``metrics.jsonl`` is an object with ``step``, ``split`` (``train`` or ``evaluation``) and the metrics. When a
run goes on from a checkpoint, the lines of the steps after it are dropped, since these steps are made again. The line
of an evaluation is also the record that it has been made, where the checkpoint was written before it.
"""

from __future__ import annotations

import importlib
import json
import math
import uuid
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..checkpoints.writing import write_text
from .configuration import ConfigurationError

METRICS = "metrics.jsonl"
SHOWN = ("loss", "perplexity", "text_loss", "audio_loss", "log_mel", "si_sdr", "stoi", "word_accuracy", "usage")
"""Which metrics of an evaluation are shown to people."""

EXTRA = 'pip install "transformers-moshi-flax[train]"'


def check_packages(tensorboard: bool, wandb_project: str | None) -> None:
    """Raises :class:`ConfigurationError` where a log is wanted whose package is not installed."""
    for wanted, key, package, remedy in (
        (tensorboard, "tensorboard", "tensorboardX", EXTRA),
        (wandb_project is not None, "wandb_project", "wandb", "pip install wandb"),
    ):
        if wanted:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ConfigurationError(
                    f"`run.{key}`: the package {package} is not installed; leave it out, or {remedy}"
                ) from error


class RunLog:
    """The logs of one process that logs (the first one); use as a context.

    Args:
        folder: of the run.
        steps: how many the run has.
        first_step: how many it has made; later lines of an earlier attempt are dropped.
        config: what the run is configured with, for Weights & Biases.
        tensorboard: also log to ``tensorboard/`` in the folder.
        wandb_project: also log to this project of Weights & Biases.
        notes: where the progress is shown; the standard error by default. It is a bar on a terminal, and lines
            elsewhere.
        counts: what the speed is told in.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        first_step: int = 0,
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        notes: Console | None = None,
        counts: str = "frames",
    ):
        self._counts = counts
        self._notes = Console(stderr=True, highlight=False) if notes is None else notes
        self._steps = steps
        self._writer = self._wandb = None
        if tensorboard:
            module = importlib.import_module("tensorboardX")
            self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        if wandb_project is not None:
            module = importlib.import_module("wandb")
            self._wandb = module.init(
                project=wandb_project, id=_run_id(folder), resume="allow", dir=str(folder), config=dict(config or {})
            )
        drop_lines_after(folder / METRICS, first_step)
        self._file = open(folder / METRICS, "a", encoding="utf-8")
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self._bar = Progress(*columns, console=self._notes, disable=not self._notes.is_terminal)
        self._task = self._bar.add_task("training", total=steps, completed=first_step, note="")

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error[0] is None else 1)

    def settle(self) -> None:
        """Before the process ends without :meth:`__exit__`: show the cursor again, and write what is held back."""
        self._bar.stop()
        if self._writer is not None:
            self._writer.flush()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line for people."""
        self._notes.print(text, soft_wrap=True, markup=False)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step of training.

        ``loss`` is shown, and the speed if ``frames_per_second`` (or of what else is counted) and ``steps_per_second``
        are among the metrics.
        """
        self._write(step, "train", metrics)
        note = f"loss {metrics['loss']:.4f}"
        if "steps_per_second" in metrics:
            left = timedelta(seconds=round((self._steps - step) / metrics["steps_per_second"]))
            note += f"  {metrics[f'{self._counts}_per_second']:.0f} {self._counts}/s  {left} left"
        self._bar.update(self._task, completed=step, note=note)
        if not self._notes.is_terminal:
            self.say(f"step {step}/{self._steps}  {note}")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of the held-out data, and show the losses."""
        self._write(step, "evaluation", metrics)
        losses = "  ".join(f"{name} {metrics[name]:.4f}" for name in SHOWN if name in metrics)
        self.say(f"evaluation at step {step}  {losses}")

    def _write(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        # JSON has no NaN
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in ((name, value) for name, value in finite.items() if value is not None):
                self._writer.add_scalar(f"{split}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{split}/{name}": value for name, value in metrics.items()}, step=step)


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of later steps, and what is no line, from ``metrics.jsonl``, if it is there."""
    if not path.exists():
        return
    text = path.read_text("utf-8", errors="replace")
    kept = "".join(f"{line}\n" for line in text.splitlines() if _step_of(line) <= step)
    if kept != text:
        write_text(path, kept)


def has_evaluation(path: Path, step: int) -> bool:
    """Whether ``metrics.jsonl`` has an evaluation of that step."""
    if not path.exists():
        return False
    lines = path.read_text("utf-8", errors="replace").splitlines()
    return any(json.loads(line).get("split") == "evaluation" for line in lines if _step_of(line) == step)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that was being written when the run was killed


def _run_id(folder: Path) -> str:
    """The name of the run for Weights & Biases, the same whenever it goes on."""
    path = folder / "wandb_id"
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text("utf-8")
