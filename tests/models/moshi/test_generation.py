"""Generation against upstream: greedy token for token over 50 frames, sampling by its distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers import MoshiForCausalLM, MoshiForConditionalGeneration

from tests.configs import tiny_moshi_config
from tests.torch_oracle import Pair, assert_close, make_pair, numpy, single_codebook_works
from transformers_moshi_flax import FlaxMoshiForCausalLM, FlaxMoshiForConditionalGeneration

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "deeper": {"num_hidden_layers": 3, "head_dim": 10, "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "two codebooks": {"num_codebooks": 2, "audio_vocab_size": 16, "vocab_size": 41},
    "six codebooks": {"num_codebooks": 6, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
    "window": {"sliding_window": 8, "num_key_value_heads": 1},
    "one codebook": {"num_codebooks": 1},
}


@pytest.fixture(autouse=True, scope="module")
def one_codebook_oracle() -> Iterator[None]:
    with single_codebook_works():
        yield


def nested_pair(directory: Any, seed: int = 0, **overrides: Any) -> Pair:
    config = tiny_moshi_config(**overrides)
    return make_pair(MoshiForConditionalGeneration, FlaxMoshiForConditionalGeneration, config, directory, seed=seed)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return nested_pair(tmp_path_factory.mktemp("nested"))


@pytest.fixture(scope="module")
def text_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("text")
    return make_pair(MoshiForCausalLM, FlaxMoshiForCausalLM, tiny_moshi_config(), directory, seed=3)


def prompt(config: Any, batch: int, frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Text and codes of a dialogue so far."""
    rng = np.random.default_rng(seed)
    codes = (batch, config.num_codebooks, frames)
    return {
        "input_ids": rng.integers(0, config.vocab_size, (batch, frames)).astype(np.int32),
        "user_audio_codes": rng.integers(0, config.audio_vocab_size, codes).astype(np.int32),
        "moshi_audio_codes": rng.integers(0, config.audio_vocab_size, codes).astype(np.int32),
    }


