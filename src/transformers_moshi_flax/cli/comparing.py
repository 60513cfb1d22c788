"""The differences between two sets of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK = 1 << 22
"""Numbers compared at a time: they are compared in float64."""


@dataclass(frozen=True)
class Difference:
    """How a parameter differs.

    Attributes:
        path: of the parameter, joined with "/".
        kind: ``missing`` (A or B lacks it), ``shape``, ``dtype`` (the values may be the same) or ``values``.
        a, b: what is there, in words; None where nothing is.
        max_abs_difference: of the finite numbers; None where there is nothing to compare.
        not_finite: numbers that are NaN or infinite on one side, and not the same on the other.
    """

    path: str
    kind: str
    a: str | None
    b: str | None
    max_abs_difference: float | None = None
    not_finite: int = 0


def differences(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], advance: Callable[[int], Any] = lambda steps: None
) -> Iterator[Difference]:
    """Compare parameter after parameter; equal ones are not told.

    Args:
        a, b: arrays by path, read lazily.
        advance: told 1 for every path that has been compared.
    """
    for path in sorted(a.keys() | b.keys()):
        difference = _difference(path, a.get(path), b.get(path))
        if difference is not None:
            yield difference
        advance(1)


def _difference(path: str, a: np.ndarray | None, b: np.ndarray | None) -> Difference | None:
    if a is None or b is None:
        return Difference(path, "missing", _form(a), _form(b))
    if a.shape != b.shape:
        return Difference(path, "shape", _form(a), _form(b))
    largest, not_finite = value_difference(a, b)
    if a.dtype != b.dtype:
        return Difference(path, "dtype", a.dtype.name, b.dtype.name, largest, not_finite)
    if largest or not_finite:
        return Difference(path, "values", _form(a), _form(b), largest, not_finite)
    return None


def value_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """The largest absolute difference of the finite numbers, and how many others are not the same.

    NaN is the same as NaN, an infinity as itself.
    """
    largest, not_finite = 0.0, 0
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    rows = max(1, CHUNK // max(1, a[:1].size))
    for start in range(0, len(a), rows):
        left, right = (np.asarray(array[start : start + rows], np.float64) for array in (a, b))
        finite = np.isfinite(left) & np.isfinite(right)
        not_finite += int((~finite & (left != right) & ~(np.isnan(left) & np.isnan(right))).sum())
        gap = np.subtract(left, right, out=np.zeros_like(left), where=finite)
        largest = max(largest, float(np.abs(gap).max(initial=0.0)))
    return largest, not_finite


def _form(array: np.ndarray | None) -> str | None:
    return None if array is None else f"{array.dtype.name} {array.shape}"
