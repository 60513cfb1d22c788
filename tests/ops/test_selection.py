"""The largest numbers and their places, as NumPy finds them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from transformers_moshi_flax.ops.selection import argmax, top_k

SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1.0, -1.0, 1e-40, -1e-40, 3.4e38]


@settings(deadline=None)
@given(
    x=arrays(
        np.float32,
        array_shapes(min_dims=1, max_dims=3, max_side=6),
        elements=st.sampled_from(SPECIAL) | st.floats(width=32),
    ),
    data=st.data(),
)
def test_as_numpys(x: np.ndarray, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    flushed = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)  # XLA has no subnormal numbers
    found = argmax(jnp.asarray(x), axis)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, flushed.argmax(axis))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3, 40)), dtype).at[0, 1, 7].set(jnp.nan)
        np.testing.assert_array_equal(argmax(x), jnp.argmax(x, axis=-1))
        np.testing.assert_array_equal(argmax(-jnp.abs(x), 0), jnp.argmin(jnp.abs(x), axis=0))


@pytest.mark.parametrize("size", [50, 8192, 9001])
def test_top_k(size: int) -> None:
    scores = jax.random.normal(jax.random.key(size), (3, size)).at[1, 4:].set(-jnp.inf)
    for number in (1, 40):
        values, ids = jax.jit(top_k, static_argnums=1)(scores, number)
        expected = np.sort(scores, axis=-1)[:, ::-1][:, :number]
        np.testing.assert_array_equal(values, expected)
        finite = np.isfinite(values)
        found = np.take_along_axis(np.asarray(scores), np.minimum(ids, size - 1), axis=-1)
        np.testing.assert_array_equal(found[finite], np.asarray(values)[finite])
