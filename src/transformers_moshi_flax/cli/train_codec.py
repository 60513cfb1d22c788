"""``moshi-flax train-codec``: train Mimi as a YAML file says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transformers_moshi_flax.cli.compilation_cache import use_compilation_cache
from transformers_moshi_flax.cli.errors import FailedRun, InterruptedRun, UserMistake
from transformers_moshi_flax.cli.train import check_extra


def train_codec(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; docs/codec.md has an example.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of CONFIG.")
    ] = None,
) -> None:
    """Train a codec (Mimi) as CONFIG says. A run that was interrupted goes on when it is started again.

    Signals and exit codes are those of `moshi-flax train`.
    """
    check_extra()
    from transformers_moshi_flax.training.codec.configuration import CodecTrainingConfig
    from transformers_moshi_flax.training.codec.trainer import CodecTrainer
    from transformers_moshi_flax.training.configuration import ConfigurationError, load_configuration
    from transformers_moshi_flax.training.data.loading import WorkerError
    from transformers_moshi_flax.training.run_checkpoints import DamagedCheckpointError
    from transformers_moshi_flax.training.trainer import Interrupted, NotFiniteError

    use_compilation_cache()
    try:
        CodecTrainer(load_configuration(config, assignments or (), CodecTrainingConfig)).train()
    except ConfigurationError as error:
        raise UserMistake(str(error)) from error
    except (DamagedCheckpointError, NotFiniteError, WorkerError, OSError) as error:
        raise FailedRun(str(error)) from error
    except Interrupted as interruption:
        raise InterruptedRun(str(interruption), interruption.signal) from interruption
