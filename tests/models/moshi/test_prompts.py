"""Dialogues that begin from a prompt: as if each of its frames had been forced in a step of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.configs import tiny_moshi_config
from tests.models.moshi.test_streaming_flax_moshi import GREEDY, SAMPLE, run, user_audio, user_codes
from tests.torch_oracle import assert_close
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, LoraConfig, MoshiPrompt
from transformers_moshi_flax.models.moshi.prompt_flax_moshi import (
    PAUSE_FRAMES,
    IdleCodes,
    system_pieces,
    voice_codes,
)
from transformers_moshi_flax.models.moshi.prompt_state import CHUNK, prompt_capacity, prompt_columns
from transformers_moshi_flax.models.moshi.stream_state import StreamState
from transformers_moshi_flax.models.moshi.streaming_flax_moshi import FlaxMoshiStream
from transformers_moshi_flax.nn.cache import NoCache, layer_keys

Moshi = FlaxMoshiForConditionalGeneration
WINDOW = 24
SLOTS = 3


@pytest.fixture(scope="module")
def model() -> Moshi:
    model = Moshi(tiny_moshi_config(sliding_window=WINDOW, max_position_embeddings=WINDOW), seed=2)
    # heads that choose among many tokens
    model.params = jax.tree.map(lambda leaf: 5 * leaf if leaf.ndim == 2 else leaf, model.params)
    return model


@pytest.fixture(scope="module")
def stream(model: Moshi) -> FlaxMoshiStream:
    return model.streaming(SLOTS, **SAMPLE)


def drawn_prompt(frames: int, seed: int = 0) -> MoshiPrompt:
    rng = np.random.default_rng(seed)
    return MoshiPrompt(rng.integers(0, 60, frames), *rng.integers(0, 32, (2, 4, frames)))


def of_one(text_id: int, moshi_code: int, user_code: int, codebooks: int = 4) -> MoshiPrompt:
    """Of one frame."""
    return MoshiPrompt(np.array([text_id]), *(np.full((codebooks, 1), code) for code in (moshi_code, user_code)))


def forced(stream: FlaxMoshiStream, prompt: MoshiPrompt, key: jax.Array | None = None) -> StreamState:
    """All slots after the frames of the prompt, forced one by one."""

    def rows(array: np.ndarray) -> np.ndarray:
        return np.broadcast_to(array, (stream.batch_size, *array.shape))

    state = stream.init(
        key, forced_text_ids=rows(prompt.text_ids[0]), forced_audio_codes=rows(prompt.moshi_codes[:, 0])
    )
    for frame in range(prompt.frames):
        behind = frame + 1 < prompt.frames
        state, _ = stream.step(
            state,
            user_audio_codes=rows(prompt.user_codes[:, frame]),
            forced_text_ids=rows(prompt.text_ids[frame + 1]) if behind else None,
            forced_audio_codes=rows(prompt.moshi_codes[:, frame + 1]) if behind else None,
        )
    return state


def assert_same_dialogue(actual: StreamState, expected: StreamState, rows: Any = slice(None)) -> None:
    """What Moshi remembers, slot by slot; of keys and values those that count."""
    for name in ("text_ids", "audio_codes", "user_codes", "forced_codes", "steps"):
        pair = (np.asarray(getattr(state.dialogue, name))[rows] for state in (actual, expected))
        np.testing.assert_array_equal(*pair, name)
    caches = [state.dialogue.cache for state in (actual, expected)]
    for name in ("position", "slot", "filled"):
        np.testing.assert_array_equal(*(np.asarray(getattr(cache, name))[rows] for cache in caches), name)
    filled = np.asarray(caches[0].filled)
    for layer in range(2):
        for ours, theirs in zip(*(layer_keys(cache, layer, len(filled)) for cache in caches)):
            for row in np.arange(len(filled))[rows]:
                assert_close(ours[row, : filled[row]], np.asarray(theirs[row, : filled[row]]), 1e-5)


def assert_same_words(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], rows: Any = slice(None)) -> None:
    for name in ("text_ids", "audio_codes", "valid"):
        np.testing.assert_array_equal(actual[name][rows], expected[name][rows], name)


class TestOnePrefill:
    @pytest.mark.parametrize("frames", [1, 2, 9, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 5, CHUNK + 1, 150])
    def test_is_as_forcing_frame_by_frame(self, stream: FlaxMoshiStream, frames: int) -> None:
        """Also of prompts longer than the context, of which the ring keeps the last frames."""
        prompt, key, codes = drawn_prompt(frames), jax.random.key(4), user_codes(SLOTS, 8, seed=1)
        expected, actual = forced(stream, prompt, key), stream.init(key, prompt=prompt)
        assert_same_dialogue(actual, expected)
        words = run(stream, actual, codes)[1]
        assert_same_words(words, run(stream, expected, codes)[1])
        assert words["valid"].all() and len(np.unique(words["audio_codes"])) > 8

    def test_mimi_begins_behind_it(self, model: Moshi, stream: FlaxMoshiStream) -> None:
        codes = user_codes(SLOTS, 5)
        words = run(stream, stream.init(prompt=drawn_prompt(7)), codes)[1]
        fresh, samples = model.audio_encoder.init_decoder_state(SLOTS), []
        for k in range(5):
            fresh, audio = model.audio_encoder.decode_step(fresh, words["audio_codes"][..., k : k + 1])
            samples.append(audio)
        assert_close(words["audio"], np.concatenate(samples, -1), 1e-5)

    def test_slots_with_different_prompts_and_none(self, stream: FlaxMoshiStream) -> None:
        first, second, key = drawn_prompt(5, 1), drawn_prompt(WINDOW + 3, 2), jax.random.key(1)
        codes = user_codes(SLOTS, 6, seed=3)
        state = stream.init(key, prompt=[first, None, second])
        words = run(stream, state, codes)[1]
        for slot, alone in enumerate((forced(stream, first, key), stream.init(key), forced(stream, second, key))):
            assert_same_words(words, run(stream, alone, codes)[1], slice(slot, slot + 1))

    def test_a_slot_begins_anew_and_its_neighbours_do_not_notice(self, stream: FlaxMoshiStream) -> None:
        codes, prompt, key = user_codes(SLOTS, 40, seed=5), drawn_prompt(9), jax.random.key(8)
        undisturbed = run(stream, stream.init(key), codes)[1]
        state, before = run(stream, stream.init(key), codes[..., :30])
        state = stream.reset(state, np.arange(SLOTS) == 1, key, prompt=prompt)
        _, after = run(stream, state, codes[..., 30:])
        for slot in (0, 2):
            for part, frames in ((before, slice(0, 30)), (after, slice(30, 40))):
                assert_same_words(part, {name: row[..., frames] for name, row in undisturbed.items()}, slot)
        expected = run(stream, forced(stream, prompt, key), codes[..., 30:])[1]
        assert_same_words(after, expected, 1)

    def test_a_state_is_good_for_many(self, stream: FlaxMoshiStream, count_compilations: Callable[[], int]) -> None:
        """It is not consumed, and beginning from it compiles nothing, whatever the prompt."""
        stream.warmup(prompt_frames=CHUNK)
        keys = [jax.random.key(seed) for seed in (0, 1)]
        prompts, codes = [drawn_prompt(5), drawn_prompt(CHUNK)], user_codes(SLOTS, 4)
        stream.init(keys[0])  # of splitting the key
        expected = [run(stream, forced(stream, prompts[0], key), codes)[1] for key in keys]
        count_compilations()
        kept = [stream.prefill(prompt) for prompt in prompts]
        words = []
        for key in keys:
            state = stream.reset(stream.init(), np.ones(SLOTS, bool), key, prompt=kept[1])
            words.append(run(stream, stream.reset(state, np.ones(SLOTS, bool), key, prompt=kept[0]), codes)[1])
        assert count_compilations() == 0
        for actual, wanted in zip(words, expected):
            assert_same_words(actual, wanted)
        assert not np.array_equal(words[0]["audio_codes"], words[1]["audio_codes"])

    def test_what_is_forced_behind_it(self, stream: FlaxMoshiStream) -> None:
        text, codes = np.array([7, -1, 9]), np.tile(np.arange(4), (SLOTS, 1))
        state = stream.init(prompt=drawn_prompt(6), forced_text_ids=text, forced_audio_codes=codes)
        _, said = run(stream, state, user_codes(SLOTS, 1))
        assert said["text_ids"][0] == 7 and said["text_ids"][2] == 9
        np.testing.assert_array_equal(said["audio_codes"][..., 0], codes)

    def test_of_kyutais_beginning(self, model: Moshi, stream: FlaxMoshiStream) -> None:
        """A stream that ignores the first frame has nothing to ignore behind a prompt."""
        kyutais, prompt = model.streaming(SLOTS, ignore_first_user_frame=True, **SAMPLE), drawn_prompt(6)
        codes, key = user_codes(SLOTS, 5), jax.random.key(3)
        state = kyutais.init(key, prompt=[prompt, None, prompt])
        words = run(kyutais, state, codes)[1]
        expected = run(stream, forced(stream, prompt, key), codes)[1]
        assert_same_words(words, expected, [0, 2])
        assert not words["valid"][1, 0] and words["valid"][1, 1:].all()

    def test_inside_of_jit(self, stream: FlaxMoshiStream) -> None:
        prompt, codes, key = stream.prefill(drawn_prompt(6)), user_codes(SLOTS, 1)[..., 0], jax.random.key(0)
        state = stream.init(key)

        @jax.jit
        def begin(state: StreamState) -> Any:
            state = stream.reset(state, np.ones(SLOTS, bool), key, prompt=prompt)
            return stream.step(state, user_audio_codes=codes)[1].audio_codes

        with pytest.raises(ValueError, match=r"is not run inside of `jax\.jit`"):
            jax.jit(lambda: stream.init(key, prompt=drawn_prompt(6)))()
        _, expected = stream.step(stream.init(key, prompt=prompt), user_audio_codes=codes)
        np.testing.assert_array_equal(begin(state), expected.audio_codes)

    def test_capacities(self) -> None:
        frames = [1, CHUNK, CHUNK + 1, 3 * CHUNK, 4 * CHUNK + 1]
        assert [prompt_capacity(count) // CHUNK for count in frames] == [1, 1, 2, 4, 8]


class Keeping(NoCache):
    """A whole dialogue at once, in which every step sees the first ``kept`` and its last ``window - kept`` ones."""

    def __init__(self, kept: int, window: int):
        self.kept, self.window = kept, window

    def next_steps(self, steps: int, window: Any, batch_size: int, attention_mask: Any = None) -> Any:
        found, after = super().next_steps(steps, None, batch_size, attention_mask)
        query, key = np.arange(steps)[:, None], np.arange(steps)[None]
        recent = (query - key < self.window - self.kept) | (key < self.kept)
        return found.replace(mask=found.mask & recent[None]), after


class TestPinned:
    @pytest.mark.parametrize("frames", [1, 7, WINDOW - 2])
    def test_the_prompt_is_kept(self, model: Moshi, frames: int) -> None:
        """As a recomputation of the whole dialogue in which those positions stay; other slots have no prompt."""
        stream = model.streaming(2, pin_prompt=True, return_audio_waveforms=False, **GREEDY)
        plain = model.streaming(2, return_audio_waveforms=False, **GREEDY)
        steps, prompt = 70, drawn_prompt(frames)
        codes = user_codes(2, steps, seed=7)
        states, said = [stream.init(prompt=[prompt, None]), plain.init(prompt=[prompt, None])], []
        for k in range(steps):
            frames_of = []
            for number, one in enumerate((stream, plain)):
                states[number], frame = one.step(states[number], user_audio_codes=codes[..., k])
                frames_of.append(frame)
            said.append(frames_of)
        forgets = [np.stack([frame[name] for _, frame in said]) for name in ("text_logits", "audio_codes")]
        keeps = [np.stack([frame[name] for frame, _ in said]) for name in ("text_logits", "audio_codes")]
        np.testing.assert_array_equal(keeps[1][:, 1], forgets[1][:, 1])
        assert np.abs(keeps[0][:, 0] - forgets[0][:, 0]).max() > 1e-2
        text, audio = (np.stack([frame[n][0] for frame, _ in said], -1) for n in ("text_ids", "audio_codes"))
        whole = MoshiPrompt(
            np.concatenate([prompt.text_ids, text]),
            np.concatenate([prompt.moshi_codes, audio], -1),
            np.concatenate([prompt.user_codes, codes[0]], -1),
        )
        ids, user, moshi = map(jnp.asarray, prompt_columns(whole, model.config))
        module = model.module
        hidden = module.apply({"params": model.params}, ids, user, moshi, method=module.embed)
        outputs = module.apply(
            {"params": model.params},
            hidden,
            Keeping(frames + 1, WINDOW),
            method=lambda module, hidden, cache: module.decoder(inputs_embeds=hidden, cache=cache),
        )
        assert_close(keeps[0][:, 0], np.asarray(outputs.logits[0, -steps:]), 1e-5)

    def test_slots_that_begin_anew_rest_and_move(self, model: Moshi, tmp_path: Path) -> None:
        """A pinned dialogue after a file, in another slot, beside others that rest, is the undisturbed one."""
        stream = model.streaming(2, pin_prompt=True, **GREEDY)
        codes, prompt = user_codes(2, 50, seed=2), drawn_prompt(5)
        codes[1] = codes[0]
        undisturbed = run(stream, stream.init(prompt=prompt), codes)[1]
        state, _ = run(stream, stream.init(prompt=drawn_prompt(9, 4)), codes[..., :40])
        state = stream.reset(state, np.array([True, False]), prompt=prompt)
        rows = np.array([True, False])
        for k in range(30):
            state, _ = stream.step(state, user_audio_codes=codes[..., k], active=rows)
        stream.save_state(state, tmp_path / "state")
        state = stream.set_slot(state, 1, stream.get_slot(stream.load_state(tmp_path / "state"), 0))
        state, words = run(stream, state, codes[..., 30:])
        for slot in range(2):
            assert_same_words(words, {name: row[..., 30:] for name, row in undisturbed.items()}, slot)
        state = stream.reset(state, rows)
        fresh = run(stream, state, codes)[1]
        assert_same_words(fresh, run(stream, stream.init(), codes)[1], 0)

    def test_prompts_that_leave_no_room(self, model: Moshi) -> None:
        stream = model.streaming(2, pin_prompt=True, **GREEDY)
        with pytest.raises(ValueError, match=f"`pin_prompt=True` can keep {WINDOW - 2} at most"):
            stream.init(prompt=drawn_prompt(WINDOW - 1))


class TestGenerate:
    def test_goes_on_as_a_dialogue(self, model: Moshi) -> None:
        """Rows with prompts of different lengths, and users who go on behind them."""
        prompts, codes = [drawn_prompt(5, 1), drawn_prompt(9, 2)], user_codes(2, 6)
        stream, said = model.streaming(2, return_audio_waveforms=False, **GREEDY), []
        state = stream.init(prompt=prompts)
        for k in range(6):
            state, frame = stream.step(state, user_audio_codes=codes[..., k])
            said.append(frame)
        words = {name: np.stack([frame[name] for frame in said], -1) for name in ("text_ids", "audio_codes")}
        options = {"max_new_tokens": 7, "return_audio_waveforms": False, "return_audio_codes": True, **GREEDY}
        out = model.generate(prompt=prompts, user_audio_codes=codes, **options)
        np.testing.assert_array_equal(out.sequences[:, -7:-1], words["text_ids"])
        np.testing.assert_array_equal(out.audio_codes[..., -6:], words["audio_codes"])
        np.testing.assert_array_equal(out.audio_codes[1, :, :9], prompts[1].moshi_codes)

    def test_is_that_of_its_streams(self, model: Moshi) -> None:
        prompt, audio = drawn_prompt(5), user_audio(2, 4)
        options = {"max_new_tokens": 6, "return_audio_waveforms": False, "return_audio_codes": True, **GREEDY}
        codes = model.audio_encoder.encode(audio, num_quantizers=4).audio_codes
        ids, moshi, user = (
            np.stack([array] * 2) for array in (prompt.text_ids, prompt.moshi_codes, prompt.user_codes)
        )
        expected = model.generate(
            ids, user_audio_codes=np.concatenate([user, codes], -1), moshi_audio_codes=moshi, **options
        )
        actual = model.generate(prompt=prompt, user_input_values=audio, **options)
        np.testing.assert_array_equal(actual.audio_codes, expected.audio_codes)
        np.testing.assert_array_equal(actual.sequences, expected.sequences)
        silent = model.generate(prompt=prompt, **options)
        assert silent.audio_codes.shape == (1, 4, 10)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"input_ids": np.zeros((1, 2), int)}, "`prompt` has text and both voices: leave out `input_ids`"),
            ({"attention_mask": np.ones((1, 2), int)}, "leave out `attention_mask`"),
            ({"user_audio_codes": np.zeros((3, 4, 2), int)}, "`prompt` has 2 prompts, but the user has the rows 3"),
            ({"user_audio_codes": np.full((2, 4, 2), 40)}, "`user_audio_codes` has the id 40"),
        ],
    )
    def test_what_does_not_go_together(self, model: Moshi, given: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=re.escape(words)):
            model.generate(prompt=[drawn_prompt(2), drawn_prompt(3)], max_new_tokens=2, **given)


def packaged(model: Moshi, prompt: MoshiPrompt, path: Path) -> None:
    """A prompt as PersonaPlex's code leaves it, step by step: embeddings of all but the last position, and the ring.

    At step k the streams of frame k are written to the ring, those with a delay one place further; then what stands at
    the place of step k - 1 goes into the model. Beginnings of all streams are the start, so that frame 0 is lost.
    """
    books, ring, embeddings = len(prompt.moshi_codes), np.zeros((1, 9, 4), np.int64), []
    start = np.array([60] + [32] * 2 * books)
    delays = np.array([0] + 2 * [0, *[1] * (books - 1)])
    streams = np.concatenate([prompt.text_ids[None], prompt.moshi_codes, prompt.user_codes])
    for step in range(prompt.frames):
        ring[0, np.arange(9), (step + delays) % 4] = streams[:, step]
        begins = step <= delays
        ring[0, begins, step % 4] = start[begins]
        if step:
            column = ring[..., (step - 1) % 4, None].astype(np.int32)
            text, moshi, user = map(jnp.asarray, (column[:, 0], column[:, 1 : 1 + books], column[:, 1 + books :]))
            module = model.module
            embeddings.append(module.apply({"params": model.params}, text, user, moshi, method=module.embed))
    voice = {"embeddings": torch.tensor(np.stack(embeddings)), "cache": torch.tensor(ring)}
    torch.save(voice, path)


class TestPackagedVoices:
    @pytest.mark.parametrize("frames", [3, 8, 9, 10, 11])
    def test_are_the_prompts_that_they_were_made_of(
        self, model: Moshi, stream: FlaxMoshiStream, tmp_path: Path, frames: int
    ) -> None:
        """Whatever is left in the ring, and with a text behind them."""
        prompt, text = drawn_prompt(frames), drawn_prompt(4, 9)
        packaged(model, prompt, tmp_path / "voice.pt")
        MoshiPrompt.from_personaplex(tmp_path / "voice.pt").save(tmp_path / "voice.safetensors")
        voice = MoshiPrompt.load(tmp_path / "voice.safetensors")
        assert voice.frames == frames - 1
        codes = user_codes(SLOTS, 4)
        heard = MoshiPrompt(prompt.text_ids[1:], prompt.moshi_codes[:, 1:], prompt.user_codes[:, 1:])
        for ours, theirs in ((voice, heard), (voice + text, heard + text)):
            actual, expected = stream.init(prompt=ours), stream.init(prompt=theirs)
            assert_same_dialogue(actual, expected)
            assert_same_words(run(stream, actual, codes)[1], run(stream, expected, codes)[1])
        with pytest.raises(ValueError, match="cannot stand behind another one"):
            text + voice
        with pytest.raises(ValueError, match="which only streams take"):
            model.generate(prompt=voice, max_new_tokens=1)

    def test_what_is_none(self, model: Moshi, stream: FlaxMoshiStream, tmp_path: Path) -> None:
        for content in (
            {"cache": torch.zeros(1, 9, 4)},
            {"embeddings": torch.zeros(3, 4), "cache": torch.zeros(1, 9, 4)},
        ):
            torch.save(content, tmp_path / "voice.pt")
            with pytest.raises(ValueError, match="is no voice of PersonaPlex, its tensors are"):
                MoshiPrompt.from_personaplex(tmp_path / "voice.pt")
        torch.save({"embeddings": Path}, tmp_path / "voice.pt")  # an object, which is not read
        with pytest.raises(ValueError, match="cannot be read as a PyTorch pickle of weights"):
            MoshiPrompt.from_personaplex(tmp_path / "voice.pt")
        with pytest.raises(FileNotFoundError):
            MoshiPrompt.from_personaplex(tmp_path / "other.pt")
        one = drawn_prompt(3)
        streams = (one.text_ids, one.moshi_codes, one.user_codes)
        with pytest.raises(ValueError, match=r"`prompt\.embeds` are of the size 8, but the model's of 64"):
            stream.init(prompt=MoshiPrompt(*streams, np.zeros((3, 8), np.float32)))
        for embeds in (np.zeros((4, 64), np.float32), np.zeros((3, 64), int), np.full((3, 64), np.nan, np.float32)):
            with pytest.raises(ValueError, match="`embeds` must"):
                MoshiPrompt(*streams, embeds)


class TestBadPrompts:
    @pytest.mark.parametrize(
        ("streams", "words"),
        [
            (([[1]], [[1]], [[1]]), "`text_ids` must have the shape (frames,), but has the shape (1, 1)"),
            (([1], [1], [[1]]), "`moshi_codes` must have the shape (codebooks, frames), but has the shape (1,)"),
            (([1.0], [[1]], [[1]]), "`text_ids` must hold integer ids, but has the dtype float64"),
            (([1], [[1]], [[-1]]), "`user_codes` has the id -1"),
            (([1, 2], [[1]], [[1]]), "must have the same frames and codebooks"),
            (([1], [[1]], [[1], [1]]), "must have the same frames and codebooks"),
            ((np.zeros(0, int), np.zeros((4, 0), int), np.zeros((4, 0), int)), "at least one frame"),
        ],
    )
    def test_streams(self, streams: Any, words: str) -> None:
        with pytest.raises(ValueError, match=re.escape(words)):
            MoshiPrompt(*map(np.array, streams))

    @pytest.mark.parametrize(
        ("prompt", "words"),
        [
            (of_one(1, 1, 1, codebooks=1), "`prompt` has 1 codebooks, but the model has 4"),
            (of_one(60, 1, 1), "`prompt.text_ids` has the id 60"),
            (of_one(1, 32, 1), "`prompt.moshi_codes` has the id 32"),
            (of_one(1, 1, 32), "`prompt.user_codes` has the id 32"),
            ([drawn_prompt(1)], "`prompt` has 1 prompts, but there are 3 slots"),
        ],
    )
    def test_other_than_the_models(self, stream: FlaxMoshiStream, prompt: Any, words: str) -> None:
        state = stream.init()
        for call in (
            lambda: stream.init(prompt=prompt),
            lambda: stream.reset(state, np.ones(SLOTS, bool), prompt=prompt),
        ):
            with pytest.raises(ValueError, match=re.escape(words)):
                call()
        stream.step(state, user_audio_codes=user_codes(SLOTS, 1)[..., 0])  # nothing was consumed

    @pytest.mark.usefixtures("unchecked_types")
    def test_what_is_none(self, stream: FlaxMoshiStream) -> None:
        with pytest.raises(ValueError, match="`prompt` must be a MoshiPrompt, but is int"):
            stream.init(prompt=[7] * SLOTS)

    def test_states_of_other_streams(self, model: Moshi, stream: FlaxMoshiStream) -> None:
        other = model.streaming(SLOTS, return_audio_waveforms=False, **SAMPLE).prefill(drawn_prompt(2))
        with pytest.raises(ValueError, match="`prompt` is of another configuration"):
            stream.init(prompt=other)

    def test_adapters_of_single_slots(self) -> None:
        model = Moshi(tiny_moshi_config(num_hidden_layers=1), seed=2)
        model.add_adapter(LoraConfig(r=2, target_modules=r"decoder\.model\..*q_proj.*"), "other")
        stream = model.streaming(2, params=model.adapted_params(adapter_names=["other", None]), **GREEDY)
        with pytest.raises(ValueError, match="each has an adapter of its own"):
            stream.prefill(drawn_prompt(2))

    def test_capacity(self, stream: FlaxMoshiStream) -> None:
        with pytest.raises(ValueError, match="`capacity` must be a whole number of at least 1, but is 0"):
            stream.prefill(drawn_prompt(1), 0)


class Tokenizer:
    """A piece a word."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [len(word) for word in text.split()]


