"""One or two rows times a large matrix, on which generation spends its time, as fast as memory can be read."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

CHUNK_BYTES = 704 * 1024
MAX_CHUNKS = 16

# where pairs of rows pay, found by measurement (docs/benchmarks.md)
PAIRED_BYTES = 1024 * 1024
MAX_TERMS = 16
MIN_SUMS = 64


def row_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """``lax.dot_general`` for ``nn.Dense(dot_general=...)``; on CPUs, few rows are summed in pieces.

    XLA's CPU backend gives each thread a range of the *columns* of such a product, so that every thread reads a short
    piece of every row. As a batch of chunks of rows, each thread reads memory from end to end, which is up to 1.6
    times as fast (``docs/benchmarks.md``). More than one row makes the library copy the matrix first: two are
    :func:`paired`, or multiplied one after another if the matrix is small; from three rows on, the copy pays. Other
    platforms and other shapes get the plain product.
    """

    def plain(lhs, rhs):
        return lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type=preferred_element_type, **kwargs
        )

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

    inputs, size = rhs.shape[0], rhs.size * rhs.dtype.itemsize
    rows, chunks, terms = lhs.size // inputs, chunk_count(inputs, size), term_count(inputs, size)
    if rows > 2 or rows * chunks == 1 or dimension_numbers != (((lhs.ndim - 1,), (0,)), ((), ())):
        return plain(lhs, rhs)
    dtypes = {lhs.dtype, rhs.dtype, jnp.dtype(preferred_element_type or rhs.dtype)}
    has_complex = dtypes in ({jnp.dtype(jnp.float32)}, {jnp.dtype(jnp.float64)})
    on_cpu = partial(paired, terms=terms) if rows == 2 and terms > 1 and has_complex else row_by_row
    return lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=plain)


def paired(lhs: jax.Array, rhs: jax.Array, terms: int) -> jax.Array:
    """Two rows times a matrix in one pass, as real and imaginary part of the same sums.

    XLA's CPU backend compiles the sums of ``terms`` products each to one loop that reads the matrix from end to end;
    as two real arrays they would be two loops. The last sum stays out of that loop if there are more than 32 of them.
    """
    inputs, outputs = rhs.shape
    rows = lhs.reshape(2, inputs // terms, terms, 1)
    matrix = rhs.reshape(inputs // terms, terms, outputs)
    real, imag = (sum(row[:, term] * matrix[:, term] for term in range(terms)) for row in rows)
    products = jnp.sum(lax.complex(real, imag), axis=0)
    return jnp.stack([products.real, products.imag]).reshape(*lhs.shape[:-1], outputs)


def batched_row_dot(
    rows: Float[Array, "batch rows inputs"], matrices: Float[Array, "batch inputs outputs"]
) -> Float[Array, "batch rows outputs"]:
    """``rows @ matrices``; on CPUs, two rows are multiplied one after another, as it is with small matrices there."""

    def row_by_row(rows, matrices):
        return jnp.stack([jnp.einsum("bi,bio->bo", rows[:, row], matrices) for row in range(2)], axis=1)

    if rows.shape[1] != 2:
        return rows @ matrices
    return lax.platform_dependent(rows, matrices, cpu=row_by_row, default=jnp.matmul)


def term_count(inputs: int, size: int) -> int:
    """How many products of a matrix of ``size`` bytes are summed in one go: 1 where pairs don't pay."""
    terms = math.gcd(min(MAX_TERMS, inputs // MIN_SUMS), inputs)
    return terms if size >= PAIRED_BYTES and terms >= 8 else 1


def chunk_count(inputs: int, size: int) -> int:
    """Into how many chunks of rows a matrix of ``size`` bytes is cut: a power of 2 that divides its rows."""
    wanted = round(math.log2(max(size / CHUNK_BYTES, 1)))
    return math.gcd(min(2**wanted, MAX_CHUNKS), inputs)
