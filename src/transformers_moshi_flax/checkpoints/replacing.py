"""Replacing a directory, or the checkpoint in one, such that nothing of the old one is left and no half of the new."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .companions import COMPANIONS, SENTENCEPIECE
from .files import MARKERS
from .writing import TEMPORARY, lock_folder, sync_all

CONFIG = "config.json"
"""Without it, no layout's files are a checkpoint."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.msgpack", "*.msgpack.index.json", "pytorch_model*.bin*")
# an adapter beside weights is applied to them by transformers: it must not outlive the weights that it was made for
_ADAPTER = ("adapter_config.json",)
_CHECKPOINT = (CONFIG, "mimi_config*.json", MARKERS, TEMPORARY, *COMPANIONS, *SENTENCEPIECE, *_WEIGHTS, *_ADAPTER)
"""Files of a checkpoint of any layout."""

_STAGED = ".replacement-"


@contextmanager
def whole_checkpoint(folder: Path) -> Iterator[Path]:
    """A new directory to write a checkpoint in, which replaces that in ``folder`` when the block ends without error.

    Of the old checkpoint nothing is left, whatever its layout; files that are part of none stay. Whoever looks at
    ``folder`` finds the old checkpoint until the new one is on the disk, and then takes over all at once, as with
    :func:`whole_folder`. A directory that cannot be renamed (a mounted disk, the current directory, one in a
    directory that is not ours to write) or has others in it is filled instead; it has no ``config.json`` meanwhile.

    Args:
        folder: where to; it need not be there yet. A link is followed.
    """
    folder = folder.resolve()
    if _can_be_renamed(folder):
        with whole_folder(folder, keeps=lambda path: not _is_of_checkpoint(path)) as fresh:
            yield fresh
        return
    leftovers = list(folder.glob(f"{_STAGED}*"))
    with _staged(folder / f"{_STAGED}{uuid.uuid4().hex}") as staged:
        yield staged
        sync_all(staged)
        (folder / CONFIG).unlink(missing_ok=True)
        sync_all(folder, deep=False)
        for path in folder.iterdir():
            if path.is_file() and _is_of_checkpoint(path):
                path.unlink()
        for path in sorted(staged.iterdir(), key=lambda path: path.name == CONFIG):
            if path.name == CONFIG:  # the commit
                sync_all(folder, deep=False)
            os.replace(path, folder / path.name)
    for path in leftovers:
        _remove_unless_locked(path)
    sync_all(folder, deep=False)


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A new directory to write in, whose files take the places of those of their names when the block ends without
    error: each at once, when all are on the disk. Other files stay; links are replaced, not written through.

    Args:
        folder: where to; made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    leftovers = list(folder.glob(f"{_STAGED}*"))
    with _staged(folder / f"{_STAGED}{uuid.uuid4().hex}") as staged:
        yield staged
        sync_all(staged)
        for path in [path for path in sorted(staged.rglob("*")) if path.is_file()]:
            place = folder / path.relative_to(staged)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    for path in leftovers:
        _remove_unless_locked(path)
    sync_all(folder, deep=False)


def _can_be_renamed(folder: Path) -> bool:
    if not folder.exists():
        return True
    within = folder == Path.cwd() or folder in Path.cwd().parents
    others = any(path.is_dir() and not path.is_symlink() for path in folder.iterdir())
    return not (within or others or os.path.ismount(folder)) and os.access(folder.parent, os.W_OK)


def _is_of_checkpoint(path: Path) -> bool:
    return any(path.match(pattern) for pattern in _CHECKPOINT)


@contextmanager
def whole_folder(folder: Path, keeps: Callable[[Path], bool] = lambda path: False) -> Iterator[Path]:
    """A new directory to write in, which takes the place of ``folder`` when the block ends without an error.

    Whoever looks at ``folder`` finds what was there before, for two system calls nothing, and then all that was
    written, whenever the process is killed. What one that was killed has left beside it is removed, or comes to its
    place where it was complete.

    Args:
        folder: if it is there, it is removed with all that is in it. A link is followed, also to another disk.
        keeps: which files of it are in the new one too, unless the block has written such.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(folder)
    scratch = _beside(folder)
    with _staged(scratch) as staged:
        try:
            yield staged
            sync_all(staged)
            if folder.exists():
                for path in folder.iterdir():
                    if not (staged / path.name).exists() and keeps(path):
                        _link(path, staged / path.name)
                shutil.copymode(folder, staged)
                sync_all(staged, deep=False)
                os.rename(folder, scratch / "replaced")
            os.rename(staged, folder)
        finally:
            if not folder.exists() and (scratch / "replaced").exists():
                os.rename(scratch / "replaced", folder)
    sync_all(folder.parent, deep=False)


@contextmanager
def _staged(scratch: Path) -> Iterator[Path]:
    """A directory in ``scratch`` to write in; both are gone when the block ends."""
    staged = scratch / "new"
    staged.mkdir(parents=True)
    with lock_folder(scratch):  # not that of the checkpoint itself, which a save locks
        try:
            yield staged
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a directory, if it is there, such that no part of it is left under its name; a link is followed."""
    folder = folder.resolve()
    if folder.exists():
        leaving = _beside(folder)
        os.rename(folder, leaving)
        shutil.rmtree(leaving)


def _link(path: Path, target: Path) -> None:
    """The same file under another name, or a copy where the disk has no such thing."""
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, target, follow_symlinks=False)


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")


def _clear_leftovers(folder: Path) -> None:
    """What processes that were killed have left beside a directory; those that are at work hold a lock."""
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.{'[0-9a-f]' * 32}.tmp"):
        if path.is_dir():
            _remove_unless_locked(path, folder)


def _remove_unless_locked(path: Path, folder: Path | None = None) -> None:
    """Remove what is left of a replacement; of one whose last step was missing, do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder is not None and not folder.exists() and (path / "replaced").exists() and (path / "new").exists():
            os.rename(path / "new", folder)
        shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
