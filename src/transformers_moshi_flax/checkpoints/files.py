"""Finding the files of a checkpoint: a directory, a single file, or a repository of the Hugging Face Hub.

Two layouts are read, each in several formats (``LAYOUTS`` has the order in which they are looked for):

- PyTorch: safetensors, with metadata ``format`` = ``pt`` or none, and pickles where they are asked for.
- Flax: ``flax_model.safetensors`` and msgpack, and ``model.safetensors`` with metadata ``format`` = ``flax``, as old
  ``transformers`` wrote it. The keys are the parameter paths joined with dots.

Each is one file, or shards that an index lists.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .formats import ShardedFiles, TensorFile, open_msgpack, open_pickle, open_safetensors, parse_json
from .recognising import foreign

FLAX_WEIGHTS = "flax_model.safetensors"
FLAX_MSGPACK = "flax_model.msgpack"
PT_WEIGHTS = "model.safetensors"
PT_PICKLE = "pytorch_model.bin"
FLAX_INDEX, MSGPACK_INDEX, PT_INDEX, PICKLE_INDEX = (
    f"{name}.index.json" for name in (FLAX_WEIGHTS, FLAX_MSGPACK, PT_WEIGHTS, PT_PICKLE)
)
LAYOUTS = {
    "flax": (FLAX_WEIGHTS, FLAX_INDEX, FLAX_MSGPACK, MSGPACK_INDEX),
    "pt": (PT_WEIGHTS, PT_INDEX, PT_PICKLE, PICKLE_INDEX),
}
"""Entries of a layout: the first that is there is the checkpoint. PyTorch's order is that of ``transformers``."""

ENTRIES = tuple(name for names in LAYOUTS.values() for name in names)
"""Entries of all layouts, in the order in which they are looked for."""

SHARD = re.compile(r"(flax_model|model|pytorch_model)-\d{5}-of-\d{5}(-[0-9a-f]{8})?\.(safetensors|msgpack|bin)")
"""Names of shards, as ``transformers`` and ``writing.py`` give them."""

