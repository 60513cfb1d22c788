"""``moshi-flax inspect``: what a checkpoint holds, from its headers, and whether that fits its configuration."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from transformers_moshi_flax.cli.checkpoints import Checkpoint, flax_class
from transformers_moshi_flax.cli.console import report_console, slow
from transformers_moshi_flax.cli.errors import BadCheckpoint, UserMistake
from transformers_moshi_flax.cli.export_contents import inspect_export
from transformers_moshi_flax.cli.headers import open_checkpoint
from transformers_moshi_flax.cli.parts import Part, Tensor, part_tree, readable_bytes, select
from transformers_moshi_flax.runtime.manifest import is_export

SHOWN = 20
"""Most names that a line of the table of misfits lists."""


def inspect(
    source: Annotated[
        str, typer.Argument(metavar="PATH_OR_ID", help="Checkpoint directory, weight file or Hub id, or an export.")
    ],
    part: Annotated[str, typer.Option(help="Show this part alone, such as depth_decoder.layers.0.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every tensor.")] = False,
) -> None:
    """Show what a checkpoint holds, and check that it fits its configuration, without reading the tensors.

    Of an export (of `moshi-flax export`) it shows nodes by kind, inputs, state and types of weights, and checks its
    files. Exit code 1: it does not fit, or its files are damaged.
    """
    if is_export(source):
        if part:
            raise UserMistake("--part: no effect with an export; leave it out")
        inspect_export(Path(source), as_json)
        return
    with slow(f"reading the headers of {source}"):
        checkpoint = open_checkpoint("PATH_OR_ID", source, headers_only=True)
        tensors = tensor_list(checkpoint)
        chosen = select(tensors, part)
        if not chosen:
            parts = sorted({tensor.name.split(".")[0] for tensor in tensors})
            raise UserMistake(f"--part: {source!r} has nothing under {part!r}; its parts are {', '.join(parts)}")
        report = describe(checkpoint, tensors)
    if as_json:
        typer.echo(json.dumps({**report, "tensors": [dataclasses.asdict(tensor) for tensor in chosen]}, indent=2))
    else:
        _show(report, part_tree(chosen))
    if report["fits"] is False:
        raise typer.Exit(1)


def tensor_list(checkpoint: Checkpoint) -> list[Tensor]:
    """What the headers say of every tensor, in the order of the files."""
    return [
        Tensor(name, tuple(tensor.shape), tensor.dtype.name, tensor.nbytes, file.path.name)
        for file in checkpoint.files
        for name, tensor in file.items()
    ]


def describe(checkpoint: Checkpoint, tensors: list[Tensor]) -> dict[str, Any]:
    """All that ``inspect`` tells apart from the tensors themselves, as JSON has it.

    ``fits`` is None where it cannot be told: without a ``config.json``, and for Kyutai's layout.

    Raises:
        UserMistake: the configuration is of another model, or does not make one.
    """
    from transformers_moshi_flax.checkpoints.verifying import file_checksums

    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[tensor.dtype] += tensor.size
    files = [
        {
            "name": file.path.name,
            "tensors": len(file),
            "bytes": sum(tensor.nbytes for tensor in file.values()),
            "format": file.metadata.get("format"),
            "checksums": len(file_checksums(file)),
        }
        for file in checkpoint.files
    ]
    report: dict[str, Any] = {
        "path": checkpoint.name,
        "layout": "kyutai" if checkpoint.is_kyutai else checkpoint.layout,
        "class": None,
        "numbers": dtypes.total(),
        "bytes": sum(file["bytes"] for file in files),
        "dtypes": dict(dtypes.most_common()),
        "quantization": None,
        "files": files,
        "config": {},
        "fits": None,
        "missing": [],
        "unexpected": [],
        "mismatched": [],
        "not_floating": [],
    }
    if checkpoint.is_kyutai:
        return {**report, "quantization": kyutai_quantization_summary(checkpoint)}
    if not checkpoint.config:
        return report

    from transformers_moshi_flax.cli.fitting import fit, fits

    model_class = flax_class("PATH_OR_ID", checkpoint.name, checkpoint.config)
    model = checkpoint.empty_model("PATH_OR_ID", model_class)
    result = fit(model, checkpoint.layout, checkpoint.tensors)
    mismatched = [{"name": name, "found": found, "expected": shape} for name, found, shape in result.mismatched]
    return {
        **report,
        "class": model_class.__name__,
        "quantization": quantization_summary(model),
        "config": config_summary(model.config),
        "fits": fits(result),
        "missing": result.missing,
        "unexpected": result.unexpected,
        "mismatched": mismatched,
        "not_floating": [{"name": name, "found": dtype} for name, dtype in result.not_floating],
    }


def quantization_summary(model: Any) -> dict[str, Any] | None:
    """How the layers of a model are quantized, and how many; None if they are not."""
    from flax.traverse_util import flatten_dict

    from transformers_moshi_flax.nn.linear import SCALES

    quantization = model.quantization
    if quantization is None:
        return None
    layers = sum(path[-1] == SCALES for path in flatten_dict(model.params_shape_tree))
    return {**dataclasses.asdict(quantization), "layers": layers}


def kyutai_quantization_summary(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """As :func:`quantization_summary`, of Kyutai's layout.

    Raises:
        BadCheckpoint: codes without scales, or scales without codes.
    """
    from transformers_moshi_flax.models.moshi.kyutai_quantized_flax_moshi import language_model_tensors

    for file in checkpoint.files:
        try:
            tensors = language_model_tensors(file)
        except ValueError as error:
            raise BadCheckpoint(str(error)) from error
        if tensors.quantization is not None:
            return {**dataclasses.asdict(tensors.quantization), "layers": tensors.number_quantized}
    return None


def config_summary(config: Any, prefix: str = "") -> dict[str, Any]:
    """The fields that decide on the architecture, those of the parts under ``part.field``."""
    from transformers import PreTrainedConfig

    from transformers_moshi_flax.model_card import ARCHITECTURE_FIELDS

    values = {f"{prefix}{name}": getattr(config, name, None) for name in ARCHITECTURE_FIELDS}
    summary = {name: value for name, value in values.items() if isinstance(value, int | float | str)}
    for name, part in vars(config).items():
        if name.endswith("_config") and isinstance(part, PreTrainedConfig):
            summary |= config_summary(part, f"{prefix}{name.removesuffix('_config')}.")
    return summary


def _show(report: dict[str, Any], root: Part) -> None:
    console = report_console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("layout", report["layout"])
    facts.add_row("class", report["class"] or "unknown")
    facts.add_row("numbers", f"{report['numbers']:,}")
    facts.add_row("bytes", f"{report['bytes']:,} ({readable_bytes(report['bytes'])})")
    facts.add_row("types", ", ".join(f"{dtype} ({size:,})" for dtype, size in report["dtypes"].items()))
    if report["quantization"]:
        from transformers_moshi_flax import QuantizationConfig

        fields = dict(report["quantization"])
        what = "matrices" if report["layout"] == "kyutai" else "layers"
        facts.add_row("quantized", f"{fields.pop('layers')} {what}, {QuantizationConfig(**fields)}")
    console.print(facts)

    files = Table("file", "tensors", "bytes", "format", "checksums")
    for file in report["files"]:
        checksums = f"{file['checksums']} of {file['tensors']}" if file["checksums"] else "none"
        format_ = file["format"] or "not said"
        files.add_row(escape(file["name"]), str(file["tensors"]), f"{file['bytes']:,}", format_, checksums)
    console.print(files)

    if report["config"]:
        config = Table("config", "")
        for name, value in report["config"].items():
            config.add_row(name, str(value))
        console.print(config)

    tree = Tree(_line(dataclasses.replace(root, label=report["path"])))
    _grow(tree, root)
    console.print(tree)

    if report["fits"] is None:
        console.print(f"not checked against a config: {_no_check(report)}")
    elif report["fits"]:
        console.print(f"fits {report['class']} and its config")
    else:
        misfits = Table("does not fit", "", title=f"{report['class']} by config.json", title_justify="left")
        for kind in ("missing", "unexpected", "mismatched", "not_floating"):
            texts = [entry if isinstance(entry, str) else _misfit(entry) for entry in report[kind]]
            more = [f"and {len(texts) - SHOWN} more (--json has all)"] if len(texts) > SHOWN else []
            if texts:
                misfits.add_row(kind.replace("_", " "), escape("\n".join([*texts[:SHOWN], *more])))
        console.print(misfits)


def _no_check(report: dict[str, Any]) -> str:
    return "Kyutai's layout has none of ours" if report["layout"] == "kyutai" else "there is no config.json"


def _misfit(entry: dict[str, Any]) -> str:
    expected = entry.get("expected", "floating-point")
    return f"{entry['name']}: {entry['found']}, by the config {expected}"


def _grow(tree: Tree, part: Part) -> None:
    for child in part.parts:
        _grow(tree.add(_line(child)), child)


def _line(part: Part) -> str:
    alike = f" ({part.alike} alike)" if part.alike > 1 else ""
    shape = "" if part.shape is None else f" {part.shape}"
    numbers = f"{part.size:,} numbers, {readable_bytes(part.nbytes)}, {' '.join(part.dtypes)}"
    return f"[bold]{escape(part.label)}[/bold]{alike}{escape(shape)}  [dim]{numbers}[/dim]"
