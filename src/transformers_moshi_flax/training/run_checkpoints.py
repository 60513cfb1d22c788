"""Checkpoints of a run, by Orbax, with checksums of ours: Orbax restores flipped bits without a word.

A checkpoint is a folder named by its step. Orbax writes it in the background, under a temporary name. When all is
written, a manifest with the size and CRC-32 of every file is added, and then the folder gets its name: a checkpoint
that has a name is whole, and one whose files do not fit its manifest has been damaged since.

What the held-out data say of a checkpoint is known later: it is written before they are evaluated, and gets a file of
metrics, with a checksum of its own, when they are.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from ..checkpoints.writing import write_text

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
DAMAGED = "damaged"
"""Beside the folder of the checkpoints; what does not fit its manifest is moved there."""

WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""Orbax adds these, times and a note of success, after the manifest; they say nothing of the arrays."""

PARAMS, REST = "params", "rest"
"""The arrays of a checkpoint: the trained parameters, and what else it takes to go on."""

METRICS_FILE = "metrics.json"
"""What the held-out data say of a checkpoint, if they were evaluated."""

_PROGRESS, _METRICS = "progress", "metrics"


class DamagedCheckpointError(ValueError):
    """A checkpoint's files are not what was written; names the files."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint that has been read.

    Attributes:
        step: when it was written.
        arrays: the trees that were asked for, by name.
        progress: what else was given to :meth:`RunCheckpoints.save`.
    """

    step: int
    arrays: dict[str, Any]
    progress: dict[str, Any]


