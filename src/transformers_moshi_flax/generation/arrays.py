"""Arrays between host and device: what is not traced is prepared with NumPy, as XLA would compile a program for every
shape."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Int, Shaped

from ..input_checks import AnyArray, is_traced


def cut(array: jax.Array, length: int, axis: int = -1, start: int = 0) -> jax.Array:
    """``length`` entries of an axis, cut on the host: XLA would compile a program for each length."""
    if array.shape[axis] == length:
        return array
    kept = [slice(None)] * array.ndim
    kept[axis] = slice(start, start + length)
    return array[tuple(kept)] if is_traced(array) else on_device(on_host(array)[tuple(kept)])


def on_device(array: ArrayLike | list[Any], dtype: DTypeLike | None = None) -> jax.Array:
    """As ``jnp.array``, which would compile a program for every shape of a NumPy array.

    What is there already stays where it is. (``jnp.asarray`` may go on reading the caller's memory, who may write
    something else there.)
    """
    if is_traced(array):
        return jnp.asarray(array, dtype=dtype)
    if isinstance(array, jax.Array) and (dtype is None or array.dtype == dtype):
        return array
    return jax.device_put(np.array(on_host(array), dtype=dtype, order="C"))


def on_host(tree: Any) -> Any:
    """The same with NumPy's arrays in place of JAX's, all fetched at once; what is traced stays."""
    leaves, structure = jax.tree.flatten(tree)
    on_devices = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not is_traced(leaf)}
    if not on_devices:
        return tree
    fetched = jax.device_get(on_devices)
    return jax.tree.unflatten(structure, [fetched.get(i, leaf) for i, leaf in enumerate(leaves)])


def host_copy(array: jax.Array) -> np.ndarray:
    """A copy on the host of what a program is going to consume: :func:`on_host` would keep a view of its memory, which
    could then not be used again."""
    with jax.transfer_guard_device_to_host("allow"):
        return np.array(array)


def on_one_device(*trees: Any) -> bool:
    """Whether no array is spread over several devices, where it is to stay."""
    leaves = jax.tree.leaves(trees)
    return all(leaf.sharding.num_devices == 1 for leaf in leaves if isinstance(leaf, jax.Array))


def turned(array: Shaped[AnyArray, "rows ..."], shift: Int[AnyArray, "rows"]) -> AnyArray:
    """Every row's last axis moved to the left by its ``shift``, what falls out there coming back at the end.

    On the host unless something is traced.
    """
    xp = jnp if is_traced(array, shift) else np
    array, shift = xp.asarray(array), xp.asarray(shift)
    indices = (xp.arange(array.shape[-1], dtype=np.int32) + shift[:, None]) % array.shape[-1]
    return xp.take_along_axis(array, indices.reshape(-1, *[1] * (array.ndim - 2), array.shape[-1]), axis=-1)


def padded(array: AnyArray, capacity: int, fill: Any, axis: int = -1) -> AnyArray:
    """``array`` with ``fill`` behind it, up to ``capacity`` along an axis; on the host unless it is traced."""
    if np.shape(array)[axis] == capacity:
        return array
    xp = jnp if is_traced(array) else np
    array = xp.asarray(on_host(array))
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, capacity - array.shape[axis])
    return xp.pad(array, widths, constant_values=fill)
