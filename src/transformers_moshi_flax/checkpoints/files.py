"""Finding and reading checkpoint files: a directory, a single file, or a repository of the Hugging Face Hub.

Two layouts of safetensors are read:

- PyTorch: ``model.safetensors``, or shards listed in ``model.safetensors.index.json``; metadata ``format`` is ``pt``
  or absent (Kyutai's own files have none).
- Flax: ``flax_model.safetensors``, or ``model.safetensors`` with metadata ``format`` = ``flax``, as old
  ``transformers`` wrote it. The keys are the parameter paths joined with dots.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

FLAX_WEIGHTS = "flax_model.safetensors"
PT_WEIGHTS = "model.safetensors"
PT_INDEX = "model.safetensors.index.json"
_UNSUPPORTED = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
    "flax_model.safetensors.index.json",
)


class CheckpointNotFoundError(OSError, ValueError):
    """A file of the checkpoint is not there. An ``OSError`` too, which is what ``transformers`` raises."""


class SafetensorsFile(Mapping):
    """Lazy read-only view of one safetensors file: key -> NumPy array (bfloat16 through ``ml_dtypes``).

    Raises:
        ValueError: the file is truncated, or no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read as safetensors ({error}): it is damaged, incomplete or of another format; "
                "download or save it again"
            ) from error
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self._keys = dict.fromkeys(self._file.keys())

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._keys:
            raise KeyError(key)
        return self._file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._keys


class ShardedFiles(Mapping):
    """Lazy view of the tensors of several files, as an index distributes them."""

    def __init__(self, file_of_key: Mapping[str, SafetensorsFile]):
        self._file_of_key = dict(file_of_key)
        lost = sorted(key for key, file in self._file_of_key.items() if key not in file)
        if lost:
            raise ValueError(f"the index names tensors that its files do not hold: {lost}; download it again")
        self.metadata = next(iter(self._file_of_key.values())).metadata if self._file_of_key else {}

    def __getitem__(self, key: str) -> np.ndarray:
        return self._file_of_key[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of_key)

    def __len__(self) -> int:
        return len(self._file_of_key)

    def __contains__(self, key: object) -> bool:
        return key in self._file_of_key


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a checkpoint lies: a local directory, one weight file in it, or a Hub repository.

    Attributes:
        name: as the user gave it.
        folder: the local directory (with ``subfolder``), or None for the Hub.
        file: the weight file if the user named one.
        hub: keyword arguments of ``transformers.utils.cached_file``.
    """

    name: str
    folder: Path | None
    file: Path | None = None
    hub: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def locate(cls, name_or_path: str | os.PathLike, subfolder: str = "", **hub: Any) -> Source:
        """Tell a directory, a file and a Hub id apart.

        Raises:
            CheckpointNotFoundError: it looks like a path, but nothing is there.
        """
        name = os.fspath(name_or_path)
        path = Path(name).expanduser()
        if path.is_file():
            if subfolder:
                raise ValueError(f"subfolder={subfolder!r} cannot go with the file {name!r}; leave it out")
            return cls(name, path.parent, path)
        if name and path.is_dir():
            folder = path / subfolder
            if not folder.is_dir():
                raise CheckpointNotFoundError(f"subfolder={subfolder!r}: {path} has no such directory")
            return cls(name, folder)
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
            raise CheckpointNotFoundError(
                f"{name!r} is neither a directory nor a file; give one that exists or a Hub id"
            )
        return cls(name, None, None, {"subfolder": subfolder, **hub})

    def find(self, filename: str) -> Path | None:
        """The local path of a file of the checkpoint (downloaded from the Hub if need be), None if it has none."""
        if self.folder is not None:
            path = self.folder / filename
            return path if path.is_file() else None
        from transformers.utils import cached_file  # only here: it imports the HTTP client

        found = cached_file(self.name, filename, _raise_exceptions_for_missing_entries=False, **self.hub)
        return None if found is None else Path(found)

    def read_json(self, filename: str) -> dict[str, Any] | None:
        """A JSON object of the checkpoint, None if there is no such file; ValueError if it holds anything else."""
        path = self.find(filename)
        return None if path is None else _read_json(path)

    def weights(self, from_pt: bool | None = None) -> tuple[str, Mapping[str, np.ndarray]]:
        """Open the weights.

        Args:
            from_pt: True insists on the PyTorch layout, False on the Flax layout, None takes what is there (the Flax
                layout first).

        Returns:
            The layout, ``"pt"`` or ``"flax"``, and the tensors.

        Raises:
            CheckpointNotFoundError: no weights in a layout asked for.
            ValueError: they are damaged, of another framework or in a format that is not read.
        """
        if self.file is not None:
            tensors = self._open(self.file)
            layout = _layout(tensors, self.file)
            if from_pt is not None and from_pt != (layout == "pt"):
                raise ValueError(f"from_pt={from_pt}, but {self.file} is in the {layout!r} layout; leave out from_pt")
            return layout, tensors
        found = []
        for filename in (FLAX_WEIGHTS, PT_WEIGHTS, PT_INDEX):
            path = self.find(filename)
            if path is None:
                continue
            tensors = self._open(path)
            layout = _layout(tensors, path)
            if from_pt is None or from_pt == (layout == "pt"):
                return layout, tensors
            found.append(f"{filename} ({layout} layout)")
        wanted = {None: "weights", True: "weights in the PyTorch layout", False: "weights in the Flax layout"}[from_pt]
        if found:
            raise CheckpointNotFoundError(f"from_pt={from_pt}: {self.name!r} has no {wanted}, only {found}")
        others = [filename for filename in _UNSUPPORTED if self.find(filename)]
        if others:
            raise CheckpointNotFoundError(f"{self.name!r} holds {others}, which are not read: convert to safetensors")
        raise CheckpointNotFoundError(
            f"{self.name!r} has no {wanted}: expected {FLAX_WEIGHTS}, {PT_WEIGHTS} or {PT_INDEX}"
        )

    def _open(self, path: Path) -> SafetensorsFile | ShardedFiles:
        if path.name.endswith((".bin", ".pt", ".pth", ".ckpt", ".msgpack")):
            raise ValueError(f"{path} is not safetensors: convert it to safetensors")
        if not path.name.endswith(".index.json"):
            return SafetensorsFile(path)
        weight_map = _read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{path} has no 'weight_map' from tensor names to file names; download it again")
        files = {}
        for filename in sorted(set(weight_map.values())):
            # The index comes from strangers: a name must not lead out of the checkpoint's directory.
            if Path(filename).name != filename or "\\" in filename or filename in ("", ".", ".."):
                raise ValueError(f"{path} names the shard {filename!r}, which is not a plain file name: not opened")
            shard = self.find(filename)
            if shard is None:
                raise CheckpointNotFoundError(f"{path} names the shard {filename!r}, which is not there")
            files[filename] = SafetensorsFile(shard)
        return ShardedFiles({key: files[filename] for key, filename in weight_map.items()})


def _layout(tensors: SafetensorsFile | ShardedFiles, path: Path) -> str:
    layout = tensors.metadata.get("format", "pt")
    if layout not in ("pt", "flax"):
        raise ValueError(f"{path} says that its format is {layout!r}; only 'pt' and 'flax' are read")
    return layout


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); download or save it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
