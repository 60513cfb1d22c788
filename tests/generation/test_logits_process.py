"""Every processor against upstream's PyTorch class of the same name, on drawn scores and histories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as upstream

from transformers_moshi_flax import generation as ours
from transformers_moshi_flax.generation.logits_process import FlaxLogitsProcessorList

ROWS, VOCAB, CAPACITY = 3, 24, 12
START = VOCAB  # the start token, past the scores

drawn = settings(derandomize=True, deadline=None, max_examples=60, database=None)
tokens = st.integers(0, VOCAB - 1)
token_lists = st.lists(tokens, min_size=2, max_size=2, unique=True)
unit = st.floats(0.02, 0.98)
kept = st.sampled_from([1, 2, 5])
lengths = st.integers(2, 4)
biases = st.floats(-5, 5)
pairs = st.tuples(tokens, tokens)
triples = st.tuples(tokens, tokens, tokens)


# The numbers of ids are fixed: they are part of the compiled program.
def sequence_biases(draw: Callable[..., Any]) -> dict[tuple[int, ...], float]:
    singles = draw(st.lists(tokens, min_size=2, max_size=2, unique=True))
    longer = [*draw(st.lists(pairs, min_size=3, max_size=3, unique=True)), draw(triples)]
    return {sequence: draw(biases) for sequence in [(single,) for single in singles] + longer}


def words(draw: Callable[..., Any]) -> list[list[int]]:
    eos = [0]
    singles = draw(st.lists(st.integers(1, VOCAB - 1), min_size=2, max_size=2, unique=True))
    longer = draw(st.lists(pairs, min_size=3, max_size=3, unique=True))
    return [eos, *([single] for single in singles), *(list(pair) for pair in longer), list(draw(triples))]


# class name without its prefix: arguments, drawn
CASES: dict[str, Callable[[Callable[..., Any]], dict[str, Any]]] = {
    "TemperatureLogitsWarper": lambda draw: {"temperature": draw(st.floats(0.05, 5))},
    "TopKLogitsWarper": lambda draw: {"top_k": draw(st.integers(1, 30)), "min_tokens_to_keep": draw(kept)},
    "TopPLogitsWarper": lambda draw: {"top_p": draw(unit), "min_tokens_to_keep": draw(kept)},
    "MinPLogitsWarper": lambda draw: {"min_p": draw(unit), "min_tokens_to_keep": draw(kept)},
    "TypicalLogitsWarper": lambda draw: {"mass": draw(unit), "min_tokens_to_keep": draw(kept)},
    "EpsilonLogitsWarper": lambda draw: {"epsilon": draw(unit) / 4, "min_tokens_to_keep": draw(kept)},
    "EtaLogitsWarper": lambda draw: {"epsilon": draw(unit) / 4, "min_tokens_to_keep": draw(kept)},
    "MinLengthLogitsProcessor": lambda draw: {"min_length": draw(lengths), "eos_token_id": draw(token_lists)},
    "MinNewTokensLengthLogitsProcessor": lambda draw: {
        "prompt_length_to_skip": draw(st.integers(0, 4)),
        "min_new_tokens": draw(lengths),
        "eos_token_id": draw(token_lists),
    },
    "ForcedBOSTokenLogitsProcessor": lambda draw: {"bos_token_id": draw(tokens)},
    "ForcedEOSTokenLogitsProcessor": lambda draw: {"max_length": draw(lengths), "eos_token_id": draw(token_lists)},
    "SuppressTokensLogitsProcessor": lambda draw: {"suppress_tokens": draw(token_lists)},
    "SuppressTokensAtBeginLogitsProcessor": lambda draw: {
        "begin_suppress_tokens": draw(token_lists),
        "begin_index": draw(lengths),
    },
    "NoRepeatNGramLogitsProcessor": lambda draw: {"ngram_size": draw(st.integers(1, 4))},
    "RepetitionPenaltyLogitsProcessor": lambda draw: {
        "penalty": draw(st.floats(0.3, 3)),
        "prompt_ignore_length": draw(st.sampled_from([None, 0, 2, np.array([0, 1, 3])])),
    },
    "SequenceBiasLogitsProcessor": lambda draw: {"sequence_bias": sequence_biases(draw)},
    "NoBadWordsLogitsProcessor": lambda draw: {"bad_words_ids": words(draw), "eos_token_id": 0},
    "ExponentialDecayLengthPenalty": lambda draw: {
        "exponential_decay_length_penalty": (draw(st.integers(0, 6)), draw(st.floats(0.8, 1.5))),
        "eos_token_id": draw(token_lists),
        "input_ids_seq_length": draw(st.integers(0, 4)),
    },
    "InfNanRemoveLogitsProcessor": lambda draw: {},
    "LogitNormalization": lambda draw: {},
}


@jax.jit
def run(processor: Any, input_ids: jax.Array, scores: jax.Array, cur_len: jax.Array) -> jax.Array:
    return processor(input_ids, scores, cur_len)


def histories(rng: np.random.Generator) -> np.ndarray:
    """Few different tokens, so that they repeat; with start tokens, and after them what must not matter."""
    ids = rng.integers(0, rng.choice([3, VOCAB]), (ROWS, CAPACITY)).astype(np.int32)
    ids[:, : rng.integers(0, 3)] = START
    return ids


def scores_of(rng: np.random.Generator, name: str) -> np.ndarray:
    scores = (rng.normal(size=(ROWS, VOCAB)) * rng.choice([0.3, 1, 4])).astype(np.float32)
    impossible = rng.random(scores.shape) < 0.2
    scores[impossible & (np.arange(VOCAB) != 5)] = -np.inf
    if name == "InfNanRemoveLogitsProcessor":
        scores[0, :3] = np.nan, np.inf, -np.inf
    return scores


def in_torch(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}


def check_equal(actual: Any, expected: Any) -> None:
    np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_equals_upstream(name: str) -> None:
    changed = []

    @drawn
    @given(st.data(), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 5, CAPACITY]))
    def check(data: Any, seed: int, cur_len: int) -> None:
        arguments = CASES[name](data.draw)
        rng = np.random.default_rng(seed)
        scores, ids = scores_of(rng, name), histories(rng)
        theirs = getattr(upstream, name)(**in_torch(arguments))
        expected = theirs(torch.from_numpy(ids[:, :cur_len]).long(), torch.from_numpy(scores.copy())).numpy()
        processor = getattr(ours, f"Flax{name}")(**arguments)
        actual = run(processor, ids, scores, jnp.int32(cur_len))
        check_equal(actual, expected)
        other = np.concatenate([ids[:, :cur_len], rng.integers(-5, 2 * VOCAB, (ROWS, CAPACITY - cur_len))], axis=1)
        np.testing.assert_array_equal(run(processor, other.astype(np.int32), scores, jnp.int32(cur_len)), actual)
        changed.append(not np.array_equal(expected, scores, equal_nan=True))

    check()
    assert sum(changed) >= 3, "the draws hardly ever change anything: the comparison would prove nothing"


@pytest.mark.parametrize("name", CASES)
def test_other_numbers_compile_nothing(name: str) -> None:
    """Sizes are drawn once, then numbers and ids vary."""
    static = {"min_tokens_to_keep": 1, "ngram_size": 2, "prompt_ignore_length": np.array([0, 1, 3])}
    rng = np.random.default_rng(0)
    scores, ids = jnp.asarray(scores_of(rng, name)), jnp.asarray(histories(rng))

    @jax.jit
    def program(processor: Any, cur_len: jax.Array) -> jax.Array:
        return processor(ids, scores, cur_len)

    @settings(drawn, max_examples=5)
    @given(st.data(), st.integers(1, CAPACITY))
    def check(data: Any, cur_len: int) -> None:
        arguments = CASES[name](data.draw)
        arguments |= {key: value for key, value in static.items() if key in arguments}
        program(getattr(ours, f"Flax{name}")(**arguments), jnp.int32(cur_len))

    check()
    assert program._cache_size() == 1


def test_ties_with_the_kth_are_kept_even_beyond_the_bound() -> None:
    scores = np.repeat(np.float32([[2.0, 1.0, 0.0]]), 100, axis=1)
    kept_scores = ours.FlaxTopKLogitsWarper(120)(jnp.zeros((1, 1), jnp.int32), jnp.asarray(scores), 1)
    expected = upstream.TopKLogitsWarper(120)(None, torch.from_numpy(scores))
    np.testing.assert_array_equal(kept_scores, expected.numpy())
    assert np.isfinite(kept_scores).sum() == 200


def test_penalty_per_prompt_serves_its_beams() -> None:
    ids = jnp.array([[1, 2, 3]] * 4)
    ignored = np.array([1, 2], np.int32)
    scores = jnp.ones((4, VOCAB))
    beams = ours.FlaxRepetitionPenaltyLogitsProcessor(2.0, ignored)(ids, scores, 3)
    single = ours.FlaxRepetitionPenaltyLogitsProcessor(2.0, np.repeat(ignored, 2))(ids, scores, 3)
    np.testing.assert_array_equal(beams, single)
    assert beams[0, 2] == 0.5 and beams[2, 2] == 1


def test_forced_tokens() -> None:
    processor = ours.FlaxForceTokensLogitsProcessor({2: 7, 3: None, 4: 0})
    scores = jnp.asarray(scores_of(np.random.default_rng(0), ""))
    ids = np.zeros((ROWS, CAPACITY), np.int32)
    for cur_len in range(1, 7):
        actual = run(processor, ids, scores, jnp.int32(cur_len))
        forced = {2: 7, 4: 0}.get(cur_len)
        expected = scores if forced is None else jnp.full_like(scores, -jnp.inf).at[:, forced].set(0)
        np.testing.assert_array_equal(actual, expected)
    pairs = ours.FlaxForceTokensLogitsProcessor([[2, 7], [4, 0]])
    np.testing.assert_array_equal(pairs.force_token_map, processor.force_token_map)


def test_a_bias_of_minus_infinity_forbids() -> None:
    scores = jnp.asarray(scores_of(np.random.default_rng(0), ""))
    bias = {(1,): -np.inf, (0, 2): -np.inf, (3,): 1.0}
    actual = run(
        ours.FlaxSequenceBiasLogitsProcessor(bias), np.zeros((ROWS, CAPACITY), np.int32), scores, jnp.int32(1)
    )
    expected = upstream.SequenceBiasLogitsProcessor(bias)(
        torch.zeros(ROWS, 1).long(), torch.from_numpy(np.array(scores))
    )
    np.testing.assert_array_equal(actual, expected.numpy())


class TestList:
    ids = np.zeros((ROWS, CAPACITY), np.int32)

    def test_applies_in_order_functions_too(self) -> None:
        def double(input_ids: Any, scores: Any, cur_len: Any) -> Any:
            return scores * 2

        members = [ours.FlaxTemperatureLogitsWarper(0.5), double, ours.FlaxSuppressTokensLogitsProcessor([1])]
        processors = FlaxLogitsProcessorList(members)
        actual = run(processors, self.ids, jnp.ones((ROWS, VOCAB)), jnp.int32(1))
        expected = jnp.full((ROWS, VOCAB), 4.0).at[:, 1].set(-jnp.inf)
        np.testing.assert_array_equal(actual, expected)
        assert [type(member) for member in jax.tree.map(lambda x: x, processors)] == [type(m) for m in members]

    def test_a_custom_one_takes_the_place_of_its_class(self) -> None:
        own = [ours.FlaxTemperatureLogitsWarper(0.5), ours.FlaxSuppressTokensLogitsProcessor([1])]
        custom = [ours.FlaxForcedBOSTokenLogitsProcessor(3), ours.FlaxTemperatureLogitsWarper(2.0)]
        merged = FlaxLogitsProcessorList(own).merged_with(custom)
        assert merged == [custom[1], own[1], custom[0]]


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "temperature": ("TemperatureLogitsWarper", {"temperature": 0.0}),
    "top_k": ("TopKLogitsWarper", {"top_k": 0}),
    "min_tokens_to_keep": ("TopKLogitsWarper", {"top_k": 3, "min_tokens_to_keep": 0}),
    "top_p": ("TopPLogitsWarper", {"top_p": 1.1}),
    "min_p": ("MinPLogitsWarper", {"min_p": -0.1}),
    "mass": ("TypicalLogitsWarper", {"mass": 1.0}),
    "epsilon": ("EpsilonLogitsWarper", {"epsilon": "0.1"}),
    "epsilon ": ("EtaLogitsWarper", {"epsilon": 0.0}),
    "min_length": ("MinLengthLogitsProcessor", {"min_length": 1.5, "eos_token_id": 0}),
    "eos_token_id": ("MinLengthLogitsProcessor", {"min_length": 1, "eos_token_id": -1}),
    "min_new_tokens": (
        "MinNewTokensLengthLogitsProcessor",
        {"prompt_length_to_skip": 0, "min_new_tokens": -1, "eos_token_id": 0},
    ),
    "bos_token_id": ("ForcedBOSTokenLogitsProcessor", {"bos_token_id": None}),
    "max_length": ("ForcedEOSTokenLogitsProcessor", {"max_length": -1, "eos_token_id": 0}),
    "suppress_tokens": ("SuppressTokensLogitsProcessor", {"suppress_tokens": [1.0]}),
    "begin_index": ("SuppressTokensAtBeginLogitsProcessor", {"begin_suppress_tokens": [1], "begin_index": -1}),
    "force_token_map": ("ForceTokensLogitsProcessor", {"force_token_map": [[0, -1]]}),
    "ngram_size": ("NoRepeatNGramLogitsProcessor", {"ngram_size": 0}),
    "penalty": ("RepetitionPenaltyLogitsProcessor", {"penalty": 0.0}),
    "prompt_ignore_length": ("RepetitionPenaltyLogitsProcessor", {"penalty": 1.0, "prompt_ignore_length": -1}),
    "sequence_bias": ("SequenceBiasLogitsProcessor", {"sequence_bias": {(): 1.0}}),
    "sequence_bias ": ("SequenceBiasLogitsProcessor", {"sequence_bias": [[[1], None]]}),
    "sequence_bias  ": ("SequenceBiasLogitsProcessor", {"sequence_bias": {(1,): np.inf}}),
    # beyond float32 and int32
    " temperature": ("TemperatureLogitsWarper", {"temperature": 1e-45}),
    " top_k": ("TopKLogitsWarper", {"top_k": 2**31}),
    " min_length": ("MinLengthLogitsProcessor", {"min_length": 2**31, "eos_token_id": 0}),
    " eos_token_id": ("MinLengthLogitsProcessor", {"min_length": 1, "eos_token_id": 2**31}),
    " bad_words_ids": ("NoBadWordsLogitsProcessor", {"bad_words_ids": [[2**31]]}),
    " penalty": ("RepetitionPenaltyLogitsProcessor", {"penalty": np.inf}),
    " exponential_decay_length_penalty": (
        "ExponentialDecayLengthPenalty",
        {"exponential_decay_length_penalty": (2**31, 2.0), "eos_token_id": 0, "input_ids_seq_length": 0},
    ),
    "bad_words_ids": ("NoBadWordsLogitsProcessor", {"bad_words_ids": [[1], []]}),
    "exponential_decay_length_penalty": (
        "ExponentialDecayLengthPenalty",
        {"exponential_decay_length_penalty": (1.5, 2.0), "eos_token_id": 0, "input_ids_seq_length": 0},
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    class_name, arguments = WRONG[name]
    with pytest.raises(ValueError, match=f"`{name.strip()}` must be .*, but is "):
        getattr(ours, f"Flax{class_name}")(**arguments)


def test_ids_outside_the_vocabulary() -> None:
    scores, ids = jnp.zeros((1, 4)), jnp.zeros((1, 1), jnp.int32)
    for processor in (
        ours.FlaxSequenceBiasLogitsProcessor({(4,): 1.0}),
        ours.FlaxNoBadWordsLogitsProcessor([[1, 4]]),
    ):
        with pytest.raises(ValueError, match=r"token ids in \[0, 4\), but is 4"):
            processor(ids, scores, 1)
