"""``moshi-flax export-checkpoint``: a checkpoint of a run as one that ``from_pretrained`` loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transformers_moshi_flax.cli.checkpoints import Dtype
from transformers_moshi_flax.cli.console import slow
from transformers_moshi_flax.cli.errors import BadCheckpoint, UserMistake
from transformers_moshi_flax.cli.train import check_extra


def export_checkpoint(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, which may be going on.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    step: Annotated[int | None, typer.Option(min=0, help="Which checkpoint. Default: the latest.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The one with the lowest held-out metric.")] = False,
    to_pt: Annotated[bool, typer.Option("--to-pt", help="In the layout of PyTorch.")] = False,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights. Default: float32, as trained.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="The model with the adapter that was trained in it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in DST.")] = False,
) -> None:
    """Write a checkpoint of the run RUN to DST, with configuration and tokenizer.

    Exit codes: 0 written; 1 the checkpoint is damaged; 2 a mistake in what was given.
    """
    if step is not None and best:
        raise UserMistake("--step, --best: they name two checkpoints; leave one out")
    if not (run / "config.yaml").is_file():
        raise UserMistake(f"RUN: {str(run)!r} is no folder of a run; give run.output_dir of its configuration")
    if destination.exists() and not destination.is_dir():
        raise UserMistake(f"DST: {str(destination)!r} is a file; give a directory")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise UserMistake(f"DST: {str(destination)!r} is not empty; give another directory, or --overwrite")
    check_extra()
    from transformers_moshi_flax.training.run_checkpoints import DamagedCheckpointError
    from transformers_moshi_flax.training.run_folder import export_checkpoint as export

    try:
        with slow(f"writing {destination}"):
            written = export(run, destination, step, best, to_pt, dtype and dtype.to_jax(), merge)
    except DamagedCheckpointError as error:
        raise BadCheckpoint(f"RUN: {error}") from error
    except (OSError, ValueError) as error:
        raise UserMistake(f"RUN: {error}") from error
    is_adapter = not merge and (destination / "adapter_config.json").exists()
    layout = "PEFT's format" if is_adapter else f"{'PyTorch' if to_pt else 'Flax'} layout"
    typer.echo(f"{destination}: step {written} of {run}, in {layout}", err=True)
