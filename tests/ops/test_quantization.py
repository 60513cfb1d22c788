"""Quantized matrices: equal to independent constructions; products, the same on CPUs and elsewhere."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from transformers_moshi_flax.ops import cpu_native
from transformers_moshi_flax.ops.cpu import tile_count
from transformers_moshi_flax.ops.quantization import (
    BITS,
    NF4,
    dequantize,
    quantize,
    quantize_with_offsets,
    quantized_dot,
)

LARGEST = {"int8": 127, "int4": 7, "nf4": 1}


def drawn(inputs: int, outputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((inputs, outputs)).astype(np.float32)


def independent(matrix: np.ndarray, kind: str, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each number becomes, one group after another: codes, not packed, scales, and what they stand for."""
    inputs, outputs = matrix.shape
    size = inputs // groups
    codes = np.zeros((inputs, outputs), int)
    scales, values = np.zeros((groups, outputs), np.float32), np.zeros((inputs, outputs), np.float32)
    for group in range(groups):
        rows = slice(group * size, (group + 1) * size)
        for column in range(outputs):
            numbers = matrix[rows, column]
            scale = np.abs(numbers).max() / np.float32(LARGEST[kind])
            scaled = numbers / scale if scale else numbers
            if kind == "nf4":
                codes[rows, column] = np.abs(scaled[:, None] - np.float32(NF4)).argmin(axis=1)
                values[rows, column] = np.float32(NF4)[codes[rows, column]] * scale
            else:
                codes[rows, column] = np.rint(scaled)
                values[rows, column] = codes[rows, column].astype(np.float32) * scale
            scales[group, column] = scale
    return codes, scales, values


