"""Writing checkpoints so that a crash leaves the old one or the new one, whole, and never a mixture.

A checkpoint is an *entry* (the single weight file, or the index of its shards), the shards that an index names, and
configuration files. A save replaces the entries of its layout, and on demand those of the other, which shares the
configuration files. It goes like this, with the directory locked against other savers:

1. Shards are written under names that no index uses.
2. The new entry is written under a temporary name, then a *marker*, ``.save-<id>.json``: the names and the fingerprint
   of the entry, the entries that it replaces and the contents of the configuration files that belong to it.
3. The entry gets its name. The entries that it replaces are removed, those that are looked for first at the end. The
   commit is the step after which the new entry is the one that is found: the renaming, or the removal of the last
   entry before it.
4. The configuration files are written, the marker is removed, then shards that nothing names.

Before step 3 the marker does not count. From then on until the end of step 4 whoever reads the new entry takes the
configuration from it (``Source.read_json``). The next save first ends one that was interrupted there, or clears what
it left. Every file is on the disk before it gets its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ..input_checks import is_whole
from .files import ENTRIES, MARKERS, PICKLE_INDEX, SHARD, fingerprint, unfinished_save
from .formats import CHECKSUMS, checksum, parse_json
from .rules import FileTensor

TEMPORARY = ".*.tmp"
"""Files that are being written, or were when a process was killed."""


def save_checkpoint(
    folder: Path,
    layout: str,
    entry: str,
    tensors: Sequence[FileTensor],
    max_shard_bytes: int,
    companions: Mapping[str, str],
    replaces: Sequence[str] = ENTRIES,
) -> list[str]:
    """Write weights and configuration files as one commit.

    Args:
        folder: the directory, made if it is not there.
        layout: ``"flax"`` or ``"pt"``.
        entry: name of the single file, whose suffix is the format (``.safetensors`` or ``.msgpack``); shards and their
            index are named after it.
        tensors: what to write; each is built once, and no more than a shard's tensors are held at a time.
        max_shard_bytes: the most that one file may hold; a single tensor above it gets a file of its own.
        companions: configuration files, name -> content.
        replaces: entries that are removed with their shards. Those that stay must be of the same configuration.

    Returns:
        The names of the files that make up the checkpoint.

    Raises:
        OSError: the disk is full, or the directory cannot be written. The old checkpoint is untouched.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        _settle(folder)
        save_id = uuid.uuid4().hex[:8]
        final = entry if len(shards) == 1 else f"{entry}.index.json"
        written: list[Path] = []
        try:
            if len(shards) == 1:
                temporary = _temporary(folder / entry)
                written.append(temporary)
                _write_tensors(temporary, shards[0], layout)
                names = [entry]
            else:
                names = _shard_names(folder, entry, len(shards), save_id)
                weight_map: dict[str, str] = {}
                for name, shard in zip(names, shards):
                    with atomic_file(folder / name) as path:
                        _write_tensors(path, shard, layout)
                    written.append(folder / name)
                    weight_map |= {_index_key(tensor.key, entry): name for tensor in shard}
                total = sum(tensor.nbytes for tensor in tensors)
                index = {"metadata": {"total_size": total}, "weight_map": weight_map}
                temporary = _temporary(folder / final)
                written.append(temporary)
                temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
                names = [*names, final]
            _sync(temporary)
            marker = folder / MARKERS.replace("*", save_id)
            written.append(marker)
            fields = {"entry": final, "temporary": temporary.name, "fingerprint": fingerprint(temporary, final)}
            write_text(marker, json.dumps({**fields, "replaces": list(replaces), "files": companions}))
            os.replace(temporary, folder / final)
        except BaseException:
            if unfinished_save(folder) is None:  # else the entry is in place
                for path in reversed(written):
                    path.unlink(missing_ok=True)
            raise
        _settle(folder)
    return [*names, *companions]


def shard_bytes(max_shard_size: Any) -> int:
    """The bytes that a ``max_shard_size`` says: an integer, or text such as ``"5GB"``, ``"1.5GB"``, ``"2GiB"``.

    Raises:
        ValueError: it is no size, or less than a byte.
    """
    text = str(max_shard_size) if is_whole(max_shard_size) else max_shard_size
    found = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    size = 0
    if found is not None:
        number, prefix, binary = found.groups()
        size = int(Fraction(number) * (1024 if binary else 1000) ** " KMGT".index((prefix or " ").upper()))
    if size < 1:
        raise ValueError(
            f"max_shard_size={max_shard_size!r} is no size of a file; give a number of bytes from 1, or text such as "
            "'500MB', '1.5GB' or '2GiB'"
        )
    return size


_SIZE = re.compile(r"(\d+(?:\.\d+)?)(?:\s*(?:([KMGT])(i?))?B)?", re.ASCII | re.IGNORECASE)


