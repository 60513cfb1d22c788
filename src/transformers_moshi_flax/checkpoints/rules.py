"""How the tensors of a file become a Flax parameter tree, and back.

One declarative table (a tuple of :class:`Rule`) a model and format is read in both directions, so reading and writing
cannot drift apart. A file tensor may hold several leaves: stacked along an axis of their own, one a codebook, as
``transformers`` keeps them, or joined along the first axis in the order (codebook, part), as Kyutai keeps q, k and v
of codebook 0, then of codebook 1, and so on. Nothing here computes: leaves are transposed, sliced, reordered, stacked
or joined, never cast, so both directions are exact to the bit.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from .recognising import foreign_tensors

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one leaf is laid out in the file.

    Attributes:
        read: rows of the file tensor -> leaf.
        write: leaf -> rows of the file tensor, the inverse of ``read``.
        file_shape: shape of the leaf -> shape of its rows in the file.
    """

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    file_shape: Callable[[Shape], Shape]


IDENTITY = Transform(lambda rows: rows, lambda leaf: leaf, lambda shape: shape)
# (out, in) <-> (in, out), and (out, in, width) <-> (width, in, out) of convolutions
REVERSED = Transform(np.transpose, np.transpose, lambda shape: shape[::-1])
# (1, 1, dim) <-> (dim,), as Kyutai keeps the scale of an RMSNorm
SCALE = Transform(lambda rows: rows.reshape(-1), lambda leaf: leaf.reshape(1, 1, -1), lambda shape: (1, 1, *shape))
_NAMED = {"identity": IDENTITY, "transpose": REVERSED, "conv": REVERSED}