def to_torch(inputs: dict[str, Any]) -> dict[str, Any]:
    def convert(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        tensor = torch.from_numpy(np.array(value))  # a copy: arrays of JAX are read-only
        return tensor if tensor.is_floating_point() else tensor.long()

    return {name: convert(value) for name, value in inputs.items()}


def check_nested(pair: Pair, inputs: dict[str, Any], new: int, waveform_tol: float = 1e-4) -> Any:
    """Greedy generation on both sides: same ids, same codes, and the waveform within ``waveform_tol`` of its scale."""
    expected = pair.theirs.generate(**to_torch(inputs), max_new_tokens=new, do_sample=False, return_audio_codes=True)
    actual = pair.ours.generate(**inputs, max_new_tokens=new, do_sample=False, return_audio_codes=True)
    np.testing.assert_array_equal(numpy(actual.sequences), numpy(expected.sequences))
    np.testing.assert_array_equal(numpy(actual.audio_codes), numpy(expected.audio_codes))
    assert_close(actual.audio_sequences, expected.audio_sequences, waveform_tol, "waveform")
    return actual


class TestNestedGreedy:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_fifty_frames(self, name: str, tmp_path: Any) -> None:
        pair = nested_pair(tmp_path, seed=len(name), **CONFIGS[name])
        inputs = prompt(pair.theirs.config, batch=2, frames=3)
        # Upstream's prefill ignores the window: only a prompt inside of it can be compared.
        actual = check_nested(pair, inputs, new=50)
        new_text = numpy(actual.sequences)[:, -50:]
        assert len(np.unique(new_text)) > 5, "the text hardly changes: the comparison would prove nothing"
        assert len(np.unique(numpy(actual.audio_codes))) > 5

    def test_without_inputs(self, pair: Pair) -> None:
        actual = check_nested(pair, {}, new=12)
        assert actual.sequences.shape == (1, 13)
        assert actual.audio_codes.shape == (1, 4, 11)

    def test_unconditional_inputs(self, pair: Pair) -> None:
        theirs = pair.theirs.get_unconditional_inputs(num_samples=2)
        ours = pair.ours.get_unconditional_inputs(num_samples=2)
        for name in ("input_ids", "user_audio_codes", "moshi_audio_codes", "attention_mask"):
            np.testing.assert_array_equal(numpy(ours[name]), numpy(theirs[name]))
        inputs = {name: np.asarray(ours[name]) for name in ours}
        check_nested(pair, {**inputs, "concat_unconditional_inputs": False}, new=10)
        check_nested(pair, inputs, new=10)

    @pytest.mark.parametrize("concat", [True, False])
    def test_codes(self, pair: Pair, concat: bool) -> None:
        inputs = prompt(pair.theirs.config, batch=2, frames=5)
        actual = check_nested(pair, {**inputs, "concat_unconditional_inputs": concat}, new=10)
        assert actual.sequences.shape == (2, 15 + concat)

    def test_waveforms(self, pair: Pair) -> None:
        frame = pair.theirs.config.audio_encoder_config.frame_size
        rng = np.random.default_rng(1)
        inputs = {
            "input_ids": rng.integers(0, 60, (2, 4)).astype(np.int32),
            "user_input_values": rng.standard_normal((2, 1, 4 * frame)).astype(np.float32),
            "moshi_input_values": rng.standard_normal((2, 1, 4 * frame)).astype(np.float32),
        }
        check_nested(pair, inputs, new=10)

    def test_waveform_beside_codes(self, pair: Pair) -> None:
        inputs = prompt(pair.theirs.config, batch=1, frames=4)
        del inputs["user_audio_codes"]
        inputs["user_input_values"] = np.random.default_rng(2).standard_normal((1, 1, 64)).astype(np.float32)
        check_nested(pair, inputs, new=6)

    def test_left_padding(self, pair: Pair) -> None:
        """Upstream puts the start frame before the padding, and lets its codes into the first frame after it."""
        inputs = prompt(pair.theirs.config, batch=2, frames=5)
        start = pair.ours.get_unconditional_inputs()
        for name in ("user_audio_codes", "moshi_audio_codes"):
            inputs[name][0, :, :2] = np.asarray(start[name])[0]
        inputs["input_ids"][0, 1] = start.input_ids[0, 0]
        inputs["attention_mask"] = np.array([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], np.int32)
        inputs = {**inputs, "concat_unconditional_inputs": False}
        expected = pair.theirs.generate(
            **to_torch(inputs), max_new_tokens=10, do_sample=False, return_audio_codes=True
        )
        actual = pair.ours.generate(**inputs, max_new_tokens=10, do_sample=False, return_audio_codes=True)
        np.testing.assert_array_equal(actual.sequences, numpy(expected.sequences))
        del inputs["concat_unconditional_inputs"]
        inputs = {name: value[:1, ..., 2:] for name, value in inputs.items()}
        unpadded = pair.ours.generate(**inputs, max_new_tokens=10, do_sample=False)
        np.testing.assert_array_equal(unpadded.sequences[0], actual.sequences[0, 1:])

    @pytest.mark.parametrize("concat", [True, False])
    def test_padding_makes_no_difference(self, pair: Pair, concat: bool) -> None:
        config, rng = pair.ours.config, np.random.default_rng(7)
        frames, heard, new, padding = 4, 9, 12, (3, 0, 1)
        frame_size = config.audio_encoder_config.frame_size
        alone = [prompt(config, batch=1, frames=frames, seed=row) for row in range(3)]
        for row, inputs in enumerate(alone):
            live = prompt(config, batch=1, frames=heard, seed=10 + row)["user_audio_codes"]
            inputs["user_audio_codes"] = np.concatenate([inputs["user_audio_codes"], live], axis=-1)
        # rows of 4, 7 and 6 frames, of which the first 3, none and the first are whatever
        longest = frames + max(padding)

        def in_front(row: int, name: str, stream: np.ndarray) -> np.ndarray:
            whatever = rng.integers(0, 30, (*stream.shape[:-1], padding[row])).astype(np.int32)
            more = longest - frames - padding[row]
            return np.concatenate([whatever, np.repeat(stream[..., :1], more, axis=-1), stream], axis=-1)

        def repeated(row: int, stream: np.ndarray) -> np.ndarray:
            return np.concatenate([np.repeat(stream[..., :1], longest - frames - padding[row], axis=-1), stream], -1)

        together = {
            name: np.concatenate([in_front(row, name, inputs[name]) for row, inputs in enumerate(alone)])
            for name in alone[0]
        }
        mask = np.arange(longest)[None] >= np.array(padding)[:, None]
        options = {"max_new_tokens": new, "return_audio_codes": True, "concat_unconditional_inputs": concat}
        options |= {"do_sample": True, "prng_key": jax.random.split(jax.random.key(5), 3)}
        batch = pair.ours.generate(**together, attention_mask=mask, **options)
        compiled = jax.jit(lambda inputs: pair.ours.generate(**inputs, **options))(
            {**together, "attention_mask": mask}
        )
        for row, inputs in enumerate(alone):
            inputs = {name: repeated(row, stream) for name, stream in inputs.items()}
            single = pair.ours.generate(**inputs, **{**options, "prng_key": options["prng_key"][row : row + 1]})
            first, end = padding[row], padding[row] + int(single.audio_lengths[0])
            for out in (batch, compiled):
                begin = int(concat)
                assert int(out.audio_lengths[row]) == end
                np.testing.assert_array_equal(out.sequences[row, :begin], single.sequences[0, :begin])
                np.testing.assert_array_equal(out.sequences[row, begin : begin + longest], together["input_ids"][row])
                np.testing.assert_array_equal(out.sequences[row, begin + padding[row] :], single.sequences[0, begin:])
                given = together["moshi_audio_codes"][row, :, :first]
                np.testing.assert_array_equal(out.audio_codes[row, :, :first], given)
                np.testing.assert_array_equal(out.audio_codes[row, :, first:end], single.audio_codes[0])
                voice = numpy(out.audio_sequences[row]).reshape(-1, frame_size)
                assert not voice[:first].any()
                assert_close(voice[first:end].ravel(), single.audio_sequences[0, 0], 1e-4)

    @pytest.mark.parametrize("mask", [[[1, 1, 0]], [[0, 0, 0]]])
    def test_padding_on_the_right(self, pair: Pair, mask: list[list[int]]) -> None:
        with pytest.raises(ValueError, match=r"`attention_mask` ends with 0 in row 0.*pad on the left"):
            pair.ours.generate(**prompt(pair.ours.config, batch=1, frames=3), attention_mask=np.array(mask))

    def test_start_codes_in_the_prompt(self, pair: Pair) -> None:
        """Upstream takes them out wherever they stand; ours where a row begins."""
        inputs = prompt(pair.theirs.config, batch=1, frames=6)
        inputs["moshi_audio_codes"][:, :, :2] = pair.ours.config.audio_vocab_size
        actual = check_nested(pair, inputs, new=6)
        np.testing.assert_array_equal(actual.audio_codes[..., :4], inputs["moshi_audio_codes"][..., 2:])
        inputs["moshi_audio_codes"][:, 1, 4] = pair.ours.config.audio_vocab_size
        with pytest.raises(ValueError, match=r"`moshi_audio_codes` has the start code 32 in frame 4 of row 0"):
            pair.ours.generate(**inputs, max_new_tokens=6)
        # what stands in the padding does not matter
        inputs["attention_mask"] = np.array([[0, 0, 0, 0, 0, 1]])
        pair.ours.generate(**inputs, max_new_tokens=6)

    def test_what_is_returned(self, pair: Pair) -> None:
        inputs = prompt(pair.theirs.config, batch=1, frames=3)
        everything = pair.ours.generate(**inputs, max_new_tokens=5, do_sample=False, return_audio_codes=True)
        for waveforms in (True, False):
            for codes in (True, False, None):
                out = pair.ours.generate(
                    **inputs,
                    max_new_tokens=5,
                    do_sample=False,
                    return_audio_waveforms=waveforms,
                    return_audio_codes=codes,
                )
                np.testing.assert_array_equal(out.sequences, everything.sequences)
                assert (out.audio_sequences is not None) == waveforms
                assert (out.audio_codes is not None) == bool(codes)

    def test_batch_row_equals_single_run(self, pair: Pair) -> None:
        inputs = prompt(pair.theirs.config, batch=3, frames=4, seed=4)
        batch = pair.ours.generate(**inputs, max_new_tokens=20, do_sample=False, return_audio_codes=True)
        for row in range(3):
            single = pair.ours.generate(
                **{name: value[row : row + 1] for name, value in inputs.items()},
                max_new_tokens=20,
                do_sample=False,
                return_audio_codes=True,
            )
            np.testing.assert_array_equal(numpy(batch.sequences[row]), numpy(single.sequences[0]))
            np.testing.assert_array_equal(numpy(batch.audio_codes[row]), numpy(single.audio_codes[0]))
            assert_close(batch.audio_sequences[row], single.audio_sequences[0], 1e-4)

    def test_cached_equals_uncached(self, pair: Pair) -> None:
        """Every generated token is the argmax of a pass over the whole generated dialogue without a cache."""
        inputs = prompt(pair.theirs.config, batch=2, frames=4, seed=5)
        new, config = 12, pair.ours.config
        out = pair.ours.generate(
            **inputs, max_new_tokens=new, do_sample=False, return_audio_codes=True, concat_unconditional_inputs=False
        )
        # The last frame's codes are known only in part (the delay), so it is left out.
        frames = 4 + new - 1
        silence = np.zeros((2, 1, config.audio_encoder_config.frame_size), np.float32)
        blank = numpy(pair.theirs.audio_encoder.encode(torch.from_numpy(silence), num_quantizers=4)[0])
        user = np.concatenate([inputs["user_audio_codes"], np.tile(blank, (1, 1, new))], axis=2)[..., :frames]
        delayed = [
            np.asarray(pair.ours.build_delay_pattern_mask(codes, 32, 32, max_length=frames + 1)[0])[..., :frames]
            for codes in (np.asarray(out.audio_codes)[..., :frames], user)
        ]
        # Upstream feeds the undelayed blank frame, and so do we: the delay shifts only the prompt's last column.
        uncached = pair.ours(
            input_ids=out.sequences[:, :frames], moshi_audio_codes=delayed[0], user_audio_codes=delayed[1]
        )
        predicted = np.asarray(uncached.logits.argmax(-1))
        np.testing.assert_array_equal(predicted[:, 3:], np.asarray(out.sequences)[:, 4:])

    def test_embeddings_equal_ids(self, pair: Pair) -> None:
        inputs = prompt(pair.theirs.config, batch=2, frames=4)
        options = {"max_new_tokens": 8, "do_sample": False, "return_audio_codes": True}
        expected = pair.ours.generate(**inputs, **options, concat_unconditional_inputs=False)
        delayed = np.concatenate(
            [
                pair.ours.build_delay_pattern_mask(inputs[name], 32, 32, max_length=12)[0]
                for name in ("moshi_audio_codes", "user_audio_codes")
            ],
            axis=1,
        )
        params = pair.ours.params
        embeds = params["decoder"]["model"]["embed_tokens"]["embedding"][inputs["input_ids"]]
        embeds = embeds + sum(params["embed_tokens"][str(k)]["embedding"][delayed[:, k]] for k in range(8))
        codes = {name: inputs[name] for name in ("moshi_audio_codes", "user_audio_codes")}
        actual = pair.ours.generate(inputs_embeds=embeds, **codes, **options)
        np.testing.assert_array_equal(numpy(actual.sequences)[:, -8:], numpy(expected.sequences)[:, -8:])
        np.testing.assert_array_equal(numpy(actual.audio_codes), numpy(expected.audio_codes))

    def test_max_length_counts_the_prompt(self, pair: Pair) -> None:
        inputs = prompt(pair.theirs.config, batch=1, frames=3)
        by_length = pair.ours.generate(
            **inputs, max_length=11, do_sample=False, return_audio_codes=True, concat_unconditional_inputs=False
        )
        by_new = pair.ours.generate(
            **inputs, max_new_tokens=8, do_sample=False, return_audio_codes=True, concat_unconditional_inputs=False
        )
        assert by_length.sequences.shape == (1, 11)
        np.testing.assert_array_equal(by_length.sequences, by_new.sequences)
        np.testing.assert_array_equal(by_length.audio_codes, by_new.audio_codes)


def test_second_call_compiles_nothing(pair: Pair, count_compilations: Callable[[], int]) -> None:
    first = prompt(pair.theirs.config, batch=5, frames=7, seed=6)
    second = prompt(pair.theirs.config, batch=5, frames=7, seed=7)
    options = {"max_new_tokens": 9, "do_sample": True, "return_audio_codes": True}
    jax.block_until_ready(pair.ours.generate(**first, **options, prng_key=jax.random.key(0)).audio_sequences)
    keys = [jax.random.key(1), jax.random.key(2)]
    assert count_compilations() > 0, "the listener hears nothing"
    jax.block_until_ready(pair.ours.generate(**second, **options, prng_key=keys[0]).audio_sequences)
    assert count_compilations() == 0
    # Temperatures are values, not part of the program.
    pair.ours.generate(**second, **options, temperature=0.5, prng_key=keys[1])
    pair.ours.generate(**second, **options, prng_key=keys[1])
    assert count_compilations() <= 1


class TestNestedSampling:
    def test_reproducible_by_key(self, pair: Pair) -> None:
        def run(seed: int) -> tuple[np.ndarray, np.ndarray]:
            out = pair.ours.generate(
                max_new_tokens=15, do_sample=True, return_audio_codes=True, prng_key=jax.random.key(seed)
            )
            return np.asarray(out.sequences), np.asarray(out.audio_codes)

        for first, second in zip(run(0), run(0)):
            np.testing.assert_array_equal(first, second)
        assert (run(0)[0] != run(1)[0]).any()
        assert (run(0)[1] != run(1)[1]).any()

    def test_top_one_is_greedy(self, pair: Pair) -> None:
        inputs = prompt(pair.theirs.config, batch=2, frames=3)
        greedy = pair.ours.generate(**inputs, max_new_tokens=12, do_sample=False, return_audio_codes=True)
        top_one = pair.ours.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=True,
            top_k=1,
            depth_decoder_do_sample=True,
            depth_decoder_top_k=1,
            return_audio_codes=True,
            prng_key=jax.random.key(0),
        )
        np.testing.assert_array_equal(top_one.sequences, greedy.sequences)
        np.testing.assert_array_equal(top_one.audio_codes, greedy.audio_codes)

    def test_distribution_of_audio_codes(self, pair: Pair) -> None:
        """Codebook 0, then codebook 1 given it, follow the depth decoder's tempered and cut softmax."""
        batch, temperature, top_k = 3000, 1.5, 6
        inputs = pair.ours.get_unconditional_inputs(num_samples=batch)
        out = pair.ours.generate(
            **{name: inputs[name] for name in ("input_ids", "user_audio_codes", "moshi_audio_codes")},
            concat_unconditional_inputs=False,
            return_audio_waveforms=False,
            return_audio_codes=True,
            do_sample=False,
            depth_decoder_do_sample=True,
            depth_decoder_temperature=temperature,
            depth_decoder_top_k=top_k,
            max_new_tokens=3,
            prng_key=jax.random.key(0),
        )
        codes, text = np.asarray(out.audio_codes), np.asarray(out.sequences)
        theirs = pair.theirs
        with torch.no_grad():
            start = to_torch({name: np.asarray(value)[:1] for name, value in inputs.items()})
            state = theirs(**start).last_hidden_state[:, -1:]

            def depth_logits(state: torch.Tensor, *ids: int) -> np.ndarray:
                mask = torch.ones(1, len(ids), dtype=torch.long)
                logits = theirs.depth_decoder(torch.tensor([ids]), last_hidden_state=state, attention_mask=mask).logits
                return logits[0, -1].numpy()

            # Frame 1, codebook 0: nothing is drawn before it.
            check_distribution(codes[:, 0, 0], depth_logits(state, text[0, 1]), temperature, top_k)

            # Frame 2 given the commonest first draw; its codebook 1 is frame 1 of the undelayed codes.
            common = np.bincount(codes[:, 0, 0]).argmax()
            chosen = codes[:, 0, 0] == common
            silence = torch.zeros(1, 1, theirs.config.audio_encoder_config.frame_size)
            blank = theirs.audio_encoder.encode(silence, num_quantizers=4)[0]
            moshi = torch.full((1, 4, 2), 32)
            moshi[0, 0, 1] = int(common)
            user = torch.full((1, 4, 2), 32)
            user[0, 0, 1] = blank[0, 0, 0]
            ids = torch.from_numpy(text[chosen][:1, :2]).long()
            state = theirs(input_ids=ids, moshi_audio_codes=moshi, user_audio_codes=user).last_hidden_state[:, -1:]
            next_text = int(text[chosen][0, 2])
            check_distribution(codes[chosen][:, 0, 1], depth_logits(state, next_text), temperature, top_k)
            second = np.bincount(codes[chosen][:, 0, 1]).argmax()
            both = chosen & (codes[:, 0, 1] == second)
            check_distribution(codes[both][:, 1, 0], depth_logits(state, next_text, int(second)), temperature, top_k)


