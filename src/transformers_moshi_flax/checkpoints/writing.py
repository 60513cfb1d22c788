"""Writing checkpoint files so that a crash leaves the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; what is written there replaces ``path`` when the block ends without error.

    The data are on the disk before the rename, so a power cut cannot leave an empty file under the final name.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        _sync(temporary)
        # safetensors creates files that only the owner can read; follow the umask as any other file does.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], layout: str) -> None:
    """Write tensors as one safetensors file with metadata ``format`` = ``layout``, atomically."""
    # safetensors writes the memory as it lies and would silently scramble a transposed array.
    ordered = {key: np.asarray(tensor, order="C") for key, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(ordered, temporary, metadata={"format": layout})


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
