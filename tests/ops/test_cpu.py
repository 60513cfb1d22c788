"""Every twin for CPUs equals the definition of its operation, and no other platform gets one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lowering import counted, lowered
from transformers_moshi_flax.ops import attention, codebook, convolution, linear, selection
from transformers_moshi_flax.ops.dispatch import for_cpu

MODULES = (attention, codebook, convolution, linear, selection)


def both(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """What the definition gives and what the twin gives."""
    results = []
    for which in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            for module in MODULES:
                patch.setattr(
                    module, "for_cpu", lambda *pair_and_arrays, i=which: pair_and_arrays[i](*pair_and_arrays[2:])
                )
            results.append(jax.jit(lambda *args: function(*args))(*args))
    return tuple(results)


def assert_twins(function: Callable[..., Any], *args: Any, tolerance: float = 1e-5) -> None:
    definition, twin = both(function, *args)
    for expected, found in zip(jax.tree.leaves(definition), jax.tree.leaves(twin), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        if jnp.issubdtype(found.dtype, jnp.floating):
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * (np.abs(expected).max() + 1e-6))
        else:
            np.testing.assert_array_equal(found, expected)


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("queries", "slots"), [(5, 5), (1, 7), (2, 7), (1, 1030), (2, 1030)])
def test_attention(heads: int, groups: int, queries: int, slots: int, dtype: Any) -> None:
    arrays = [normal(2, queries, heads, 6), normal(2, slots, groups, 6, seed=1), normal(2, slots, groups, 6, seed=2)]
    arrays = [array.astype(dtype) for array in arrays]
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for used in {slots, min(slots, 100)}:
        mask = np.random.default_rng(3).random((2, queries, slots)) < 0.7
        mask[:, :, used:] = False
        mask[:, :, 0] = True
        for weights in (True, False):
            assert_twins(
                lambda *args, wanted=weights: attention.attention(*args, output_weights=wanted),
                *arrays,
                jnp.asarray(mask),
                tolerance=tolerance,
            )
    definition, _ = both(attention.attention, *arrays, jnp.asarray(mask))
    weights = definition[1].astype(jnp.float32)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-2)
    assert (np.asarray(weights)[~np.broadcast_to(mask[:, None], weights.shape)] == 0).all()


def test_attention_without_weights_is_the_same() -> None:
    query, key, value = normal(2, 3, 4, 8), normal(2, 5, 2, 8, seed=1), normal(2, 5, 2, 8, seed=2)
    mask = jnp.asarray(np.tril(np.ones((3, 5), bool), 2)[None])
    with_weights, none = (attention.attention(query, key, value, mask, output_weights=w) for w in (True, False))
    assert none[1] is None
    np.testing.assert_allclose(none[0], with_weights[0], atol=1e-5)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("options", [{"scale": 0.2}, {"soft_cap": 0.5}, {"scale": 2.0, "soft_cap": 1.5}])
def test_scaled_and_capped_scores(options: dict[str, float], weights: bool) -> None:
    """As written out."""
    query, key, value = normal(1, 3, 4, 8), normal(1, 5, 2, 8, seed=1), normal(1, 5, 2, 8, seed=2)
    mask = np.tril(np.ones((3, 5), bool), 2)[None]
    scores = np.einsum("bqhd,bshd->bhqs", query, np.repeat(key, 2, axis=2)) * options.get("scale", 8**-0.5)
    if "soft_cap" in options:
        scores = options["soft_cap"] * np.tanh(scores / options["soft_cap"])
    shares = np.where(mask[:, None], np.exp(scores), 0)
    mixed = np.einsum("bhqs,bshd->bqhd", shares / shares.sum(-1, keepdims=True), np.repeat(value, 2, axis=2))
    capped = partial(attention.attention, output_weights=weights, **options)
    for found in both(lambda *args: capped(*args), query, key, value, jnp.asarray(mask)):
        np.testing.assert_allclose(found[0], mixed, rtol=0, atol=1e-5)


def test_a_query_that_sees_nothing_attends_all_alike() -> None:
    value = normal(1, 4, 1, 3)
    mask = jnp.zeros((1, 1, 4), bool)
    for result in both(attention.attention, normal(1, 1, 1, 3), normal(1, 4, 1, 3), value, mask):
        np.testing.assert_allclose(result[0], value.mean(1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_written_steps(steps: int) -> None:
    array, new = normal(6, 8, 4), normal(6, steps, 4, seed=1)
    index = jnp.array([6, 0, 4], dtype=jnp.int32)
    assert_twins(attention.write_steps, array, new, index, tolerance=0)
    expected = np.array(array)
    for row in range(3):
        expected[2 * row : 2 * row + 2, index[row] : index[row] + steps] = new[2 * row : 2 * row + 2]
    np.testing.assert_array_equal(attention.write_steps(array, new, index), expected)


def test_stored_and_restored() -> None:
    array = normal(2, 5, 3, 4)
    np.testing.assert_array_equal(attention.restored(attention.stored(array), 2), array)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2),
    width=st.integers(1, 5),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    per_group=st.integers(1, 3),
    frames=st.integers(1, 20),
)
def test_convolutions(
    batch: int, width: int, stride: int, dilation: int, groups: int, per_group: int, frames: int
) -> None:
    x = normal(batch, (width - 1) * dilation + 1 + (frames - 1) * stride, groups * per_group)
    kernel = normal(width, per_group, 2 * groups, seed=1)
    assert_twins(lambda x, kernel: convolution.conv1d(x, kernel, stride, dilation, groups), x, kernel)
    x, kernel = normal(batch, frames, groups * per_group), normal(width, 2, groups * per_group, seed=2)
    assert_twins(lambda x, kernel: convolution.conv_transpose1d(x, kernel, stride, groups), x, kernel)


def test_a_depthwise_transposed_convolution() -> None:
    x, kernel = normal(2, 4, 6), normal(4, 1, 6, seed=1)
    assert_twins(lambda x, kernel: convolution.conv_transpose1d(x, kernel, 2, 6), x, kernel)


@pytest.mark.parametrize("rows", [1, 3])
def test_nearest_entries(rows: int) -> None:
    total, usage = normal(2048, 16), jnp.exp(normal(2048, seed=1))
    x = normal(rows, 1, 16, seed=2)
    assert_twins(codebook.squared_norms, total)
    squares = codebook.squared_norms(total)
    assert_twins(codebook.nearest_entries, total, usage, squares, x)
    entries = np.asarray(total / usage[:, None], np.float64)
    expected = np.square(np.asarray(x, np.float64)[..., None, :] - entries).sum(-1).argmin(-1)
    np.testing.assert_array_equal(codebook.nearest_entries(total, usage, squares, x), expected)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), levels=st.sampled_from([3, 50, 100_000]))
def test_largest_numbers_with_ties(seed: int, levels: int) -> None:
    """Of equal numbers the first one comes first, in both."""
    x = jnp.asarray(np.random.default_rng(seed).integers(0, levels, (2, 9001)), jnp.float32)
    assert_twins(lambda x: selection.top_k(x, 64), x, tolerance=0)
    expected = np.argsort(-np.asarray(x), axis=1, kind="stable")[:, :64]
    np.testing.assert_array_equal(selection.top_k(x, 64)[1], expected)


def test_the_largest_number() -> None:
    x = normal(3, 400).at[0, 7].set(jnp.nan).at[1].set(0.0).at[2, 5].set(jnp.inf)
    assert_twins(selection.argmax, x)


def test_taken_rows_of_groups() -> None:
    x, members = normal(2, 3, 4, 5), jnp.array([[2, 2, 0], [1, 0, 1]])
    assert_twins(selection.take_group_rows, x, members, tolerance=0)
    expected = np.stack([np.asarray(x)[row, np.asarray(members)[row]] for row in range(2)])
    np.testing.assert_array_equal(selection.take_group_rows(x, members), expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_products_of_few_rows(rows: int) -> None:
    dimensions = (((1,), (0,)), ((), ()))
    x, kernel = normal(rows, 1024), normal(1024, 768, seed=1)
    assert_twins(lambda x, kernel: linear.dot_general(x, kernel, dimensions), x, kernel)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_program_holds_one_of_both(platform: str) -> None:
    """Nothing is left in it of the other one, nor of the choice."""

    def function(x: jax.Array) -> jax.Array:
        return for_cpu(jnp.sin, jnp.cos, x)

    names = {name: counted(lowered(function, name, jnp.zeros(2))) for name in ("cpu", platform)}
    assert names["cpu"]["cosine"] == 1 and not names["cpu"]["sine"]
    assert names[platform]["sine"] == 1 and not names[platform]["cosine"]
    assert not any(op.is_branch for op in lowered(function, platform, jnp.zeros(2)))


def test_branches_are_seen() -> None:
    def function(x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x)

    assert sum(op.is_branch for op in lowered(function, "tpu", jnp.zeros(2))) == 1
