"""Weight files of every format as lazy mappings: key -> NumPy array.

Safetensors are memory-mapped: an array is a read-only view of the file, and its pages are read when they are used. The
other two formats cannot be mapped and are read whole: msgpack (``flax.serialization``), and PyTorch's pickles, which
need the ``torch`` extra.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ..input_checks import shortened

CHECKSUMS = "checksums"
"""Key of the header metadata: a JSON object, tensor name -> CRC-32 of its bytes as 8 hexadecimal digits."""

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}
_LFS_POINTER = b"version https://git-lfs"


class TensorFile(Mapping):
    """The tensors of one file. ``metadata`` is its header's, empty for formats that have none."""

    def __init__(self, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Any]):
        self.path = path
        self.metadata = dict(metadata)
        self._tensors = tensors

    def __getitem__(self, key: str) -> np.ndarray:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, key: object) -> bool:
        return key in self._tensors


def open_safetensors(path: Path) -> TensorFile:
    """A safetensors file, memory-mapped.

    Raises:
        ValueError: the file is truncated, damaged, a git-LFS pointer or no safetensors file.
    """
    _refuse_pointer(path)
    try:
        # the library checks that the header is sound and that the tensors tile the rest of the file
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        data = np.memmap(path, dtype=np.uint8, mode="r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = parse_json(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        tensors = {key: _view(data[8 + length :], **entry) for key, entry in header.items()}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): it is damaged, incomplete or of another format; "
            "download or save it again"
        ) from error
    return TensorFile(path, metadata, tensors)