MARKERS = ".save-*.json"
"""Markers of saves under way or interrupted; see ``writing.py``."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class CheckpointNotFoundError(OSError, ValueError):
    """A file of the checkpoint is not there. An ``OSError`` too, which is what ``transformers`` raises."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a checkpoint lies: a local directory, one weight file in it, or a Hub repository.

    Attributes:
        name: as the user gave it.
        folder: the local directory (with ``subfolder``), or None for the Hub.
        file: the weight file if the user named one.
        hub: keyword arguments of ``huggingface_hub.hf_hub_download``.
        use_safetensors: True opens safetensors only, False the other formats only, None any.
    """

    name: str
    folder: Path | None
    file: Path | None = None
    hub: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    use_safetensors: bool | None = None
    _unseen: dict[str, str] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """Files of the Hub that are not in the cache and could not be asked for, with the reason."""

    @classmethod
    def locate(
        cls, name_or_path: str | os.PathLike, subfolder: str = "", use_safetensors: bool | None = None, **hub: Any
    ) -> Source:
        """Tell a directory, a file and a Hub id apart.

        Raises:
            CheckpointNotFoundError: it looks like a path, but nothing is there.
            ValueError: ``use_safetensors`` is none of True, False, None.
        """
        if use_safetensors not in (None, True, False):
            raise ValueError(f"use_safetensors={use_safetensors!r} must be True, False or None")
        name = os.fspath(name_or_path)
        path = Path(name).expanduser()
        if path.is_file():
            if subfolder:
                raise ValueError(f"subfolder={subfolder!r} cannot go with the file {name!r}; leave it out")
            return cls(name, path.parent, path, {}, use_safetensors)
        if name and path.is_dir():
            folder = path / subfolder
            if not folder.is_dir():
                raise CheckpointNotFoundError(f"subfolder={subfolder!r}: {path} has no such directory")
            return cls(name, folder, None, {}, use_safetensors)
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
            raise CheckpointNotFoundError(
                f"{name!r} is neither a directory nor a file; give one that exists or a Hub id"
            )
        return cls(name, None, None, {"subfolder": subfolder, **hub}, use_safetensors)

    def find(self, filename: str) -> Path | None:
        """The local path of a file of the checkpoint (downloaded from the Hub if need be), None if it has none."""
        if self.folder is not None:
            path = self.folder / filename
            if not path.is_file() and (path.is_symlink() or path.exists()):
                raise CheckpointNotFoundError(f"{path} {_no_file(path)}")  # nothing else is taken in its place
            return path if path.is_file() else None
        self._unseen.pop(filename, None)
        found = self._download(filename)
        return None if found is None else Path(found)

    def _download(self, filename: str) -> str | None:
        import huggingface_hub  # only here: it imports the HTTP client
        from huggingface_hub import errors

        from .. import __version__

        options = {**self.hub, "subfolder": self.hub.get("subfolder") or None}
        try:
            return huggingface_hub.hf_hub_download(
                self.name,
                filename,
                library_name="transformers-moshi-flax",
                library_version=__version__,
                **options,
            )
        except errors.LocalEntryNotFoundError as error:
            if self._is_known_to_lack(filename):
                return None
            self._unseen[filename] = self._why_unseen(error)
            return None
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise CheckpointNotFoundError(
                f"{self.name!r} is a gated repository of the Hub: ask for access on its page, and log in "
                "(hf auth login) or pass token="
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointNotFoundError(
                f"{self.name!r} is neither a directory here nor a repository of the Hub that is open to you: correct "
                "the name, or, if it is private, log in (hf auth login) or pass token="
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointNotFoundError(
                f"revision={self.hub.get('revision')!r} is no branch, tag or commit of {self.name!r}"
            ) from error
        except ValueError as error:  # such as a name that none can have, or force_download where nothing may be asked
            raise CheckpointNotFoundError(f"{self.name!r} cannot be loaded from the Hub: {error}") from error
        except PermissionError as error:
            raise PermissionError(
                f"{self.name!r} cannot be put into the cache: {error}; set HF_HOME or pass cache_dir="
            ) from error

    def _is_known_to_lack(self, filename: str) -> bool:
        """Whether the cache says that the repository has no such file, as the Hub has said before."""
        from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

        path = "/".join(filter(None, [self.hub.get("subfolder"), filename]))
        places = {key: self.hub.get(key) for key in ("cache_dir", "revision")}
        return try_to_load_from_cache(self.name, path, **places) is _CACHED_NO_EXIST

    def _why_unseen(self, error: Exception) -> str:
        from huggingface_hub import constants

        if constants.is_offline_mode():
            return "the Hub is not asked for it, as HF_HUB_OFFLINE is set: load it once online, or give a directory"
        if self.hub.get("local_files_only"):
            return "the Hub is not asked for it (local_files_only=True): load it once without, or give a directory"
        cause = " ".join(str(error.__cause__ or error).split()) or type(error.__cause__).__name__
        return (
            f"the Hub cannot be reached at {constants.ENDPOINT} ({cause:.200}): check the connection, or give a "
            "directory"
        )

    def absence(self, *filenames: str) -> str | None:
        """Why files that :meth:`find` has not found may be there all the same: the Hub could not be asked.

        Returns:
            A sentence, None if the checkpoint has none of them.
        """
        for filename in filenames:
            if filename in self._unseen:
                return f"{filename} of {self.name!r} is not in the cache, and {self._unseen[filename]}"
        return None

    def filenames(self) -> set[str]:
        """What files there are, for messages; of the Hub's none where it cannot be asked. Nothing is downloaded."""
        if self.folder is not None:
            return {path.name for path in self.folder.iterdir()}
        from huggingface_hub import HfApi

        start = self.hub.get("subfolder") or ""
        try:
            if self.hub.get("local_files_only"):
                return set()
            names = HfApi(token=self.hub.get("token")).list_repo_files(self.name, revision=self.hub.get("revision"))
        except (OSError, ValueError, RuntimeError):  # RuntimeError: of the HTTP client
            return set()
        prefix = f"{start.strip('/')}/" if start else ""
        return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

    def read_json(self, filename: str, from_pt: bool | None = None) -> dict[str, Any] | None:
        """A JSON object of the checkpoint, None if there is no such file; ValueError if it holds anything else.

        Where a save was interrupted after its weights were in place, what it had still to write counts for those who
        read these weights: ``from_pt`` as in :meth:`weights`.
        """
        path = self.find(filename)
        if self.folder is not None and (save := unfinished_save(self.folder)) is not None:
            read = self.file or active_entry(self.folder, from_pt, self.use_safetensors)
            if filename in save.companions and self.folder / save.entry == read:
                return parse_json(save.companions[filename])
        return None if path is None else _read_json(path)

    def weights(self, from_pt: bool | None = None) -> tuple[str, TensorFile | ShardedFiles]:
        """Open the weights.

        Args:
            from_pt: True insists on the PyTorch layout, False on the Flax layout, None takes what is there (the Flax
                layout first). Pickles, which other programs may abuse, are opened for True only.

        Returns:
            The layout, ``"pt"`` or ``"flax"``, and the tensors.

        Raises:
            CheckpointNotFoundError: no weights in a layout asked for.
            ValueError: they are damaged, of another framework or in a format that is not read.
        """
        if self.file is not None:
            if not _is_wanted(self.file.name, self.use_safetensors):
                raise ValueError(
                    f"use_safetensors={self.use_safetensors}, but {self.file} is of another format; leave it out"
                )
            tensors = self._open(self.file, from_pt)
            layout = _layout(tensors, self.file)
            if from_pt is not None and from_pt != (layout == "pt"):
                raise ValueError(f"from_pt={from_pt}, but {self.file} is in the {layout!r} layout; leave out from_pt")
            return layout, tensors
        found = []
        left_out = {}  # not even downloaded
        for filename in ENTRIES:
            if not _is_wanted(filename, self.use_safetensors):
                left_out[filename] = f"left out by use_safetensors={self.use_safetensors}"
                continue
            if filename in (PT_PICKLE, PICKLE_INDEX) and not from_pt:
                left_out[filename] = "a pickle: opened with from_pt=True only"
                continue
            path = self.find(filename)
            if path is None:
                continue
            self._refuse_to_leave(path)
            tensors = self._open(path, from_pt)
            layout = _layout(tensors, path)
            if from_pt is None or from_pt == (layout == "pt"):
                return layout, tensors
            found.append(f"{filename} ({layout} layout)")
        wanted = {None: "weights", True: "weights in the PyTorch layout", False: "weights in the Flax layout"}[from_pt]
        there = self.filenames()
        found += [f"{filename} ({why})" for filename, why in left_out.items() if filename in there]
        if found:
            raise CheckpointNotFoundError(f"from_pt={from_pt}: {self.name!r} has no {wanted}, only {found}")
        if unseen := self.absence(*ENTRIES):
            raise CheckpointNotFoundError(unseen)
        known = foreign(self, None)
        remedy = f"it {known}" if known else f"expected {FLAX_WEIGHTS}, {PT_WEIGHTS}, {FLAX_MSGPACK} or their indexes"
        raise CheckpointNotFoundError(f"{self.name!r} has no {wanted}: {remedy}")

    def _open(self, path: Path, from_pt: bool | None) -> TensorFile | ShardedFiles:
        if not path.name.endswith(".index.json"):
            return _reader(path, from_pt)(path)
        index = _read_json(path)
        weight_map, described = index.get("weight_map"), index.get("metadata")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{path} has no 'weight_map' from tensor names to file names; download it again")
        files = {}
        for filename in sorted(set(weight_map.values())):
            # The index comes from strangers: a name must not lead out of the checkpoint's directory.
            if not _is_plain(filename):
                raise ValueError(
                    f"{path} names the shard {filename[:300]!r}, which is not a plain file name: not opened"
                )
            shard = self.find(filename)
            if shard is None:
                raise CheckpointNotFoundError(
                    self.absence(filename) or f"{path} names the shard {filename!r}, which is not there"
                )
            self._refuse_to_leave(shard)
            files[filename] = _reader(shard, from_pt)(shard)
        file_of_key = {key.replace("/", "."): files[name] for key, name in weight_map.items()}
        return ShardedFiles(path, file_of_key, described.get("total_size") if isinstance(described, dict) else None)

    def _refuse_to_leave(self, path: Path) -> None:
        """A link of the Hub's cache must lead to its blobs, wherever these lie; other links are the user's own."""
        if self.folder is None or not path.is_symlink():
            return
        snapshot = self.folder.resolve()
        blobs = [
            parent.parent / "blobs"
            for parent in snapshot.parents
            if parent.name == "snapshots" and parent.parent.name.startswith("models--")
        ]
        # the first step counts: a blob may be a link to another disk, as may the directory of them
        target = snapshot / os.readlink(path)
        inside = target.parent.resolve()
        if blobs and not any(inside.is_relative_to(place.resolve()) for place in (snapshot, *blobs)):
            raise ValueError(f"{path} is a link out of the directory and of the cache, to {target}: not opened")


