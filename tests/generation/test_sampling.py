"""The whole list against upstream's, and draws against the probabilities that they should have."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, MoshiForCausalLM

from tests.configs import tiny_moshi_config
from transformers_moshi_flax.generation.configuration import merge_generation_config, resolve_plan
from transformers_moshi_flax.generation.sampling import (
    TOP_P_CANDIDATES,
    Sampling,
    process_logits,
    row_keys,
    select_token,
)

VOCAB, PROMPT, CAPACITY, ROWS = 20, 3, 8, 2

process = jax.jit(process_logits)
select = jax.jit(select_token)


def sampling(top_k: int | None = None, bound: int = 64, **numbers: Any) -> Sampling:
    operands = {name: jnp.float32(number) for name, number in {"temperature": 1.0, **numbers}.items()}
    return Sampling(**operands, top_k=None if top_k is None else jnp.int32(top_k), top_k_bound=bound, do_sample=True)


@pytest.fixture(scope="module")
def theirs() -> MoshiForCausalLM:
    with torch.device("meta"):
        return MoshiForCausalLM(tiny_moshi_config())


some = st.none()
tokens = st.integers(1, VOCAB - 1)
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "do_sample": st.booleans(),
    "temperature": st.floats(0.3, 3),
    "top_k": st.sampled_from([0, 3, 12, 50]),
    "top_p": st.floats(0.3, 1),
    "min_p": st.floats(0.01, 0.3),
    "typical_p": st.floats(0.3, 1),
    "epsilon_cutoff": st.floats(0, 0.1),
    "eta_cutoff": st.floats(0, 0.1),
    "repetition_penalty": st.floats(0.5, 2),
    "no_repeat_ngram_size": st.integers(0, 2),
    "bad_words_ids": st.just([[4], [1, 2], [0]]),
    "sequence_bias": st.just([[[3], 1.5], [[1, 2], -2.0]]),
    "min_length": st.integers(0, CAPACITY),
    "min_new_tokens": st.integers(0, CAPACITY - PROMPT),
    "forced_bos_token_id": tokens,
    "forced_eos_token_id": st.just([0, 2]),
    "remove_invalid_values": st.booleans(),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 3), st.floats(1, 1.5)),
    "suppress_tokens": st.just([5, 9]),
    "begin_suppress_tokens": st.just([6, 7]),
    "renormalize_logits": st.booleans(),
    "num_beams": st.sampled_from([1, 3]),
}


@pytest.mark.filterwarnings("ignore:.*has no effect:UserWarning")  # some are drawn without what they need
def test_list_equals_upstream(theirs: MoshiForCausalLM) -> None:
    """Options are drawn few at a time; eager on our side, as nearly every draw would be another program."""

    @settings(derandomize=True, deadline=None, max_examples=70, database=None)
    @given(st.data(), st.integers(0, 2**32 - 1), st.integers(PROMPT, CAPACITY - 1), st.booleans())
    def check(data: Any, seed: int, cur_len: int, sample: bool) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=5, unique=True))
        options = {"do_sample": sample, **{name: data.draw(OPTIONS[name]) for name in names}}
        options |= {"eos_token_id": [0, 11], "max_length": CAPACITY, "pad_token_id": 19}
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(ROWS, VOCAB)).astype(np.float32) * 2
        ids = rng.integers(0, 4, (ROWS, CAPACITY)).astype(np.int32)
        mask = np.array([[0, 1, 1], [1, 1, 1]], np.int32)

        config, _ = theirs._prepare_generation_config(GenerationConfig(**options))
        theirs._prepare_special_tokens(config, device="cpu")
        if config.min_new_tokens is not None:
            config.min_length = config.min_new_tokens + PROMPT
        processors = theirs._get_logits_processor(
            config, input_ids_seq_length=PROMPT, model_kwargs={"attention_mask": torch.from_numpy(mask)}, device="cpu"
        )
        expected = processors(torch.from_numpy(ids[:, :cur_len]).long(), torch.from_numpy(logits)).numpy()

        merged, _ = merge_generation_config(GenerationConfig(), None, options)
        plan = resolve_plan(merged, PROMPT, VOCAB, ROWS, attention_mask=jnp.asarray(mask))
        actual = process_logits(jnp.asarray(logits), jnp.asarray(ids), cur_len, plan.sampling)
        np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)

    check()


# A vocabulary in which the candidates are a part, and one that is all candidates.
FILTERS: dict[str, Sampling] = {
    "none": sampling(),
    "temperature": sampling(temperature=0.5),
    "top-k": sampling(top_k=9),
    "top-p": sampling(top_p=0.8),
    "top-k and top-p": sampling(top_k=30, top_p=0.9, temperature=1.5),
    "min-p": sampling(min_p=0.1),
    "everything": sampling(
        top_k=40, top_p=0.95, min_p=0.02, typical_p=0.9, epsilon_cutoff=0.01, eta_cutoff=0.02, temperature=0.9
    ),
}
NOBODY = jnp.zeros((1, 1), jnp.int32)


@pytest.mark.parametrize(
    ("name", "vocab_size"), [*((name, 600) for name in FILTERS), ("top-p", 50), ("everything", 50)]
)
def test_draws_have_the_probabilities(name: str, vocab_size: int) -> None:
    number = 4000
    logits = jax.random.normal(jax.random.key(vocab_size), (1, vocab_size)) * 2.5
    probabilities = np.asarray(jax.nn.softmax(process(logits, NOBODY, 1, FILTERS[name])), np.float64)[0]
    keys = jax.random.split(jax.random.key(1), number)
    drawn = np.asarray(select(jnp.repeat(logits, number, 0), jnp.repeat(NOBODY, number, 0), 1, keys, 0, FILTERS[name]))
    counts = np.bincount(drawn, minlength=vocab_size)
    assert counts[probabilities == 0].sum() == 0, "an impossible token was drawn"
    expected = probabilities / probabilities.sum() * number
    often = expected >= 5
    observed, wanted = [*counts[often], counts[~often].sum()], [*expected[often], expected[~often].sum()]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-3
    shifted = np.roll(wanted, 1)
    assert scipy.stats.chisquare(observed, shifted).pvalue < 1e-6, "the test cannot tell distributions apart"


def test_widely_spread_top_p_sorts_the_vocabulary() -> None:
    """More tokens than candidates have the probability together: the row is sorted, its neighbour is not."""
    size = 2 * TOP_P_CANDIDATES
    logits = jnp.stack([jnp.zeros(size).at[0].set(0.5), jnp.zeros(size).at[7].set(20.0)])
    options = sampling(top_p=0.9)
    kept = np.isfinite(process(logits, jnp.repeat(NOBODY, 2, 0), 1, options)).sum(axis=1)
    assert abs(kept[0] - 0.9 * size) < 3 and kept[1] == 1
    keys = jax.random.split(jax.random.key(0), 400)
    drawn = select(jnp.repeat(logits[:1], 400, 0), jnp.repeat(NOBODY, 400, 0), 1, keys, 0, options)
    assert (np.asarray(drawn) >= TOP_P_CANDIDATES).mean() > 0.3


def test_more_ties_than_the_bound() -> None:
    """All are kept by ``process_logits``; a draw is one of the first."""
    logits = jnp.zeros((1, 300))
    options = sampling(top_k=3)
    assert np.isfinite(process(logits, NOBODY, 1, options)).sum() == 300
    keys = jax.random.split(jax.random.key(0), 500)
    drawn = np.asarray(select(jnp.zeros((500, 300)), jnp.repeat(NOBODY, 500, 0), 1, keys, 0, options))
    assert drawn.max() == 63 and len(np.unique(drawn)) > 55


@pytest.mark.parametrize("name", ["none", "top-p", "everything"])
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    rows = 5
    scale = jnp.array([0.01, 3.0, 1.0, 8.0, 2.0])[:, None]
    logits = jax.random.normal(jax.random.key(0), (rows, 2 * TOP_P_CANDIDATES)) * scale
    keys = row_keys(jax.random.key(3), rows)
    history = jnp.zeros((rows, 1), jnp.int32)
    together = select(logits, history, 1, keys, 2, FILTERS[name])
    for row in range(rows):
        # other neighbours, another slot
        tokens = select(jnp.tile(logits[row], (rows, 1)), history, 1, jnp.roll(keys, 3 - row), 2, FILTERS[name])
        assert tokens[3] == together[row]
    other = [select(logits, history, 1, keys, stream, FILTERS[name]) for stream in (0, 1)]
    assert any((np.asarray(tokens) != np.asarray(together)).any() for tokens in other)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_neighbours_make_no_difference_to_other_generators(impl: str) -> None:
    """Their own numbers depend on them."""
    given = jax.random.split(jax.random.key(0, impl=impl), 4)
    logits, history = jnp.zeros((4, 5000)), jnp.zeros((4, 1), jnp.int32)
    together = select(logits, history, 1, row_keys(given, 4), 0, Sampling(do_sample=True))
    assert len(set(np.asarray(together).tolist())) == 4
    for row in range(4):
        alone = select(logits[:1], history[:1], 1, row_keys(given[row : row + 1], 1), 0, Sampling(do_sample=True))
        assert alone[0] == together[row]
    one = [row_keys(jax.random.key(seed, impl=impl), 2) for seed in (0, 1)]
    assert len({key.tobytes() for keys in one for key in np.asarray(jax.random.key_data(keys))}) == 4
    raw = jax.random.key_data(jax.random.key(1, impl=impl))
    with jax.default_prng_impl(impl):
        assert (row_keys(raw, 2) == one[1]).all()


def test_other_numbers_compile_nothing() -> None:
    @jax.jit
    def program(logits: jax.Array, options: Sampling) -> tuple[jax.Array, jax.Array]:
        keys = row_keys(jax.random.key(0), 1)
        return process_logits(logits, NOBODY, 1, options), select_token(logits, NOBODY, 1, keys, 0, options)

    logits = jax.random.normal(jax.random.key(0), (1, 100))
    for k, p in ((1, 0.5), (50, 0.7), (64, 0.99)):
        values = {"top_k": k, "top_p": p, "temperature": p, "typical_p": p, "repetition_penalty": 1 + p}
        config, _ = merge_generation_config(GenerationConfig(), None, {"do_sample": True, **values})
        program(logits, resolve_plan(config, 1, 100, 1).sampling)
    assert program._cache_size() == 1


def test_row_keys() -> None:
    keys = row_keys(jax.random.key(0), 3)
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in keys}) == 3
    for same in (row_keys(keys, 3), row_keys(jax.random.PRNGKey(0), 3), row_keys(jax.random.key(0), 4)[:3]):
        np.testing.assert_array_equal(jax.random.key_data(same), jax.random.key_data(keys))


def test_half_precision_is_processed_in_float32() -> None:
    logits = jnp.asarray([[1.0, 2.0]], dtype=jnp.bfloat16)
    scores = process_logits(logits, NOBODY, 1, sampling(temperature=0.3))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, np.array([[1, 2]]) / 0.3, rtol=1e-6)