class RunCheckpoints:
    """The checkpoints in a folder; all processes of a run make the same calls.

    Args:
        folder: absolute; made if it is not there. What an interrupted save has left in it is removed.
        max_to_keep: how many of the latest are kept when another one has been written.
        best_metric: the one with the lowest value of it is kept as well.
        read_only: nothing is written, moved or removed.
    """

    def __init__(self, folder: Path, max_to_keep: int = 1, best_metric: str = "loss", read_only: bool = False):
        self.folder = folder
        self._read_only = read_only
        self._best_metric = best_metric
        self._saving: int | None = None
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
        else:
            self._move_away([step for step in self._steps_on_disk() if self._is_damaged(step, _METRICS)])
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_LatestAndBest(max_to_keep, self._best_of),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
                save_root_metadata=False,
            )
        handlers = {name: ocp.StandardCheckpointHandler() for name in (PARAMS, REST)}
        handlers[_PROGRESS] = ocp.JsonCheckpointHandler()
        with _without_chatter():
            self._manager = ocp.CheckpointManager(folder, options=options, item_handlers=handlers)
        # looked at again only where another process may write
        self._metrics = {} if read_only else {step: read_metrics(folder / str(step)) for step in self._steps_on_disk()}
        self._max_to_keep = max_to_keep

    def _best_of(self, steps: Iterable[int]) -> int | None:
        """The step with the lowest metric; None if none has metrics."""
        known = {step: found[self._best_metric] for step in steps if (found := self._metrics.get(step))}
        return min(known, key=known.__getitem__, default=None)

    def save(
        self,
        step: int,
        params: Any,
        rest: Any,
        progress: Mapping[str, Any],
    ) -> None:
        """Write a checkpoint in the background; waits for the one before, and for the arrays to be copied.

        Args:
            step: its number; there must be no checkpoint of it.
            params, rest: trees of arrays; ``rest`` may be None.
            progress: what JSON can hold.

        Raises:
            OSError: the save before this one failed, as on a full disk.
        """
        self.wait()
        self._saving = step
        items = {PARAMS: ocp.args.StandardSave(params)}
        if rest is not None:
            items[REST] = ocp.args.StandardSave(rest)
        args = ocp.args.Composite(**items, **{_PROGRESS: ocp.args.JsonSave(dict(progress))})
        with _without_chatter(), self._failures():
            self._manager.save(step, args=args, force=True)

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write down what the held-out data say of a checkpoint, which tells the best one; waits for its save.

        Checkpoints that are neither among the latest nor the best one now are removed.

        Args:
            step: of the checkpoint.
            metrics: finite numbers.

        Raises:
            OSError: the disk is full, or a save has failed.
        """
        self.wait()
        if jax.process_index() == 0:
            write_text(self.folder / str(step) / METRICS_FILE, _with_checksum(metrics))
        self._metrics[step] = dict(metrics)
        steps = self.steps()
        for old in set(steps) - {*steps[-self._max_to_keep :], self._best_of(steps)}:
            self._manager.delete(old)

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            OSError: one has failed.
        """
        with self._failures():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish what is under way and stop the threads; raises as :meth:`wait`."""
        with self._failures():
            self._manager.close()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """What Orbax raises of a disk that is full, depending on which of its files it was writing, is an OSError."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()
            raise OSError(
                f"{self.folder}: the checkpoint of step {self._saving} cannot be written; those before it are kept: "
                f"{reason[0] if reason else type(error).__name__}"
            ) from error

    def steps(self) -> list[int]:
        """Which checkpoints there are, in order; waits for the one that is being written."""
        self.wait()
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Which has the lowest metric; None if none has metrics."""
        steps = self.steps()
        if self._read_only:
            self._metrics = {step: read_metrics(self.folder / str(step)) for step in steps}
        return self._best_of(steps)

    def restore_latest(self, targets: Mapping[str, Any]) -> Restored | None:
        """Read the latest checkpoint that is whole; damaged ones are reported and moved out of the way.

        Args:
            targets: the trees to read, :data:`PARAMS` or :data:`REST`, each with a ``jax.ShapeDtypeStruct`` in the
                place of every array, and the sharding that it is to have; or with NumPy arrays of those shapes, for
                NumPy arrays.

        Returns:
            None if there is no checkpoint.

        Raises:
            DamagedCheckpointError: there are checkpoints, and all are damaged.
        """
        damaged: list[int] = []
        for step in reversed(self.steps()):
            if not self._is_damaged(step):
                self._move_away(damaged)
                if damaged:
                    self._manager.reload()
                return self._read(step, targets)
            damaged.append(step)
        set_aside = self.folder.parent / DAMAGED
        if damaged or set_aside.exists():
            raise DamagedCheckpointError(
                f"no checkpoint in {self.folder} is whole; bring a copy back, or remove that folder"
                f"{f' and {set_aside}' if set_aside.exists() else ''} to begin anew"
            )
        return None

    def restore(self, step: int, targets: Mapping[str, Any]) -> Restored:
        """Read one checkpoint; ``targets`` as of :meth:`restore_latest`.

        Raises:
            DamagedCheckpointError: it is damaged.
            ValueError: there is none of this step.
        """
        self._require(step)
        return self._read(step, targets)

    def host_target(self, step: int, name: str) -> Any:
        """A target for a tree, :data:`PARAMS` or :data:`REST`, of a checkpoint, to be restored as NumPy arrays.

        Raises:
            DamagedCheckpointError, ValueError: as :meth:`restore`.
        """
        self._require(step, f"{name}/_METADATA")
        metadata = self._manager.item_metadata(step)[name].tree
        return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), metadata)

    def _require(self, step: int, prefix: str = "") -> None:
        """Raises unless there is a checkpoint, of which the files whose paths begin with ``prefix`` are whole."""
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise ValueError(f"{self.folder} has no checkpoint of step {step}; there are: {there}")
        if problems := self._problems(step, prefix):
            found = "; ".join(problems)
            raise DamagedCheckpointError(f"checkpoint {self.folder / str(step)} is damaged ({found}); use another one")

    def _read(self, step: int, targets: Mapping[str, Any]) -> Restored:
        args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        read = self._manager.restore(step, args=ocp.args.Composite(**args, **{_PROGRESS: ocp.args.JsonRestore()}))
        return Restored(step, {name: read[name] for name in targets}, read[_PROGRESS])

    def _steps_on_disk(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdecimal())

    def _write_manifest(self) -> None:
        """Runs in Orbax's thread of the first process, between the last write and the renaming."""
        written = [path for path in self.folder.glob(f"{self._saving}.*") if path.is_dir()]
        if len(written) != 1:
            raise OSError(f"{self.folder}: no folder of the checkpoint of step {self._saving} that is being written")
        write_text(written[0] / MANIFEST, json.dumps(_checksums(written[0]), indent=1) + "\n")

    def _problems(self, step: int, prefix: str = "") -> list[str]:
        """As :func:`find_damage`; the first process reads the files for all."""
        problems = find_damage(self.folder / str(step), prefix) if jax.process_index() == 0 else []
        if jax.process_count() > 1:
            damaged = bool(multihost_utils.broadcast_one_to_all(np.asarray(bool(problems))))
            if damaged and not problems:
                return ["as the first process says"]
        return problems

    def _is_damaged(self, step: int, prefix: str = "") -> bool:
        """Whether a checkpoint is damaged; it is reported."""
        problems = self._problems(step, prefix)
        if problems and jax.process_index() == 0:
            logger.error("checkpoint %s is damaged and not used: %s", self.folder / str(step), "; ".join(problems))
        return bool(problems)

    def _move_away(self, steps: list[int]) -> None:
        if not steps or self._read_only:
            return
        if jax.process_index() == 0:
            target = self.folder.parent / DAMAGED
            target.mkdir(exist_ok=True)
            for step in steps:
                shutil.rmtree(target / str(step), ignore_errors=True)
                os.rename(self.folder / str(step), target / str(step))
                logger.error("it lies in %s now; the checkpoint before it is used", target / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints moved away")


@dataclass(frozen=True)
class _LatestAndBest(policies.PreservationPolicy):
    """Orbax asks it, when a save begins, what is kept once that is written."""

    latest: int
    best_of: Callable[[Iterable[int]], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-self.latest :], self.best_of(steps)}
        return [step in kept for step in steps]


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """No warning of Orbax's that a folder is opened for reading."""
    orbax_log = logging.getLogger("absl")
    orbax_log.addFilter(_is_of_interest)
    try:
        yield
    finally:
        orbax_log.removeFilter(_is_of_interest)


