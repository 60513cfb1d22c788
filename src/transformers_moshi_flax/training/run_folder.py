"""The folder of a run: what is in it, and the export of a checkpoint from it.

- ``config.yaml``: the whole configuration; ``starts.jsonl``: versions and git state, a line for every start.
- ``model/``: configuration and tokenizer of the model; ``frozen/``: the weights that are not trained, written once.
- ``checkpoints/``: see :mod:`~transformers_moshi_flax.training.run_checkpoints`; ``damaged/``: those found damaged.
- ``metrics.jsonl``, ``tensorboard/``, ``samples/step-N/``; ``export/``: the model after the last step, and in
  ``exported_step`` the number of that.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .. import __version__
from ..checkpoints.companions import copy_companions, sentencepiece_model
from ..checkpoints.configs import load_config
from ..checkpoints.files import Source
from ..checkpoints.replacing import remove_folder, whole_checkpoint
from ..checkpoints.writing import atomic_file, write_text
from ..generation.configuration import load_generation_config
from ..modeling_flax_utils import FlaxPreTrainedModel
from ..models.moshi import FlaxMoshiForConditionalGeneration
from ..quantization.tree import is_quantized
from .adapter import TrainedAdapter
from .configuration import (
    Configuration,
    ConfigurationError,
    changes_of_the_run,
    load_configuration,
    to_yaml,
)
from .run_checkpoints import DAMAGED, PARAMS, DamagedCheckpointError, RunCheckpoints
from .scanned_layers import unstack_layers
from .train_state import merge_params

CONFIGURATION = "config.yaml"
_LOCK, _EXPORTED = ".lock", "exported_step"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


class RunFolder:
    """The folder of a run.

    Attributes:
        path: absolute.
    """

    configuration_class: type[Configuration] | None = None

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).resolve()

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def frozen(self) -> Path:
        """Where the weights lie that are not trained."""
        return self.path / "frozen"

    @property
    def model(self) -> Path:
        """Where configuration and tokenizer of the model lie."""
        return self.path / "model"

    @property
    def export(self) -> Path:
        """Where the model of the last step is exported to."""
        return self.path / "export"

    def has_checkpoints(self) -> bool:
        """Whether a run has written checkpoints here, be they damaged."""
        found = [*self.checkpoints.glob("*"), *(self.path / DAMAGED).glob("*")]
        return any(entry.name.isdecimal() for entry in found)

    def configuration(self) -> Any:
        """What the run was started with.

        Raises:
            ConfigurationError: the folder has no configuration that can be read.
        """
        return load_configuration(self.path / CONFIGURATION, kind=self.configuration_class)

    def check(self, config: Configuration) -> None:
        """Make sure that a run of ``config`` can begin or go on here.

        Raises:
            ConfigurationError: the folder has other things in it, or checkpoints of a run that this one cannot go on
                from.
        """
        if not self.path.exists():
            return
        name = f"`run.output_dir`: {str(self.path)!r}"
        if not self.path.is_dir():
            raise ConfigurationError(f"{name} is a file; name a folder")
        if not (self.path / CONFIGURATION).exists():
            ours = (_LOCK, f".{CONFIGURATION}.")  # a run that was killed may have left no more than these
            others = [entry.name for entry in self.path.iterdir() if not entry.name.startswith(ours)]
            if others:
                raise ConfigurationError(f"{name} has other things in it ({sorted(others)[0]}); name an empty folder")
        elif self.has_checkpoints():
            changes = changes_of_the_run(self.configuration(), config)
            if changes:
                raise ConfigurationError(
                    f"{name} has a run that was started with other values ({'; '.join(changes)}); "
                    "give it those to go on, or another folder to begin anew"
                )

    def begin_anew(self, config: Configuration) -> None:
        """Write down the configuration, and remove what a run has left that had no checkpoints, or lost them.

        Its model and frozen weights, which may be others, and its export. The configuration comes first: with it in
        place, the folder is known to be of a run at whatever point this one is killed.
        """
        write_text(self.path / CONFIGURATION, to_yaml(config))
        (self.path / _EXPORTED).unlink(missing_ok=True)
        for folder in (self.export, self.frozen, self.model):
            remove_folder(folder)

    def begin(self, config: Configuration, step: int) -> None:
        """Write down the configuration, and with what the run is started at ``step``."""
        write_text(self.path / CONFIGURATION, to_yaml(config))
        start = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, **environment()}
        with open(self.path / "starts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")

    def model_class(self, source: Source) -> type[FlaxPreTrainedModel]:
        """The class of the model that lies at ``source``, or in :attr:`model`; ValueError if the run has none."""
        return FlaxMoshiForConditionalGeneration

    def keep_model(self, model: FlaxPreTrainedModel, source: Source | None) -> None:
        """Write down the configuration of the model, and copy its tokenizer and the like, if it comes from files."""
        self.model.mkdir(exist_ok=True)
        if source is not None:
            copy_companions(source, self.model)
            if tokenizer := sentencepiece_model(source):
                with atomic_file(self.model / "tokenizer.model") as path:
                    path.write_bytes(tokenizer.read_bytes())
        generation_config: Any = model.generation_config
        write_text(self.model / "generation_config.json", generation_config.to_json_string(use_diff=True))
        write_text(self.model / "config.json", model.config.to_json_string(use_diff=True))

    def load_model(self, **fields: Any) -> FlaxPreTrainedModel:
        """The model of :meth:`keep_model`, without parameters.

        Args:
            **fields: such as ``dtype``.
        """
        source = Source.locate(self.model)
        model_class = self.model_class(source)
        model = model_class(load_config(model_class.known_configs(), source), _do_init=False, **fields)
        model.generation_config = load_generation_config(source.read_json("generation_config.json") or {})
        return model

    def exported_step(self) -> int | None:
        """After which step the model in :attr:`export` was written; None if there is none."""
        path = self.path / _EXPORTED
        return int(path.read_text("utf-8")) if path.exists() and self.export.is_dir() else None

    def set_exported_step(self, step: int) -> None:
        """Write down that :attr:`export` has the model after ``step``."""
        write_text(self.path / _EXPORTED, f"{step}\n")

    def lock(self) -> AbstractContextManager[None]:
        """For as long as the context lasts, no other process can train here.

        Raises:
            ConfigurationError: another one does.
        """
        return _Lock(self.path)

    def freezes(self) -> bool:
        """Whether there are weights that are not trained."""
        return True

    def restore_frozen(self, target: Any = None) -> Any:
        """The weights that are not trained, none if all are.

        Args:
            target: as of :meth:`RunCheckpoints.restore`; by default NumPy arrays are restored.

        Raises:
            DamagedCheckpointError: they are damaged or missing.
        """
        if not self.freezes():
            return {}
        if not self.frozen.is_dir():
            raise DamagedCheckpointError(f"{self.frozen} is not there; {self._remedy()}")
        frozen = RunCheckpoints(self.frozen, read_only=True)
        try:
            target = frozen.host_target(0, PARAMS) if target is None else target
            return frozen.restore(0, {PARAMS: target}).arrays[PARAMS]
        except (OSError, ValueError) as error:
            raise DamagedCheckpointError(f"{error}; {self._remedy()}") from error
        finally:
            frozen.close()

    def _remedy(self) -> str:
        return (
            "it has the weights that are not trained: bring a copy of it back, or remove "
            f"{self.checkpoints} (and {DAMAGED}/ beside it) to begin anew"
        )

    def adapter(self) -> TrainedAdapter | None:
        """What the run trains instead of the model, None if it is the model."""
        config = self.configuration()
        adapter = getattr(config, "adapter", None)
        if adapter is None or adapter.r is None:
            return None
        return TrainedAdapter(config, self.load_model())

    def write_export(self, params: dict[str, Any], folder: Path, to_pt: bool = False) -> None:
        """Write a checkpoint that ``from_pretrained`` loads; it is there whole, tokenizer and all, or not at all.

        Args:
            params: of the whole model, layers unstacked.
            folder: where to. A checkpoint that is there is replaced, of whatever layout; other files stay.
            to_pt: for the PyTorch classes of ``transformers``.
        """
        with whole_checkpoint(folder) as fresh:
            copy_companions(Source.locate(self.model), fresh)
            model = self.load_model()
            if model.quantization is not None and not is_quantized(params):
                model = type(model)(model._config_with(None), _do_init=False)
            model.save_pretrained(fresh, params=params, to_pt=to_pt)


def export_checkpoint(
    run: str | os.PathLike,
    destination: str | os.PathLike,
    step: int | None = None,
    best: bool = False,
    to_pt: bool = False,
    dtype: DTypeLike | None = None,
    merges: bool = False,
) -> int:
    """Write a checkpoint of a run as a directory that ``from_pretrained`` loads, or ``load_adapter``.

    Args:
        run: the folder of the run, which may be going on.
        destination: the directory to write.
        step: which checkpoint; the latest one by default.
        best: the one with the lowest held-out metric instead.
        to_pt: for the PyTorch classes of ``transformers``.
        dtype: of the weights, as trained (float32) by default.
        merges: of a run that trains an adapter: write the model with the adapter in its weights, not the adapter.

    Returns:
        The step of the checkpoint.

    Raises:
        ConfigurationError: ``run`` is not the folder of a run.
        DamagedCheckpointError: the checkpoint is damaged.
        ValueError: there is no such checkpoint; ``step`` and ``best`` are both given; ``merges`` without an adapter,
            or an adapter ``to_pt``, whose files are PyTorch's anyway.
    """
    if step is not None and best:
        raise ValueError("`step` and `best` are both given; leave one out")
    folder = open_run(run)
    config = folder.configuration()
    adapter = folder.adapter()
    if merges and adapter is None:
        raise ValueError("`merges`: the run trains no adapter; leave it out")
    if to_pt and adapter is not None and not merges:
        raise ValueError("`to_pt`: an adapter's files are those of PyTorch anyway; leave it out, or merge it")
    step, trained = _restore_trained(folder, config.run.best_metric, step, best)
    params = merge_params(trained, folder.restore_frozen())
    if config.model.scan_layers:
        params = unstack_layers(params)
    if adapter is not None and not merges:
        adapter.write(params, Path(destination), dtype)
        return step
    if adapter is not None:
        params = adapter.merged(params)
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    folder.write_export(params, Path(destination), to_pt)
    return step


def open_run(path: str | os.PathLike) -> RunFolder:
    """The folder of a run, of whatever is trained."""
    folder = RunFolder(path)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        content = (folder.path / CONFIGURATION).read_text("utf-8")
        if "\nquantizer:" in content:
            from .codec.run_folder import CodecRunFolder

            return CodecRunFolder(path)
        if content.startswith("task: text\n"):
            from .text.run_folder import TextRunFolder

            return TextRunFolder(path)
        if content.startswith("task: speech_text\n"):
            from .speech_text.run_folder import SpeechTextRunFolder

            return SpeechTextRunFolder(path)
    return folder


def environment() -> dict[str, Any]:
    """Versions and git state: what else than the configuration a run depends on."""
    versions: dict[str, str | None] = {
        "transformers_moshi_flax": __version__,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"versions": versions, "git": git_state(Path(__file__).parent), "platform": platform.platform()}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, and whether files differ from it, of the repository that has the files of ``folder``; None if none."""

    def git(*command: str) -> str:
        result = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        if not git("ls-files", "."):
            return None  # an installed package in somebody's repository
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


