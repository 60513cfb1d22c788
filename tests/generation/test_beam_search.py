"""Beam search over text against upstream's, its parts, and that nothing depends on what it should not."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import MoshiForCausalLM, TextStreamer

from tests.configs import tiny_moshi_config
from tests.torch_oracle import Pair, assert_close, make_pair, numpy
from transformers_moshi_flax import FlaxMoshiForCausalLM
from transformers_moshi_flax.generation.beam_search import (
    advance_beams,
    choose_continuations,
    finish_beams,
    start_beams,
)
from transformers_moshi_flax.generation.decoding import Request, State, start
from transformers_moshi_flax.generation.recording import Recording
from transformers_moshi_flax.generation.sampling import Sampling

VOCAB = 23
# what programs are compiled for: number of beams, early_stopping, and which processors there are
PROGRAMS: list[tuple[int, bool | str, dict[str, Any]]] = [
    (2, True, {"min_length": st.integers(3, 9), "no_repeat_ngram_size": st.just(2)}),
    (3, "never", {}),
    (5, False, {"min_new_tokens": st.integers(1, 5), "repetition_penalty": st.sampled_from([0.8, 1.3, 2.0])}),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config = tiny_moshi_config(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1)
    return make_pair(MoshiForCausalLM, FlaxMoshiForCausalLM, config, tmp_path_factory.mktemp("text"), seed=3)


def on_host(output: Any) -> types.SimpleNamespace:
    """The output in NumPy: cutting on the device would compile a program for every length."""
    return types.SimpleNamespace(**jax.tree.map(np.asarray, dict(output.items())))


def draw_prompt(seed: int, length: int, batch_size: int = 2) -> dict[str, np.ndarray]:
    """Ids with their mask; the first row is left-padded if the seed is odd."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch_size, length), np.int32)
    if seed % 2:
        mask[0, : rng.integers(0, length)] = 0
    return {"input_ids": rng.integers(0, VOCAB, (batch_size, length)).astype(np.int32), "attention_mask": mask}


def check_steps(ours: tuple, theirs: tuple, name: str) -> None:
    """Hidden states or attentions of all steps and layers; of the prompt its last column, as others may be padding."""
    assert len(ours) == len(theirs)
    for step, (our_layers, their_layers) in enumerate(zip(ours, theirs)):
        assert len(our_layers) == len(their_layers)
        for one, other in zip(our_layers, their_layers):
            assert one.shape == other.shape
            assert_close(one[..., -1:, :], other[..., -1:, :], 1e-5, f"{name} of step {step}")


@pytest.mark.parametrize(("num_beams", "early_stopping", "processors"), PROGRAMS)
def test_upstream(pair: Pair, num_beams: int, early_stopping: bool | str, processors: dict[str, Any]) -> None:
    lengths, full = set(), not processors

    @settings(derandomize=True, deadline=None, max_examples=10, database=None, phases=[Phase.generate])
    @given(st.data())
    def check(data: st.DataObject) -> None:
        inputs = draw_prompt(data.draw(st.integers(0, 10**6)), data.draw(st.integers(2, 6)))
        options = {name: data.draw(values) for name, values in processors.items()} | {
            "num_beams": num_beams,
            "early_stopping": early_stopping,
            "max_new_tokens": data.draw(st.integers(8 if processors else 1, 14)),
            "length_penalty": data.draw(st.sampled_from([-2.0, -0.5, 0.0, 0.6, 1.0, 3.0])),
            "eos_token_id": data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3, unique=True)),
            "num_return_sequences": num_beams,
            "pad_token_id": VOCAB,
            "do_sample": False,
            "output_scores": True,
            "output_hidden_states": full,
            "output_attentions": full,
            "return_dict_in_generate": True,
        }
        expected = pair.theirs.generate(**{name: torch.from_numpy(x).long() for name, x in inputs.items()}, **options)
        actual = on_host(pair.ours.generate(**inputs, **options))
        np.testing.assert_array_equal(actual.sequences, numpy(expected.sequences))
        np.testing.assert_allclose(actual.sequences_scores, numpy(expected.sequences_scores), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(actual.beam_indices, numpy(expected.beam_indices))
        assert len(actual.scores) == len(expected.scores)
        for ours, theirs in zip(actual.scores, expected.scores):
            np.testing.assert_allclose(ours, numpy(theirs), rtol=1e-5, atol=2e-5)
        if full:
            for name in ("hidden_states", "attentions"):
                check_steps(getattr(actual, name), getattr(expected, name), name)
        lengths.update((actual.beam_indices >= 0).sum(axis=1).tolist())

    check()
    assert len(lengths) > 5, "all hypotheses have the same few lengths: nothing ends early"


def beam_request(batch_size: int, limit: int = 100, prompt: int = 2, capacity: int = 8, **fields: Any) -> Request:
    return Request(
        **{
            "input_ids": jnp.zeros((batch_size, capacity), jnp.int32),
            "attention_mask": jnp.ones((batch_size, capacity), bool),
            "prompt_length": jnp.int32(prompt),
            "limits": jnp.full((batch_size,), limit, jnp.int32),
            "keys": jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(batch_size)),
            "sampling": Sampling(do_sample=True),
            "eos_token_ids": jnp.full((4,), -1, jnp.int32),
            "pad_token_id": jnp.int32(0),
            **fields,
        }
    )