def check_distribution(
    drawn: np.ndarray, logits: np.ndarray, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> None:
    """Chi-square test of draws against the softmax of the logits after temperature, top-k and top-p."""
    probabilities = np.exp((logits - logits.max()) / temperature, dtype=np.float64)
    if top_k is not None:
        probabilities[probabilities < np.sort(probabilities)[-top_k]] = 0
    probabilities /= probabilities.sum()
    if top_p is not None:
        order = np.argsort(-probabilities)
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= top_p]] = 0
        probabilities /= probabilities.sum()
    assert len(drawn) >= 100, "too few draws for a test"
    counts = np.bincount(drawn, minlength=len(logits))
    assert counts[probabilities == 0].sum() == 0, "an impossible token was drawn"
    expected = probabilities * len(drawn)
    often = expected >= 5
    rest = (probabilities > 0) & ~often
    observed, expected = list(counts[often]), list(expected[often])
    if rest.any():
        observed.append(counts[rest].sum())
        expected.append(probabilities[rest].sum() * len(drawn))
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-4
    # The same draws do not fit the distribution at another temperature: the test can tell.
    wrong = np.where(probabilities > 0, probabilities, 0) ** 3
    wrong = wrong / wrong.sum() * len(drawn)
    seen = wrong > 1e-9
    assert ((counts[seen] - wrong[seen]) ** 2 / wrong[seen]).sum() > 30