def plan_shards(tensors: Sequence[FileTensor], max_shard_bytes: int) -> list[list[FileTensor]]:
    """Deal tensors, in their order, to as few files as ``max_shard_bytes`` allows; at least one file."""
    shards: list[list[FileTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _shard_names(folder: Path, entry: str, count: int, save_id: str) -> list[str]:
    """The names that ``transformers`` gives, or with the save's id where such files are there already."""
    stem, suffix = entry.split(".", 1)
    names = [f"{stem}-{number:05d}-of-{count:05d}.{suffix}" for number in range(1, count + 1)]
    if any((folder / name).exists() for name in names):
        names = [name.replace(f".{suffix}", f"-{save_id}.{suffix}") for name in names]
    return names


def _index_key(key: str, entry: str) -> str:
    # old transformers writes the paths of msgpack shards with slashes
    return key.replace(".", "/") if entry.endswith(".msgpack") else key


def _write_tensors(
    path: Path, shard: Sequence[FileTensor], layout: str, notes: Mapping[str, str] | None = None
) -> None:
    """Write one weight file under its temporary name."""
    arrays = {tensor.key: tensor.build() for tensor in shard}
    if ".msgpack." in path.name:
        from flax.serialization import msgpack_serialize
        from flax.traverse_util import unflatten_dict

        path.write_bytes(msgpack_serialize(unflatten_dict(arrays, sep=".")))
        return
    checksums = {key: checksum(array) for key, array in arrays.items()}
    try:
        save_file(arrays, path, metadata={**(notes or {}), "format": layout, CHECKSUMS: json.dumps(checksums)})
    except SafetensorError as error:
        raise OSError(f"{path.parent}: cannot write {path.name} ({error}); nothing was replaced") from error
    _follow_umask(path)


def _settle(folder: Path) -> None:
    """End the save whose entry is in place, and clear what those that did not come so far have left behind."""
    save = unfinished_save(folder)
    if save is not None:
        _sync(folder)
        # what is looked for first goes last: until then it is the checkpoint
        for rival in reversed(ENTRIES):
            if rival in save.replaces and rival != save.entry:
                (folder / rival).unlink(missing_ok=True)
        _sync(folder)
        for name, content in save.companions.items():
            write_text(folder / name, content)
    for path in [*folder.glob(MARKERS), *folder.glob(TEMPORARY)]:
        path.unlink(missing_ok=True)
    named = set()
    for index in folder.glob("*.index.json"):
        with contextlib.suppress(ValueError, AttributeError):
            named |= set(parse_json(index.read_bytes()).get("weight_map", {}).values())
    for path in folder.iterdir():
        # saves of ours leave no pickles: those that lie about are somebody's, unless theirs is the index that went
        ours = not path.name.endswith(".bin") or (save is not None and PICKLE_INDEX in save.replaces)
        if ours and SHARD.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)
    _sync(folder)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Waits for other savers of the directory; the lock goes with the process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; what is written there replaces ``path`` when the block ends without error.

    The data are on the disk before the rename, so a power cut cannot leave an empty file under the final name.
    """
    temporary = _temporary(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], layout: str, notes: Mapping[str, str] | None = None
) -> None:
    """Write tensors as one safetensors file with metadata ``format`` = ``layout`` and ``notes``, atomically."""
    shard = [FileTensor(key, array.nbytes, partial(np.asarray, array, order="C")) for key, array in tensors.items()]
    with atomic_file(path) as temporary:
        _write_tensors(temporary, shard, layout, notes)


def check_gguf(name: str) -> None:
    """ValueError if the ``gguf`` package is not installed, which writes the file of this name."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"{name} is a GGUF file, which is written by the package gguf: install the extra (pip install "
            "'transformers-moshi-flax[gguf]')"
        ) from error


def write_gguf(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write tensors as one GGUF file by the ``gguf`` package, atomically.

    Args:
        path: of the file.
        tensors: as :func:`~transformers_moshi_flax.checkpoints.formats.open_gguf` has them: codes in blocks of 32 with
            their float16 scales under ``X.scales``, which become Q8_0, and floats.

    Raises:
        ValueError: as of :func:`check_gguf`.
    """
    check_gguf(path.name)
    from gguf import GGMLQuantizationType, GGUFWriter

    with atomic_file(path) as temporary:
        writer = GGUFWriter(temporary, "moshi")
        try:
            for key, array in tensors.items():
                if (scales := tensors.get(f"{key}.scales")) is not None:
                    blocks = np.concatenate([scales[..., None].view(np.uint8), array.view(np.uint8)], axis=-1)
                    writer.add_tensor(key, blocks.reshape(len(array), -1), raw_dtype=GGMLQuantizationType.Q8_0)
                elif array.dtype == ml_dtypes.bfloat16:
                    writer.add_tensor(key, array.view(np.uint8), raw_dtype=GGMLQuantizationType.BF16)
                elif not key.endswith(".scales"):
                    writer.add_tensor(key, np.ascontiguousarray(array))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _follow_umask(path: Path) -> None:
    # safetensors creates files that only the owner can read
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sync_all(folder: Path, deep: bool = True) -> None:
    """Return when a directory, and with ``deep`` all that is in it, is on the disk."""
    for path in folder.rglob("*") if deep else ():
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