class TestMakingOne:
    def test_a_persona_has_personaplexs_order(self) -> None:
        idle = IdleCodes(np.array([1, 2], np.int32), np.array([3, 4], np.int32))
        voice = MoshiPrompt.from_codes(np.array([[5, 6, 7], [8, 9, 10]]), idle.user)
        prompt = MoshiPrompt.of_persona(idle, voice, " You are\n wise. ", Tokenizer())
        said = [len("<system>"), 3, 3, 5, len("<system>")]
        pause = [3] * PAUSE_FRAMES
        assert prompt.text_ids.tolist() == [3, 3, 3, *pause, *said, *pause]
        quiet = PAUSE_FRAMES + len(said) + PAUSE_FRAMES
        assert prompt.moshi_codes.tolist() == [[5, 6, 7] + [1] * quiet, [8, 9, 10] + [2] * quiet]
        assert prompt.user_codes.tolist() == [[3] * (quiet + 3), [4] * (quiet + 3)]
        of_voice, of_text = (
            MoshiPrompt.of_persona(idle, voice=voice),
            MoshiPrompt.of_persona(idle, text="You are wise.", tokenizer=Tokenizer()),
        )
        both = of_voice + of_text
        assert all(np.array_equal(getattr(both, n), getattr(prompt, n)) for n in ("text_ids", "moshi_codes"))

    def test_words_that_are_marked_already(self) -> None:
        marked, bare = (system_pieces(text, Tokenizer()) for text in ("<system> be brief <system>", "be brief"))
        assert marked.tolist() == bare.tolist() == [8, 2, 5, 8]
        assert system_pieces(" \n", None).size == system_pieces(None, None).size == 0

    def test_personas_of_nothing(self) -> None:
        idle = IdleCodes(np.array([1, 2], np.int32), np.array([3, 4], np.int32))
        with pytest.raises(ValueError, match="A persona has a `voice`, a `text` or both"):
            MoshiPrompt.of_persona(idle, text="  ")
        with pytest.raises(ValueError, match="`text` needs a `tokenizer`"):
            MoshiPrompt.of_persona(idle, text="wise")
        with pytest.raises(ValueError, match="`user_code` must be the codes of one frame"):
            MoshiPrompt.from_codes(np.zeros((2, 3), int), np.zeros((2, 3), int))
        with pytest.raises(ValueError, match="Prompts of 2 and of 4 codebooks"):
            MoshiPrompt.of_persona(idle, MoshiPrompt.from_codes(np.zeros((2, 1), int), idle.user)) + drawn_prompt(1)

    def test_a_recording_is_encoded_by_mimi(self, model: Moshi) -> None:
        audio = np.random.default_rng(0).uniform(-1, 1, 16 * 9 - 5).astype(np.float32)
        prompt = MoshiPrompt.from_recording(model, audio)
        whole = np.pad(audio, (0, 5))[None, None]
        np.testing.assert_array_equal(
            prompt.moshi_codes, model.audio_encoder.encode(whole, num_quantizers=4).audio_codes[0]
        )
        assert prompt.text_ids.tolist() == [3] * 9
        silence = model.audio_encoder.encode(np.zeros((1, 1, 16 * 100), np.float32), num_quantizers=4).audio_codes[0]
        np.testing.assert_array_equal(prompt.user_codes[:, 0], silence[:, -1])
        np.testing.assert_array_equal(voice_codes(model, audio[None]), prompt.moshi_codes)

    @pytest.mark.parametrize(
        ("audio", "words"),
        [
            (np.zeros((2, 16), np.float32), "`audio` must have the shape"),
            (np.zeros(16, np.int16), "`audio` must be floats in [-1, 1]"),
            (np.full(16, np.nan, np.float32), "NaN or infinite"),
            (np.zeros(0, np.float32), "`audio` is empty"),
        ],
    )
    def test_recordings_of_no_use(self, model: Moshi, audio: Any, words: str) -> None:
        with pytest.raises(ValueError, match=re.escape(words)):
            MoshiPrompt.from_recording(model, audio)

    def test_codes_that_the_model_was_trained_with(self) -> None:
        config = tiny_moshi_config()
        config.idle_codes = {"moshi": [1, 2, 3, 4], "user": [5, 6, 7, 8]}
        idle = IdleCodes.of(SimpleNamespace(config=config))
        assert idle.moshi.tolist() == [1, 2, 3, 4] and idle.user.tolist() == [5, 6, 7, 8]

    def test_files(self, tmp_path: Path) -> None:
        prompt, path = drawn_prompt(5), tmp_path / "voice.safetensors"
        prompt.save(path)
        again = MoshiPrompt.load(path)
        for name in ("text_ids", "moshi_codes", "user_codes"):
            np.testing.assert_array_equal(getattr(again, name), getattr(prompt, name))
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged"):
            MoshiPrompt.load(path)
        with pytest.raises(FileNotFoundError, match="there is no file"):
            MoshiPrompt.load(tmp_path / "other")
