"""Arrays between host and device: what is not traced is prepared with NumPy, as XLA would compile a program for every
shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Int, Shaped

from ..input_checks import is_traced


def cut(array: jax.Array, length: int, axis: int = -1, start: int = 0) -> jax.Array:
    """``length`` entries of an axis, cut on the host: XLA would compile a program for each length."""
    if array.shape[axis] == length:
        return array
    kept = [slice(None)] * array.ndim
    kept[axis] = slice(start, start + length)
    return array[tuple(kept)] if is_traced(array) else on_device(np.asarray(array)[tuple(kept)])


def on_device(array: ArrayLike, dtype: DTypeLike | None = None) -> jax.Array:
    """As ``jnp.array``, which would compile a program for every shape of a NumPy array.

    (``jnp.asarray`` may go on reading the caller's memory, who may write something else there.)
    """
    if is_traced(array):
        return jnp.asarray(array, dtype=dtype)
    return jax.device_put(np.array(array, dtype=dtype, order="C"))


def on_one_device(*trees: Any) -> bool:
    """Whether no array is spread over several devices, where it is to stay."""
    leaves = jax.tree.leaves(trees)
    return all(leaf.sharding.num_devices == 1 for leaf in leaves if isinstance(leaf, jax.Array))


def turned(array: Shaped[ArrayLike, "rows ..."], shift: Int[ArrayLike, "rows"]) -> ArrayLike:
    """Every row's last axis moved to the left by its ``shift``, what falls out there coming back at the end.

    On the host unless something is traced.
    """
    xp = jnp if is_traced(array, shift) else np
    array, shift = xp.asarray(array), xp.asarray(shift)
    columns = (xp.arange(array.shape[-1], dtype=np.int32) + shift[:, None]) % array.shape[-1]
    return xp.take_along_axis(array, columns.reshape(-1, *[1] * (array.ndim - 2), array.shape[-1]), axis=-1)


def padded(array: ArrayLike, capacity: int, fill: Any, axis: int = -1) -> ArrayLike:
    """``array`` with ``fill`` behind it, up to ``capacity`` along an axis; on the host unless it is traced."""
    xp = jnp if is_traced(array) else np
    array = xp.asarray(array)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, capacity - array.shape[axis])
    return xp.pad(array, widths, constant_values=fill)