class TestText:
    def check(self, pair: Pair, ids: np.ndarray, **options: Any) -> Any:
        torch_options = to_torch(options)
        expected = pair.theirs.generate(torch.from_numpy(ids).long(), do_sample=False, **torch_options)
        actual = pair.ours.generate(ids, do_sample=False, **options)
        np.testing.assert_array_equal(numpy(actual.sequences), numpy(expected))
        return actual

    def ids(self, batch: int, length: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 60, (batch, length)).astype(np.int32)

    def test_greedy(self, text_pair: Pair) -> None:
        self.check(text_pair, self.ids(3, 5), max_new_tokens=40)

    def test_max_length(self, text_pair: Pair) -> None:
        assert self.check(text_pair, self.ids(1, 5), max_length=12).sequences.shape == (1, 12)

    def test_left_padding(self, text_pair: Pair) -> None:
        mask = np.array([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], np.int32)
        self.check(text_pair, self.ids(2, 5), attention_mask=mask, max_new_tokens=20)

    def test_right_padding(self, text_pair: Pair) -> None:
        with pytest.raises(ValueError, match=r"`attention_mask` ends with 0 in row 1.*pad on the left"):
            text_pair.ours.generate(self.ids(2, 2), attention_mask=np.array([[0, 1], [1, 0]]))
        with pytest.raises(
            ValueError, match=r"`input_ids` ends with `pad_token_id` = 7 in row 1.*pass an `attention_m"
        ):
            text_pair.ours.generate(np.array([[1, 2], [3, 7]]), pad_token_id=7)

    def test_left_padding_equals_unpadded(self, text_pair: Pair) -> None:
        ids = self.ids(2, 5)
        mask = np.array([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], np.int32)
        padded = text_pair.ours.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
        single = text_pair.ours.generate(ids[:1, 3:], max_new_tokens=20, do_sample=False)
        np.testing.assert_array_equal(padded.sequences[0, 5:], single.sequences[0, 2:])

    def test_eos_ends_rows_independently(self, text_pair: Pair) -> None:
        ids = self.ids(3, 4)
        free = np.asarray(text_pair.ours.generate(ids, max_new_tokens=30, do_sample=False).sequences)
        eos = int(free[0, 4 + 6])
        out = self.check(text_pair, ids, max_new_tokens=30, eos_token_id=eos, pad_token_id=59)
        ends = [int(np.argmax(row[4:] == eos)) if (row[4:] == eos).any() else 29 for row in free]
        assert len(set(ends)) > 1, "all rows end together: draw other ids"
        for row, end in enumerate(ends):
            assert (np.asarray(out.sequences)[row, 4 + end + 1 :] == 59).all()

    def test_eos_of_all_rows_trims(self, text_pair: Pair) -> None:
        ids = self.ids(1, 4)
        free = np.asarray(text_pair.ours.generate(ids, max_new_tokens=30, do_sample=False).sequences)
        out = self.check(text_pair, ids, max_new_tokens=30, eos_token_id=int(free[0, 8]), pad_token_id=59)
        assert out.sequences.shape[1] < 34

    def test_under_jit_is_padded_to_max_length(self, text_pair: Pair) -> None:
        ids = self.ids(2, 4)
        model = text_pair.ours
        eager = model.generate(ids, max_length=20, do_sample=False)
        compiled = jax.jit(lambda ids: model.generate(ids, max_length=20, do_sample=False).sequences)(ids)
        np.testing.assert_array_equal(compiled, eager.sequences)
        eos = int(eager.sequences[0, 6])
        short = model.generate(ids[:1], max_length=20, do_sample=False, eos_token_id=eos, pad_token_id=59)
        padded = jax.jit(
            lambda ids: (
                model.generate(ids, max_length=20, do_sample=False, eos_token_id=eos, pad_token_id=59).sequences
            )
        )(ids[:1])
        assert padded.shape == (1, 20)
        length = short.sequences.shape[1]
        assert length < 20
        np.testing.assert_array_equal(padded[:, :length], short.sequences)
        assert (np.asarray(padded)[:, length:] == 59).all()

    def test_jit_of_the_bound_method(self, text_pair: Pair) -> None:
        ids = self.ids(2, 4)
        model = text_pair.ours
        compiled = jax.jit(model.generate)(ids)
        np.testing.assert_array_equal(compiled.sequences[:, : 4 + 5], model.generate(ids).sequences[:, : 4 + 5])

    @pytest.mark.parametrize(
        "options", [{}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.7}], ids=str
    )
    def test_distribution(self, text_pair: Pair, options: dict[str, Any]) -> None:
        ids = np.tile(self.ids(1, 3), (4000, 1))
        out = text_pair.ours.generate(
            ids, max_new_tokens=1, do_sample=True, prng_key=jax.random.key(1), **{"top_k": 0, **options}
        )
        logits = text_pair.upstream(torch.from_numpy(ids[:1]).long()).logits[0, -1].numpy()
        options = {"temperature": 1.0, **options}
        check_distribution(np.asarray(out.sequences)[:, 3], logits, **options)

    def test_sampling_is_reproducible_by_key(self, text_pair: Pair) -> None:
        def run(seed: int) -> jax.Array:
            return text_pair.ours.generate(
                self.ids(2, 3), max_new_tokens=20, do_sample=True, prng_key=jax.random.key(seed)
            ).sequences

        np.testing.assert_array_equal(run(0), run(0))
        assert (run(0) != run(1)).any()

    def test_params_argument(self, text_pair: Pair) -> None:
        ids = self.ids(2, 3)
        other = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=-1), text_pair.ours.params)
        changed = text_pair.ours.generate(ids, max_new_tokens=10, do_sample=False, params=other)
        plain = text_pair.ours.generate(ids, max_new_tokens=10, do_sample=False)
        assert (changed.sequences != plain.sequences).any()


