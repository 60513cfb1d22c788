"""Scales that are quantized themselves: an independent construction; products, the same on CPUs and elsewhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.test_quantization import drawn, independent
from transformers_moshi_flax.ops import cpu_native
from transformers_moshi_flax.ops.quantization import BITS, NF4, dequantize, quantize, quantize_scales, quantized_dot
from transformers_moshi_flax.ops.scales import QuantizedScales, float_scales

BLOCK = 256


def twice(matrix: np.ndarray, kind: str, groups: int) -> tuple[jax.Array, QuantizedScales]:
    """Its codes, and its scales, quantized as well."""
    codes, scales = quantize(jnp.asarray(matrix), kind, groups)
    return codes, quantize_scales(scales)


def independent_scales(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, steps, and what the codes stand for, one block after another."""
    groups, outputs = scales.shape
    mean = np.float32(scales.mean(dtype=np.float64))
    codes, values = np.zeros((groups, outputs), int), np.zeros((groups, outputs), np.float32)
    steps = np.zeros((groups, -(-outputs // BLOCK)), np.float32)
    for group in range(groups):
        for block in range(steps.shape[1]):
            columns = slice(block * BLOCK, min((block + 1) * BLOCK, outputs))
            rest = scales[group, columns] - mean
            step = np.abs(rest).max() / np.float32(127)
            steps[group, block] = step
            codes[group, columns] = np.rint(rest / step) if step else 0
            values[group, columns] = codes[group, columns].astype(np.float32) * step + mean
    return codes, steps, values


@pytest.mark.parametrize(("groups", "outputs"), [(1, 3), (3, 256), (2, 257), (4, 700)])
def test_equals_an_independent_construction(groups: int, outputs: int) -> None:
    """Also of blocks that are shorter."""
    scales = np.abs(drawn(groups, outputs)) + 1
    found = quantize_scales(jnp.asarray(scales))
    codes, steps, values = independent_scales(scales)
    assert found.codes.dtype == jnp.int8 and found.steps.dtype == found.mean.dtype == jnp.float32
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_allclose(found.steps, steps, rtol=1e-6, atol=1e-8)  # the mean is rounded otherwise
    np.testing.assert_allclose(found.mean, scales.mean(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(float_scales(found), values, rtol=1e-6)
    assert sum(leaf.nbytes for leaf in found) == groups * (outputs + 4 * -(-outputs // BLOCK)) + 4


@pytest.mark.parametrize("kind", BITS)
def test_a_matrix_equals_an_independent_construction(kind: str) -> None:
    """The codes are those beside scales of floats."""
    matrix, groups = drawn(24, 300), 3
    codes, scales, _ = independent(matrix, kind, groups)
    table = np.float32(NF4)[codes] if kind == "nf4" else codes.astype(np.float32)
    expected = table * np.repeat(independent_scales(scales)[2], 24 // groups, axis=0)
    found, own = quantize(jnp.asarray(matrix), kind, groups)
    np.testing.assert_allclose(dequantize(found, quantize_scales(own), kind), expected, rtol=2e-6)


@settings(max_examples=5, deadline=None)
@given(
    kind=st.sampled_from([*BITS]),
    half=st.integers(1, 20),
    groups=st.integers(1, 4),
    outputs=st.integers(1, 600),
    rows=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_any_shape(kind: str, half: int, groups: int, outputs: int, rows: int, seed: int) -> None:
    """A number is off by half a step of its own and what half a step of its scale makes of it, at most."""
    inputs = 2 * half * groups
    matrix, x = jnp.asarray(drawn(inputs, outputs, seed)), jnp.asarray(drawn(rows, inputs, seed + 1))
    codes, scales = quantize(matrix, kind, groups)
    own = quantize_scales(scales)
    off = np.repeat(own.steps, BLOCK, axis=1)[:, :outputs] / 2
    assert (np.abs(float_scales(own) - scales) <= 1.0001 * off + 1e-6).all()
    step, largest = (np.diff(NF4).max(), 1) if kind == "nf4" else (1, {"int8": 127, "int4": 7}[kind])
    bound = np.repeat(scales * step / 2 + largest * off, inputs // groups, axis=0)
    values = dequantize(codes, own, kind)
    assert (np.abs(values - matrix) <= 1.0001 * bound + 1e-5).all()
    expected = np.asarray(x, np.float64) @ np.asarray(values, np.float64)
    assert np.abs(quantized_dot(x, codes, own, kind) - expected).max() <= 1e-5 * np.abs(expected).max() + 1e-6


@pytest.mark.parametrize("kind", BITS)
def test_groups_of_zeros_and_numbers_that_are_not_finite(kind: str) -> None:
    matrix = drawn(8, 300)
    matrix[:4, 7] = 0
    values = np.asarray(dequantize(*twice(matrix, kind, 2), kind))
    np.testing.assert_array_equal(values[:4, 7], 0)
    matrix[1, 1] = np.inf
    assert not np.isfinite(dequantize(*twice(matrix, kind, 2), kind)).any()


@pytest.fixture(params=["compiled", "tiles"])
def on_cpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How products of few rows are computed: by the library, or without it."""
    if request.param == "tiles":
        monkeypatch.setattr(cpu_native, "is_built", lambda: False)
    elif not cpu_native.is_built():
        pytest.skip("the package was installed without a C++ compiler")
    return request.param


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize(("shape", "dtype"), [((), "float32"), ((5,), "float32"), ((2, 1), "bfloat16")])
def test_cpus_compute_the_definition(kind: str, shape: tuple[int, ...], dtype: str, on_cpus: str) -> None:
    """Of a matrix of several tiles, and of a block that is shorter; with its gradient."""
    codes, scales = twice(drawn(2048, 1200), kind, 64)
    draw = np.random.default_rng(1)
    x, cotangent = (jnp.asarray(draw.standard_normal((*shape, size)), dtype) for size in (2048, 1200))
    found, pull_back = jax.vjp(jax.jit(lambda x: quantized_dot(x, codes, scales, kind)), x)
    assert found.dtype == x.dtype and found.shape == (*shape, 1200)
    matrix = np.asarray(dequantize(codes, scales, kind), np.float64)
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    for ours, theirs in (
        (found, np.asarray(x, np.float64) @ matrix),
        (pull_back(cotangent)[0], np.asarray(cotangent, np.float64) @ matrix.T),
    ):
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=tolerance * np.abs(theirs).max())


@given(
    kind=st.sampled_from([*BITS]),
    rows=st.integers(1, cpu_native.MOST_ROWS),
    members=st.integers(1, 20),
    groups=st.integers(1, 5),
    blocks=st.integers(1, 40),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=6)
def test_the_library_takes_all_sizes(kind: str, rows: int, members: int, groups: int, blocks: int, seed: int) -> None:
    inputs, outputs = 2 * members * groups, cpu_native.LANES * blocks
    codes, scales = twice(drawn(inputs, outputs, seed), kind, groups)
    x = jnp.asarray(drawn(rows, inputs, seed + 1))
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(codes, scales, kind), np.float64)
    found = quantized_dot(x, codes, scales, kind)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_library_mapped() -> None:
    codes, scales = twice(drawn(256, 512), "nf4", 8)
    x = jnp.asarray(drawn(6, 256))
    alone = np.stack([quantized_dot(row, codes, scales, "nf4") for row in x])
    np.testing.assert_array_equal(jax.vmap(lambda row: quantized_dot(row, codes, scales, "nf4"))(x), alone)


def test_tiles_and_library_are_for_cpus_only(on_cpus: str) -> None:
    codes, scales = twice(drawn(64, 512), "nf4", 2)

    def program(platform: str) -> str:
        traced = jax.jit(lambda *args: quantized_dot(*args, "nf4")).trace(jnp.zeros((1, 64)), codes, scales)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert ("QuantizedDotNf4Double" in program("cpu")) == (on_cpus == "compiled")
    for platform in ("cuda", "tpu"):
        text = program(platform)
        assert "stablehlo.while" not in text and "optimization_barrier" in text and "custom_call" not in text


@pytest.mark.parametrize("rows", [1, 16])
def test_a_loop_keeps_no_float_scales_beside_it(rows: int, on_cpus: str) -> None:
    """Neither in a loop of frames, nor between the way forward and the way back."""
    layers = [twice(drawn(512, 2048, seed), "nf4", 256) for seed in range(8)]
    float_bytes = sum(4 * scales.codes.size for _, scales in layers)

    def frames(x: jax.Array, layers: Any) -> jax.Array:
        def frame(_: int, x: jax.Array) -> jax.Array:
            for codes, scales in layers:
                x = x + quantized_dot(x, codes, scales, "nf4")[:, :512]
            return x

        return jax.lax.fori_loop(0, 10, frame, x)

    x = jnp.zeros((rows, 512))
    for function in (frames, jax.grad(lambda x, layers: frames(x, layers).sum())):
        compiled = jax.jit(function).lower(x, layers).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < float_bytes / 2
