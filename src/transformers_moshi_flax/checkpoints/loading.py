"""From the tensors of a file to the parameters of a model, leaf by leaf."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from ..nn.linear import OF_GROUPS

SETTINGS: Any = jax.config
"""Its attributes are made when it is imported, and no type checker sees them."""


def to_device(leaf: np.ndarray, dtype: DTypeLike | None, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    """One leaf as a JAX array of its own memory; the file's pages are read once and no host copy stays.

    Args:
        leaf: a view of the mapped file, in any memory order. XLA transposes it on the way to the device, on all cores.
        dtype: to cast floating leaves to, None leaves them.
        sharding: where it is to lie (default: whole on the default device). Each device gets its slice alone.

    Raises:
        ValueError: the leaf is float64, which JAX would cut, and no ``dtype`` is given.
    """
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    if leaf.dtype == np.float64 and dtype is None and not SETTINGS.jax_enable_x64:
        raise ValueError("the checkpoint is in float64: enable jax_enable_x64 or pass dtype=jnp.float32")
    target = np.dtype(dtype) if dtype is not None and floating else leaf.dtype

    if sharding is None:
        return _put(leaf, target, None)
    parts = [
        _put(leaf[index], target, SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts, dtype=target)


def _put(leaf: np.ndarray, dtype: np.dtype, place: jax.sharding.Sharding | None) -> jax.Array:
    source = leaf.astype(dtype, copy=False)  # keeps the memory order, so that only XLA transposes
    array = jax.device_put(source, place)
    (device,) = array.devices()
    # On CPUs an array that needs no transposition may be the mapped file itself, even with may_alias=False.
    if device.platform == "cpu" and array.unsafe_buffer_pointer() == source.ctypes.data:
        array = jax.device_put(array, may_alias=False)
    return jax.block_until_ready(array)  # or the host copies of several casts would be there at once


class Transfers:
    """Runs what places a leaf for two leaves at a time, with the JAX settings of the thread that makes it.

    XLA leaves most of the work on one leaf to the thread that asks for it, and more than two at a time would hold
    more copies than the bound on memory allows, where leaves are cast. For the same reason few leaves wait, which may
    be made and no views of the file.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="load")
        self._places = threading.Semaphore(4)
        # settings by context manager are the thread's own
        self._x64, self._device = SETTINGS.jax_enable_x64, SETTINGS.jax_default_device

    def __enter__(self) -> Transfers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def start(self, place: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """The result to come of ``place(*arguments)``, such as of :func:`to_device`, errors included."""
        self._places.acquire()
        return self._pool.submit(self._run, place, *arguments)

    def _run(self, place: Callable[..., Any], *arguments: Any) -> Any:
        try:
            with jax.enable_x64(self._x64), jax.default_device(self._device):
                return place(*arguments)
        finally:
            self._places.release()


def main_dtype(params: Mapping[tuple[str, ...], Any]) -> jnp.dtype:
    """The floating dtype that most of the numbers have, without the scales and offsets of quantized layers."""
    sizes: dict[jnp.dtype, int] = {}
    for path, leaf in params.items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and path[-1] not in OF_GROUPS:
            sizes[jnp.dtype(leaf.dtype)] = sizes.get(jnp.dtype(leaf.dtype), 0) + leaf.size
    return max(sizes, key=sizes.__getitem__) if sizes else jnp.dtype(jnp.float32)
