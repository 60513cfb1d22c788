"""The ring of keys and values, against rows that are kept whole."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.configs import tiny_moshi_config
from transformers_moshi_flax.models.ring_cache import RingCache, write_steps

BATCH = 3


@settings(max_examples=25, deadline=None)
@given(window=st.integers(1, 9), steps=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_a_query_sees_its_window_alone(window: int, steps: int, seed: int) -> None:
    """Rows rest and start again at random; every query finds exactly the last ``window`` steps of its row."""
    rng = np.random.default_rng(seed)
    config = tiny_moshi_config(sliding_window=window, num_hidden_layers=1)
    heads, size = config.num_key_value_heads, config.head_dim
    cache = RingCache.create(config, BATCH, steps=steps)
    kept: list[list[int]] = [[] for _ in range(BATCH)]
    count = 0
    for _ in range(14):
        restart, active = rng.random(BATCH) < 0.1, rng.random(BATCH) < 0.7
        cache = cache.reset(jnp.asarray(restart))
        kept = [[] if again else row for again, row in zip(restart, kept)]
        names = 1 + count + np.arange(BATCH * steps).reshape(BATCH, steps)  # each step of each row has a number
        count += BATCH * steps
        new = np.broadcast_to(names[:, None, :, None], (BATCH, heads, steps, size)).reshape(-1, steps, size)
        (array,) = cache.keys
        array = write_steps(array, jnp.asarray(new, jnp.float32), cache.slot)
        np.testing.assert_array_equal(cache.positions(steps)[:, 0], [len(row) for row in kept])
        mask = np.asarray(cache.mask(steps, window))
        contents = np.asarray(array).reshape(BATCH, heads, -1, size)
        for row in np.flatnonzero(active):
            kept[row] += list(names[row])
            for query in range(steps):
                end = len(kept[row]) - (steps - 1 - query)
                seen = np.sort(contents[row, :, mask[row, query]], axis=0)
                expected = kept[row][max(end - window, 0) : end]
                np.testing.assert_array_equal(seen, np.broadcast_to(np.reshape(expected, (-1, 1, 1)), seen.shape))
        cache = cache.replace(keys=(array,)).advance(steps, jnp.asarray(active))


def test_both_ways_of_writing_are_equal() -> None:
    """The scatter of accelerators and the single updates of CPUs."""
    rng = np.random.default_rng(0)
    array, new = (jnp.asarray(rng.standard_normal((6, slots, 4)), jnp.float32) for slots in (8, 2))
    slot = jnp.array([6, 0, 4], dtype=jnp.int32)
    expected = np.array(array)
    for row in range(3):
        expected[2 * row : 2 * row + 2, slot[row] : slot[row] + 2] = new[2 * row : 2 * row + 2]
    np.testing.assert_array_equal(write_steps(array, new, slot), expected)
    branches = jax.make_jaxpr(write_steps)(array, new, slot).jaxpr.eqns[-1].params["branches"]
    assert len(branches) == 2
    for branch in branches:
        np.testing.assert_array_equal(jax.core.eval_jaxpr(branch.jaxpr, branch.consts, array, new, slot)[0], expected)
