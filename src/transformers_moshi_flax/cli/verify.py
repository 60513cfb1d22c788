"""``moshi-flax verify``: whether a checkpoint is undamaged, and how it differs from another one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transformers_moshi_flax.cli.checkpoints import Checkpoint, flax_class
from transformers_moshi_flax.cli.comparing import Difference, differences
from transformers_moshi_flax.cli.console import report_console, slow
from transformers_moshi_flax.cli.errors import BadCheckpoint, UserMistake, as_mistake, hub_errors
from transformers_moshi_flax.cli.exports import load_for_export, show_agreement, verified
from transformers_moshi_flax.cli.headers import open_checkpoint
from transformers_moshi_flax.runtime.manifest import is_export

SHOWN = 100
"""Most differences that are printed; ``--json`` has all."""


def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="Checkpoint directory, weight file or Hub id.")],
    b: Annotated[
        str | None, typer.Argument(metavar="[B]", help="Another one, of any layout, or an export of A, to compare.")
    ] = None,
    outputs: Annotated[
        bool, typer.Option("--outputs/--no-outputs", help="With B: also run both on the same inputs, in float32.")
    ] = True,
    audio: Annotated[
        Path | None, typer.Option(help="With an export: what both hear. Default: the embedded question.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every tensor of A for damage (checksums, numbers that are not finite), and compare A with B.

    With an export as B (of `moshi-flax export`), both hold the same dialogue: the tokens that they choose must be the
    same, and logits and audio agree. Exit code 1: something is damaged or differs.
    """
    if is_export(a):
        raise UserMistake(f"A: {a!r} is an export; give the checkpoint first, and it as B")
    if b is not None and is_export(b):
        if not outputs:
            raise UserMistake("--no-outputs: of an export there is nothing else to compare; leave it out")
        _verify_export(a, Path(b), audio, as_json)
        return
    if audio is not None:
        raise UserMistake("--audio: no effect without an export as B; leave it out")
    if b is None and not outputs:
        raise UserMistake("--no-outputs: no effect without B; leave it out or give B")
    report: dict[str, Any] = {"ok": True, "checkpoints": []}
    opened = [_check(option, name, report) for option, name in (("A", a), ("B", b)) if name is not None]
    both = [checkpoint for checkpoint in opened if checkpoint is not None]
    if len(both) == 2:
        _compare(both[0], both[1], outputs, report)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report, report_console())
    if not report["ok"]:
        raise typer.Exit(1)


def _verify_export(a: str, b: Path, audio: Path | None, as_json: bool) -> None:
    report = verified("B", load_for_export("A", a), b, audio)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show_agreement(report, report_console())
    if not report["agrees"]:
        raise typer.Exit(1)


def _check(option: str, name: str, report: dict[str, Any]) -> Checkpoint | None:
    """Check one checkpoint and add what was found to ``report``; None if it cannot even be opened."""
    entry: dict[str, Any] = {"path": name, "layout": None, "tensors": 0, "checksums": 0, "damaged": {}, "error": None}
    report["checkpoints"].append(entry)
    try:
        checkpoint = open_checkpoint(option, name)
        found = damage(checkpoint)
    except BadCheckpoint as error:
        entry["error"] = str(error)
        report["ok"] = False
        return None
    entry |= {"layout": checkpoint.layout, "tensors": len(checkpoint.tensors), **found}
    report["ok"] &= not found["damaged"]
    return checkpoint


def damage(checkpoint: Checkpoint) -> dict[str, Any]:
    """``damaged``, what is wrong with which tensor; and ``checksums``, how many tensors have one.

    Raises:
        BadCheckpoint: the checksums themselves are damaged.
    """
    from transformers_moshi_flax.checkpoints.verifying import file_checksums, tensor_problems

    damaged = {}
    try:
        checksums = sum(len(file_checksums(file)) for file in checkpoint.files)
        with slow(f"checking {checkpoint.name}", len(checkpoint.tensors)) as advance:
            for key, problem in tensor_problems(checkpoint.tensors):
                if problem is not None:
                    damaged[key] = problem
                advance(1)
    except ValueError as error:
        raise BadCheckpoint(str(error)) from error
    return {"checksums": checksums, "damaged": damaged}


