"""The product of few rows with a matrix: in chunks on CPUs, plain elsewhere, the same everywhere."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from transformers_moshi_flax.models.dots import chunk_count, row_dot_general

LARGE = (1024, 768)


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layer = nn.Dense(kernel.shape[1], use_bias=False, dot_general=row_dot_general)
    return layer.apply({"params": {"kernel": kernel}}, x)


@pytest.mark.parametrize("shape", [(1, 1), (1,), (3, 1), (1, 1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("matrix", [LARGE, (1000, 700), (64, 8)])
def test_equals_the_plain_product(shape: tuple[int, ...], matrix: tuple[int, int]):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((*shape, matrix[0])), rng.standard_normal(matrix)
    result = jax.jit(dense)(jnp.float32(x), jnp.float32(kernel))
    assert result.shape == (*shape, matrix[1])
    np.testing.assert_allclose(result, x @ kernel, atol=1e-3 * np.abs(x @ kernel).mean())


def test_gradients_pass_through():
    kernel = jnp.ones(LARGE)
    gradient = jax.grad(lambda kernel: dense(jnp.ones((1, 1024)), kernel).sum())(kernel)
    np.testing.assert_array_equal(gradient, np.ones(LARGE))


def test_one_or_two_rows_are_cut_on_cpus_only():
    kernel = jnp.zeros(LARGE)

    def products(rows: int, platform: str) -> str:
        exported = jax.export.export(jax.jit(dense), platforms=[platform])(jnp.zeros((rows, 1024)), kernel)
        return exported.mlir_module()

    assert "batching_dims" in products(1, "cpu")
    assert products(2, "cpu").count("batching_dims") == 2
    assert "batching_dims" not in products(3, "cpu")
    assert "batching_dims" not in products(1, "tpu") + products(2, "tpu")


def test_chunks_divide_the_rows():
    assert chunk_count(512, 512 * 512 * 4) == 2
    assert chunk_count(2816, 2816 * 1024 * 4) == 16
    assert chunk_count(1001, 1001 * 1024 * 4) == 1
    assert chunk_count(64, 64 * 64 * 4) == 1
