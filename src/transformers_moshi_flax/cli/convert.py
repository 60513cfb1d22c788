"""``moshi-flax convert``: checkpoints from PyTorch layout to Flax and back."""

from __future__ import annotations

import enum
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from transformers_moshi_flax.cli.checkpoints import Dtype, read_config
from transformers_moshi_flax.cli.errors import UserMistake, as_mistake

# for checkpoints that do not say their architecture
DEFAULT_ARCHITECTURES = {"moshi": "MoshiForConditionalGeneration", "mimi": "MimiModel"}
# beside the weights; a checkpoint without one of them is whole all the same
COMPANIONS = (
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.msgpack", "*.msgpack.index.json", "pytorch_model*.bin*")


class Layout(enum.StrEnum):
    """Layouts a checkpoint may be written in."""

    flax = "flax"
    pt = "pt"


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint directory or Hub id, either layout.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    to: Annotated[Layout, typer.Option(help="Layout to write.")] = Layout.flax,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights. Default: the checkpoint's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in DST.")] = False,
) -> None:
    """Write the checkpoint SRC to the directory DST in Flax or PyTorch layout."""
    _check_destination(source, destination, overwrite)
    config = read_config("SRC", source)
    model_class = flax_class(source, config)
    with as_mistake(f"SRC: cannot load {source!r}", OSError, ValueError):
        model = model_class.from_pretrained(source, dtype=dtype and dtype.to_jax())
    with as_mistake(f"DST: cannot write {str(destination)!r}", OSError):
        destination.parent.mkdir(parents=True, exist_ok=True)
        # a failure on the way leaves DST as it was
        with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as scratch:
            fresh = Path(scratch)
            model.save_pretrained(fresh, to_pt=to is Layout.pt)
            _copy_companions(source, fresh)
            _replace(destination, fresh)
    typer.echo(f"{destination}: {model_class.__name__} in {'PyTorch' if to is Layout.pt else 'Flax'} layout", err=True)


def flax_class(source: str, config: dict) -> type:
    """The class of this package for the architecture named in a checkpoint's ``config.json``.

    Raises:
        UserMistake: the architecture is none of ours.
    """
    import transformers_moshi_flax

    architectures = config.get("architectures") or [DEFAULT_ARCHITECTURES.get(config.get("model_type"), "unknown")]
    name = architectures[0].removeprefix("Flax")
    if f"Flax{name}" not in transformers_moshi_flax.__all__:
        raise UserMistake(
            f"SRC: {source!r} holds a {name} (model_type {config.get('model_type')!r}), which this package has not; "
            "give a checkpoint of Moshi or Mimi"
        )
    return getattr(transformers_moshi_flax, f"Flax{name}")


def _check_destination(source: str, destination: Path, overwrite: bool) -> None:
    if destination.resolve() == Path(source).resolve():
        raise UserMistake(f"DST: {str(destination)!r} is SRC; give another directory")
    if destination.exists() and not destination.is_dir():
        raise UserMistake(f"DST: {str(destination)!r} is a file; give a directory")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise UserMistake(f"DST: {str(destination)!r} is not empty; give another directory, or --overwrite")


def _copy_companions(source: str, target: Path) -> None:
    from transformers.utils import cached_file

    for name in COMPANIONS:
        if (target / name).exists():
            continue
        found = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        if found is not None:
            shutil.copyfile(found, target / name)


def _replace(destination: Path, fresh: Path) -> None:
    """Move the files of ``fresh`` into ``destination``; weights that lie there in another layout go."""
    destination.mkdir(exist_ok=True)
    for pattern in WEIGHTS:
        for stale in destination.glob(pattern):
            stale.unlink()
    for file in fresh.iterdir():
        file.replace(destination / file.name)
