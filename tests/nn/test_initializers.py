"""Random initial values: their distributions, and how many programs draw them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from transformers_moshi_flax.nn.initializers import (
    LONGEST,
    SHORTEST,
    kaiming_normal,
    normal,
    uniform,
    without_values,
)


@pytest.mark.parametrize("size", [SHORTEST, SHORTEST + 1, LONGEST + 1])
def test_distributions(size):
    key = jax.random.key(1)
    shape = (size, 1)
    assert stats.kstest(normal(0.02)(key, shape).ravel(), stats.norm(scale=0.02).cdf).pvalue > 0.01
    assert stats.kstest(uniform(0.3)(key, shape).ravel(), stats.uniform(-0.3, 0.6).cdf).pvalue > 0.01
    three_inputs = kaiming_normal(key, (1, 3, size))
    assert stats.kstest(np.ravel(three_inputs), stats.norm(scale=(2 / 3) ** 0.5).cdf).pvalue > 0.01


def test_other_keys_give_other_numbers():
    first, second = (normal(1.0)(jax.random.key(seed), (3, 5)) for seed in range(2))
    assert first.shape == (3, 5) and first.dtype == jnp.float32
    assert not np.any(np.asarray(first) == np.asarray(second))


def test_the_same_inside_of_a_program():
    key = jax.random.key(3)
    for initializer in (normal(0.5), uniform(0.5), kaiming_normal):
        inside = jax.jit(lambda key, initializer=initializer: initializer(key, (7, 9)))(key)
        np.testing.assert_allclose(initializer(key, (7, 9)), inside, rtol=1e-6)


def test_equal_initializers_are_one():
    assert normal(0.02) is normal(0.02)
    assert normal(0.02) is not normal(0.03)


def test_shapes_and_deviations_share_the_program_that_draws(count_compilations):
    key = jax.random.key(0)
    normal(1.0)(key, (40, 50))
    count_compilations()
    normal(0.5)(key, (40, 50))
    assert count_compilations() == 0
    normal(1.0)(key, (4, 5, 6))  # but it is cut out by one of its own
    assert count_compilations() == 1


def test_without_values_only_shapes_are_made():
    key = jax.random.key(0)
    for initializer in (normal(0.7), uniform(0.7), kaiming_normal):
        before = initializer(key, (3, 41), jnp.bfloat16)
        with without_values():
            traced = jax.make_jaxpr(lambda key, initializer=initializer: initializer(key, (3, 41), jnp.bfloat16))(key)
        assert traced.out_avals[0] == jax.typeof(before)
        assert [equation.primitive.name for equation in traced.eqns] == ["empty"]
        np.testing.assert_array_equal(initializer(key, (3, 41), jnp.bfloat16), before)