def is_weights(filename: str, layout: str | None = None) -> bool:
    """Whether a file is an entry or a shard of a checkpoint, of one layout or of any, by its name."""
    known = filename in ENTRIES or SHARD.fullmatch(filename) is not None
    return known and (layout is None or filename.startswith("flax_") == (layout == "flax"))


def _no_file(path: Path) -> str:
    """Why what lies here is no file."""
    if path.exists():
        return "is no file; give the file of the checkpoint this name, or remove it"
    return (
        f"is a link to {os.readlink(path)!r}, where there is no file: bring back the disk or the files that it leads "
        "to, or remove it"
    )


def _is_plain(filename: str) -> bool:
    """Whether a string is the name of a file in a directory, on any system."""
    strange = any(character in filename for character in "/\\\0") or filename in ("", ".", "..")
    return not strange and Path(filename).name == filename and len(filename.encode("utf-8", "replace")) <= 255


@dataclasses.dataclass(frozen=True)
class UnfinishedSave:
    """A save that has put its entry in place and has not ended.

    Attributes:
        entry: the entry.
        replaces: the entries that are to go.
        companions: configuration files that belong to it, name -> content.
    """

    entry: str
    replaces: tuple[str, ...]
    companions: dict[str, str]


def unfinished_save(folder: Path) -> UnfinishedSave | None:
    """The save of a directory that was interrupted after its entry was in place, None if there is none.

    A marker counts if its temporary file has become the entry. Two signs tell that: the one is not there any more
    (which a copy of the directory may lack, too), and the other is as the marker says.
    """
    for path in sorted(folder.glob(MARKERS)):
        try:
            marker = _read_json(path)
            entry, files = marker["entry"], marker["files"]
            if (
                entry in ENTRIES
                and not (folder / marker["temporary"]).exists()
                and fingerprint(folder / entry, entry) == marker["fingerprint"]
            ):
                companions = {name: text for name, text in files.items() if _is_plain(name) and isinstance(text, str)}
                return UnfinishedSave(entry, tuple(marker["replaces"]), companions)
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue  # not a marker of ours, or the save has ended just now
    return None