def unpacked(codes: np.ndarray, kind: str) -> np.ndarray:
    if BITS[kind] == 8:
        return codes.astype(int)
    rows = np.zeros((2 * len(codes), codes.shape[1]), int)
    rows[0::2], rows[1::2] = codes % 16, codes // 16
    return rows - 8 if kind == "int4" else rows


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(8, 3, 1), (12, 5, 3), (64, 7, 2)])
def test_equals_an_independent_construction(kind: str, inputs: int, outputs: int, groups: int) -> None:
    matrix = drawn(inputs, outputs)
    codes, scales = quantize(jnp.asarray(matrix), kind, groups)
    expected_codes, expected_scales, values = independent(matrix, kind, groups)
    assert codes.dtype == (jnp.int8 if kind == "int8" else jnp.uint8)
    np.testing.assert_array_equal(unpacked(np.asarray(codes), kind), expected_codes)
    # XLA divides by 127 and 7 as a product with their reciprocals, rounded once more
    np.testing.assert_allclose(scales, expected_scales, rtol=2e-7)
    np.testing.assert_allclose(dequantize(codes, scales, kind), values, rtol=2e-7)


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from([*BITS]),
    half=st.integers(1, 20),
    groups=st.integers(1, 4),
    outputs=st.integers(1, 9),
    rows=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_any_shape(kind: str, half: int, groups: int, outputs: int, rows: int, seed: int) -> None:
    """Half a step is the most that a number is off; products are those of the dequantized matrix."""
    inputs = 2 * half * groups
    matrix, x = jnp.asarray(drawn(inputs, outputs, seed)), jnp.asarray(drawn(rows, inputs, seed + 1))
    codes, scales = quantize(matrix, kind, groups)
    values = dequantize(codes, scales, kind)
    step = np.diff(NF4).max() if kind == "nf4" else 1
    bound = np.repeat(scales, inputs // groups, axis=0) * step / 2
    assert (np.abs(values - matrix) <= bound * 1.0001).all()
    product = quantized_dot(x, codes, scales, kind)
    expected = np.asarray(x, np.float64) @ np.asarray(values, np.float64)
    assert np.abs(product - expected).max() <= 1e-5 * np.abs(expected).max() + 1e-6


def test_int8_is_torchs_formula() -> None:
    matrix = drawn(48, 10)
    weight = torch.from_numpy(matrix.T.copy())  # (out, in)
    scb = weight.abs().amax(dim=1, keepdim=True)
    expected = torch.round(weight / (scb / 127)).to(torch.int8)
    codes, scales = quantize(jnp.asarray(matrix), "int8", 1)
    np.testing.assert_array_equal(codes, expected.numpy().T)
    np.testing.assert_allclose(scales[0], (scb / 127)[:, 0].numpy(), rtol=2e-7)


def test_nf4_is_the_table_of_bitsandbytes() -> None:
    """As its ``create_normal_map`` makes it: quantiles on both sides of 0, scaled to [-1, 1]."""
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    table = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(NF4, table / table.max(), atol=2e-7)


@pytest.mark.parametrize("kind", BITS)
def test_zeros_and_numbers_that_are_not_finite(kind: str) -> None:
    matrix = np.zeros((8, 3), np.float32)
    matrix[1, 1], matrix[2, 2] = np.nan, np.inf
    values = dequantize(*quantize(jnp.asarray(matrix), kind, 1), kind)
    np.testing.assert_array_equal(values[:, 0], 0)
    assert not np.isfinite(values[:, 1:]).all(axis=0).any()


@pytest.fixture(params=["compiled", "tiles"])
def on_cpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How products of few rows are computed: by the library, or without it."""
    if request.param == "tiles":
        monkeypatch.setattr(cpu_native, "is_built", lambda: False)
    elif not cpu_native.is_built():
        pytest.skip("the package was installed without a C++ compiler")
    return request.param


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((), "float32"), ((2, 1), "float32"), ((5,), "float32"), ((1,), "bfloat16")]
)
def test_cpus_compute_the_definition(kind: str, shape: tuple[int, ...], dtype: str, on_cpus: str) -> None:
    """Of a matrix of several tiles; what other platforms run is the product with the dequantized one."""
    codes, scales = quantize(jnp.asarray(drawn(2048, 1200)), kind, 1 if kind == "int8" else 64)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((*shape, 2048)), dtype)
    found = jax.jit(lambda *args: quantized_dot(*args, kind))(x, codes, scales)
    assert found.dtype == x.dtype and found.shape == (*shape, 1200)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(codes, scales, kind), np.float64)
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.skipif(shutil.which("g++") is None, reason="without a compiler there is no library")
def test_the_library_is_built() -> None:
    assert cpu_native.is_built()


@given(
    kind=st.sampled_from([*BITS]),
    rows=st.integers(1, cpu_native.MOST_ROWS),
    members=st.integers(1, 20),
    groups=st.integers(1, 5),
    blocks=st.integers(1, 40),
    offsets=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=30)
def test_the_library_takes_all_sizes(
    kind: str, rows: int, members: int, groups: int, blocks: int, offsets: bool, seed: int
) -> None:
    inputs, outputs = 2 * members * groups, cpu_native.LANES * blocks
    matrix = jnp.asarray(drawn(inputs, outputs, seed))
    made = (quantize_with_offsets if offsets and kind != "nf4" else quantize)(matrix, kind, groups)
    codes, scales, *rest = made
    x = jnp.asarray(drawn(rows, inputs, seed + 1))
    found = quantized_dot(x, codes, scales, kind, *rest)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(codes, scales, kind, *rest), np.float64)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", BITS)
def test_the_library_in_a_loop_and_mapped(kind: str) -> None:
    """Also when several programs call it at once."""
    layers = [quantize(jnp.asarray(drawn(256, 256, seed)), kind, 4) for seed in range(3)]

    def states(x: jax.Array) -> jax.Array:
        def step(_: Any, x: jax.Array) -> jax.Array:
            for codes, scales in layers:
                x = jnp.tanh(quantized_dot(x, codes, scales, kind))
            return x

        return jax.lax.fori_loop(0, 20, step, x)

    x = jnp.asarray(drawn(6, 256))
    alone = np.stack([jax.jit(states)(row[None])[0] for row in x])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda row: states(row[None])[0]))(x), alone)
    program = jax.jit(states).lower(x[:1]).compile()
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda row: np.asarray(program(row[None]))[0], x))
    np.testing.assert_array_equal(np.stack(found), alone)


def program(kind: str, platform: str, rows: int = 1) -> str:
    codes, scales = quantize(jnp.asarray(drawn(64, 32)), kind, 2)
    # a function of its own, as traces are kept
    traced = jax.jit(lambda *args: quantized_dot(*args, kind)).trace(jnp.zeros((rows, 64)), codes, scales)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("kind", BITS)
def test_tiles_and_library_are_for_cpus_only(kind: str, on_cpus: str) -> None:
    few, many = program(kind, "cpu"), program(kind, "cpu", rows=cpu_native.MOST_ROWS + 1)
    assert ("stablehlo.while" in few) != ("QuantizedDot" in few) == (on_cpus == "compiled")
    assert "stablehlo.while" in many and "QuantizedDot" not in many
    for platform in ("cuda", "tpu"):
        text = program(kind, platform)
        assert "stablehlo.while" not in text and "optimization_barrier" in text and "custom_call" not in text


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [((1,), 1, "float32"), ((3, 2), 64, "float32"), ((40,), 64, "float32"), ((2,), 64, "bfloat16")],
)
def test_gradients_are_those_of_the_dequantized_matrix(
    kind: str, shape: tuple[int, ...], groups: int, dtype: str
) -> None:
    """Of a matrix of several tiles."""
    codes, scales = quantize(jnp.asarray(drawn(2048, 600)), kind, groups)
    draw = np.random.default_rng(1)
    x = jnp.asarray(draw.standard_normal((*shape, 2048)), dtype)
    cotangent = jnp.asarray(draw.standard_normal((*shape, 600)), dtype)

    def pulled_back(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: quantized_dot(x, codes, scales, kind), x)[1](cotangent)[0]

    found = jax.jit(pulled_back)(x, cotangent)
    assert found.dtype == x.dtype and found.shape == x.shape
    expected = np.asarray(cotangent, np.float64) @ np.asarray(dequantize(codes, scales, kind), np.float64).T
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "groups"), [("int8", 1), ("int4", 64)])
def test_gradients_with_offsets(kind: str, groups: int) -> None:
    codes, scales, offsets = quantize_with_offsets(jnp.asarray(drawn(2048, 600) + 0.3), kind, groups)
    x = jnp.zeros((2, 3, 2048))
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 600)), jnp.float32)
    found = jax.vjp(lambda x: quantized_dot(x, codes, scales, kind, offsets), x)[1](cotangent)[0]
    matrix = np.asarray(dequantize(codes, scales, kind, offsets), np.float64)
    expected = np.asarray(cotangent, np.float64) @ matrix.T
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", BITS)
def test_gradients_keep_no_floats(kind: str) -> None:
    """Neither forward nor backward is there a whole matrix of floats."""
    layers = [quantize(jnp.asarray(drawn(1024, 1024, seed)), kind, 32) for seed in range(4)]

    def loss(x: jax.Array, layers: Any) -> jax.Array:
        for codes, scales in layers:
            x = jnp.tanh(quantized_dot(x, codes, scales, kind))
        return jnp.sum(x)

    compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros((8, 1024)), layers).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 1024 * 4
    text = jax.jit(jax.grad(loss)).trace(jnp.zeros((8, 1024)), layers).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" not in text


@pytest.mark.parametrize("kind", BITS)
def test_temporaries_do_not_grow_with_the_products(kind: str) -> None:
    """What a product's loop over tiles writes into is not there before the product."""

    def temporaries(products: int) -> int:
        layers = [quantize(jnp.asarray(drawn(64, 64, seed)), kind, 2) for seed in range(products)]

        def loss(x: jax.Array, layers: Any) -> jax.Array:
            for codes, scales in layers:
                x = x + quantized_dot(x, codes, scales, kind)
            return jnp.sum(x)

        compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros((512, 64)), layers).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(12) < temporaries(2) + 512 * 64 * 4


