"""The tensors of a checkpoint as a tree of parts, with equal siblings told once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Tensor:
    """What a header says of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: str

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Part:
    """A node of the tree: a tensor, or what lies under a common beginning of names.

    Attributes:
        label: the piece of the name; ``0…31`` for siblings that are alike.
        alike: how many siblings it stands for.
        size: numbers in all of them (in the parts below: in those of one).
        nbytes: bytes of all of them.
        dtypes: names, sorted.
        shape: of a tensor, None for a node that has parts.
        parts: below it.
    """

    label: str
    alike: int
    size: int
    nbytes: int
    dtypes: tuple[str, ...]
    shape: tuple[int, ...] | None
    parts: tuple[Part, ...] = ()

    @property
    def form(self) -> tuple:
        """Equal for parts that differ in their label alone."""
        return self.shape, self.dtypes, tuple((part.label, part.form) for part in self.parts)


def select(tensors: Iterable[Tensor], part: str) -> list[Tensor]:
    """The tensors under a part, named as in the file, or with "/" in place of "."; ``""`` is all of them."""
    start = part.replace("/", ".").strip(".")
    return [tensor for tensor in tensors if not start or f"{tensor.name}.".startswith(f"{start}.")]


def part_tree(tensors: Iterable[Tensor]) -> Part:
    """The tree of the tensors, whose names are split at their dots; the root has no label."""
    root = _node("", [(tensor.name.split("."), tensor) for tensor in tensors])
    return root if root.shape is None else replace(root, label="", shape=None, parts=(root,))


def _node(label: str, entries: list[tuple[list[str], Tensor]]) -> Part:
    if len(entries) == 1:
        ((names, tensor),) = entries
        whole = ".".join(filter(None, [label, *names]))
        return Part(whole, 1, tensor.size, tensor.nbytes, (tensor.dtype,), tensor.shape)
    groups: dict[str, list[tuple[list[str], Tensor]]] = {}
    for names, tensor in entries:
        groups.setdefault(names[0] if names else "", []).append((names[1:], tensor))
    parts = _merged([_node(name, groups[name]) for name in sorted(groups, key=_in_order)])
    if len(parts) == 1 and label:
        return replace(parts[0], label=f"{label}.{parts[0].label}")
    return Part(
        label,
        1,
        sum(part.size for part in parts),
        sum(part.nbytes for part in parts),
        tuple(sorted({dtype for part in parts for dtype in part.dtypes})),
        None,
        tuple(parts),
    )


def _in_order(name: str) -> tuple[bool, int, str]:
    return (True, int(name), "") if name.isdecimal() else (False, 0, name)


def _merged(parts: list[Part]) -> list[Part]:
    """Runs of numbered siblings that are alike as one."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        # "0.weight" and "1.weight" are numbered as well: their chains have been joined
        numbers, _, rest = part.label.partition(".")
        if last is not None and numbers.isdecimal():
            first, _, last_rest = last.label.partition(".")
            if first.split("…")[0].isdecimal() and rest == last_rest and part.form == last.form:
                label = ".".join(filter(None, [f"{first.split('…')[0]}…{numbers}", rest]))
                alike, size, nbytes = last.alike + part.alike, last.size + part.size, last.nbytes + part.nbytes
                merged[-1] = replace(last, label=label, alike=alike, size=size, nbytes=nbytes)
                continue
        merged.append(part)
    return merged


def readable_bytes(nbytes: int) -> str:
    """Decimal units, as the Hub has them: ``"1.23 MB"``."""
    size, unit = float(nbytes), 0
    while size >= 999.5 and unit < 4:
        size, unit = size / 1000, unit + 1
    return f"{nbytes} B" if unit == 0 else f"{size:.3g} {['kB', 'MB', 'GB', 'TB'][unit - 1]}"
