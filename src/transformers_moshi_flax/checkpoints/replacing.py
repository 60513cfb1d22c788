"""Replacing a directory, or the checkpoint in one, such that nothing of the old one is left and no half of the new."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .writing import lock_folder, sync_all

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


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new directory to write in, which takes the place of ``folder`` when the block ends without an error.

    Whoever looks at ``folder`` finds what was there before, for two system calls nothing, and then all that was
    written, whenever the process is killed. What one that was killed has left beside it is removed.

    Args:
        folder: if it is there, it is removed with all that is in it. A link is followed, also to another disk.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    scratch = _beside(folder)
    staged = scratch / "new"
    staged.mkdir(parents=True)
    with lock_folder(scratch):  # not that of the checkpoint itself, which a save locks
        try:
            yield staged
            sync_all(staged)
            if folder.exists():
                os.rename(folder, scratch / "replaced")
            os.rename(staged, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    sync_all(folder.parent, deep=False)


def remove_folder(folder: Path) -> None:
    """Remove a directory, if it is there, such that no part of it is left under its name; a link is followed."""
    folder = folder.resolve()
    if folder.exists():
        leaving = _beside(folder)
        os.rename(folder, leaving)
        shutil.rmtree(leaving)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")


def _remove_leftovers(folder: Path) -> None:
    """What processes that were killed have left beside a directory; those that are at work hold a lock."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 32}.tmp"):
        if path.is_dir():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                continue
            finally:
                os.close(descriptor)