@pytest.mark.parametrize("kind", BITS)
def test_a_loop_keeps_no_floats_beside_it(kind: str) -> None:
    """XLA would make floats of all matrices before the loop; the temporaries stay far below a matrix of floats."""
    layers = [quantize(jnp.asarray(drawn(512, 512, seed)), kind, 16) for seed in range(8)]

    def frames(x: jax.Array, layers: Any) -> jax.Array:
        def frame(_: int, x: jax.Array) -> jax.Array:
            for codes, scales in layers:
                x = x + quantized_dot(x, codes, scales, kind)
            return x

        return jax.lax.fori_loop(0, 10, frame, x)

    compiled = jax.jit(frames).lower(jnp.zeros((1, 512)), layers).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 512 * 512 * 4


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(8, 3, 1), (64, 7, 2)])
def test_with_offsets(kind: str, inputs: int, outputs: int, groups: int) -> None:
    """The codes reach from the smallest to the largest number of a group; half a step is the most that one is off."""
    matrix = 3 + drawn(inputs, outputs)
    codes, scales, offsets = quantize_with_offsets(jnp.asarray(matrix), kind, groups)
    grouped, levels = matrix.reshape(groups, -1, outputs), 2 ** BITS[kind]
    steps = (grouped.max(axis=1) - grouped.min(axis=1)) / (levels - 1)
    np.testing.assert_allclose(scales, steps, rtol=3e-7)
    np.testing.assert_allclose(offsets, grouped.min(axis=1) + levels // 2 * steps, rtol=3e-7)
    found = unpacked(np.asarray(codes), kind).reshape(grouped.shape)
    assert (found.min(axis=1) == -levels // 2).all() and (found.max(axis=1) == levels // 2 - 1).all()
    values = np.asarray(dequantize(codes, scales, kind, offsets))
    np.testing.assert_allclose(
        values, (found * scales[:, None] + offsets[:, None]).reshape(inputs, outputs), rtol=3e-7
    )
    assert (np.abs(values - matrix).reshape(grouped.shape) <= 0.5001 * steps[:, None] + 1e-6).all()
    for rows in (1, 6):
        x = jnp.asarray(drawn(rows, inputs, 1))
        expected = np.asarray(x, np.float64) @ values.astype(np.float64)
        product = quantized_dot(x, codes, scales, kind, offsets)
        assert np.abs(product - expected).max() <= 1e-5 * np.abs(expected).max()


def test_offsets_of_one_number_alone() -> None:
    codes, scales, offsets = quantize_with_offsets(jnp.full((8, 2), -1.5), "int4", 2)
    np.testing.assert_array_equal(dequantize(codes, scales, "int4", offsets), -1.5)


def test_tiles() -> None:
    assert [tile_count(1024, 4 * 1024 * outputs) for outputs in (512, 5632, 32000)] == [2, 8, 32]
    assert tile_count(1, 10**9) == 1 and tile_count(7, 10**9) == 1