class _Lock(AbstractContextManager):
    """The lock goes with the process, however it ends."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = open(folder / _LOCK, "w")

    def __enter__(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigurationError(
                f"`run.output_dir`: {str(self._folder)!r} is where another process is training; wait for it to end"
            ) from error

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _restore_trained(folder: RunFolder, best_metric: str, step: int | None, best: bool) -> tuple[int, Any]:
    """The step of the checkpoint that was asked for, and its trained parameters as NumPy arrays.

    A run that goes on may remove a checkpoint while it is read, but has written another one by then: where none was
    asked for by its step, that is read.
    """
    failed = None
    while True:
        if not folder.checkpoints.is_dir():
            raise ValueError(f"{str(folder.path)!r} has no checkpoints yet; wait for the first")
        checkpoints = RunCheckpoints(folder.checkpoints, best_metric=best_metric, read_only=True)
        chosen: int | None = step
        try:
            if best:
                chosen = checkpoints.best_step()
                if chosen is None:
                    raise ValueError(
                        f"`best` of {str(folder.path)!r}: no checkpoint has held-out metrics; give a step"
                    )
            elif step is None:
                chosen = max(checkpoints.steps(), default=None)
                if chosen is None:
                    raise ValueError(f"{str(folder.path)!r} has no checkpoints yet; wait for the first")
            else:
                chosen = step
            target = checkpoints.host_target(chosen, PARAMS)
            return chosen, checkpoints.restore(chosen, {PARAMS: target}).arrays[PARAMS]
        except Exception:  # Orbax has many for files that vanish
            if chosen in (step, failed):
                raise
            failed = chosen
        finally:
            checkpoints.close()