def entry_of(folder: Path, layout: str) -> Path | None:
    """The file that stands for the checkpoint of one layout, pickles included."""
    return next((folder / name for name in LAYOUTS[layout] if (folder / name).is_file()), None)


def active_entry(folder: Path, from_pt: bool | None = None, use_safetensors: bool | None = None) -> Path | None:
    """The file that stands for the checkpoint, single file or index, as :meth:`Source.weights` looks for it."""
    names = LAYOUTS["pt"] if from_pt else [name for name in ENTRIES if name not in (PT_PICKLE, PICKLE_INDEX)]
    return next(
        (folder / name for name in names if (folder / name).is_file() and _is_wanted(name, use_safetensors)), None
    )


def _is_wanted(filename: str, use_safetensors: bool | None) -> bool:
    """Whether weights of this name are opened where ``use_safetensors`` is as it is."""
    return use_safetensors is None or use_safetensors == (".safetensors" in filename)


def fingerprint(path: Path, entry: str) -> str:
    """Tells the file that is or becomes ``entry`` from others: size and content, hashed.

    Of safetensors the header is enough, as it has the checksums.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = min(8 + int.from_bytes(file.read(8), "little"), size) if entry.endswith(".safetensors") else size
        file.seek(0)
        digest = hashlib.sha256(b"%d " % size)
        while piece := file.read(min(length, 1 << 20)):
            digest.update(piece)
            length -= len(piece)
    return digest.hexdigest()


def _reader(path: Path, from_pt: bool | None) -> Callable[[Path], TensorFile]:
    if path.suffix == ".msgpack":
        return open_msgpack
    if path.suffix in _PICKLES:
        if not from_pt:
            raise ValueError(f"{path} is a pickle: pass from_pt=True to open it with PyTorch, or convert it")
        return open_pickle
    return open_safetensors


def _layout(tensors: TensorFile | ShardedFiles, path: Path) -> str:
    layout = "flax" if ".msgpack" in path.suffixes else tensors.metadata.get("format", "pt")
    if layout not in ("pt", "flax"):
        raise ValueError(f"{path} says that its format is {layout!r}; only 'pt' and 'flax' are read")
    return layout


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON object ({error}); download or save it again") from error
