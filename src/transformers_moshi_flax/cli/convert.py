"""``moshi-flax convert``: checkpoints from one layout to another."""

from __future__ import annotations

import enum
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from transformers_moshi_flax.cli.checkpoints import Dtype, check_source, find_config, flax_class
from transformers_moshi_flax.cli.console import slow
from transformers_moshi_flax.cli.errors import UserMistake, as_mistake, hub_errors


class Layout(enum.StrEnum):
    """Layouts a checkpoint may be written in."""

    flax = "flax"
    pt = "pt"
    kyutai = "kyutai"
    mlx = "mlx"
    candle = "candle"


class Quantization(enum.StrEnum):
    """Kinds of quantized weights, and none."""

    int8 = "int8"
    int4 = "int4"
    nf4 = "nf4"
    none = "none"


class SourceLayout(enum.StrEnum):
    """Layouts a checkpoint may be read in."""

    auto = "auto"
    flax = "flax"
    pt = "pt"
    kyutai = "kyutai"


LAYOUT_NAMES = {
    Layout.flax: "Flax",
    Layout.pt: "PyTorch",
    Layout.kyutai: "Kyutai's",
    Layout.mlx: "Kyutai's MLX",
    Layout.candle: "Kyutai's candle",
}
PACKAGES = {Layout.kyutai: "moshi", Layout.mlx: "mlx", Layout.candle: "candle"}
"""Of Kyutai, that load what is written."""
QUANTIZATIONS = {
    Layout.flax: [*Quantization],
    Layout.pt: [Quantization.none],
    Layout.kyutai: [Quantization.int8, Quantization.none],
    Layout.mlx: [Quantization.int8, Quantization.int4, Quantization.none],
    Layout.candle: [Quantization.int8, Quantization.none],
}
"""What a layout has."""
WITH_GROUPS = (Quantization.int4, Quantization.nf4)
"""Kinds whose weights share scales in groups."""
FROM_PT = {SourceLayout.auto: None, SourceLayout.flax: False, SourceLayout.pt: True}


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint directory, weight file or Hub id.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    from_: Annotated[
        SourceLayout,
        typer.Option("--from", help="Layout to read; auto takes Flax or PyTorch, pt also opens pickles (*.bin)."),
    ] = SourceLayout.auto,
    to: Annotated[Layout, typer.Option(help="Layout to write.")] = Layout.flax,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights. Default: the checkpoint's.")] = None,
    quantize: Annotated[
        Quantization | None,
        typer.Option(help="Quantize the linear layers; none turns quantized ones into floats. Default: as in SRC."),
    ] = None,
    double_quantization: Annotated[
        bool,
        typer.Option("--double-quantization", help="With --quantize int4 or nf4: the scales in 8 bits as well."),
    ] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(help="The most a weight file may hold, such as 500MB. Default: 5GB.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Also upload DST to this repository (owner/name).")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: make REPO private; refused if it is public.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in DST.")] = False,
) -> None:
    """Write the checkpoint SRC to the directory DST in the layout of Flax, PyTorch, Kyutai or its MLX."""
    _check_destination(source, destination, overwrite)
    _check_quantization(to, quantize, double_quantization)
    _check_options(to, max_shard_size, push_to_hub, private)
    model_class = _class_to_load(source, from_)
    if to in PACKAGES and not hasattr(model_class, "save_kyutai"):
        raise UserMistake(f"--to {to}: that layout is of whole Moshi models, {source!r} is a {model_class.__name__}")
    with as_mistake(f"SRC: cannot load {source!r}", *hub_errors(), ValueError), slow(f"loading {source}"):
        options: dict[str, Any] = {"dtype": dtype and dtype.to_jax()}
        if quantize not in (None, Quantization.none):
            options["quantization"] = _quantization(quantize, double_quantization, to)
        if from_ is SourceLayout.kyutai:
            model = model_class.from_kyutai(source, **options)
        else:
            model = model_class.from_pretrained(source, from_pt=FROM_PT[from_], **options)
        if quantize is Quantization.none:
            model.dequantize()
    with as_mistake(f"DST: cannot write {str(destination)!r}", OSError, ValueError), slow(f"writing {destination}"):
        tokenizer, from_kyutai = _tokenizer(source, from_), from_ is SourceLayout.kyutai
        written = _write(model, source, destination, to, max_shard_size, tokenizer, from_kyutai)
    quantized = f", {model.quantization}" if model.quantization else ""
    typer.echo(f"{destination}: {model_class.__name__} in {LAYOUT_NAMES[to]} layout{quantized}", err=True)
    if push_to_hub is not None:
        _upload(model, destination, written, push_to_hub, private)


def _quantization(kind: Quantization, double: bool, to: Layout) -> Any:
    """What is asked for, as the layout has it."""
    if to not in PACKAGES:
        from transformers_moshi_flax import QuantizationConfig

        return QuantizationConfig(kind.value, double_quantization=double)
    from transformers_moshi_flax.models.moshi import kyutai_flax_moshi

    grids = kyutai_flax_moshi.PACKAGES[PACKAGES[to]].values()
    return next(grid for grid in grids if grid.kind == kind.value)