def _compare(a: Checkpoint, b: Checkpoint, with_outputs: bool, report: dict[str, Any]) -> None:
    """Compare two checkpoints as what the first one is, and add what was found to ``report``."""
    from transformers_moshi_flax.cli import outputs
    from transformers_moshi_flax.cli.fitting import fit, fit_kyutai, fits

    if not a.config and not a.is_kyutai:
        raise UserMistake(f"A: {a.name!r} has no config.json, so its tensors mean nothing; add it to compare with B")
    kyutai_class = "MoshiForConditionalGeneration"
    of_kyutai = a.is_kyutai or not a.config
    model_class = flax_class("A", a.name, {"architectures": [kyutai_class]} if of_kyutai else a.config or {})
    results = []
    for option, checkpoint in (("A", a), ("B", b)):
        if checkpoint.is_kyutai:
            if model_class.__name__ != f"Flax{kyutai_class}":
                raise UserMistake(f"{option}: {checkpoint.name!r} is a whole Moshi, but the other is another model")
            with as_mistake(f"{option}: cannot read {checkpoint.name!r}", *hub_errors(), ValueError):
                results.append(fit_kyutai(checkpoint.name))
        else:
            model = checkpoint.empty_model(option, model_class)
            results.append(fit(model, checkpoint.layout, checkpoint.tensors))
    paths = len(results[0].params.keys() | results[1].params.keys())
    with slow("comparing", paths) as advance:
        found = list(differences(results[0].params, results[1].params, advance))
    misfits = [
        {"missing": result.missing, "unexpected": result.unexpected, "mismatched": result.mismatched}
        for result in results
    ]
    whole = all(fits(result) for result in results)
    report |= {
        "class": model_class.__name__,
        "differences": [dataclasses.asdict(difference) for difference in found],
        "misfits": None if whole else dict(zip("ab", misfits)),
        "implementations": None,
        "outputs": None,
    }
    report["ok"] &= whole and not found
    if not (with_outputs and whole and outputs.has_outputs(model_class)):
        return
    made = []
    for checkpoint in (a, b):
        with slow(f"running {checkpoint.name}"):
            made.append(outputs.run(checkpoint, model_class))
    compared = outputs.output_differences(*made)
    report["implementations"] = [outputs.implementation(checkpoint, model_class) for checkpoint in (a, b)]
    report["outputs"] = [dataclasses.asdict(difference) for difference in compared]
    report["ok"] &= all(difference.agrees for difference in compared)


def _show(report: dict[str, Any], console: Console) -> None:
    for entry in report["checkpoints"]:
        if entry["error"] is not None:
            console.print(f"[red]damaged[/red]: {escape(entry['error'])}", soft_wrap=True)
            continue
        verdict = f"[red]{len(entry['damaged'])} damaged[/red]" if entry["damaged"] else "none is damaged"
        console.print(
            f"{escape(entry['path'])}: {entry['tensors']} tensors in {entry['layout']} layout, "
            f"{entry['checksums']} with a checksum, {verdict}",
            soft_wrap=True,
        )
        for name, problem in entry["damaged"].items():
            console.print(f"  [bold]{escape(name)}[/bold]: {escape(problem)}", soft_wrap=True)
    if "class" not in report:
        return
    _show_differences([Difference(**fields) for fields in report["differences"]], report, console)
    if report["outputs"] is not None:
        by = dict(zip("AB", report["implementations"]))
        table = Table(f"outputs (A by {by['A']}, B by {by['B']})", "relative difference", "")
        for output in report["outputs"]:
            verdict = "agrees" if output["agrees"] else "[red]differs[/red]"
            table.add_row(output["name"], f"{output['relative']:.1e}", verdict)
        console.print(table)


def _show_differences(found: list[Difference], report: dict[str, Any], console: Console) -> None:
    for side, misfit in (report["misfits"] or {}).items():
        for kind, names in misfit.items():
            if names:
                text = f"{side.upper()}, {kind} for {report['class']}: {names[:SHOWN]}"
                console.print(escape(text), soft_wrap=True)
    if not found:
        if not report["misfits"]:
            console.print(f"the parameters of {report['class']} are the same")
        return
    table = Table("parameter", "differs in", "A", "B", "largest difference", "not finite")
    for difference in found[:SHOWN]:
        largest = difference.max_abs_difference
        table.add_row(
            escape(difference.path),
            difference.kind,
            escape(difference.a or "none"),
            escape(difference.b or "none"),
            "" if largest is None else f"{largest:.3g}",
            str(difference.not_finite or ""),
        )
    console.print(table)
    if len(found) > SHOWN:
        console.print(f"and {len(found) - SHOWN} more (--json has all)")