def beam_state(request: Request, num_beams: int, scores: np.ndarray) -> Any:
    """A state in the middle of a search in which all rows have the same scores."""
    batch_size = request.input_ids.shape[0]
    state = State(
        position=request.prompt_length,
        cache=None,
        sequences=request.input_ids,
        lengths=jnp.broadcast_to(request.prompt_length, (batch_size,)),
        finished=jnp.zeros((batch_size,), bool),
        streams=None,
        records={},
    )
    _, state = start_beams(request, state, num_beams=num_beams)
    return state.replace(scores=jnp.broadcast_to(jnp.asarray(scores, jnp.float32), (batch_size, num_beams)))


class TestDraws:
    def draw(self, ends: list[int], rows: int = 8000) -> tuple[Any, np.ndarray]:
        """Continuations of two beams over four tokens, and the logarithm of their probabilities."""
        scores = np.log(np.array([[0.4, 0.1, 0.2, 0.3], [0.05, 0.55, 0.25, 0.15]], np.float32))
        sums = np.array([-0.3, -1.1], np.float32)
        request = beam_request(rows, eos_token_ids=jnp.asarray([*ends, *[-1] * (4 - len(ends))], jnp.int32))
        state = beam_state(request, 2, sums)
        log_probs = jnp.broadcast_to(jnp.asarray(scores), (rows, 2, 4))
        chosen = jax.jit(choose_continuations)(state, log_probs, request.keys, request)
        return jax.tree.map(np.asarray, chosen), (scores + sums[:, None]).reshape(-1)

    def test_without_replacement(self) -> None:
        """The first two draws have exactly the probabilities of ``torch.multinomial`` without replacement."""
        chosen, logits = self.draw([])
        first, second = (chosen.top_parents * 4 + chosen.top_tokens).T
        probs = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum()
        expected = probs[:, None] * probs[None] / (1 - probs[:, None]) * len(first)
        counts = np.zeros((8, 8))
        np.add.at(counts, (first, second), 1)
        assert (np.diag(counts) == 0).all()
        apart = ~np.eye(8, dtype=bool)
        assert expected[apart].min() > 5
        assert scipy.stats.chisquare(counts[apart], expected[apart]).pvalue > 1e-3

    def test_best_of_the_draws_go_on(self) -> None:
        """Four draws without end tokens (as there are two beams), of which the two likeliest go on; six with two."""
        for ends, number in (([], 4), ([1, 2], 6)):
            chosen, logits = self.draw(ends)
            going_on = chosen.parents * 4 + chosen.tokens
            assert not np.isin(chosen.tokens, ends).any()
            assert (chosen.scores[:, 0] > chosen.scores[:, 1]).all()
            np.testing.assert_allclose(chosen.scores, logits[going_on], rtol=1e-6)
            np.testing.assert_array_equal(chosen.ended, np.isin(chosen.top_tokens, ends))
            # the likeliest allowed continuation is the best one unless it is not drawn
            allowed = [index for index in range(8) if index % 4 not in ends]
            best = max(allowed, key=lambda index: logits[index])
            rng = np.random.default_rng(0)
            gumbel = logits + rng.gumbel(size=(20000, 8))
            drawn = (np.argsort(-gumbel, axis=1)[:, :number] == best).any(axis=1).mean()
            share = (going_on[:, 0] == best).mean()
            assert abs(share - drawn) < 4 * np.sqrt(drawn * (1 - drawn) * (1 / 8000 + 1 / 20000))


