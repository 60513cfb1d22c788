"""Prepared conversations: codes and text ids by frame, from disk or from memory, one at a time.

A prepared dataset is a folder of safetensors shards with an ``index.json``. A shard is also the record of what was
done: its header names its conversations and the recordings that were skipped, so that a shard under its final name is
finished, and nothing else is. The index is written last. Checksums are CRC-32, as in checkpoints, and are compared
when a conversation is read for the first time.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from ...checkpoints.formats import checksum, open_safetensors, parse_json
from ...checkpoints.writing import write_safetensors, write_text

INDEX = "index.json"
SETTINGS = "settings.json"
"""What a dataset is made from; there from the beginning of the work."""
SHARDS = "shard-{:05d}.safetensors"
VERSION = 1

TEXT = ("moshi_text_tokens", "user_text_tokens")
AUDIO = ("moshi_audio_tokens", "user_audio_tokens")
OPTIONAL = "user_text_tokens"
NAMES = (*TEXT, *AUDIO)

_CONTENTS = "contents"
_CHECKSUM = "checksum"
_FORMAT = "moshi-prepared"
_OPEN_FILES = 64


@dataclass(frozen=True)
class Conversation:
    """One conversation, undelayed; any integer dtype.

    Attributes:
        id: its name.
        moshi_text_tokens: ``(frames,)``.
        moshi_audio_tokens, user_audio_tokens: ``(codebooks, frames)``.
        user_text_tokens: ``(frames,)``, or None where nobody wrote down what the user says.
    """

    id: str
    moshi_text_tokens: Int[np.ndarray, "frames"]
    moshi_audio_tokens: Int[np.ndarray, "codebooks frames"]
    user_audio_tokens: Int[np.ndarray, "codebooks frames"]
    user_text_tokens: Int[np.ndarray, "frames"] | None = None

    @classmethod
    def from_arrays(cls, name: str, arrays: Mapping[str, Any]) -> Conversation:
        """A conversation of the four arrays (the user's text may lack).

        Raises:
            ValueError: arrays that lack, are not wanted, are not of integers, or whose shapes do not agree; the
                message names the conversation and the array.
        """
        if unknown := sorted(set(arrays) - set(NAMES)):
            raise ValueError(f"{name!r}: `{unknown[0]}` is none of the arrays {', '.join(NAMES)}; leave it out")
        found: dict[str, np.ndarray] = {}
        for key in NAMES:
            if key == OPTIONAL and arrays.get(key) is None:
                continue
            if key not in arrays:
                raise ValueError(f"{name!r}: `{key}` is missing; there must be {', '.join(NAMES)}")
            array = np.asarray(arrays[key])
            wanted = 1 if key in TEXT else 2
            if not np.issubdtype(array.dtype, np.integer):
                raise ValueError(f"{name!r}: `{key}` must hold integers, but has the dtype {array.dtype}")
            if array.ndim != wanted:
                shape = "(frames,)" if key in TEXT else "(codebooks, frames)"
                raise ValueError(f"{name!r}: `{key}` must have the shape {shape}, but has the shape {array.shape}")
            found[key] = array
        frames = found[TEXT[0]].shape[-1]
        for key, array in found.items():
            if array.shape[-1] != frames:
                raise ValueError(
                    f"{name!r}: `{key}` has {array.shape[-1]} frames, but `{TEXT[0]}` has {frames}; they must agree"
                )
        moshi, user = (found[key].shape[0] for key in AUDIO)
        if moshi != user or not moshi:
            raise ValueError(
                f"{name!r}: `{AUDIO[0]}` has {moshi} codebooks and `{AUDIO[1]}` {user}; they must agree, and be some"
            )
        return cls(name, **found)

    @property
    def frames(self) -> int:
        """Its length."""
        return self.moshi_text_tokens.shape[0]

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that it has, by name."""
        return {key: array for key in NAMES if (array := getattr(self, key)) is not None}

    def digest(self) -> str:
        """Changes with its name and what it holds."""
        held = [(key, array.shape, checksum(array)) for key, array in self.arrays().items()]
        return f"{self.id} {held}\n"

    def part(self, start: int, end: int) -> Conversation:
        """The frames from ``start`` to before ``end``; views."""
        return Conversation(self.id, **{key: array[..., start:end] for key, array in self.arrays().items()})

    def check_ids(self, vocab_size: int, audio_vocab_size: int) -> None:
        """Raises ``ValueError`` for ids outside of ``[0, size)``, naming the conversation and the array."""
        for key, array in self.arrays().items():
            size = vocab_size if key in TEXT else audio_vocab_size
            if array.size and not (0 <= array.min() and array.max() < size):
                wrong = array[(array < 0) | (array >= size)][0]
                raise ValueError(
                    f"{self.id!r}: `{key}` has the id {wrong}, outside of [0, {size}); it comes from another model "
                    "or is damaged"
                )


# ---------------------------------------------------------------------------------------------------------- datasets


class PreparedDataset:
    """Conversations by number; a subclass says where they lie. :func:`open_dataset` makes one.

    Attributes:
        ids: their names.
        lengths: their frames, ``(len(self),)`` int64.
        without_user_text: names of those that have no ``user_text_tokens``.
        fingerprint: changes when conversations come, go, or change.
    """

    def __init__(self, ids: Sequence[str], lengths: Sequence[int], without_user_text: Sequence[str], fingerprint: str):
        self.ids = list(ids)
        self.lengths = np.asarray(lengths, np.int64).reshape(-1)
        self.without_user_text = list(without_user_text)
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Conversation:
        """The conversation; its arrays may be views of a file.

        Raises:
            ValueError: it is damaged, or its arrays do not agree.
            IndexError: there is none.
        """
        name = self.ids[index]
        conversation = Conversation.from_arrays(name, self._arrays(index % len(self.ids)))
        if conversation.frames != self.lengths[index]:
            raise ValueError(
                f"{name!r}: has {conversation.frames} frames, but had {self.lengths[index]} when the dataset was "
                "opened; leave the files alone while they are in use"
            )
        return conversation

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def _arrays(self, index: int) -> Mapping[str, Any]:
        raise NotImplementedError


class _InMemory(PreparedDataset):
    def __init__(self, samples: Sequence[Mapping[str, Any]]):
        conversations = [Conversation.from_arrays(f"sample {place}", sample) for place, sample in enumerate(samples)]
        digest = hashlib.sha256()
        for conversation in conversations:
            digest.update(conversation.digest().encode())
        self._samples = [conversation.arrays() for conversation in conversations]
        super().__init__(
            [conversation.id for conversation in conversations],
            [conversation.frames for conversation in conversations],
            [conversation.id for conversation in conversations if conversation.user_text_tokens is None],
            digest.hexdigest(),
        )

    def _arrays(self, index: int) -> Mapping[str, Any]:
        return self._samples[index]


class _Files(PreparedDataset):
    """What the two kinds of folders share: few files are open at once, and none in a pickle."""

    def __init__(self, folder: Path, *fields: Any):
        super().__init__(*fields)
        self._folder = folder
        self._opened: dict[str, Mapping[str, Any]] = {}

    def _file(self, name: str) -> Mapping[str, Any]:
        opened = self._opened
        if name not in opened:
            if len(opened) >= _OPEN_FILES:
                opened.pop(next(iter(opened)), None)
            opened[name] = _open(self._folder / name)
        return opened[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}


class _SampleFolder(_Files):
    """A file a sample."""

    def __init__(self, folder: Path, names: Sequence[str]):
        lengths, without, digest = [], [], hashlib.sha256()
        for name in names:
            conversation = Conversation.from_arrays(name, _open(folder / name))
            lengths.append(conversation.frames)
            if conversation.user_text_tokens is None:
                without.append(name)
            digest.update(conversation.digest().encode())
        super().__init__(folder, names, lengths, without, digest.hexdigest())

    def _arrays(self, index: int) -> Mapping[str, Any]:
        return self._file(self.ids[index])


class _Shards(_Files):
    """The folder of ``moshi-flax prepare``."""

    def __init__(self, folder: Path):
        text = (folder / INDEX).read_bytes()
        try:
            index = parse_json(text)
            version = index["version"]
            if version == VERSION:
                entries = index["conversations"]
                self._entries = [(entry["shard"], entry["checksums"]) for entry in entries]
                ids, lengths = [entry["id"] for entry in entries], [entry["frames"] for entry in entries]
                without = [entry["id"] for entry in entries if OPTIONAL not in entry["checksums"]]
                self.settings: dict[str, Any] = index["settings"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(folder / INDEX)!r} is damaged ({error!r}); prepare the dataset anew") from error
        if version != VERSION:
            raise ValueError(
                f"{str(folder / INDEX)!r} is of version {version!r}, but this package reads {VERSION}: prepare anew"
            )
        for shard in {shard for shard, _ in self._entries}:
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise ValueError(f"{str(folder)!r} has no {shard!r}, which its index names; prepare the dataset anew")
        self._checked: set[int] = set()
        super().__init__(folder, ids, lengths, without, hashlib.sha256(text).hexdigest())

    def _arrays(self, index: int) -> Mapping[str, Any]:
        shard, checksums = self._entries[index]
        arrays = _arrays_in(shard, self._file(shard), self.ids[index], checksums, index not in self._checked)
        self._checked.add(index)
        return arrays


def _arrays_in(
    shard: str, file: Mapping[str, Any], name: str, checksums: Mapping[str, str], compare: bool
) -> dict[str, Any]:
    """The arrays of a conversation in a shard, compared with their checksums or not."""
    arrays = {}
    for key, wanted in checksums.items():
        array = file.get(f"{name}/{key}")
        if array is None:
            raise ValueError(f"{name!r}: `{key}` is not in {shard!r}; prepare the dataset anew")
        if compare and checksum(array) != wanted:
            raise ValueError(f"{name!r}: `{key}` in {shard!r} is damaged; prepare the dataset anew")
        arrays[key] = array
    return arrays


def open_dataset(source: str | os.PathLike | Sequence[Mapping[str, Any]]) -> PreparedDataset:
    """Conversations for training.

    Args:
        source: a folder that ``moshi-flax prepare`` has made; or a folder with one ``.npz`` or ``.safetensors`` file
            a sample; or the samples themselves. A sample has ``moshi_text_tokens`` ``(frames,)``,
            ``moshi_audio_tokens`` and ``user_audio_tokens`` ``(codebooks, frames)``, all of integers and undelayed,
            and may have ``user_text_tokens`` ``(frames,)``.

    Raises:
        ValueError: no such folder, nothing in it, a dataset that is not finished or is damaged, samples whose arrays
            lack or do not agree.
    """
    if not isinstance(source, str | os.PathLike):
        return _InMemory(source)
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}; give one that `moshi-flax prepare` has made")
    if (folder / INDEX).is_file():
        return _Shards(folder)
    if (folder / SETTINGS).is_file():
        raise ValueError(f"{str(folder)!r} is not finished; run the same `moshi-flax prepare` again to finish it")
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".npz", ".safetensors"))
    if not names:
        raise ValueError(f"{str(folder)!r} has no {INDEX} and no .npz or .safetensors files; prepare a dataset")
    return _SampleFolder(folder, names)


