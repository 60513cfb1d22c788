"""``moshi-flax export``: a model as graphs that run without JAX."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from transformers_moshi_flax.cli.audio import read_audio
from transformers_moshi_flax.cli.checkpoints import EMBEDDED_MODEL, EMBEDDED_QUESTION, NOTICE, is_embedded, name_of
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
    web = "web"


def export(
    format_: Annotated[
        Format, typer.Argument(metavar="FORMAT", help="onnx: graphs for ONNX Runtime. web: a page around them.")
    ],
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
    onnxruntime_web: Annotated[
        Path | None,
        typer.Option(help="Of web: an installed npm package onnxruntime-web. Default: npm is asked for it."),
    ] = None,
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

    With web, DIR is a page that it lives in, for any host of files: `python -m http.server` will do.

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
    as_page = format_ is Format.web
    if as_page and batch_size != 1:
        raise UserMistake(f"--batch-size: a page holds one dialogue, not {batch_size}; leave it out")
    if onnxruntime_web is not None and not as_page:
        raise UserMistake("--onnxruntime-web: no effect with onnx; leave it out")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserMistake(f"DIR: {str(destination)!r} is there and not empty; give another directory")
    try:
        from transformers_moshi_flax.export import export_onnx, export_web
    except ImportError as error:
        raise UserMistake("FORMAT: this needs onnx and onnxruntime; install transformers-moshi-flax[onnx]") from error
    model = load_for_export("MODEL", source)
    options = {"context": context, "quantization": quantization.value, **sampling}
    with as_mistake(f"cannot export {name_of(source)!r}", OSError, ValueError), slow(f"exporting {name_of(source)}"):
        if as_page:
            manifest = export_web(model, destination, source, onnxruntime_web, **told(source), **options)
        else:
            manifest = export_onnx(model, destination, source, batch_size, **options)
    total = sum(file["bytes"] for file in manifest["files"].values())
    typer.echo(f"{destination}: {total:,} bytes, of {name_of(source)}", err=True)
    if as_page:
        typer.echo(f"python -m http.server --directory {destination} has it at http://localhost:8000", err=True)
    if verify:
        report = verified("DIR", model, destination / "model" if as_page else destination, None)
        show_agreement(report, report_console())
        if not report["agrees"]:
            raise typer.Exit(1)


def told(source: str) -> dict[str, Any]:
    """What a page says and asks of its own, which is known of the embedded checkpoint."""
    if not is_embedded(source):
        return {}
    from transformers_moshi_flax.export.web import RATE

    return {"notice": NOTICE, "question": read_audio(EMBEDDED_QUESTION, RATE)}