class TestLoop:
    def search(self, pair: Pair, limit: int, until: list[int], forced: np.ndarray | None = None, **fields: Any) -> Any:
        """Beam search by its programs, in pieces that end at the columns ``until``."""
        inputs = draw_prompt(8, 4)
        request = beam_request(
            2,
            limit,
            prompt=4,
            capacity=16,
            **{
                "input_ids": jnp.pad(jnp.asarray(inputs["input_ids"]), ((0, 0), (0, 12)), constant_values=VOCAB),
                "attention_mask": jnp.ones((2, 16), bool),
                "sampling": Sampling(),
                "eos_token_ids": jnp.asarray([1, 9, -1, -1], jnp.int32),
                "forced_ids": jnp.asarray(np.full((2, 16), -1) if forced is None else forced, jnp.int32),
                **fields,
            },
        )
        params = pair.ours.params
        state = pair.ours.compiled(start, chunk=3, recording=Recording())(params, request)
        request, state = start_beams(request, state, num_beams=3)
        advance = pair.ours.compiled(advance_beams, (3,), early_stopping=False, recording=Recording())
        penalty = jnp.float32(1)
        for column in until:
            state = advance(params, request, penalty, state, jnp.int32(column))
        returned, scores, beam_indices = finish_beams(request, penalty, state, num_return_sequences=3)
        return jax.tree.map(np.asarray, (returned.sequences, returned.lengths, scores, beam_indices))

    def test_in_pieces(self, pair: Pair) -> None:
        whole = self.search(pair, 16, [16])
        for pieces in ([5, 6, 9, 16], range(5, 17)):
            for one, other in zip(self.search(pair, 16, list(pieces)), whole):
                np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize("end", [5, 7, 10])
    def test_cut_short(self, pair: Pair, end: int) -> None:
        """What runs when the search is stopped counts as ended: as if the limit had been there."""
        stopped, limited = self.search(pair, 16, [end]), self.search(pair, end, [16])
        for one, other in zip(stopped, limited):
            np.testing.assert_array_equal(one, other)

    def test_limits_of_rows(self, pair: Pair) -> None:
        limits = jnp.asarray([6, 12], jnp.int32)
        both = self.search(pair, 0, [16], limits=limits)
        for row in range(2):
            alone = self.search(pair, int(limits[row]), [16])
            for one, other in zip(both, alone):
                np.testing.assert_array_equal(one[3 * row : 3 * row + 3], other[3 * row : 3 * row + 3])

    def test_caches_stay_in_place(self, pair: Pair) -> None:
        request = beam_request(1, prompt=4, capacity=4096, sampling=Sampling())
        state = pair.ours.compiled(start, chunk=0, recording=Recording())(pair.ours.params, request)
        request, state = start_beams(request, state, num_beams=3)
        advance = pair.ours.compiled(advance_beams, (3,), early_stopping=False, recording=Recording())
        lowered = advance.lower(pair.ours.params, request, jnp.float32(1), state, jnp.int32(9))
        temporaries = lowered.compile().memory_analysis().temp_size_in_bytes
        assert temporaries < state.running.cache.keys[0].nbytes, "there is room for a copy of a cache"

    def test_forced_tokens(self, pair: Pair) -> None:
        """Forced tokens stand in every hypothesis, and their log-probabilities in the score."""
        forced = np.full((2, 16), -1)
        forced[0, 4:6] = 11, 12
        forced[1, 7] = 13
        no_ends = jnp.full((4,), -1, jnp.int32)
        free = self.search(pair, 12, [16], eos_token_ids=no_ends)
        sequences, lengths, scores, _ = self.search(pair, 12, [16], forced, eos_token_ids=no_ends)
        assert (lengths == 12).all()
        assert (sequences[:3, 4:6] == [11, 12]).all()
        assert (sequences[3:, 7] == 13).all()
        assert (free[0][:3, 5] != 12).all()
        assert (free[0][3:, 7] != 13).all()
        with torch.no_grad():
            logits = pair.theirs(torch.tensor(sequences).long().clamp(max=VOCAB)).logits
        log_probs = torch.log_softmax(logits, dim=-1).numpy()
        for row, sequence in enumerate(sequences):
            total = sum(log_probs[row, column - 1, sequence[column]] for column in range(4, 12))
            np.testing.assert_allclose(scores[row], total / 8, rtol=1e-5)


