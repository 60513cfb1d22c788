"""``moshi-flax train``: train Moshi, a language model or a speech-language model, as a YAML file says."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from transformers_moshi_flax.cli.compilation_cache import use_compilation_cache
from transformers_moshi_flax.cli.errors import FailedRun, InterruptedRun, UserMistake

EXTRA = 'pip install "transformers-moshi-flax[train]"'
PACKAGES = ("grain", "orbax.checkpoint", "yaml")
"""What training cannot do without, as it is imported."""


def check_extra() -> None:
    """Raises :class:`UserMistake` where a package of the extra ``train`` is not installed."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserMistake(f"training needs {package}, which is not installed: {EXTRA}") from error


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; docs/training.md has an example.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of CONFIG.")
    ] = None,
) -> None:
    """Train as CONFIG says. A run that was interrupted goes on when it is started again.

    SIGTERM and SIGINT (Ctrl-C) write a checkpoint first, if there are steps to keep; a second one ends the run at
    once. Exit codes: 0 all steps are made; 1 the run cannot go on (steps that are not finite, checkpoints that are all
    damaged, a full disk, a process of data.workers that was killed); 2 a mistake in what was given; 130 after SIGINT,
    143 after SIGTERM.
    """
    check_extra()
    from transformers_moshi_flax.training.configuration import ConfigurationError, load_configuration
    from transformers_moshi_flax.training.data.loading import WorkerError
    from transformers_moshi_flax.training.run_checkpoints import DamagedCheckpointError
    from transformers_moshi_flax.training.trainer import Interrupted, NotFiniteError, make_trainer

    use_compilation_cache()
    try:
        make_trainer(load_configuration(config, assignments or ())).train()
    except ConfigurationError as error:
        raise UserMistake(str(error)) from error
    except (DamagedCheckpointError, NotFiniteError, WorkerError, OSError) as error:
        raise FailedRun(str(error)) from error
    except Interrupted as interruption:
        raise InterruptedRun(str(interruption), interruption.signal) from interruption
