"""Arrays between host and device: what is not traced is prepared with NumPy, as XLA would compile a program for every
shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from ..input_checks import is_traced


def cut(array: jax.Array, length: int) -> jax.Array:
    """The first ``length`` entries of the last axis, cut on the host: XLA would compile a program for each length."""
    if is_traced(array):
        return array[..., :length]
    return array if array.shape[-1] == length else on_device(np.asarray(array)[..., :length])


def on_device(array: ArrayLike, dtype: DTypeLike | None = None) -> jax.Array:
    """As ``jnp.array``, which would compile a program for every shape of a NumPy array.

    (``jnp.asarray`` may go on reading the caller's memory, who may write something else there.)
    """
    if is_traced(array):
        return jnp.asarray(array, dtype=dtype)
    return jax.device_put(np.array(array, dtype=dtype, order="C"))


def padded(array: ArrayLike, capacity: int, fill: Any, axis: int = -1) -> ArrayLike:
    """``array`` with ``fill`` behind it, up to ``capacity`` along an axis; on the host unless it is traced."""
    xp = jnp if is_traced(array) else np
    array = xp.asarray(array)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, capacity - array.shape[axis])
    return xp.pad(array, widths, constant_values=fill)
