"""Random initial values, drawn by few programs.

XLA takes a quarter of a second for a program that draws normal variables, and every shape would need its own. Here a
leaf is cut out of a longer draw, whose lengths are powers of two. Where only shapes are asked for, nothing is drawn.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Initializer = Callable[..., jax.Array]

SHORTEST = 4096
LONGEST = 2**20
"""Numbers above which a leaf has a program of its own: there are few such shapes, and what is cut off costs memory."""

_draws = ContextVar("draws", default=True)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Initializers return leaves of their shapes and dtypes without values, quickly, to trace a module's shapes."""
    token = _draws.set(False)
    try:
        yield
    finally:
        _draws.reset(token)


@functools.cache  # equal initializers are one, so that modules that have them are equal too
def normal(stddev: float) -> Initializer:
    """As ``flax.linen.initializers.normal``."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return _drawn(_normal, key, stddev, shape, dtype)

    return initialize


@functools.cache
def uniform(limit: float) -> Initializer:
    """Uniform between ``-limit`` and ``limit``."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        return _drawn(_uniform, key, limit, shape, dtype)

    return initialize


def kaiming_normal(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Normal, of the variance 2 / inputs; all axes but the last are inputs (He et al., 2015)."""
    return normal(math.sqrt(2 / math.prod(shape[:-1])))(key, shape, dtype)


def _drawn(
    draw: Callable[..., jax.Array], key: jax.Array, scale: float, shape: tuple[int, ...], dtype: DTypeLike
) -> jax.Array:
    if not _draws.get():
        return jax.lax.empty(shape, dtype)
    size = math.prod(shape)
    length = size if size > LONGEST else max(SHORTEST, 1 << (size - 1).bit_length())
    return _cut(draw(key, scale, length, jnp.dtype(dtype)), tuple(shape))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _normal(key, stddev, length, dtype):
    return stddev * jax.random.normal(key, (length,), dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _uniform(key, limit, length, dtype):
    return jax.random.uniform(key, (length,), dtype, -limit, limit)


@functools.partial(jax.jit, static_argnums=1)
def _cut(drawn, shape):
    return drawn[: math.prod(shape)].reshape(shape)
