"""ONNX Runtime for web pages, as npm has it: the files of it that a page needs, in the one version that was tried."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""SHA-512 of the package's archive."""
WASM = "ort-wasm-simd-threaded.wasm"
FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
"""What a page needs of it, and the SHA-256 of each."""
SECONDS = 600
"""That npm may take."""


def copy_runtime(folder: Path, given: Path | None = None) -> None:
    """Copies the files of ONNX Runtime for web pages.

    Args:
        folder: where to; it is there.
        given: an installed package (``node_modules/onnxruntime-web``); None asks npm for it, by npm's own settings.

    Raises:
        ValueError: ``given`` is not the package, or not its version; npm is not installed, or has not got it.
    """
    if given is not None:
        _copy(Path(given), folder)
        return
    with tempfile.TemporaryDirectory() as scratch:
        archive = _packed(Path(scratch))
        with tarfile.open(archive) as opened:
            opened.extractall(scratch, filter="data")
        _copy(Path(scratch) / "package", folder)


def _packed(scratch: Path) -> Path:
    """The archive that npm has of the package."""
    npm = shutil.which("npm")
    remedy = f"give a directory with {PACKAGE} {VERSION} as `onnxruntime_web`"
    if npm is None:
        raise ValueError(f"npm is not installed, which {PACKAGE} comes from: install it, or {remedy}.")
    command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--prefer-offline", "--silent", "--pack-destination", str(scratch)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS, cwd=scratch)
        (archive,) = scratch.glob("*.tgz")
    except (subprocess.SubprocessError, ValueError) as error:
        said = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise ValueError(f"npm has not got {PACKAGE} {VERSION} ({said}): try again, or {remedy}.") from error
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != INTEGRITY:
        raise ValueError(f"what npm has as {PACKAGE} {VERSION} has another checksum than was published: {remedy}.")
    return archive


def _copy(package: Path, folder: Path) -> None:
    described = package / "package.json"
    found = json.loads(described.read_text("utf-8")) if described.is_file() else {}
    if found.get("name") != PACKAGE or found.get("version") != VERSION:
        what = f"{found.get('name')} {found.get('version')}" if found else "no package"
        raise ValueError(
            f"`onnxruntime_web` is {str(package)!r}, which is {what}: give the directory of {PACKAGE} {VERSION}, such "
            f"as node_modules/{PACKAGE} after `npm install {PACKAGE}@{VERSION}`."
        )
    for name, wanted in FILES.items():
        path = package / "dist" / name
        if not path.is_file() or hashlib.sha256(content := path.read_bytes()).hexdigest() != wanted:
            raise ValueError(f"{str(path)!r} is missing or damaged: install {PACKAGE} {VERSION} again.")
        (folder / name).write_bytes(content)
