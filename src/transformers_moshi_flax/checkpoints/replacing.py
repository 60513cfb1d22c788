"""Saving into a directory that holds a checkpoint, such that nothing of that one's weights is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.msgpack", "*.msgpack.index.json", "pytorch_model*.bin*")


@contextmanager
def replacing_weights(folder: Path) -> Iterator[list[str]]:
    """Remove the weights that are in ``folder`` when the block has saved others without an error.

    A save of ours replaces what we would load. This is for the rest, such as files that Kyutai's format names.

    Args:
        folder: where to; it need not be there yet.

    Yields:
        A list, which has the names of the files that the block has written once it has ended.
    """
    before = _identities(folder)
    written: list[str] = []
    yield written
    after = _identities(folder)
    written += [name for name, identity in after.items() if before.get(name) != identity]
    for name in after.keys() - set(written):
        if any(Path(name).match(pattern) for pattern in WEIGHTS):
            (folder / name).unlink()


def _identities(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file of ``folder`` is replaced, by name."""
    files = folder.glob("*") if folder.is_dir() else ()
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files if path.is_file()}