def _class_to_load(source: str, layout: SourceLayout) -> type[Any]:
    if layout is SourceLayout.kyutai:
        check_source("SRC", source)
        from transformers_moshi_flax import FlaxMoshiForConditionalGeneration

        return FlaxMoshiForConditionalGeneration
    from transformers_moshi_flax.checkpoints.files import Source
    from transformers_moshi_flax.checkpoints.recognising import foreign, is_foreign_config

    check_source("SRC", source, files=True)
    config = find_config("SRC", source)
    if known := foreign(Source.locate(source), config) if not config or is_foreign_config(config) else None:
        raise UserMistake(f"SRC: {source!r} has no config.json of a model of ours: it {known}")
    if not config or config.keys().isdisjoint(("architectures", "model_type")):
        raise UserMistake(
            f"SRC: {source!r} has no config.json that names a model; give a checkpoint that has one, or --from kyutai "
            "for the files that Kyutai published"
        )
    return flax_class("SRC", source, config)


def _check_destination(source: str, destination: Path, overwrite: bool) -> None:
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    if destination.resolve() == folder.resolve():
        raise UserMistake(f"DST: {str(destination)!r} is where SRC lies; give another directory")
    if destination.exists() and not destination.is_dir():
        raise UserMistake(f"DST: {str(destination)!r} is a file; give a directory")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise UserMistake(f"DST: {str(destination)!r} is not empty; give another directory, or --overwrite")


def _check_quantization(to: Layout, quantize: Quantization | None, double: bool) -> None:
    if quantize is not None and quantize not in QUANTIZATIONS[to]:
        raise UserMistake(f"--quantize {quantize}: not with --to {to}, a layout without such weights; leave out --to")
    if double and quantize not in WITH_GROUPS:
        raise UserMistake("--double-quantization: the scales of groups; give --quantize int4 or nf4, or leave it out")
    if double and to is not Layout.flax:
        raise UserMistake(f"--double-quantization: not with --to {to}, a layout without such scales; leave out --to")
    if to is Layout.candle and quantize is Quantization.int8:
        from transformers_moshi_flax.checkpoints.writing import check_gguf

        with as_mistake(f"--to {to}", ValueError):
            check_gguf("model.q8.gguf")


def _check_options(to: Layout, max_shard_size: str | None, push_to_hub: str | None, private: bool) -> None:
    if private and push_to_hub is None:
        raise UserMistake("--private: no effect without --push-to-hub; leave it out, or give a repository")
    if to in PACKAGES:
        for option, value in (("--max-shard-size", max_shard_size), ("--push-to-hub", push_to_hub)):
            if value is not None:
                raise UserMistake(f"{option}: not with --to {to}, whose layout has neither shards nor a model card")
    if max_shard_size is not None:
        from transformers_moshi_flax.checkpoints.writing import shard_bytes

        with as_mistake("--max-shard-size", ValueError):
            shard_bytes(max_shard_size)
    if push_to_hub is not None:
        from huggingface_hub.utils import validate_repo_id

        with as_mistake(f"--push-to-hub: {push_to_hub!r} is no name of a repository", ValueError):
            validate_repo_id(push_to_hub)
        if private:
            from transformers_moshi_flax.checkpoints.uploading import Repository

            # before the hours that a conversion may take
            with as_mistake(f"--push-to-hub: cannot upload to {push_to_hub!r}", *hub_errors(), ValueError):
                Repository.look_up(push_to_hub, private=True)


def _tokenizer(source: str, layout: SourceLayout) -> Path | None:
    """The SentencePiece model of a checkpoint, if it has one."""
    if layout is SourceLayout.kyutai:
        from transformers_moshi_flax.models.moshi.kyutai_flax_moshi import find_kyutai_files

        return find_kyutai_files(source).tokenizer
    from transformers_moshi_flax.checkpoints.companions import sentencepiece_model
    from transformers_moshi_flax.checkpoints.files import Source

    return sentencepiece_model(Source.locate(source))


def _save_processor(source: str, folder: Path) -> None:
    """Write what ``prepare`` and the processor read, and Kyutai's files do not have; its lack spoils no weights."""
    from transformers_moshi_flax import MoshiProcessor

    try:
        MoshiProcessor.from_kyutai(source).save_pretrained(folder)
    except ValueError as error:
        typer.echo(f"no processor is written, which prepare would need: {error}", err=True)


def _write(
    model: Any,
    source: str,
    destination: Path,
    to: Layout,
    max_shard_size: str | None,
    tokenizer: Path | None,
    from_kyutai: bool,
) -> list[str]:
    """Write weights, configurations and what lies beside them, as one; returns the names of the files."""
    from transformers_moshi_flax.checkpoints.companions import copy_companions
    from transformers_moshi_flax.checkpoints.files import Source
    from transformers_moshi_flax.checkpoints.replacing import whole_checkpoint

    with whole_checkpoint(destination) as fresh:
        if to in PACKAGES:
            model.save_kyutai(fresh, tokenizer=tokenizer, package=PACKAGES[to])
        else:
            copy_companions(Source.locate(source), fresh)
            if tokenizer is not None:
                shutil.copyfile(tokenizer, fresh / "tokenizer.model")
            if from_kyutai:
                _save_processor(source, fresh)
            size = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
            model.save_pretrained(fresh, to_pt=to is Layout.pt, **size)
        return sorted(path.name for path in fresh.iterdir())


def _upload(model: Any, folder: Path, files: list[str], repo_id: str, private: bool) -> None:
    problem = f"--push-to-hub: {str(folder)!r} is written, but cannot be uploaded to {repo_id!r}"
    with as_mistake(problem, *hub_errors(), ValueError), slow(f"uploading to {repo_id}"):
        commit = model._upload(folder, files, repo_id, model.params, private=private or None)
    typer.echo(commit.commit_url, err=True)
