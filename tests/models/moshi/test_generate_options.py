"""What ``generate`` promises beside the tokens: records, several results a row, lengths, forced frames, streaming,
and that nothing is compiled twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import MoshiForCausalLM, TextStreamer

from tests.configs import tiny_moshi_config
from tests.models.moshi.test_generation import nested_pair, prompt, to_torch
from tests.torch_oracle import Pair, assert_close, make_pair, numpy
from transformers_moshi_flax import FlaxMoshiForCausalLM, FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.generation import StopGeneration
from transformers_moshi_flax.ops import cpu

GREEDY = {"do_sample": False, "depth_decoder_do_sample": False, "return_audio_codes": True}
CODES_ONLY = {**GREEDY, "return_audio_waveforms": False}
SAMPLE = {"do_sample": True, "depth_decoder_do_sample": True, "return_audio_codes": True}
RECORDS = ("scores", "logits", "hidden_states", "attentions")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return nested_pair(tmp_path_factory.mktemp("nested"))


@pytest.fixture(scope="module")
def text_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config = tiny_moshi_config(num_hidden_layers=2, max_position_embeddings=400, sliding_window=400)
    return make_pair(MoshiForCausalLM, FlaxMoshiForCausalLM, config, tmp_path_factory.mktemp("text"), seed=3)


def ids(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60, (batch, length)).astype(np.int32)


def assert_same_records(ours: Any, theirs: Any) -> None:
    for name in RECORDS:
        actual, expected = getattr(ours, name), getattr(theirs, name)
        assert len(actual) == len(expected), name
        for step, (a, b) in enumerate(zip(actual, expected)):
            for one, other in zip([a], [b]) if name in ("scores", "logits") else zip(a, b, strict=True):
                other = numpy(other)
                kept = np.isfinite(other)
                np.testing.assert_array_equal(np.isfinite(one), kept)
                assert_close(np.where(kept, one, 0), np.where(kept, other, 0), 1e-5, f"{name} of step {step}")


class TestRecords:
    OPTIONS = {"output_scores": True, "output_logits": True, "output_hidden_states": True, "output_attentions": True}

    def test_text(self, text_pair: Pair) -> None:
        theirs = text_pair.theirs.generate(
            torch.from_numpy(ids(2, 5)).long(),
            do_sample=False,
            max_new_tokens=6,
            repetition_penalty=1.5,
            return_dict_in_generate=True,
            **self.OPTIONS,
        )
        ours = text_pair.ours.generate(
            ids(2, 5), do_sample=False, max_new_tokens=6, repetition_penalty=1.5, **self.OPTIONS
        )
        np.testing.assert_array_equal(ours.sequences, numpy(theirs.sequences))
        assert_same_records(ours, theirs)

    def test_prompt_of_several_chunks(self, text_pair: Pair) -> None:
        long = ids(1, 290)
        theirs = text_pair.theirs.generate(
            torch.from_numpy(long).long(),
            do_sample=False,
            max_new_tokens=3,
            return_dict_in_generate=True,
            **self.OPTIONS,
        )
        ours = text_pair.ours.generate(long, do_sample=False, max_new_tokens=3, **self.OPTIONS)
        np.testing.assert_array_equal(ours.sequences, numpy(theirs.sequences))
        assert_same_records(ours, theirs)

    def test_nested(self, pair: Pair) -> None:
        inputs = prompt(pair.theirs.config, batch=2, frames=3)
        theirs = pair.theirs.generate(
            **to_torch(inputs), max_new_tokens=5, return_dict_in_generate=True, **GREEDY, **self.OPTIONS
        )
        ours = pair.ours.generate(**inputs, max_new_tokens=5, **GREEDY, **self.OPTIONS)
        np.testing.assert_array_equal(ours.audio_codes, numpy(theirs.audio_codes))
        assert_same_records(ours, theirs)

    def test_under_jit(self, text_pair: Pair) -> None:
        def generate(tokens: jax.Array) -> Any:
            return text_pair.ours.generate(tokens, do_sample=False, max_new_tokens=4, **self.OPTIONS)

        eager, compiled = generate(ids(2, 5)), jax.jit(generate)(ids(2, 5))
        np.testing.assert_array_equal(eager.sequences, compiled.sequences)
        for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
            assert_close(one, numpy(other), 1e-5)

    def test_not_there_unless_asked_for(self, text_pair: Pair) -> None:
        out = text_pair.ours.generate(ids(1, 2), do_sample=False, max_new_tokens=2)
        assert list(out) == ["sequences"]


class TestWithoutAnEffect:
    """A keyword of the call that does nothing in it warns; the fields are in ``test_configuration.py``."""

    def test_generate(self, pair: Pair, text_pair: Pair) -> None:
        with pytest.warns(UserWarning, match="`temperature=0.5` has no effect without sampling: set `do_sample=True`"):
            text_pair.ours.generate(ids(1, 2), do_sample=False, max_new_tokens=2, temperature=0.5)
        with pytest.warns(UserWarning, match="`depth_decoder_top_k=3` has no effect .*`depth_decoder_do_sample=True`"):
            pair.ours.generate(max_new_tokens=2, depth_decoder_top_k=3, **CODES_ONLY)

    def test_streaming(self, pair: Pair) -> None:
        options = {"do_sample": False, "depth_decoder_do_sample": False}
        with pytest.warns(UserWarning, match="`top_p=0.5` has no effect without sampling"):
            pair.ours.streaming(1, top_p=0.5, **options)
        with pytest.warns(UserWarning, match="`depth_decoder_top_p=0.5` has no effect without sampling"):
            pair.ours.streaming(1, depth_decoder_top_p=0.5, **options)


class TestSeveralResults:
    def test_copies_of_a_row_are_draws_of_their_own(self, pair: Pair) -> None:
        inputs = prompt(pair.theirs.config, batch=2, frames=3)
        options = {**SAMPLE, "max_new_tokens": 12, "prng_key": jax.random.key(5)}
        out = pair.ours.generate(**inputs, **options, num_return_sequences=3)
        assert out.sequences.shape == (6, 16) and out.audio_codes.shape[0] == 6 and out.audio_lengths.shape == (6,)
        sequences = np.asarray(out.sequences)
        np.testing.assert_array_equal(sequences[:3, 1:4], np.tile(inputs["input_ids"][:1], (3, 1)))
        np.testing.assert_array_equal(sequences[3:, 1:4], np.tile(inputs["input_ids"][1:], (3, 1)))
        assert len(np.unique(sequences, axis=0)) == 6
        # a row's results do not depend on its neighbours
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), np.arange(2))
        alone = pair.ours.generate(
            **{name: value[1:] for name, value in inputs.items()},
            **{**options, "prng_key": keys[1:]},
            num_return_sequences=3,
        )
        np.testing.assert_array_equal(alone.sequences, sequences[3:])
        np.testing.assert_array_equal(alone.audio_codes, out.audio_codes[3:])


class TestIndependenceOfTheBatch:
    def test_neighbours_slot_and_padding(self, text_pair: Pair) -> None:
        """A row with its own key draws the same alone, at another slot, and with padding before it."""
        row, key = ids(1, 4, seed=9), jax.random.key(11)
        options = {"do_sample": True, "max_new_tokens": 15, "top_p": 0.9}
        alone = np.asarray(text_pair.ours.generate(row, prng_key=key[None], **options).sequences)[0, 4:]
        keys = jax.random.split(jax.random.key(0), 3)
        for slot in range(3):
            batch = ids(3, 4, seed=slot)
            batch[slot] = row
            out = text_pair.ours.generate(batch, prng_key=keys.at[slot].set(key), **options)
            np.testing.assert_array_equal(np.asarray(out.sequences)[slot, 4:], alone)
        padded = np.concatenate([ids(2, 3), np.concatenate([ids(1, 4, seed=1), row])], axis=1)
        mask = np.ones((2, 7), np.int32)
        mask[1, :3] = 0
        out = text_pair.ours.generate(padded, attention_mask=mask, prng_key=keys[:2].at[1].set(key), **options)
        np.testing.assert_array_equal(np.asarray(out.sequences)[1, 7:], alone)


class TestLengths:
    def test_stop_lengths_cut_the_free_run(self, pair: Pair) -> None:
        inputs = prompt(pair.theirs.config, batch=3, frames=3)
        options = {**GREEDY, "max_new_tokens": 10, "concat_unconditional_inputs": False, "pad_token_id": 3}
        free = pair.ours.generate(**inputs, **options)
        stops = np.array([4, 9, 1])
        out = pair.ours.generate(**inputs, **options, stop_lengths=stops)
        assert out.sequences.shape == (3, 3 + 9)
        np.testing.assert_array_equal(out.sequence_lengths, 3 + stops)
        np.testing.assert_array_equal(out.audio_lengths, 3 + stops - 1)
        for row, stop in enumerate(stops):
            np.testing.assert_array_equal(out.sequences[row, : 3 + stop], free.sequences[row, : 3 + stop])
            assert (np.asarray(out.sequences)[row, 3 + stop :] == 3).all()
            frames = 3 + stop - 1
            np.testing.assert_array_equal(out.audio_codes[row, :, :frames], free.audio_codes[row, :, :frames])
            assert (np.asarray(out.audio_codes)[row, :, frames:] == 32).all()

    def test_max_time(self, text_pair: Pair) -> None:
        tokens = ids(1, 3)
        short = np.asarray(
            text_pair.ours.generate(tokens, do_sample=False, max_new_tokens=300, max_time=1e-6).sequences
        )
        long = np.asarray(text_pair.ours.generate(tokens, do_sample=False, max_new_tokens=300).sequences)
        assert 3 < short.shape[1] < 303
        np.testing.assert_array_equal(short, long[:, : short.shape[1]])


def test_few_slots_of_a_large_cache(text_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that leaves out unused slots, up to and past the number that it looks at, changes nothing."""
    options = {"do_sample": False, "max_new_tokens": 20, "output_logits": True, "output_attentions": True}
    expected = text_pair.ours.generate(ids(2, 5), **options)
    monkeypatch.setattr(cpu, "LARGE_CACHE", 64)
    monkeypatch.setattr(cpu, "SLOTS_IN_USE", 12)
    other = FlaxMoshiForCausalLM(text_pair.ours.config, _do_init=False)  # programs are kept by the model
    actual = other.generate(ids(2, 5), params=text_pair.ours.params, **options)
    np.testing.assert_array_equal(actual.sequences, expected.sequences)
    for one, same in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(one, numpy(same), 1e-5)


