"""What the subcommands share about checkpoints: the embedded one, the files beside the weights, the dtype option."""

from __future__ import annotations

import enum
from importlib import resources
from pathlib import Path
from typing import Any

from transformers_moshi_flax.cli.errors import UserMistake

ASSETS = Path(str(resources.files("transformers_moshi_flax") / "assets"))
EMBEDDED_MODEL = ASSETS / "moshi-tiny-random"
EMBEDDED_CLIP = ASSETS / "user.flac"


class Dtype(enum.StrEnum):
    """Types a model may be loaded in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    def to_jax(self) -> Any:
        """The type as ``jax.numpy`` has it."""
        import jax.numpy as jnp

        return getattr(jnp, self.value)


def read_config(option: str, source: str) -> dict:
    """The contents of ``config.json`` of a directory or Hub id.

    Raises:
        UserMistake: there is no such checkpoint, or its ``config.json`` cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserMistake(f"{option}: {source!r} has no config.json; give the directory of a checkpoint")
    elif path.exists():
        raise UserMistake(f"{option}: {source!r} is a file; give the directory of a checkpoint")
    elif source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserMistake(f"{option}: there is no directory {source!r}; give one, or an id on the Hub (owner/name)")

    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise UserMistake(f"{option}: cannot read the configuration of {source!r} ({error})") from error
    if not config:
        raise UserMistake(f"{option}: {source!r} is no checkpoint directory and no id that the Hub knows")
    return config