@pytest.fixture(scope="module")
def runs(pair: Pair) -> tuple[Any, Any, int, list[int]]:
    """A run without an end, the same with an end, the id that ends it and the new tokens of each row."""
    new_tokens = 20
    inputs = prompt(pair.theirs.config, batch=3, frames=3, seed=8)
    options = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "return_audio_codes": True,
        "concat_unconditional_inputs": False,
    }
    free = pair.ours.generate(**inputs, **options)
    new = np.asarray(free.sequences)[:, 3:]
    # An id that ends some row early, and not all rows at the same frame.
    for eos in new[0, 4:]:
        ends = [int(np.argmax(row == eos)) + 1 if (row == eos).any() else new_tokens for row in new]
        if min(ends) > 2 and len(set(ends)) > 1:
            break
    else:
        pytest.fail("no id of the run ends the rows at different frames: choose another seed")
    ended = pair.ours.generate(**inputs, **options, eos_token_id=int(eos), pad_token_id=3)
    return free, ended, int(eos), ends


class TestEndOfSequenceWithAudio:
    """Upstream crashes here, so the oracle is the run without an end: every row is that run, cut."""

    def test_text(self, runs: tuple[Any, Any, int, list[int]]) -> None:
        free, ended, _, ends = runs
        sequences = np.asarray(ended.sequences)
        assert sequences.shape[1] == 3 + max(ends)
        for row, end in enumerate(ends):
            np.testing.assert_array_equal(sequences[row, : 3 + end], np.asarray(free.sequences)[row, : 3 + end])
            assert (sequences[row, 3 + end :] == 3).all()

    def test_audio(self, pair: Pair, runs: tuple[Any, Any, int, list[int]]) -> None:
        free, ended, _, ends = runs
        lengths = np.asarray(ended.audio_lengths)
        frame = pair.theirs.config.audio_encoder_config.frame_size
        for row, end in enumerate(ends):
            frames = 3 + end - 1
            assert lengths[row] == frames
            np.testing.assert_array_equal(ended.audio_codes[row, :, :frames], free.audio_codes[row, :, :frames])
            alone = pair.theirs.audio_encoder.decode(
                torch.from_numpy(np.array(free.audio_codes[row : row + 1, :, :frames])).long()
            )
            assert_close(ended.audio_sequences[row, :, : frames * frame], alone.audio_values[0], 1e-4)
            assert (np.asarray(ended.audio_sequences)[row, :, frames * frame :] == 0).all()