def test_mapped_over_keys(pair: Pair, text_pair: Pair) -> None:
    """``jax.vmap`` traces the key alone; the outputs are as inside of ``jax.jit``."""
    keys = jax.random.split(jax.random.key(2), 2)
    inputs = prompt(pair.ours.config, batch=1, frames=3)

    def speak(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = pair.ours.generate(**inputs, **SAMPLE, max_new_tokens=5, prng_key=key, return_audio_waveforms=False)
        return out.sequences, out.audio_codes

    def write(key: jax.Array) -> jax.Array:
        return text_pair.ours.generate(ids(1, 3), do_sample=True, max_new_tokens=5, prng_key=key).sequences

    text, codes = jax.vmap(speak)(keys)
    written = jax.vmap(write)(keys)
    assert text.shape == (2, 1, 9) and written.shape == (2, 1, 8)
    for number, key in enumerate(keys):
        alone, its_codes = speak(key)
        np.testing.assert_array_equal(text[number], alone)
        np.testing.assert_array_equal(codes[number][..., : its_codes.shape[-1]], its_codes)
        np.testing.assert_array_equal(written[number], write(key))


def test_logits_processor_of_the_text(pair: Pair) -> None:
    inputs = prompt(pair.ours.config, batch=2, frames=3)
    out = pair.ours.generate(
        **inputs, **CODES_ONLY, max_new_tokens=6, logits_processor=lambda ids, scores, length: scores.at[:, 7].set(1e9)
    )
    assert (np.asarray(out.sequences)[:, 4:] == 7).all()


class TestForced:
    def test_text_and_codes(self, pair: Pair) -> None:
        """Forced frames stand where they are asked for; what follows is as if they had been in the prompt."""
        config = pair.ours.config
        inputs = prompt(config, batch=2, frames=3)
        rng = np.random.default_rng(1)
        said = rng.integers(0, config.vocab_size, (2, 4))
        codes = rng.integers(0, config.audio_vocab_size, (2, config.num_codebooks, 4))
        options = {**GREEDY, "concat_unconditional_inputs": False}
        out = pair.ours.generate(
            **inputs, **options, forced_text_ids=said, forced_audio_codes=codes, max_new_tokens=12
        )
        np.testing.assert_array_equal(out.sequences[:, 3:7], said)
        np.testing.assert_array_equal(out.audio_codes[:, :, 3:7], codes)
        silence = np.zeros((2, 1, config.audio_encoder_config.frame_size), np.float32)
        blank = numpy(pair.theirs.audio_encoder.encode(torch.from_numpy(silence), num_quantizers=4)[0])
        longer = {
            "input_ids": np.concatenate([inputs["input_ids"], said], axis=1),
            "moshi_audio_codes": np.concatenate([inputs["moshi_audio_codes"], codes], axis=2),
            "user_audio_codes": np.concatenate([inputs["user_audio_codes"], np.tile(blank, (1, 1, 4))], axis=2),
        }
        expected = pair.ours.generate(**longer, **options, max_new_tokens=8)
        np.testing.assert_array_equal(out.sequences, expected.sequences)
        np.testing.assert_array_equal(out.audio_codes, expected.audio_codes)

    def test_text_alone(self, text_pair: Pair, unchecked_types: None) -> None:
        """Also from a tensor of PyTorch, as tokenizers give it on demand."""
        prompt, said = ids(2, 3), np.array([[4, -1, 7], [9, 8, -1]])
        out = numpy(
            text_pair.ours.generate(
                torch.tensor(prompt), forced_text_ids=said, max_new_tokens=6, do_sample=False
            ).sequences
        )
        longer = np.concatenate([prompt, said[:, :1]], axis=1)
        free = numpy(text_pair.ours.generate(longer, max_new_tokens=1, do_sample=False).sequences)
        assert out[0, 3:6].tolist() == [4, free[0, 4], 7] and out[1, 3:5].tolist() == [9, 8]
        free = numpy(text_pair.ours.generate(out[:, :6], max_new_tokens=3, do_sample=False).sequences)
        np.testing.assert_array_equal(out, free)

    def test_free_places_are_chosen(self, pair: Pair) -> None:
        inputs = prompt(pair.ours.config, batch=1, frames=3)
        free = pair.ours.generate(**inputs, **CODES_ONLY, max_new_tokens=8)
        text, codes = np.full((1, 8), -1), np.full((1, 4, 8), -1)
        same = pair.ours.generate(
            **inputs, **CODES_ONLY, max_new_tokens=8, forced_text_ids=text, forced_audio_codes=codes
        )
        np.testing.assert_array_equal(same.sequences, free.sequences)
        np.testing.assert_array_equal(same.audio_codes, free.audio_codes)
        text[0, 5] = (int(free.sequences[0, 4 + 5]) + 1) % 60
        codes[0, 2, 4] = (int(free.audio_codes[0, 2, 3 + 4]) + 1) % 32
        out = pair.ours.generate(
            **inputs, **CODES_ONLY, max_new_tokens=8, forced_text_ids=text, forced_audio_codes=codes
        )
        assert out.sequences[0, 4 + 5] == text[0, 5] and out.audio_codes[0, 2, 3 + 4] == codes[0, 2, 4]
        np.testing.assert_array_equal(out.sequences[:, : 4 + 5], free.sequences[:, : 4 + 5])

    @pytest.mark.parametrize(
        "forced, message",
        [
            ({"forced_text_ids": np.zeros((1, 9), int)}, r"`forced_text_ids` must have the shape \(1, 1 to 8 new"),
            ({"forced_text_ids": np.zeros((2, 3), int)}, "`forced_text_ids` must have the shape"),
            ({"forced_text_ids": np.full((1, 3), 60)}, "`forced_text_ids` has the id 60"),
            ({"forced_text_ids": np.full((1, 3), -2)}, "-1 leaves the choice"),
            ({"forced_audio_codes": np.zeros((1, 3, 3), int)}, "`forced_audio_codes` must have the shape"),
            ({"forced_audio_codes": np.full((1, 4, 3), 32)}, "`forced_audio_codes` has the id 32"),
            ({"forced_audio_codes": np.zeros((1, 4, 0), int)}, "`forced_audio_codes` must have the shape"),
        ],
    )
    def test_bad_input(self, pair: Pair, forced: dict[str, Any], message: str) -> None:
        inputs = prompt(pair.ours.config, batch=1, frames=3)
        with pytest.raises(ValueError, match=message):
            pair.ours.generate(**inputs, **CODES_ONLY, max_new_tokens=8, **forced)


class Listener:
    """A streamer that takes text and audio."""

    def __init__(self, stop_after: int | None = None):
        self.text: list[np.ndarray] = []
        self.codes: list[np.ndarray] = []
        self.stop_after, self.ended = stop_after, False

    def put(self, value: np.ndarray) -> None:
        self.text.append(value)
        if self.stop_after is not None and len(self.text) > self.stop_after:
            raise StopGeneration

    def put_audio_codes(self, codes: np.ndarray) -> None:
        self.codes.append(codes)

    def end(self) -> None:
        self.ended = True


class TestStreamer:
    def test_hears_all_of_it(self, pair: Pair) -> None:
        inputs = prompt(pair.ours.config, batch=2, frames=3)
        plain = pair.ours.generate(**inputs, **GREEDY, max_new_tokens=20)
        listener = Listener()
        out = pair.ours.generate(**inputs, **GREEDY, max_new_tokens=20, streamer=listener)
        np.testing.assert_array_equal(out.sequences, plain.sequences)
        assert_close(out.audio_sequences, numpy(plain.audio_sequences), 1e-6)
        np.testing.assert_array_equal(listener.text[0], plain.sequences[:, :4])
        np.testing.assert_array_equal(np.stack(listener.text[1:], axis=1), plain.sequences[:, 4:])
        np.testing.assert_array_equal(np.concatenate(listener.codes, axis=2), plain.audio_codes[:, :, 3:])
        assert listener.ended

    def test_rows_that_have_ended_are_silent(self, pair: Pair) -> None:
        inputs = prompt(pair.ours.config, batch=2, frames=3)
        listener = Listener()
        out = pair.ours.generate(
            **inputs, **GREEDY, max_new_tokens=20, streamer=listener, stop_lengths=[5, 12], pad_token_id=3
        )
        np.testing.assert_array_equal(np.concatenate(listener.codes, axis=2), out.audio_codes[:, :, 3:])
        np.testing.assert_array_equal(np.stack(listener.text[1:], axis=1), out.sequences[:, 4:])

    def test_can_stop(self, pair: Pair) -> None:
        inputs = prompt(pair.ours.config, batch=1, frames=3)
        plain = pair.ours.generate(**inputs, **CODES_ONLY, max_new_tokens=60)
        out = pair.ours.generate(**inputs, **CODES_ONLY, max_new_tokens=60, streamer=Listener(stop_after=6))
        length = out.sequences.shape[1]
        assert 4 + 6 <= length < 64
        np.testing.assert_array_equal(out.sequences, plain.sequences[:, :length])
        frames = out.audio_codes.shape[2]
        assert frames == length - 2
        np.testing.assert_array_equal(out.audio_codes, plain.audio_codes[:, :, :frames])

    def test_streamer_of_transformers(self, text_pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
        class Tokenizer:
            def decode(self, tokens: list[int], **options: Any) -> str:
                return "".join(f"{token} " for token in tokens)

        tokens = ids(1, 3)
        out = text_pair.ours.generate(
            tokens, do_sample=False, max_new_tokens=7, streamer=TextStreamer(Tokenizer(), skip_prompt=True)
        )
        assert capsys.readouterr().out.split() == [str(token) for token in np.asarray(out.sequences)[0, 3:]]

    def test_it_can_stop_at_the_prompt(self, pair: Pair) -> None:
        class Refusing:
            ended = 0

            def put(self, tokens: np.ndarray) -> None:
                raise StopGeneration

            def end(self) -> None:
                self.ended += 1

        streamer, inputs = Refusing(), prompt(pair.ours.config, batch=1, frames=5)
        out = pair.ours.generate(**inputs, **GREEDY, streamer=streamer)
        np.testing.assert_array_equal(out.sequences[:, 1:], inputs["input_ids"])
        np.testing.assert_array_equal(out.audio_codes, inputs["moshi_audio_codes"][..., :4])
        assert streamer.ended == 1

    def test_without_its_methods(self, pair: Pair) -> None:
        with pytest.raises(ValueError, match="`streamer` must have a method `put`"):
            pair.ours.generate(**GREEDY, streamer=print)

    @pytest.mark.parametrize("option", [{"streamer": Listener()}, {"max_time": 1.0}], ids=["streamer", "max_time"])
    def test_not_under_jit(self, text_pair: Pair, option: dict[str, Any]) -> None:
        (name,) = option
        with pytest.raises(ValueError, match=f"`{name}` cannot be used inside of `jax.jit`"):
            jax.jit(lambda tokens: text_pair.ours.generate(tokens, **option).sequences)(ids(1, 3))


class TestCompiledOnce:
    def test_nested(self, pair: Pair, count_compilations: Callable[[], int]) -> None:
        config = pair.ours.config
        keys = list(jax.random.split(jax.random.key(0), 8))
        frame = config.audio_encoder_config.frame_size

        def run(frames: int, new: int, **options: Any) -> None:
            inputs = prompt(config, batch=2, frames=frames)
            del inputs["user_audio_codes"]
            inputs["user_input_values"] = np.zeros((2, 1, frames * frame), np.float32)
            options = {**SAMPLE, "top_p": 0.9, "repetition_penalty": 1.1, **options}
            jax.block_until_ready(pair.ours.generate(**inputs, max_new_tokens=new, **options))

        run(5, 20)
        assert count_compilations() > 0, "the listener hears nothing"
        run(5, 20, prng_key=keys[0])
        run(12, 9, prng_key=keys[1], temperature=0.3, top_k=7, top_p=0.5, repetition_penalty=2.0)
        run(3, 40, depth_decoder_temperature=0.6, depth_decoder_top_k=60, eos_token_id=[1, 2], pad_token_id=3)
        run(9, 30, stop_lengths=[3, 25], min_new_tokens=None, max_time=60.0)
        run(2, 30, attention_mask=np.array([[0, 1], [1, 1]]))
        assert count_compilations() == 0

    def test_text(self, text_pair: Pair, count_compilations: Callable[[], int]) -> None:
        def run(length: int, new: int, **options: Any) -> None:
            jax.block_until_ready(
                text_pair.ours.generate(ids(1, length), do_sample=False, max_new_tokens=new, **options)
            )

        run(20, 5)
        assert count_compilations() > 0
        run(57, 7)
        run(33, 2, eos_token_id=4, streamer=Listener())
        assert count_compilations() == 0

    def test_numbers_of_ids(self, text_pair: Pair, count_compilations: Callable[[], int]) -> None:
        """Ends, forced and suppressed tokens, up to four each, with a mask and without."""

        def run(count: int, **options: Any) -> None:
            tokens = list(range(1, 1 + count))
            options |= dict.fromkeys(("eos_token_id", "forced_eos_token_id", "begin_suppress_tokens"), tokens)
            options |= {"suppress_tokens": [9, *tokens[1:]], "min_new_tokens": 2, "repetition_penalty": 1.5}
            jax.block_until_ready(text_pair.ours.generate(ids(2, 5), do_sample=False, max_new_tokens=7, **options))

        run(1)
        assert count_compilations() > 0
        run(3)
        run(4, attention_mask=np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
        assert count_compilations() == 0

    def test_streamer_of_audio(self, pair: Pair, count_compilations: Callable[[], int]) -> None:
        """In pieces of whatever length, since they depend on time."""

        def run(frames: int) -> None:
            inputs = prompt(pair.ours.config, batch=1, frames=frames)
            pair.ours.generate(**inputs, **CODES_ONLY, max_new_tokens=30, streamer=Listener())

        run(3)
        count_compilations()
        run(4)
        run(9)
        assert count_compilations() == 0

    @pytest.mark.parametrize("waveforms", [True, False])
    def test_warmup(self, tmp_path: Any, count_compilations: Callable[[], int], waveforms: bool) -> None:
        model = FlaxMoshiForConditionalGeneration(tiny_moshi_config())
        inputs = prompt(model.config, batch=2, frames=5)
        if waveforms:
            for name in ("user", "moshi"):
                del inputs[f"{name}_audio_codes"]
                inputs[f"{name}_input_values"] = np.zeros((2, 1, 5 * 16), np.float32)
        options = {**SAMPLE, "temperature": 0.5}
        model.warmup(batch_size=2, prompt_frames=7, max_new_tokens=12, waveforms=waveforms, **options)
        key = jax.random.key(4)
        count_compilations()
        jax.block_until_ready(model.generate(**inputs, max_new_tokens=14, prng_key=key, **options))
        assert count_compilations() == 0

    def test_warmup_for_several_buckets(self, count_compilations: Callable[[], int]) -> None:
        """Rows that end early, and recordings that end within a frame."""
        model = FlaxMoshiForConditionalGeneration(tiny_moshi_config())
        model.warmup(prompt_frames=50, max_new_tokens=125, do_sample=False)
        count_compilations()
        for frames, missing, stop in ((50, 0, 125), (50, 3, 3), (49, 4, 20), (42, 15, 90)):
            silence = np.zeros((1, 1, frames * 16), np.float32)
            model.generate(
                ids(1, frames),
                user_input_values=silence[..., missing:],
                moshi_input_values=silence,
                max_new_tokens=125,
                stop_lengths=[stop],
                do_sample=False,
            )
            assert count_compilations() == 0

    def test_warmup_with_parameters_from_outside(self, pair: Pair, count_compilations: Callable[[], int]) -> None:
        model = FlaxMoshiForConditionalGeneration(pair.ours.config, _do_init=False)
        options = {"max_new_tokens": 3, "do_sample": False, "params": pair.ours.params}
        model.warmup(**options)
        count_compilations()
        jax.block_until_ready(model.generate(**options))
        assert count_compilations() == 0

    def test_embeds_of_other_lengths(self, pair: Pair, count_compilations: Callable[[], int]) -> None:
        def run(frames: int) -> None:
            inputs = prompt(pair.ours.config, batch=1, frames=frames)
            del inputs["input_ids"]
            embeds = np.zeros((1, frames, pair.ours.config.hidden_size), np.float32)
            jax.block_until_ready(pair.ours.generate(inputs_embeds=embeds, **inputs, **GREEDY, max_new_tokens=4))

        run(5)
        count_compilations()
        run(7)
        assert count_compilations() == 0

    def test_warmup_without_a_prompt(self, count_compilations: Callable[[], int]) -> None:
        model = FlaxMoshiForConditionalGeneration(tiny_moshi_config())
        model.warmup(max_new_tokens=12, do_sample=False)
        count_compilations()
        jax.block_until_ready(model.generate(max_new_tokens=9, do_sample=False))
        assert count_compilations() == 0

    def test_warmup_of_text(self, text_pair: Pair, count_compilations: Callable[[], int]) -> None:
        text_pair.ours.warmup(batch_size=3, prompt_length=90, max_new_tokens=4, do_sample=False)
        count_compilations()
        text_pair.ours.generate(ids(3, 80), max_new_tokens=6, do_sample=False)
        assert count_compilations() == 0


def test_results_are_those_of_the_unbucketed_program(pair: Pair) -> None:
    """Inside of ``jax.jit`` nothing is rounded up: the same tokens and codes, logits within 1e-5."""
    inputs = prompt(pair.ours.config, batch=2, frames=21)
    options = {**CODES_ONLY, "max_new_tokens": 9, "output_logits": True}
    bucketed = pair.ours.generate(**inputs, **options)
    exact = jax.jit(lambda inputs: pair.ours.generate(**inputs, **options))(inputs)
    np.testing.assert_array_equal(bucketed.sequences, exact.sequences)
    # there the outputs keep their full length
    np.testing.assert_array_equal(bucketed.audio_codes, exact.audio_codes[:, :, : bucketed.audio_codes.shape[2]])
    for one, other in zip(bucketed.logits, exact.logits, strict=True):
        assert_close(one, numpy(other), 1e-5)
