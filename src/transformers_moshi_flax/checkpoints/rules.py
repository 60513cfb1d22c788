"""How the tensors of a PyTorch-layout file become a Flax parameter tree, and back.

One declarative table (a tuple of :class:`Rule`) is read in both directions, so reading and writing cannot drift apart.
Nothing here computes: leaves are transposed, sliced or stacked, never cast, so both directions are exact to the bit.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from .recognising import foreign_tensors

# Axes to permute a file tensor by to get our leaf.
_FROM_FILE = {"identity": None, "transpose": (1, 0), "conv": (2, 1, 0)}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a checkpoint table.

    Attributes:
        path: regular expression that must match the whole "/"-joined Flax path. A group named ``codebook`` says that
            the leaf is that slice along a leading axis of the file tensor.
        key: template (as in ``re.Match.expand``) of the key in the file; a "/" in the result becomes a dot.
        transform: ``identity``, ``transpose`` or ``conv``; applied to the slice.
        squeeze_single: write a single codebook without the leading axis (upstream stores some layers so when there is
            one codebook only). Reading takes both forms in any case.

    Raises:
        ValueError: the transform is none of these.
    """

    path: str
    key: str
    transform: str = "identity"
    squeeze_single: bool = False

    def __post_init__(self):
        if self.transform not in _FROM_FILE:
            raise ValueError(f"transform must be one of {sorted(_FROM_FILE)}, got {self.transform!r}")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one leaf lies in a file: ``key``, and the index along the leading axis if the tensor is stacked."""

    path: str
    key: str
    transform: str = "identity"
    codebook: int | None = None
    squeeze_single: bool = False


@dataclasses.dataclass
class ReadResult:
    """What :func:`read_slots` found.

    Attributes:
        params: the leaves that were read, by "/"-joined path.
        missing: paths without a tensor in the file.
        unexpected: keys of the file that no leaf asked for.
        mismatched: ``(key, shape in the file, shape in the model)``.
        not_floating: ``(key, dtype in the file)`` where the model wants floating-point numbers.
    """

    params: dict[str, Any]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    not_floating: list[tuple[str, str]]


def pt_slots(paths: Iterable[str], rules: tuple[Rule, ...]) -> list[Slot]:
    """Slots of the leaves in a PyTorch-layout file; the first matching rule wins.

    Raises:
        ValueError: a path that no rule matches, or codebooks that are not numbered 0, 1, 2, ...
    """
    slots = []
    for path in paths:
        for rule in rules:
            match = re.fullmatch(rule.path, path)
            if match:
                codebook = match.groupdict().get("codebook")
                index = None if codebook is None else int(codebook)
                key = match.expand(rule.key).replace("/", ".")
                slots.append(Slot(path, key, rule.transform, index, rule.squeeze_single))
                break
        else:
            raise ValueError(f"no rule of the checkpoint table matches the parameter {path!r}: add one")
    for key, group in _by_key(slots).items():
        indices = [slot.codebook for slot in group]
        if indices not in ([None], list(range(len(group)))):
            raise ValueError(f"the leaves of the file key {key!r} are numbered {indices}, expected 0, 1, 2, ...")
    return slots


def flax_slots(paths: Iterable[str]) -> list[Slot]:
    """Slots of the leaves in a Flax-layout file: the key is the path joined with dots, the tensor is the leaf."""
    return [Slot(path, path.replace("/", ".")) for path in paths]


def choose_renaming(
    slots: list[Slot], keys: Iterable[str], prefixes: tuple[str, ...] = ("",), base_model_prefix: str = ""
) -> tuple[str, Callable[[str], str]]:
    """How the keys we ask for are called in a file that holds more, or less, than our model.

    Tries each prefix of ``prefixes`` before our keys (the model is a part of the saved one) and ``base_model_prefix``
    taken off them (the file holds our base model alone). The way that finds most tensors wins, the earlier on a tie.

    Returns:
        The prefix, and the function from our key to the file's; ValueError if no tensor is found in any way.
    """
    keys = set(keys)
    wanted = dict.fromkeys(slot.key for slot in slots)
    ways = [(prefix, lambda key, prefix=prefix: prefix + key) for prefix in prefixes]
    if base_model_prefix:
        # A key outside the base model, such as the head's, has no place in a base-model file.
        start = f"{base_model_prefix}."
        ways.append(("", lambda key: key.removeprefix(start) if key.startswith(start) else f"\0{key}"))
    scores = [sum(rename(key) in keys for key in wanted) for _, rename in ways]
    best = max(range(len(ways)), key=lambda index: (scores[index], -index))
    if not scores[best]:
        remedy = foreign_tensors(keys) or "load the class that the checkpoint was saved from"
        raise ValueError(
            f"none of the file's {len(keys)} tensors belongs to this model: the file has {sorted(keys)[:3]}..., the "
            f"model wants {list(wanted)[:3]}...; {remedy}"
        )
    return ways[best]


def read_slots(
    slots: list[Slot],
    template: Mapping[str, Any],
    tensors: Mapping[str, Any],
    rename: Callable[[str], str] = lambda key: key,
    convert: Callable[[str, np.ndarray], Any] = lambda path, leaf: leaf,
) -> ReadResult:
    """Read leaves from a mapping of file tensors.

    Each tensor is fetched once and let go before the next, so a lazy mapping never holds more than one in memory.

    Args:
        slots: from :func:`pt_slots` or :func:`flax_slots`.
        template: for every leaf, by path, what has its ``shape`` and ``dtype``.
        tensors: key -> array.
        rename: from :func:`choose_renaming`.
        convert: called on every path and leaf, a view of the tensor (for a cast, a transfer to the device).
    """
    result = ReadResult({}, [], [], [], [])
    used = set()
    for key, group in _by_key(slots).items():
        name = rename(key)
        if name not in tensors:
            result.missing += [slot.path for slot in group]
            continue
        used.add(name)
        tensor = tensors[name]
        wanted = template[group[0].path]
        single = _file_shape(group[0], wanted.shape)
        stacked = group[0].codebook is not None
        expected = (len(group), *single) if stacked else single
        if stacked and len(group) == 1 and tensor.shape == single:
            tensor = tensor[None]
        if tensor.shape != expected:
            result.mismatched.append((name, tuple(tensor.shape), expected))
            continue
        if jnp.issubdtype(wanted.dtype, jnp.floating) and not jnp.issubdtype(tensor.dtype, jnp.floating):
            result.not_floating.append((name, tensor.dtype.name))
            continue
        for slot in group:
            leaf = tensor[slot.codebook] if stacked else tensor
            axes = _FROM_FILE[slot.transform]
            result.params[slot.path] = convert(slot.path, leaf if axes is None else leaf.transpose(axes))
    result.unexpected = [key for key in tensors if key not in used]
    return result


def read_params(
    template: Mapping[str, Any], rules: tuple[Rule, ...], tensors: Mapping[str, Any]
) -> tuple[dict, list[str], list[str], list[tuple]]:
    """Read a parameter tree from the tensors of a PyTorch-layout file, dtypes as in the file.

    Args:
        template: nested dict whose leaves have a ``shape`` and a ``dtype``.
        rules: the table of the model.
        tensors: key -> array, read lazily.

    Returns:
        The nested dict of NumPy arrays that were found, then missing paths, unexpected keys, mismatched shapes as in
        :class:`ReadResult`.
    """
    leaves = flatten_dict(template, sep="/")
    result = read_slots(pt_slots(leaves, rules), leaves, tensors)
    return unflatten_dict(result.params, sep="/"), result.missing, result.unexpected, result.mismatched


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor that is to be written: what it is called and how large it is, before it is made.

    Attributes:
        key: its name in the file.
        nbytes: its size.
        build: makes the C-contiguous array, fetching leaves from their devices.
    """

    key: str
    nbytes: int
    build: Callable[[], np.ndarray]


