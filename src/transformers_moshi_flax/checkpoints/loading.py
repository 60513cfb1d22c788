"""From the tensors of a file to the parameters of a model, leaf by leaf."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def to_device(leaf: np.ndarray, dtype: DTypeLike | None, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """One leaf as a JAX array of its own memory; the file's pages are read once and no host copy stays.

    Args:
        leaf: a view of the mapped file, in any memory order.
        dtype: to cast floating leaves to, None leaves them.
        sharding: where it is to lie (default: whole on the default device). Each device gets its slice alone.

    Raises:
        ValueError: the leaf is float64, which JAX would cut, and no ``dtype`` is given.
    """
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    if leaf.dtype == np.float64 and dtype is None and not jax.config.jax_enable_x64:
        raise ValueError("the checkpoint is in float64: enable jax_enable_x64 or pass dtype=jnp.float32")
    target = np.dtype(dtype) if dtype is not None and floating else leaf.dtype
    if sharding is not None:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index].astype(target))
    if leaf.nbytes < SMALL or leaf.dtype == np.float64:
        return jnp.array(leaf.astype(target))
    # As it lies in the file: on CPUs the device array is the mapped file itself, until the copy below is made. XLA
    # transposes several times as fast as NumPy.
    order = tuple(int(axis) for axis in np.argsort([-stride for stride in leaf.strides], kind="stable"))
    on_device = jax.device_put(leaf.transpose(order))
    return jax.block_until_ready(_copy(on_device, tuple(int(axis) for axis in np.argsort(order)), target))


SMALL = 1 << 20
"""Bytes below which a leaf isn't worth a program of its own shape."""


@partial(jax.jit, static_argnums=(1, 2))
def _copy(array: jax.Array, axes: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return jnp.copy(array.transpose(axes).astype(dtype))


def main_dtype(params: Mapping[Any, Any]) -> jnp.dtype:
    """The floating dtype that most of the numbers have."""
    sizes: dict[jnp.dtype, int] = {}
    for leaf in params.values():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            sizes[jnp.dtype(leaf.dtype)] = sizes.get(jnp.dtype(leaf.dtype), 0) + leaf.size
    return max(sizes, key=sizes.__getitem__) if sizes else jnp.dtype(jnp.float32)
