"""The product of few rows with a matrix: in pieces on CPUs, plain elsewhere, the same everywhere."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from transformers_moshi_flax.ops.cpu import batched_dot, chunk_count, term_count
from transformers_moshi_flax.ops.linear import dot_general

LARGE = (1024, 768)


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layer = nn.Dense(kernel.shape[1], use_bias=False, dot_general=dot_general)
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


def exported(rows: int, platform: str, shape: tuple[int, int] = LARGE, dtype: str = "float32") -> str:
    arguments = jnp.zeros((rows, shape[0]), dtype), jnp.zeros(shape, dtype)
    return jax.export.export(jax.jit(row_product), platforms=[platform])(*arguments).mlir_module()


def row_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return dot_general(x, kernel, (((1,), (0,)), ((), ())))


def test_a_row_is_cut_into_chunks_on_cpus_only():
    assert "batching_dims" in exported(1, "cpu")
    assert "batching_dims" not in exported(3, "cpu") + exported(1, "tpu")


def test_two_rows_are_one_complex_sum_on_cpus_only():
    assert "complex<f32>" in exported(2, "cpu") and "stablehlo.dot_general" not in exported(2, "cpu")
    for other in (exported(1, "cpu"), exported(3, "cpu"), exported(2, "tpu"), exported(2, "cuda")):
        assert "complex<" not in other


def test_two_rows_without_a_complex_number_of_their_kind_are_multiplied_one_after_another():
    for product in (exported(2, "cpu", dtype="bfloat16"), exported(2, "cpu", (512, 384))):
        assert product.count("batching_dims") == 2 and "complex<" not in product


def test_two_rows_read_the_matrix_once_and_copy_nothing():
    kernel = jnp.zeros(LARGE)
    compiled = jax.jit(row_product).lower(jnp.zeros((2, 1024)), kernel).compile()
    main = re.search(r"ENTRY.*?\n}", compiled.as_text(), re.DOTALL)[0]
    matrix = re.search(r"%(\S+) = f32\[1024,768\]\S* parameter", main)[1]
    for _ in range(2):  # a view of it, and what reads the view
        readers = re.findall(rf"%(\S+) = (\S+) (\w+)\([^)]*%{re.escape(matrix)}[,)]", main)
        assert len(readers) == 1
        matrix, _, kind = readers[0]
    assert kind == "fusion"
    assert compiled.memory_analysis().temp_size_in_bytes < kernel.nbytes / 4


@pytest.mark.parametrize("matrix", [LARGE, (512, 512), (8192, 32), (1536, 200), (704, 400)])
def test_two_rows_in_double_precision(matrix: tuple[int, int]):
    rng = np.random.default_rng(1)
    x, kernel = rng.standard_normal((2, matrix[0])), rng.standard_normal(matrix)
    with jax.enable_x64():
        x, kernel = jnp.asarray(x), jnp.asarray(kernel)
        result = row_product(x, kernel)
        assert result.dtype == jnp.float64
    np.testing.assert_allclose(result, np.asarray(x) @ np.asarray(kernel), rtol=0, atol=1e-11)


def test_gradients_of_two_rows():
    rng = np.random.default_rng(2)
    x, kernel, weights = (jnp.float32(rng.standard_normal(shape)) for shape in ((2, 1024), LARGE, (2, 768)))
    gradients = jax.grad(lambda *args: (row_product(*args) * weights).sum(), (0, 1))(x, kernel)
    for found, expected in zip(gradients, (weights @ kernel.T, x.T @ weights)):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_batches_of_rows_equal_the_plain_products(rows: int):
    rng = np.random.default_rng(3)
    x, matrices = rng.standard_normal((4, rows, 60)), rng.standard_normal((4, 60, 25))
    result = jax.jit(batched_dot)(jnp.float32(x), jnp.float32(matrices))
    np.testing.assert_allclose(result, x @ matrices, atol=1e-4)


def test_terms_divide_the_rows():
    assert term_count(512, 512 * 512 * 4) == 8
    assert term_count(8192, 8192 * 1024 * 4) == 16
    assert term_count(1000, 1000 * 700 * 4) == 1
    assert term_count(512, 512 * 256 * 4) == 1


def test_chunks_divide_the_rows():
    assert chunk_count(512, 512 * 512 * 4) == 2
    assert chunk_count(2816, 2816 * 1024 * 4) == 16
    assert chunk_count(1001, 1001 * 1024 * 4) == 1
    assert chunk_count(64, 64 * 64 * 4) == 1
