"""The caches: the ring against rows that are kept whole, what is reordered, what may be seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.configs import tiny_moshi_config
from transformers_moshi_flax.nn.cache import (
    BLOCK,
    LinearCache,
    NoCache,
    PackedTexts,
    RingCache,
    StaticCache,
    layer_keys,
)
from transformers_moshi_flax.ops.attention import write_steps

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
        nexts, after = cache.next_steps(steps, window, BATCH, jnp.asarray(active)[:, None])
        (array,) = cache.keys
        array = write_steps(array, jnp.asarray(new, jnp.float32), nexts.index)
        np.testing.assert_array_equal(nexts.positions[:, 0], [len(row) for row in kept])
        mask = np.asarray(nexts.mask)
        contents = np.asarray(array).reshape(BATCH, heads, -1, size)
        for row in np.flatnonzero(active):
            kept[row] += list(names[row])
            for query in range(steps):
                end = len(kept[row]) - (steps - 1 - query)
                seen = np.sort(contents[row, :, mask[row, query]], axis=0)
                expected = kept[row][max(end - window, 0) : end]
                np.testing.assert_array_equal(seen, np.broadcast_to(np.reshape(expected, (-1, 1, 1)), seen.shape))
        cache = after.with_layers([(array, array)])


@pytest.mark.parametrize(("begin", "end"), [(0, 150), (3, 150), (70, 71), (5, 5), (149, 150)])
def test_reordered_slots(begin: int, end: int) -> None:
    """The slots of the range follow the parents whatever the blocks, and those before it stay."""
    capacity, num_beams, heads = 150, 3, 4
    assert capacity % BLOCK and capacity > 2 * BLOCK
    rng = np.random.default_rng(begin)
    parents = np.array([[0, 0, 1], [2, 1, 2]])
    keys = rng.standard_normal((2, num_beams, heads, capacity, 5)).astype(np.float32)
    mask = rng.integers(0, 2, (2, num_beams, capacity)).astype(bool)
    flat = jnp.asarray(keys.reshape(-1, capacity, 5))
    cache = LinearCache((flat,), (flat + 1,), jnp.asarray(mask.reshape(-1, capacity)), jnp.int32(7))
    actual = jax.jit(LinearCache.reorder)(cache, jnp.asarray(parents, jnp.int32), jnp.int32(begin), jnp.int32(end))
    np.testing.assert_array_equal(actual.values[0], actual.keys[0] + 1)
    for name, array in (("keys", keys), ("mask", mask)):
        reordered = np.asarray(actual.keys[0] if name == "keys" else actual.mask).reshape(array.shape)
        for row, beam in np.ndindex(2, num_beams):
            moved, parent = reordered[row, beam], array[row, parents[row, beam]]
            np.testing.assert_array_equal(
                moved[..., begin:end, :] if name == "keys" else moved[begin:end],
                parent[..., begin:end, :] if name == "keys" else parent[begin:end],
            )
            kept = array[row, beam]
            np.testing.assert_array_equal(
                moved[..., :begin, :] if name == "keys" else moved[:begin],
                kept[..., :begin, :] if name == "keys" else kept[:begin],
            )
    assert actual.length == 7


@pytest.mark.parametrize("kind", [LinearCache, StaticCache])
def test_what_a_linear_cache_shows(kind: type) -> None:
    """Step by step and at once, the same may be seen: what counts, is not later, and is in the window."""
    config = tiny_moshi_config(num_hidden_layers=1)
    counts = np.array([[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0]])
    cache = kind.create(config, 2, 6)
    whole, _ = NoCache().next_steps(6, 3, 2, jnp.asarray(counts))
    expected = np.zeros((2, 6, 6), bool)
    for query in range(6):
        for key in range(max(query - 2, 0), query + 1):
            expected[:, query, key] = counts[:, key]
    np.testing.assert_array_equal(whole.mask, expected)
    np.testing.assert_array_equal(whole.positions, np.arange(6)[None])
    for start, length in ((0, 2), (2, 1), (3, 3)):
        steps, cache = cache.next_steps(length, 3, 2, jnp.asarray(counts[:, start : start + length]))
        assert int(steps.index) == start and int(cache.length) == start + length
        np.testing.assert_array_equal(steps.positions, np.arange(start, start + length)[None])
        shown = np.asarray(steps.mask)
        np.testing.assert_array_equal(shown, expected[:, start : start + length, : shown.shape[-1]])
        assert not expected[:, start : start + length, shown.shape[-1] :].any()


def test_keys_are_read_by_slots_and_heads() -> None:
    config = tiny_moshi_config(num_hidden_layers=2)
    cache = LinearCache.create(config, 3, 5)
    for array in layer_keys(cache, 1, 3):
        assert array.shape == (3, 5, config.num_key_value_heads, config.head_dim)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 4),
)
def test_texts_of_a_row_do_not_see_each_other(rows: list[list[int]], window: int | None) -> None:
    """Every step sees what it sees where its text is alone, at the same position; padding sees and shows nothing."""
    steps = max(map(sum, rows)) + 1
    segments = np.zeros((len(rows), steps), np.int32)
    masks, positions = np.zeros((len(rows), steps, steps), bool), np.zeros((len(rows), steps), np.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for name, length in enumerate(lengths, 1):
            part = slice(start, start + length)
            alone, _ = NoCache().next_steps(length, window, 1)
            segments[row, part], masks[row, part, part] = name, alone.mask[0]
            positions[row, part] = alone.positions[0]
            start += length
    found, _ = PackedTexts(jnp.asarray(segments)).next_steps(steps, window, len(rows))
    np.testing.assert_array_equal(found.mask, masks)
    np.testing.assert_array_equal(np.where(segments > 0, found.positions, 0), positions)