def _is_of_interest(record: logging.LogRecord) -> bool:
    return "read only" not in record.getMessage()


def _with_checksum(metrics: Mapping[str, float]) -> str:
    text = json.dumps(dict(metrics))
    return json.dumps({"metrics": dict(metrics), "crc32": f"{zlib.crc32(text.encode()):08x}"}) + "\n"


def read_metrics(checkpoint: Path) -> dict[str, float] | None:
    """What the held-out data say of a checkpoint; None if they were not evaluated, or that is damaged."""
    try:
        content = json.loads((checkpoint / METRICS_FILE).read_bytes())
        metrics = content["metrics"]
        return metrics if _with_checksum(metrics) == json.dumps(content) + "\n" else None
    except FileNotFoundError:
        earlier = checkpoint / _METRICS / _METRICS  # where Orbax wrote them, along with the rest
        with contextlib.suppress(OSError, ValueError):
            return json.loads(earlier.read_bytes()) if not find_damage(checkpoint, f"{_METRICS}/") else None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def find_damage(checkpoint: Path, prefix: str = "") -> list[str]:
    """What does not fit the manifest of a checkpoint, each as a sentence that begins with the file; empty if whole.

    Args:
        checkpoint: its folder.
        prefix: only files whose path in the folder begins with it are read.
    """
    try:
        expected = json.loads((checkpoint / MANIFEST).read_bytes())
        files = {name: sum_ for name, sum_ in expected.items() if name.startswith(prefix)}
    except (OSError, ValueError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    try:
        found = _checksums(checkpoint, prefix)
    except OSError as error:
        return [f"{error.filename} cannot be read ({error.strerror})"]
    problems = []
    if METRICS_FILE.startswith(prefix) and (checkpoint / METRICS_FILE).exists() and read_metrics(checkpoint) is None:
        problems.append(f"{METRICS_FILE} is not what was written")
    problems += [f"{name} is missing" for name in sorted(files.keys() - found.keys())]
    problems += [f"{name} is not of this checkpoint" for name in sorted(found.keys() - files.keys())]
    for name in sorted(files.keys() & found.keys()):
        if files[name] != found[name]:
            problems.append(f"{name} has {found[name]}, written were {files[name]}")
    return problems


def _checksums(folder: Path, prefix: str = "") -> dict[str, str]:
    """Size and CRC-32 of the files that a manifest has, by their paths in the folder."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    skipped = (MANIFEST, METRICS_FILE, *WRITTEN_LAST)
    files = {name: path for name, path in paths.items() if name.startswith(prefix) and name not in skipped}
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(files, pool.map(_checksum, files.values())))


def _checksum(path: Path) -> str:
    value, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
            size += len(block)
    return f"{size} bytes, CRC-32 {value:08x}"
