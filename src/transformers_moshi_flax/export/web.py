"""A page that a Moshi lives in: the folder of a site without a server, of what ``web/`` has and an export."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ..checkpoints.replacing import whole_folder
from ..models.moshi.streaming_flax_moshi import samples_per_frame
from .folder import check_unused, checked, export_onnx
from .onnxruntime_web import PACKAGE, WASM, copy_runtime

WEB = resources.files("transformers_moshi_flax") / "web"
RATE, FRAME_SIZE = 24_000, 1920
"""Of the sound of a page."""
SILENCE = 50
"""Frames after a question, in which Moshi answers."""

MODEL, MODULE, QUESTION = "model", "moshi-onnx", "question.pcm"
FOR_NPM = ("package.json", "README.md")
INDEX, BOOT, SERVICE_WORKER = "index.html", "boot.js", "service_worker.js"


def export_web(
    model: Any,
    folder: str | os.PathLike,
    source: str | os.PathLike | None = None,
    onnxruntime_web: str | os.PathLike | None = None,
    notice: str | None = None,
    question: Float[np.ndarray, "samples"] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes a page that holds dialogues with a Moshi where it is opened: files for any host of files.

    Args:
        model: a ``FlaxMoshiForConditionalGeneration`` in float32 with the whole of Mimi, at 24 kHz.
        folder: where to; not there yet, or empty. It gets its name when it is complete.
        source: a checkpoint, directory or Hub id, whose tokenizer and licence go along.
        onnxruntime_web: an installed package ``onnxruntime-web``; without, npm is asked for it.
        notice: what the page says of the model.
        question: mono at 24 kHz in [-1, 1], which a button plays to the model; without, there is no such button.
        **options: of :func:`export_onnx`, but for ``batch_size``.

    Returns:
        The manifest of the export, which is in ``model`` in the folder.

    Raises:
        ValueError: as :func:`export_onnx`; a model at another rate; onnxruntime-web cannot be had, or is another one.
        OSError: something cannot be read or written.
    """
    folder = Path(folder)
    check_unused(folder)
    if "batch_size" in options:
        raise ValueError("`batch_size` is not an option of a page, which holds one dialogue: leave it out.")
    codec = checked(model).config.audio_encoder_config
    found = (codec.sampling_rate, samples_per_frame(codec), codec.audio_channels)
    if found != (RATE, FRAME_SIZE, 1):
        raise ValueError(
            f"`model` has frames of {found[1]} samples at {found[0]} Hz in {found[2]} channel(s), but the page has "
            f"{FRAME_SIZE} at {RATE} Hz in one: export it with `export_onnx`."
        )
    with whole_folder(folder) as fresh:
        (fresh / PACKAGE).mkdir()
        copy_runtime(fresh / PACKAGE, None if onnxruntime_web is None else Path(onnxruntime_web))
        manifest = export_onnx(model, fresh / MODEL, source, batch_size=1, **options)
        for part, place in (("page", ""), ("shared", ""), ("js", MODULE), (PACKAGE, PACKAGE)):
            (fresh / place).mkdir(exist_ok=True)
            for file in (WEB / part).iterdir():
                if file.name not in FOR_NPM:
                    (fresh / place / file.name).write_bytes(file.read_bytes())
        if question is not None:
            samples = np.clip(np.round(question * 32768), -32768, 32767).astype("<i2")
            (fresh / QUESTION).write_bytes(samples.tobytes())
        _describe(fresh, manifest, notice)
    return manifest


def _describe(folder: Path, manifest: dict[str, Any], notice: str | None) -> None:
    """Writes the checksums of all files into the page and into what keeps them for offline use."""
    runtime = folder / PACKAGE / WASM
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SERVICE_WORKER)
    sums = {path.relative_to(folder).as_posix(): integrity(path) for path in files}
    of_model = {f"{MODEL}/{name}" for name in manifest["files"]}
    looked_at_when_read = {INDEX, runtime.relative_to(folder).as_posix(), *of_model}
    site = {
        "notice": notice,
        "question": {"file": QUESTION, "silence": SILENCE} if (folder / QUESTION).exists() else None,
        "kept": round(sum(path.stat().st_size for path in files) / 1e6),
        "code": {name: digest for name, digest in sums.items() if name not in looked_at_when_read},
        "runtime": {
            "file": runtime.relative_to(folder).as_posix(),
            "bytes": runtime.stat().st_size,
            "sha256": hashlib.sha256(runtime.read_bytes()).hexdigest(),
            "model": sum(file["bytes"] for file in manifest["files"].values()),
        },
    }
    index = (folder / INDEX).read_text("utf-8")
    # "<" would end the element that it stands in
    told = json.dumps(site).replace("<", "\\u003c")
    index = index.replace('id="site">{}', f'id="site">{told}')
    # by another address, as browsers may not ask again for what they have of an older page
    boot = f"{BOOT}?{hashlib.sha256(sums[BOOT].encode()).hexdigest()[:8]}"
    index = index.replace(f'src="{BOOT}"', f'src="{boot}" integrity="{sums[BOOT]}"')
    (folder / INDEX).write_text(index, "utf-8")
    sums[INDEX] = integrity(folder / INDEX)
    version = hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]
    worker = folder / SERVICE_WORKER
    kept = json.dumps({"version": version, "files": sums})
    worker.write_text(f"const SITE = {kept};\n{worker.read_text('utf-8')}", "utf-8")


def integrity(path: Path) -> str:
    """The SHA-256 of a file, as browsers compare it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()}"