def pt_tensors(params: Mapping[str, Any], rules: tuple[Rule, ...]) -> list[FileTensor]:
    """The tensors of a PyTorch-layout file, dtypes as in the tree: the inverse of :func:`read_params`.

    Raises:
        ValueError: a leaf that no rule matches, or the leaves of one file tensor differ in dtype or shape.
    """
    flat = flatten_dict(params, sep="/")
    tensors = []
    for key, group in _by_key(pt_slots(flat, rules)).items():
        leaves = [flat[slot.path] for slot in group]
        forms = Counter((np.dtype(leaf.dtype).name, tuple(leaf.shape)) for leaf in leaves)
        if len(forms) > 1:
            raise ValueError(f"the leaves of the file key {key!r} differ in dtype or shape: {sorted(forms)}")
        tensors.append(FileTensor(key, sum(leaf.nbytes for leaf in leaves), partial(_build, group, leaves)))
    return tensors


def _build(group: list[Slot], leaves: list[Any]) -> np.ndarray:
    arrays = [_to_file(slot, np.asarray(leaf)) for slot, leaf in zip(group, leaves)]
    single = group[0].codebook is None or (group[0].squeeze_single and len(group) == 1)
    # np.stack keeps the memory order of transposed leaves, which safetensors would write as it lies
    return np.asarray(arrays[0] if single else np.stack(arrays), order="C")


def flax_tensors(params: Mapping[str, Any]) -> list[FileTensor]:
    """The tensors of a Flax-layout file, dtypes as in the tree."""
    flat = flatten_dict(params, sep="/")
    return [
        FileTensor(slot.key, flat[slot.path].nbytes, partial(np.asarray, flat[slot.path], order="C"))
        for slot in flax_slots(flat)
    ]


def _by_key(slots: list[Slot]) -> dict[str, list[Slot]]:
    """Slots that share a file tensor, in the order of their codebooks."""
    groups: dict[str, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.key, []).append(slot)
    for group in groups.values():
        group.sort(key=lambda slot: -1 if slot.codebook is None else slot.codebook)
    return groups


def _file_shape(slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
    axes = _FROM_FILE[slot.transform]
    return tuple(shape) if axes is None else tuple(shape[axis] for axis in np.argsort(axes))


def _to_file(slot: Slot, leaf: np.ndarray) -> np.ndarray:
    axes = _FROM_FILE[slot.transform]
    return leaf if axes is None else leaf.transpose(np.argsort(axes))