class TestSampling:
    def sample(self, pair: Pair, inputs: dict[str, np.ndarray], keys: jax.Array, **numbers: Any) -> Any:
        options = {"max_new_tokens": 10, "eos_token_id": [2, 5], "temperature": 1.5, "top_k": VOCAB} | numbers
        output = pair.ours.generate(
            **inputs,
            **options,
            num_beams=3,
            num_return_sequences=3,
            pad_token_id=VOCAB,
            do_sample=True,
            prng_key=keys,
        )
        return on_host(output)

    def test_independent_of_the_batch(self, pair: Pair) -> None:
        inputs, others = draw_prompt(4, 5, batch_size=3), draw_prompt(10, 5, batch_size=3)
        keys, other_keys = jax.random.split(jax.random.key(3), 3), jax.random.split(jax.random.key(4), 3)
        batch = self.sample(pair, inputs, keys)
        for row, place in ((0, 2), (1, 0), (2, 2)):
            moved = {name: value.copy() for name, value in others.items()}
            for name, value in inputs.items():
                moved[name][place] = value[row]
            among_others = self.sample(pair, moved, other_keys.at[place].set(keys[row]))
            here, there = slice(3 * place, 3 * place + 3), slice(3 * row, 3 * row + 3)
            width = min(among_others.sequences.shape[1], batch.sequences.shape[1])
            np.testing.assert_array_equal(among_others.sequences[here, :width], batch.sequences[there, :width])
            np.testing.assert_allclose(among_others.sequences_scores[here], batch.sequences_scores[there], rtol=1e-5)
        other = self.sample(pair, inputs, other_keys)
        assert other.sequences.shape != batch.sequences.shape or (other.sequences != batch.sequences).any()

    def test_other_numbers_compile_nothing(self, pair: Pair, count_compilations: Callable[[], int]) -> None:
        keys = jax.random.split(jax.random.key(3), 3)
        self.sample(pair, draw_prompt(4, 5, batch_size=3), keys)
        count_compilations()
        numbers = {"max_new_tokens": 8, "eos_token_id": [3, 7], "temperature": 0.7, "length_penalty": 2.0}
        self.sample(pair, draw_prompt(7, 4, batch_size=3), keys, **numbers)
        assert count_compilations() == 0


class TestGenerate:
    def test_inside_of_jit(self, pair: Pair) -> None:
        inputs = draw_prompt(3, 4)

        def generate(length_penalty: Any, input_ids: Any, attention_mask: Any) -> Any:
            output = pair.ours.generate(
                input_ids,
                attention_mask=attention_mask,
                length_penalty=length_penalty,
                num_beams=3,
                early_stopping="never",
                max_new_tokens=9,
                eos_token_id=[4],
                pad_token_id=VOCAB,
                do_sample=False,
                output_scores=True,
                output_hidden_states=True,
                output_attentions=True,
            )
            assert output.beam_indices.shape[1] <= 9  # the new tokens
            return output.sequences, output.sequences_scores, output.beam_indices

        eager = [np.asarray(array) for array in generate(0.5, **inputs)]
        for inside, outside in zip(jax.jit(generate)(0.5, **inputs), eager):
            inside = np.asarray(inside)
            if inside.ndim == 2:
                inside, behind = np.split(inside, [outside.shape[1]], axis=1)
                assert np.isin(behind, [-1, VOCAB]).all()
            np.testing.assert_allclose(inside, outside, rtol=1e-5)

    def test_scores_and_zeros_behind_the_end(self, pair: Pair) -> None:
        """Both differ from upstream, see ``docs/differences.md``."""
        output = pair.ours.generate(
            **draw_prompt(3, 4),
            num_beams=3,
            num_return_sequences=3,
            early_stopping=True,
            max_new_tokens=12,
            eos_token_id=list(range(5, VOCAB)),
            pad_token_id=0,
            do_sample=False,
        )
        sequences, indices = np.asarray(output.sequences), np.asarray(output.beam_indices)
        assert output.sequences_scores.shape == sequences.shape[:1] and (np.asarray(output.sequences_scores) < 0).all()
        behind = indices == -1
        assert behind.any(), "all end together: the test would prove nothing"
        assert (sequences[:, -indices.shape[1] :][behind] == 0).all()

    def test_within_time(self, pair: Pair) -> None:
        options = {"num_beams": 3, "max_new_tokens": 30, "do_sample": False, "early_stopping": "never"}
        output = pair.ours.generate(**draw_prompt(2, 4), **options, max_time=1e-9)
        one_step = pair.ours.generate(**draw_prompt(2, 4), **options | {"max_new_tokens": 1})
        np.testing.assert_array_equal(output.sequences, one_step.sequences)

    def test_streamer_is_refused(self, pair: Pair) -> None:
        with pytest.raises(ValueError, match="`streamer` cannot be used with `num_beams=2`"):
            pair.ours.generate(**draw_prompt(2, 4), num_beams=2, streamer=TextStreamer(None))
