"""``moshi_export.json``: what a runtime has to know of an exported model, and whether its files are whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST = "moshi_export.json"
FORMAT = "moshi-export"
FORMAT_VERSION = 1

NEXT = "next."
"""Begins the names of outputs that are the next state."""


class BadExport(ValueError):
    """A folder is no export, or is damaged."""


def is_export(folder: Path | str) -> bool:
    """Whether there is an export in a folder, be it damaged."""
    return (Path(folder) / MANIFEST).is_file()


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The contents of the manifest.

    Raises:
        BadExport: there is none, or it is none of this version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise BadExport(
            f"{str(folder)!r} is no export: it has no {MANIFEST}; write one with `moshi-flax export onnx`."
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BadExport(f"{str(path)!r} is damaged ({error}): export the model again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadExport(f"{str(path)!r} is no manifest of an export.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise BadExport(
            f"{str(folder)!r} is of format version {manifest.get('format_version')!r}, but this runtime reads "
            f"{FORMAT_VERSION}: export the model again, or use the version of the package that wrote it "
            f"({manifest.get('package_version')})."
        )
    return manifest


def check_files(folder: Path | str, manifest: dict[str, Any]) -> None:
    """Compares all files with their checksums.

    Raises:
        BadExport: one is missing, or is not the one that was written.
    """
    for name in manifest["files"]:
        problem = problem_of(folder, manifest, name)
        if problem is not None:
            raise BadExport(f"{str(Path(folder) / name)!r} {problem}: export the model again, or use another copy.")


def problem_of(folder: Path | str, manifest: dict[str, Any], name: str) -> str | None:
    """What is wrong with a file that the manifest names; None if it is the one that was written."""
    path, wanted = Path(folder) / name, manifest["files"][name]
    if Path(name).name != name or not path.is_file():
        return "is missing"
    if path.stat().st_size != wanted["bytes"] or checksum(path) != wanted["sha256"]:
        return "is damaged, it has another checksum"
    return None