def _open(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise ValueError("it is an .npy, a single array")
            with loaded:
                return dict(loaded)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r} cannot be read as .npz ({error}); write it with numpy.savez") from error


# ----------------------------------------------------------------------------------------------------------- writing


def write_shard(
    folder: Path,
    number: int,
    conversations: Sequence[tuple[Conversation, Mapping[str, Any]]],
    skipped: Sequence[Mapping[str, Any]],
    dtype: type[np.integer],
) -> None:
    """Write a shard as one commit.

    Args:
        folder: of the dataset.
        number: of the shard.
        conversations: each with what else the index is to say of it.
        skipped: what the report is to say of recordings of this shard that gave no conversation.
        dtype: of the arrays; the ids must fit.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    entries: list[dict[str, Any]] = []
    for conversation, notes in conversations:
        mine = {key: np.ascontiguousarray(array, dtype) for key, array in conversation.arrays().items()}
        arrays |= {f"{conversation.id}/{key}": array for key, array in mine.items()}
        checksums = {key: checksum(array) for key, array in mine.items()}
        entries.append({"id": conversation.id, "frames": conversation.frames, **notes, "checksums": checksums})
    contents = json.dumps({"conversations": entries, "skipped": list(skipped)})
    metadata = {_CONTENTS: contents, _CHECKSUM: _checksum_of(contents)}
    write_safetensors(folder / SHARDS.format(number), arrays, _FORMAT, metadata)


def read_contents(folder: Path, number: int) -> dict[str, list[dict[str, Any]]] | None:
    """``conversations`` and ``skipped`` of a shard; None if it is not there, or not whole."""
    path = folder / SHARDS.format(number)
    if not path.is_file():
        return None
    try:
        metadata = open_safetensors(path).metadata
        contents = metadata[_CONTENTS]
        return parse_json(contents) if metadata[_CHECKSUM] == _checksum_of(contents) else None
    except (ValueError, KeyError):
        return None


def contents_of(folder: Path, number: int) -> dict[str, list[dict[str, Any]]]:
    """As :func:`read_contents`, of a shard that must be there; ValueError if it is not whole."""
    contents = read_contents(folder, number)
    if contents is None:
        raise ValueError(f"{str(folder)!r}: shard {number} is not whole; prepare the dataset again")
    return contents


def is_whole(folder: Path, number: int) -> bool:
    """Whether a shard is there and its arrays are those that were written; reads all of it."""
    contents = read_contents(folder, number)
    if contents is None:
        return False
    shard = SHARDS.format(number)
    file = open_safetensors(folder / shard)
    try:
        for entry in contents["conversations"]:
            _arrays_in(shard, file, entry["id"], entry["checksums"], compare=True)
    except ValueError:
        return False
    return True


def _checksum_of(text: str) -> str:
    return checksum(np.frombuffer(text.encode(), np.uint8))


def write_index(folder: Path, settings: Mapping[str, Any], shards: int) -> None:
    """Gather what the shards say of themselves; this finishes the dataset."""
    entries = []
    for number in range(shards):
        conversations = contents_of(folder, number)["conversations"]
        entries += [{**entry, "shard": SHARDS.format(number)} for entry in conversations]
    index = {"version": VERSION, "settings": dict(settings), "conversations": entries}
    write_text(folder / INDEX, json.dumps(index))