def interleaved_heads(head_dim: int) -> Transform:
    """A projection to queries or keys, (heads·head_dim, in) <-> (in, heads·head_dim), of even ``head_dim``.

    The file's rotary embedding turns the rows 2i and 2i+1 of a head together, ours i and i + head_dim/2.
    """
    half = head_dim // 2

    def read(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(-1, half, 2, rows.shape[-1]).transpose(0, 2, 1, 3).reshape(rows.shape).T

    def write(leaf: np.ndarray) -> np.ndarray:
        return leaf.T.reshape(-1, 2, half, leaf.shape[0]).transpose(0, 2, 1, 3).reshape(leaf.shape[::-1])

    return Transform(read, write, REVERSED.file_shape)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a checkpoint table.

    Attributes:
        path: regular expression that must match the whole "/"-joined Flax path. A group named ``codebook`` says which
            of several leaves of a file tensor it is.
        key: template (as in ``re.Match.expand``) of the key in the file; a "/" in the result becomes a dot.
        transform: of the leaf: a :class:`Transform`, or ``identity``, ``transpose`` or ``conv``.
        squeeze_single: write a single codebook without the leading axis (upstream stores some layers so when there is
            one codebook only). Reading takes both forms in any case.
        joined: the leaves of a tensor are joined along its first axis; otherwise codebooks have an axis of their own.
        part: orders the joined leaves of the same codebook.
        other_keys: templates of other keys, such as of files that keep the leaves of each codebook apart; read, not
            written.

    Raises:
        ValueError: the transform is none of these.
    """

    path: str
    key: str
    transform: str | Transform = "identity"
    squeeze_single: bool = False
    joined: bool = False
    part: int = 0
    other_keys: tuple[str, ...] = ()

    def __post_init__(self):
        if not isinstance(self.transform, Transform) and self.transform not in _NAMED:
            raise ValueError(f"transform must be one of {sorted(_NAMED)}, got {self.transform!r}")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one leaf lies in a file: its key or one of ``other_keys``, and which of the tensor's leaves it is.

    Attributes:
        codebook: index along a leading axis of codebooks, None if there is no such axis.
        order: of the leaf among those of its tensor.
    """

    path: str
    key: str
    transform: Transform = IDENTITY
    codebook: int | None = None
    squeeze_single: bool = False
    order: tuple[int, int] = (0, 0)
    other_keys: tuple[str, ...] = ()

    def file_shape(self, shape: Shape) -> Shape:
        """The shape of the rows of a leaf."""
        rows = self.transform.file_shape(tuple(shape))
        return rows if self.codebook is None else (1, *rows)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The leaf in its rows of the tensor."""
        return self.transform.read(rows if self.codebook is None else rows[0])

    def name_in(self, tensors: Container[str], rename: Callable[[str], str] = lambda key: key) -> str:
        """Which of its keys a file has, the first if it has none."""
        names = [rename(key) for key in (self.key, *self.other_keys)]
        return next((name for name in names if name in tensors), names[0])

    def write(self, leaf: np.ndarray) -> np.ndarray:
        """The rows of a leaf."""
        rows = self.transform.write(leaf)
        return rows if self.codebook is None else rows[None]


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


def table_slots(paths: Iterable[str], rules: tuple[Rule, ...]) -> list[Slot]:
    """Slots of the leaves in a file by its table; the first matching rule wins.

    Raises:
        ValueError: a path that no rule matches, or codebooks that are not numbered 0, 1, 2, ...
    """
    compiled = [(rule, re.compile(rule.path)) for rule in rules]
    slots = []
    for path in paths:
        for rule, pattern in compiled:
            match = pattern.fullmatch(path)
            if match:
                codebook = match.groupdict().get("codebook")
                index = None if codebook is None or rule.joined else int(codebook)
                templates = (rule.key, *rule.other_keys)
                key, *others = (match.expand(template).replace("/", ".") for template in templates)
                transform = rule.transform if isinstance(rule.transform, Transform) else _NAMED[rule.transform]
                order = (int(codebook or 0), rule.part)
                slots.append(Slot(path, key, transform, index, rule.squeeze_single, order, tuple(others)))
                break
        else:
            raise ValueError(f"no rule of the checkpoint table matches the parameter {path!r}: add one")
    for key, group in _grouped(slots).items():
        indices = [slot.codebook for slot in group]
        if indices[0] is not None and indices != list(range(len(group))):
            raise ValueError(f"the leaves of the file key {key!r} are numbered {indices}, expected 0, 1, 2, ...")
        if len(group) > 1 and len({slot.order for slot in group}) < len(group):
            raise ValueError(
                f"two leaves have the same place in the file key {key!r}: {[slot.path for slot in group]}"
            )
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
    ways: list[tuple[str, Callable[[str], str]]] = [(prefix, partial(operator.add, prefix)) for prefix in prefixes]
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
        slots: from :func:`table_slots` or :func:`flax_slots`.
        template: for every leaf, by path, what has its ``shape`` and ``dtype``.
        tensors: key -> array.
        rename: from :func:`choose_renaming`.
        convert: called on every path and leaf, a view of the tensor (for a cast, a transfer to the device).

    Raises:
        ValueError: a tensor is to be of whole numbers (of a quantized layer) and has another dtype.
    """
    result = ReadResult({}, [], [], [], [])
    groups = _grouped(slots, lambda slot: slot.name_in(tensors, rename))
    for name, group in groups.items():
        if name not in tensors:
            result.missing += [slot.path for slot in group]
            continue
        tensor = tensors[name]
        rows = [slot.file_shape(template[slot.path].shape) for slot in group]
        alone = len(group) == 1
        if alone and group[0].codebook is not None and tensor.shape == rows[0][1:]:
            tensor = tensor[None]
        expected = rows[0] if alone else (sum(shape[0] for shape in rows), *rows[0][1:])
        if tensor.shape != expected:
            result.mismatched.append((name, tuple(tensor.shape), expected))
            continue
        wanted = template[group[0].path].dtype
        if not jnp.issubdtype(wanted, jnp.floating) and tensor.dtype != wanted:
            raise ValueError(
                f"{name} is {tensor.dtype.name} in the file, but {wanted.name} by the config: save it again"
            )
        if jnp.issubdtype(wanted, jnp.floating) and not jnp.issubdtype(tensor.dtype, jnp.floating):
            result.not_floating.append((name, tensor.dtype.name))
            continue
        start = 0
        for slot, shape in zip(group, rows):
            part = tensor if alone else tensor[start : start + shape[0]]
            result.params[slot.path] = convert(slot.path, slot.read(part))
            start += shape[0] if shape else 0
    result.unexpected = [key for key in tensors if key not in groups]
    return result


def read_params(
    template: Mapping[str, Any], rules: tuple[Rule, ...], tensors: Mapping[str, Any]
) -> tuple[dict, list[str], list[str], list[tuple]]:
    """Read a parameter tree from the tensors of a file by its table, dtypes as in the file.

    Args:
        template: nested dict whose leaves have a ``shape`` and a ``dtype``.
        rules: the table of the model.
        tensors: key -> array, read lazily.

    Returns:
        The nested dict of NumPy arrays that were found, then missing paths, unexpected keys, mismatched shapes as in
        :class:`ReadResult`.
    """
    leaves = flatten_dict(template, sep="/")
    result = read_slots(table_slots(leaves, rules), leaves, tensors)
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


def table_tensors(params: Mapping[str, Any], rules: tuple[Rule, ...]) -> list[FileTensor]:
    """The tensors of a file by its table, dtypes as in the tree: the inverse of :func:`read_params`.

    Raises:
        ValueError: a leaf that no rule matches, or the leaves of one file tensor differ in dtype or shape.
    """
    flat = flatten_dict(params, sep="/")
    tensors = []
    for key, group in _grouped(table_slots(flat, rules)).items():
        leaves = [flat[slot.path] for slot in group]
        rows = [slot.file_shape(leaf.shape) for slot, leaf in zip(group, leaves)]
        forms = Counter(
            # joined leaves, such as k and v of fewer heads than q, may differ along the axis that they are joined on
            (
                np.dtype(leaf.dtype).name,
                tuple(leaf.shape) if slot.codebook is not None or len(group) == 1 else shape[1:],
            )
            for slot, leaf, shape in zip(group, leaves, rows)
        )
        if len(forms) > 1:
            raise ValueError(
                f"the leaves of the file key {key!r} differ in dtype or shape, {sorted(forms)}: cast them alike"
            )
        tensors.append(FileTensor(key, sum(leaf.nbytes for leaf in leaves), partial(_build, group, leaves)))
    return tensors


def _build(group: list[Slot], leaves: list[Any]) -> np.ndarray:
    rows = [slot.write(np.asarray(leaf)) for slot, leaf in zip(group, leaves)]
    if len(rows) > 1:
        tensor = np.concatenate(rows)
    else:
        tensor = rows[0][0] if group[0].codebook is not None and group[0].squeeze_single else rows[0]
    # np.concatenate keeps the memory order of transposed leaves, which safetensors would write as it lies
    return np.asarray(tensor, order="C")


def flax_tensors(params: Mapping[str, Any]) -> list[FileTensor]:
    """The tensors of a Flax-layout file, dtypes as in the tree."""
    flat = flatten_dict(params, sep="/")
    return [
        FileTensor(slot.key, flat[slot.path].nbytes, partial(np.asarray, flat[slot.path], order="C"))
        for slot in flax_slots(flat)
    ]


def _grouped(slots: list[Slot], name_of: Callable[[Slot], str] = lambda slot: slot.key) -> dict[str, list[Slot]]:
    """Slots that share a file tensor, in the order in which it has them."""
    groups: dict[str, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(name_of(slot), []).append(slot)
    for group in groups.values():
        group.sort(key=lambda slot: slot.order)
    return groups
