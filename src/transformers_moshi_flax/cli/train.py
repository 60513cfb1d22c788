"""``moshi-flax train``: fine-tune Moshi as a YAML file says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from transformers_moshi_flax.cli.compilation_cache import use_compilation_cache
from transformers_moshi_flax.cli.errors import FailedRun, InterruptedRun, UserMistake

EXTRA = 'pip install "transformers-moshi-flax[train]"'
PACKAGES = ("yaml", "orbax", "grain", "tensorboardX")
"""What the extra brings, as it is imported."""


@contextmanager
def extra_is_there() -> Iterator[None]:
    """Raises :class:`UserMistake` where the block lacks a package of the extra ``train``."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in PACKAGES:
            raise
        raise UserMistake(f"training needs {error.name}, which is not installed: {EXTRA}") from error


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; docs/training.md has an example.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of CONFIG.")
    ] = None,
) -> None:
    """Train as CONFIG says. A run that was interrupted goes on when it is started again.

    SIGTERM and SIGINT (Ctrl-C) write a checkpoint first; a second one ends the run at once. Exit codes: 0 all steps
    are made; 1 the run cannot go on (steps that are not finite, checkpoints that are all damaged); 2 a mistake in what was
    given; 130 after SIGINT, 143 after SIGTERM.
    """
    with extra_is_there():
        from transformers_moshi_flax.training.configuration import ConfigurationError, load_configuration
        from transformers_moshi_flax.training.run_checkpoints import DamagedCheckpointError
        from transformers_moshi_flax.training.trainer import Interrupted, NotFiniteError, Trainer

        use_compilation_cache()
        try:
            Trainer(load_configuration(config, assignments or ())).train()
        except ConfigurationError as error:
            raise UserMistake(str(error)) from error
        except (DamagedCheckpointError, NotFiniteError) as error:
            raise FailedRun(str(error)) from error
        except Interrupted as interruption:
            raise InterruptedRun(str(interruption), interruption.signal) from interruption