def _view(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    begin, end = data_offsets
    # an ndarray, as every slice of a memmap would carry its bookkeeping
    return np.asarray(data)[begin:end].view(DTYPES[dtype]).reshape(shape)


def open_msgpack(path: Path) -> TensorFile:
    """A file of ``flax.serialization``, nested or flat; keys are the paths joined with dots.

    Raises:
        ValueError: the file is truncated, damaged, a git-LFS pointer or of another format.
    """
    from flax.serialization import msgpack_restore
    from flax.traverse_util import flatten_dict

    _refuse_pointer(path)
    try:
        tree = msgpack_restore(path.read_bytes())
        tensors = {key.replace("/", "."): value for key, value in flatten_dict(tree, sep="/").items()}
        wrong = [key for key, value in tensors.items() if not isinstance(value, np.ndarray)]
        if wrong:
            raise ValueError(f"no arrays under {wrong[:3]}")
    except Exception as error:  # msgpack and flax raise all kinds for damaged bytes
        raise ValueError(
            f"{path} cannot be read as msgpack ({error}): it is damaged, incomplete or of another format; download or "
            "save it again"
        ) from error
    return TensorFile(path, {}, tensors)


def open_pickle(path: Path) -> TensorFile:
    """A PyTorch pickle, read by ``torch.load(weights_only=True)``.

    Raises:
        ValueError: torch is not installed, or the file is damaged or holds anything but tensors.
    """
    _refuse_pointer(path)
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{path} is a pickle, which only PyTorch reads: install the extra (pip install "
            "'transformers-moshi-flax[torch]'), or convert it to safetensors"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise ValueError("it is no mapping of names to tensors")
    except Exception as error:  # torch raises all kinds for damaged or dangerous pickles
        raise ValueError(
            f"{path} cannot be read as a PyTorch pickle of weights ({error}): download or save it again"
        ) from error
    return TensorFile(path, {}, _Torch(state))


def open_gguf(path: Path) -> TensorFile:
    """A GGUF file, memory-mapped, read by the ``gguf`` package.

    A tensor ``X`` of the type Q8_0 is ``X``, its codes in blocks ``(..., blocks, 32)`` int8, and ``X.scales``,
    ``(..., blocks)`` float16; other tensors are of floats.

    Raises:
        ValueError: ``gguf`` is not installed, the file is damaged, or has tensors of other types.
    """
    _refuse_pointer(path)
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(
            f"{path} is a GGUF file, which is read by the package gguf: install the extra (pip install "
            "'transformers-moshi-flax[gguf]')"
        ) from error
    try:
        reader = GGUFReader(path)
        if reader.byte_order != "I":
            raise ValueError("its byte order is not this machine's")
        found = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
        for tensor, following in itertools.pairwise(found):
            if tensor.data_offset + tensor.n_bytes > following.data_offset:
                raise ValueError(f"{tensor.name} and {following.name} overlap")
    except Exception as error:  # numpy and gguf raise all kinds for damaged bytes
        raise ValueError(
            f"{path} cannot be read as GGUF ({error}): it is damaged, incomplete or of another format; download or "
            "save it again"
        ) from error
    tensors: dict[str, np.ndarray] = {}
    other = []
    for tensor in found:
        data, kind = np.asarray(tensor.data), tensor.tensor_type.name
        if kind == "Q8_0":
            blocks = data.reshape(*data.shape[:-1], -1, 34)  # a float16, then 32 codes
            tensors[tensor.name] = blocks[..., 2:].view(np.int8)
            tensors[f"{tensor.name}.scales"] = blocks[..., :2].view(np.float16)[..., 0]
        elif kind in ("F32", "F16"):
            tensors[tensor.name] = data
        elif kind == "BF16":
            tensors[tensor.name] = data.view(ml_dtypes.bfloat16)
        else:
            other.append(f"{tensor.name} ({kind})")
    if other:
        raise ValueError(
            f"{path} has tensors of types that are not read: {shortened(other, 5, ', ')}; get a file of Q8_0, F32, "
            "F16 and BF16"
        )
    return TensorFile(path, {}, tensors)


def open_kyutai(path: Path) -> TensorFile:
    """A weight file of Kyutai's packages: GGUF by its name, or safetensors; errors as of these."""
    return open_gguf(path) if path.suffix == ".gguf" else open_safetensors(path)


class _Torch(Mapping):
    """Tensors of torch as NumPy arrays, bfloat16 through ``ml_dtypes``; memory is shared."""

    def __init__(self, state: Mapping[str, Any]):
        self._state = state

    def __getitem__(self, key: str) -> np.ndarray:
        import torch

        tensor = self._state[key].detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class ShardedFiles(Mapping):
    """The tensors of several files, as an index distributes them; ``total_size`` is what it says of their bytes.

    Raises:
        ValueError: the index names a tensor that its file lacks, or that another file of the index holds as well.
    """

    def __init__(self, index: Path, file_of_key: Mapping[str, TensorFile], total_size: Any = None):
        self.path = index
        self.total_size = total_size
        self._file_of_key = dict(file_of_key)
        lost = sorted(key for key, file in self._file_of_key.items() if key not in file)
        if lost:
            raise ValueError(
                f"{index} names tensors that their files do not hold: {lost[:8]} (in "
                f"{self._file_of_key[lost[0]].path.name}); download it again"
            )
        files = {id(file): file for file in self._file_of_key.values()}.values()
        twice = sorted(key for file in files for key in file if self._file_of_key.get(key, file) is not file)
        if twice:
            raise ValueError(f"tensors lie in two of the files of {index}: {twice[:8]}; download it again")
        self.files = tuple(files)
        self.metadata = self.files[0].metadata if self.files else {}

    def __getitem__(self, key: str) -> np.ndarray:
        return self._file_of_key[key][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of_key)

    def __len__(self) -> int:
        return len(self._file_of_key)

    def __contains__(self, key: object) -> bool:
        return key in self._file_of_key


def parse_json(content: bytes | str) -> dict[str, Any]:
    """A JSON object; ValueError for anything else, also for a key that is there twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
        return values

    try:
        values = json.loads(content, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"it must hold a JSON object, got {type(values).__name__}")
    return values


def checksum(tensor: np.ndarray) -> str:
    """The CRC-32 of the bytes as they lie in a file (C order), 8 hexadecimal digits."""
    flat = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
    return f"{zlib.crc32(flat.data):08x}"


def _refuse_pointer(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(
                f"{path} is a git-LFS pointer, not the weights: run `git lfs pull` in the clone, or download the file"
            )
