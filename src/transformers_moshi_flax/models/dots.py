"""One or two rows times a large matrix, on which generation spends its time, as fast as memory can be read."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

CHUNK_BYTES = 704 * 1024
MAX_CHUNKS = 16


def row_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """``lax.dot_general`` for ``nn.Dense(dot_general=...)``; on CPUs, a row times a matrix is summed over chunks.

    XLA's CPU backend gives each thread a range of the *columns* of such a product, so that every thread reads a short
    piece of every row. As a batch of chunks of rows, each thread reads memory from end to end, which is up to 1.6
    times as fast (``docs/benchmarks.md``). Two rows are multiplied one after another, because more than one row makes
    the library copy the matrix first; from three rows on, that pays. Other platforms and other shapes get the plain
    product.
    """

    def plain(lhs, rhs):
        return lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type=preferred_element_type, **kwargs
        )

    inputs = rhs.shape[0]
    chunks = chunk_count(inputs, rhs.size * rhs.dtype.itemsize)
    rows = lhs.size // inputs
    if rows > 2 or rows * chunks == 1 or dimension_numbers != (((lhs.ndim - 1,), (0,)), ((), ())):
        return plain(lhs, rhs)

    def row_by_row(lhs, rhs):
        products = [chunked(row, rhs) for row in lhs.reshape(rows, inputs)]
        return jnp.stack(products).reshape(*lhs.shape[:-1], rhs.shape[1])

    def chunked(row, rhs):
        products = lax.dot_general(
            row.reshape(chunks, 1, -1),
            rhs.reshape(chunks, inputs // chunks, -1),
            (((2,), (1,)), ((0,), (0,))),
            precision,
            preferred_element_type=preferred_element_type,
            **kwargs,
        )
        return jnp.sum(products, axis=0)[0]

    return lax.platform_dependent(lhs, rhs, cpu=row_by_row, default=plain)


def chunk_count(inputs: int, size: int) -> int:
    """Into how many chunks of rows a matrix of ``size`` bytes is cut: a power of 2 that divides its rows."""
    wanted = round(math.log2(max(size / CHUNK_BYTES, 1)))
    return math.gcd(min(2**wanted, MAX_CHUNKS), inputs)
