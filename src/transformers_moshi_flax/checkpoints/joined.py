"""Tables for files whose tensors join several of our leaves along the first axis, as Kyutai's own files do.

A table (a tuple of :class:`JoinedRule`) is read in both directions, like those of ``rules.py``. A file tensor is the
concatenation of its leaves in the order (codebook, part): ``in_proj_weight`` of an attention is q, k, v; that of the
depth decoder q, k, v of codebook 0, then of codebook 1, and so on. Nothing here computes: leaves are reordered, sliced
and joined, never cast, so both directions are exact to the bit.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ..input_checks import shortened

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
class JoinedRule:
    """One line of a table.

    Attributes:
        path: regular expression that must match the whole "/"-joined Flax path. A group named ``codebook`` orders the
            leaves of a tensor.
        key: template (as in ``re.Match.expand``) of the key in the file.
        transform: layout of the leaf in the file.
        part: orders the leaves of the same codebook.
        other_key: template of a second key, for files that keep the leaves of each codebook apart; read, not written.
    """

    path: str
    key: str
    transform: Transform = IDENTITY
    part: int = 0
    other_key: str = ""


@dataclasses.dataclass(frozen=True)
class _Slot:
    path: str
    key: str
    other_key: str
    order: tuple[int, int]
    transform: Transform


def read_joined(
    shapes: Mapping[str, Shape],
    rules: tuple[JoinedRule, ...],
    tensors: Mapping[str, np.ndarray],
    name: str,
    convert: Callable[[np.ndarray], Any] = np.asarray,
    series: str | None = None,
) -> dict[str, Any]:
    """Read leaves from a mapping of file tensors.

    Each tensor is fetched once and let go before the next, so a lazy mapping never holds more than one in memory.

    Args:
        shapes: the expected shape of every leaf, by "/"-joined path.
        rules: the table; the first matching rule wins.
        tensors: key -> array.
        name: of the file, for error messages.
        convert: called on every leaf (a cast, a transfer to the device).
        series: regular expression of keys that count up, and of which the model may have the first ones alone.

    Returns:
        The leaves by path.

    Raises:
        ValueError: tensors that are missing, too many, of another shape or not floating, all listed; or a path that no
            rule matches.
    """

    def key_of(slot: _Slot) -> str:
        return slot.other_key if slot.key not in tensors and slot.other_key in tensors else slot.key

    groups = _grouped(_slots(shapes, rules), key_of)
    missing = [key for key in groups if key not in tensors]
    unexpected = [key for key in tensors if key not in groups and not (series and re.search(series, key))]
    problems = [f"it lacks {shortened(missing, 6, ', ')}"] if missing else []
    problems += [f"the model has no place for {shortened(unexpected, 6, ', ')}"] if unexpected else []
    leaves: dict[str, Any] = {}
    misfits = []
    for key, group in groups.items() if not problems else ():
        tensor = tensors[key]
        rows = [slot.transform.file_shape(shapes[slot.path]) for slot in group]
        expected = (sum(shape[0] for shape in rows), *rows[0][1:])
        if tensor.shape != expected or not jnp.issubdtype(tensor.dtype, jnp.floating):
            misfits.append(f"{key} is {tensor.dtype.name} {tensor.shape}, the configuration wants floating {expected}")
            continue
        start = 0
        for slot, shape in zip(group, rows):
            leaves[slot.path] = convert(slot.transform.read(tensor[start : start + shape[0]]))
            start += shape[0]
    problems += [shortened(misfits, 6, ", ")] if misfits else []
    if problems:
        raise ValueError(f"{name} does not fit: {'; '.join(problems)}. Use the weights that belong to the config.json")
    return leaves


def to_joined_state(params: Mapping[str, Any], rules: tuple[JoinedRule, ...]) -> dict[str, np.ndarray]:
    """The tensors of a file, C-contiguous, dtypes as in the tree: the inverse of :func:`read_joined`.

    Raises:
        ValueError: a leaf that no rule matches, or the leaves of one file tensor differ in dtype.
    """
    flat = flatten_dict(params, sep="/")
    state = {}
    for key, group in _grouped(_slots(flat, rules), lambda slot: slot.key).items():
        leaves = [slot.transform.write(np.asarray(flat[slot.path])) for slot in group]
        dtypes = sorted({leaf.dtype.name for leaf in leaves})
        if len(dtypes) > 1:
            raise ValueError(f"the leaves of the file key {key!r} differ in dtype, {dtypes}: cast them alike")
        # np.concatenate keeps the memory order of transposed leaves, which safetensors would write as it lies.
        state[key] = np.asarray(leaves[0] if len(leaves) == 1 else np.concatenate(leaves), order="C")
    return state


def _slots(paths: Iterable[str], rules: tuple[JoinedRule, ...]) -> list[_Slot]:
    slots = []
    for path in paths:
        found = ((rule, match) for rule in rules if (match := re.fullmatch(rule.path, path)))
        rule, match = next(found, (None, None))
        if rule is None or match is None:
            raise ValueError(f"no rule of the checkpoint table matches the parameter {path!r}: add one")
        order = (int(match.groupdict().get("codebook") or 0), rule.part)
        slots.append(_Slot(path, match.expand(rule.key), match.expand(rule.other_key), order, rule.transform))
    return slots


def _grouped(slots: list[_Slot], key_of: Callable[[_Slot], str]) -> dict[str, list[_Slot]]:
    """Slots that share a file tensor, in the order in which it joins them."""
    groups: dict[str, list[_Slot]] = {}
    for slot in slots:
        groups.setdefault(key_of(slot), []).append(slot)
    return {key: sorted(group, key=lambda slot: slot.order) for key, group in groups.items()}
