"""``moshi-flax export``: a model as graphs that run without JAX."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from transformers_moshi_flax.cli.checkpoints import EMBEDDED_MODEL, name_of
from transformers_moshi_flax.cli.console import report_console, slow
from transformers_moshi_flax.cli.errors import UserMistake, as_mistake
from transformers_moshi_flax.cli.exports import load_for_export, show_agreement, verified
from transformers_moshi_flax.cli.options import (
    DepthTemperature,
    DepthTopK,
    Temperature,
    TopK,
    TopP,
    sampling_options,
)


class Quantization(enum.StrEnum):
    """Kinds of weights, of Moshi's linear layers."""

    none = "none"
    int8 = "int8"


class Format(enum.StrEnum):
    """What a model may be exported to."""

    onnx = "onnx"


def export(
    format_: Annotated[Format, typer.Argument(metavar="FORMAT", help="onnx: graphs for ONNX Runtime.")],
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="[MODEL] DIR",
            help="Checkpoint directory or Hub id (default: the embedded one), and the directory to write.",
        ),
    ],
    context: Annotated[
        int | None, typer.Option(min=1, help="Frames that Moshi looks back. Default: the model's window.")
    ] = None,
    quantization: Annotated[
        Quantization, typer.Option(help="Of the weights of Moshi's linear layers; Mimi's stay float32.")
    ] = Quantization.none,
    batch_size: Annotated[int, typer.Option(min=1, help="Dialogues that go on side by side.")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest text and codes.")] = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    depth_temperature: DepthTemperature = None,
    depth_top_k: DepthTopK = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Hold the export against the model in a dialogue.")
    ] = True,
) -> None:
    """Write a Moshi as ONNX graphs to the directory DIR, for dialogues without JAX, and verify it.

    Numbers of the sampling can be changed when the export runs; whether there is sampling cannot. Exit code 1: the
    export does not agree with the model.
    """
    if len(places) > 2:
        raise UserMistake(f"DIR: {str(places[2])!r} is one too many; give a checkpoint and a directory")
    destination = places[-1]
    source = str(places[0]) if len(places) == 2 else str(EMBEDDED_MODEL)
    sampling = sampling_options(temperature, top_k, top_p, depth_temperature, depth_top_k)
    if greedy and sampling:
        raise UserMistake("--greedy: not with options of sampling; leave one out")
    if greedy:
        sampling = {"do_sample": False, "depth_decoder_do_sample": False}
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserMistake(f"DIR: {str(destination)!r} is there and not empty; give another directory")
    try:
        from transformers_moshi_flax.export import export_onnx
    except ImportError as error:
        raise UserMistake("FORMAT: onnx needs onnx and onnxruntime; install transformers-moshi-flax[onnx]") from error
    model = load_for_export("MODEL", source)
    with as_mistake(f"cannot export {name_of(source)!r}", OSError, ValueError), slow(f"exporting {name_of(source)}"):
        manifest = export_onnx(model, destination, source, batch_size, context, quantization.value, **sampling)
    total = sum(file["bytes"] for file in manifest["files"].values())
    typer.echo(f"{destination}: {total:,} bytes, of {name_of(source)}", err=True)
    if verify:
        report = verified("DIR", model, destination, None)
        show_agreement(report, report_console())
        if not report["agrees"]:
            raise typer.Exit(1)
