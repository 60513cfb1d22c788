"""Finding damage that opening a file does not show: flipped bits and weights that are not finite.

Safetensors carry no checksums of their own: a flipped bit in the data loads in silence. Checkpoints that this library
writes have the CRC-32 of every tensor in their header (``formats.CHECKSUMS``), at a third of a second a gigabyte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from .formats import CHECKSUMS, ShardedFiles, TensorFile, checksum


def tensor_problems(tensors: TensorFile | ShardedFiles) -> Iterator[tuple[str, str | None]]:
    """Checks tensor after tensor.

    Yields:
        For every tensor its name and what is wrong with it, or None.
    """
    files = tensors.files if isinstance(tensors, ShardedFiles) else (tensors,)
    checksums = [file_checksums(file) for file in files]
    for file, expected in zip(files, checksums):
        for key in file:
            listed = key in tensors or not expected
            yield (
                key,
                _problem(file[key], expected.get(key), file.path.name) if listed else "the index does not list it",
            )
        for key in expected.keys() - set(file):
            yield key, f"it was written to {file.path.name}, but is not there: the file is damaged"
    if isinstance(tensors, ShardedFiles) and tensors.total_size is not None and any(checksums):
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size != tensors.total_size:
            yield tensors.path.name, f"its total_size is {tensors.total_size}, but the tensors it lists have {size}"


def file_checksums(file: TensorFile) -> Mapping[str, str]:
    """The checksums in a file's header, empty if it has none (as files that other programs wrote)."""
    try:
        checksums = json.loads(file.metadata.get(CHECKSUMS, "{}"))
    except ValueError as error:
        raise ValueError(f"{file.path}: the checksums in the header are damaged ({error}); save it again") from error
    if not isinstance(checksums, dict):
        raise ValueError(f"{file.path}: the checksums in the header are damaged; save it again")
    return checksums


def _problem(tensor: np.ndarray, expected: str | None, filename: str) -> str | None:
    if expected is not None and (found := checksum(tensor)) != expected:
        return f"its bytes in {filename} have the checksum {found}, but {expected} was written: the file is damaged"
    if jnp.issubdtype(tensor.dtype, jnp.floating):
        wrong = np.size(tensor) - int(np.isfinite(tensor).sum())
        if wrong:
            return f"{wrong} of its {tensor.size} numbers in {filename} are not finite"
    return None


def refuse_damage(tensors: TensorFile | ShardedFiles) -> None:
    """Raises ``ValueError`` that lists every damaged tensor."""
    problems = [f"{key}: {problem}" for key, problem in tensor_problems(tensors) if problem]
    if problems:
        raise ValueError(f"{tensors.path} is damaged: {'; '.join(problems)}. Download or save it again")
