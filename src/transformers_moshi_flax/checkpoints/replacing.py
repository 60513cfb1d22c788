"""Saving into a directory that has a checkpoint already, such that what is loaded from it then is the new one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.msgpack", "*.msgpack.index.json", "pytorch_model*.bin*")


@contextmanager
def replacing_weights(folder: Path) -> Iterator[list[str]]:
    """Remove the weights that are in ``folder``, of any layout, when the block has saved others without an error.

    Weights of another layout would be what is loaded, or what other programs load.

    Args:
        folder: where to; it need not be there yet.

    Yields:
        A list, which has the names of the files that the block has written once it has ended.
    """
    before = _identities(folder)
    written: list[str] = []
    with _quiet():
        yield written
    after = _identities(folder)
    written += [name for name, identity in after.items() if before.get(name) != identity]
    for name in after.keys() - set(written):
        if any(Path(name).match(pattern) for pattern in WEIGHTS):
            (folder / name).unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of weights in another layout that lie in the directory: they are about to go."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _identities(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file of ``folder`` is replaced, by name."""
    files = folder.glob("*") if folder.is_dir() else ()
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files if path.is_file()}
