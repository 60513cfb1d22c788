"""What ``moshi-flax inspect`` tells of an export."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from transformers_moshi_flax.cli.console import report_console, slow
from transformers_moshi_flax.cli.errors import BadCheckpoint, UserMistake
from transformers_moshi_flax.cli.parts import readable_bytes
from transformers_moshi_flax.runtime.manifest import BadExport, problem_of, read_manifest

FACTS = ("package_version", "license", "opset", "quantization", "batch_size", "context", "sampling")


def inspect_export(folder: Path, as_json: bool) -> None:
    """Prints what an export holds.

    Raises:
        UserMistake: ONNX is not installed.
        BadCheckpoint: the manifest is damaged, or of another version.
        Exit: with code 1, if files are missing or damaged.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise UserMistake("PATH_OR_ID: exports need onnx; install transformers-moshi-flax[onnx]") from error
    with slow(f"reading {folder}"):
        try:
            report = describe(folder)
        except BadExport as error:
            raise BadCheckpoint(f"PATH_OR_ID: {error}") from error
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report, report_console())
    if not report["ok"]:
        raise typer.Exit(1)


def describe(folder: Path) -> dict[str, Any]:
    """All that is told of an export, as JSON has it. Graphs whose files are damaged are left out of ``steps``.

    Raises:
        BadExport: the manifest is damaged, or of another version.
    """
    manifest = read_manifest(folder)
    files = [
        {"name": name, "bytes": wanted["bytes"], "problem": problem_of(folder, manifest, name)}
        for name, wanted in manifest["files"].items()
    ]
    damaged = {file["name"] for file in files if file["problem"]}
    steps = {
        name: _described(folder / step["file"], step)
        for name, step in manifest["steps"].items()
        if step["file"] not in damaged
    }
    dtypes: Counter[str] = Counter()
    for step in steps.values():
        dtypes.update(step["dtypes"])
    return {
        "path": str(folder),
        **{name: manifest[name] for name in FACTS},
        "bytes": sum(file["bytes"] for file in files),
        "dtypes": dict(dtypes.most_common()),
        "steps": steps,
        "files": files,
        "ok": not damaged,
    }


def _described(path: Path, step: dict[str, Any]) -> dict[str, Any]:
    """What a graph holds: nodes by kind, bytes of weights by dtype, inputs and state."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    dtypes: Counter[str] = Counter()
    for tensor in graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        dtypes[dtype.name] += math.prod(tensor.dims) * dtype.itemsize
    return {
        "nodes": dict(Counter(node.op_type for node in graph.node).most_common()),
        "dtypes": dict(dtypes.most_common()),
        "inputs": step["inputs"],
        "outputs": step["outputs"],
        "state": {
            "arrays": len(step["state"]),
            "bytes": sum(math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize for entry in step["state"]),
        },
    }


def _show(report: dict[str, Any], console: Console) -> None:
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name in FACTS:
        if name != "sampling":
            facts.add_row(name.replace("_", " "), str(report[name]))
    numbers = ", ".join(f"{name} {number:.4g}" for name, number in report["sampling"].items())
    facts.add_row("sampling", numbers or "none: greedy")
    facts.add_row("weights", _bytes(report["dtypes"]))
    console.print(facts)
    for name, step in report["steps"].items():
        table = Table(name, "")
        counts = ", ".join(f"{kind} {count}" for kind, count in step["nodes"].items())
        table.add_row("nodes", f"{sum(step['nodes'].values())}: {counts}")
        table.add_row("weights", _bytes(step["dtypes"]))
        for kind in ("inputs", "outputs"):
            told = [f"{key} {tuple(tensor['shape'])} {tensor['dtype']}" for key, tensor in step[kind].items()]
            table.add_row(kind, "\n".join(map(escape, told)))
        table.add_row("state", f"{step['state']['arrays']} arrays, {readable_bytes(step['state']['bytes'])}")
        console.print(table)
    files = Table("file", "bytes", "checksum")
    for file in report["files"]:
        verdict = f"[red]{file['problem']}[/red]" if file["problem"] else "ok"
        files.add_row(escape(file["name"]), f"{file['bytes']:,}", verdict)
    console.print(files)


def _bytes(dtypes: dict[str, int]) -> str:
    return ", ".join(f"{dtype} {readable_bytes(size)}" for dtype, size in dtypes.items())
