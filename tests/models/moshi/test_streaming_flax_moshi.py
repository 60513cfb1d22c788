"""The endless dialogue: equal to ``generate`` and to a sliding window, slot by slot, and as data."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import normalization
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, MoshiForConditionalGeneration

from tests.buffers import aligned, late
from tests.configs import tiny_moshi_config
from tests.models.moshi.drawn import draw_config
from tests.models.moshi.test_compiled import large_weights, tpu_module, with_promotion
from tests.random_model import RANDOM_MODEL
from tests.torch_oracle import assert_close, make_pair
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.checkpoints.writing import write_safetensors
from transformers_moshi_flax.models.moshi.generation_flax_moshi import encode_audio
from transformers_moshi_flax.models.moshi.stream_files import ORIGIN, STATE_FORMAT, named_leaves, origin_tensor
from transformers_moshi_flax.models.moshi.stream_state import StreamState
from transformers_moshi_flax.models.moshi.streaming_flax_moshi import (
    FlaxMoshiFrame,
    FlaxMoshiStream,
    next_frame,
    on_mesh,
)
from transformers_moshi_flax.ops import cpu

Moshi = FlaxMoshiForConditionalGeneration
WINDOW = 64
SAMPLE = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 25,
    "depth_decoder_do_sample": True,
    "depth_decoder_temperature": 0.8,
    "depth_decoder_top_k": 20,
}
GREEDY = {"do_sample": False, "depth_decoder_do_sample": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Moshi:
    config = tiny_moshi_config(sliding_window=WINDOW, max_position_embeddings=WINDOW)
    return make_pair(MoshiForConditionalGeneration, Moshi, config, tmp_path_factory.mktemp("moshi")).ours


@pytest.fixture(scope="module")
def greedy(model: Moshi) -> FlaxMoshiStream:
    return model.streaming(2, **GREEDY)


@pytest.fixture(scope="module")
def sampling(model: Moshi) -> FlaxMoshiStream:
    return model.streaming(3, **SAMPLE)


@pytest.fixture(scope="module")
def kyutais(model: Moshi) -> FlaxMoshiStream:
    return model.streaming(2, ignore_first_user_frame=True, **GREEDY)


@pytest.fixture(scope="module")
def alone(model: Moshi) -> FlaxMoshiStream:
    return model.streaming(1, **SAMPLE)


def user_codes(batch: int, frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 32, (batch, 4, frames)).astype(np.int32)


def user_audio(batch: int, frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (batch, 1, 16 * frames)).astype(np.float32)


def run(stream: FlaxMoshiStream, state: StreamState, codes: np.ndarray, **more: Any) -> tuple[StreamState, Any]:
    """Steps through ``codes``; the frames' text ids, codes and audio, time last."""
    frames = []
    for k in range(codes.shape[-1]):
        options = {name: values[..., k] for name, values in more.items()}
        state, frame = stream.step(state, user_audio_codes=codes[..., k], **options)
        frames.append(jax.tree.map(np.asarray, frame))
    return state, gathered(frames)


def gathered(frames: list[FlaxMoshiFrame]) -> dict[str, np.ndarray]:
    return {
        "text_ids": np.stack([frame.text_ids for frame in frames], -1),
        "audio_codes": np.stack([frame.audio_codes for frame in frames], -1),
        "valid": np.stack([frame.valid for frame in frames], -1),
        "audio": np.concatenate([frame.audio for frame in frames], -1),
    }


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name in ("text_ids", "audio_codes", "valid"):
        np.testing.assert_array_equal(actual[name], expected[name], name)
    assert_close(actual["audio"], expected["audio"], 1e-5)


def generated(model: Moshi, codes: np.ndarray, key: jax.Array | None = None, **options: Any) -> Any:
    """``generate`` from the start frame on, with a live user."""
    batch, _, frames = codes.shape
    start = model.get_unconditional_inputs(batch)
    return model.generate(
        start.input_ids,
        user_audio_codes=np.concatenate([start.user_audio_codes, codes], -1),
        moshi_audio_codes=start.moshi_audio_codes,
        concat_unconditional_inputs=False,
        max_new_tokens=frames + 1,
        return_audio_codes=True,
        prng_key=key,
        **options,
    )


def assert_as_generated(actual: dict[str, np.ndarray], out: Any) -> None:
    frames = actual["text_ids"].shape[-1]
    assert actual["valid"].all()
    np.testing.assert_array_equal(actual["text_ids"], np.asarray(out.sequences)[:, 1 : frames + 1])
    np.testing.assert_array_equal(actual["audio_codes"], out.audio_codes)
    assert_close(actual["audio"], np.asarray(out.audio_sequences), 1e-5)


class TestEqualToGenerate:
    def test_greedy(self, model: Moshi, greedy: FlaxMoshiStream) -> None:
        codes = user_codes(2, 30)
        assert_as_generated(run(greedy, greedy.init(), codes)[1], generated(model, codes, **GREEDY))

    def test_sampling_draws_the_same(self, model: Moshi, sampling: FlaxMoshiStream) -> None:
        codes, key = user_codes(3, 20, seed=1), jax.random.key(5)
        assert_as_generated(run(sampling, sampling.init(key), codes)[1], generated(model, codes, key, **SAMPLE))

    def test_forced_frames(self, model: Moshi, greedy: FlaxMoshiStream) -> None:
        codes, rng = user_codes(2, 16, seed=2), np.random.default_rng(3)
        text = np.where(rng.random((2, 17)) < 0.5, rng.integers(0, 60, (2, 17)), -1)
        audio = np.where(rng.random((2, 4, 17)) < 0.3, rng.integers(0, 32, (2, 4, 17)), -1)
        expected = generated(model, codes, forced_text_ids=text, forced_audio_codes=audio, **GREEDY)
        state = greedy.init(forced_text_ids=text[:, 0], forced_audio_codes=audio[..., 0])
        _, actual = run(greedy, state, codes, forced_text_ids=text[:, 1:], forced_audio_codes=audio[..., 1:])
        assert_as_generated(actual, expected)
        for name, forced in (("text_ids", text[:, :16]), ("audio_codes", audio[..., :16])):
            np.testing.assert_array_equal(actual[name][forced >= 0], forced[forced >= 0])

    def test_recorded_audio(self, model: Moshi, greedy: FlaxMoshiStream) -> None:
        """Encoded and decoded by Mimi in a stream."""
        audio, state, frames = user_audio(2, 24), greedy.init(), []
        for k in range(24):
            state, frame = greedy.step(state, audio[..., 16 * k : 16 * (k + 1)])
            frames.append(frame)
        codes = model.compiled(encode_audio)(model.params, audio)
        assert_as_generated(gathered(frames), generated(model, np.asarray(codes), **GREEDY))

    def test_logits_and_hidden_states_are_those_of_the_next_token(self, model: Moshi, greedy: FlaxMoshiStream) -> None:
        codes, state = user_codes(2, 5), greedy.init()
        out = generated(model, codes, output_logits=True, output_hidden_states=True, **GREEDY)
        for k in range(5):
            state, frame = greedy.step(state, user_audio_codes=codes[..., k])
            assert_close(frame.text_logits, np.asarray(out.logits[k + 1]), 1e-5)
            assert_close(frame.last_hidden_state, np.asarray(out.hidden_states[k + 1][-1][:, -1]), 1e-5)

    def test_inside_of_jit(self, greedy: FlaxMoshiStream) -> None:
        codes = user_codes(2, 4)

        @jax.jit
        def dialogue(state: StreamState, codes: jax.Array) -> Any:
            return jax.lax.scan(lambda state, now: greedy.step(state, user_audio_codes=now), state, codes)

        _, frames = dialogue(greedy.init(), np.moveaxis(codes, -1, 0))
        _, expected = run(greedy, greedy.init(), codes)
        np.testing.assert_array_equal(np.moveaxis(np.asarray(frames.audio_codes), 0, -1), expected["audio_codes"])


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**16), draws=st.booleans(), batch=st.integers(1, 3))
def test_drawn_configurations(seed: int, draws: bool, batch: int) -> None:
    """Other sizes, one codebook, windows of a few frames: as ``generate``, which keeps every frame."""
    model = Moshi(draw_config(seed), seed=seed)
    # heads that choose among many tokens
    model.params = jax.tree.map(lambda leaf: 5 * leaf if leaf.ndim == 2 else leaf, model.params)
    config, frames, rng = model.config, 9, np.random.default_rng(seed)
    codes = rng.integers(0, config.audio_vocab_size, (batch, config.num_codebooks, frames)).astype(np.int32)
    options = {"do_sample": draws, "depth_decoder_do_sample": draws}
    stream = model.streaming(batch, return_audio_waveforms=False, **options)
    state, said = stream.init(jax.random.key(seed)), []
    for k in range(frames):
        state, frame = stream.step(state, user_audio_codes=codes[..., k])
        said.append(np.concatenate([np.asarray(frame.text_ids)[:, None], frame.audio_codes], axis=1))
    out = generated(model, codes, jax.random.key(seed), return_audio_waveforms=False, **options)
    expected = np.concatenate([np.asarray(out.sequences)[:, None, 1 : frames + 1], out.audio_codes], axis=1)
    np.testing.assert_array_equal(np.stack(said, -1), expected)


@pytest.mark.parametrize("steps, large_cache", [(2000, 1024), (100, WINDOW)])
def test_endless(model: Moshi, steps: int, large_cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps through 64 frames of context are those of a window that slides over the whole."""
    monkeypatch.setattr(cpu, "LARGE_CACHE", large_cache)
    monkeypatch.setattr(cpu, "SLOTS_IN_USE", 12)
    stream, rng = model.streaming(1, **GREEDY), np.random.default_rng(0)
    text, user, moshi = rng.integers(0, 60, (steps, 1)), user_codes(1, steps), user_codes(1, steps, seed=1)

    @jax.jit
    def dialogue(state: StreamState, *columns: jax.Array) -> tuple[StreamState, jax.Array]:
        def step(state: StreamState, now: tuple[jax.Array, ...]) -> tuple[StreamState, jax.Array]:
            heard, text, said = now
            state, frame = stream.step(state, user_audio_codes=heard, forced_text_ids=text, forced_audio_codes=said)
            return state, frame.text_logits[0]

        return jax.lax.scan(step, state, columns)

    state = stream.init(forced_text_ids=text[0], forced_audio_codes=moshi[..., 0])
    heard, said = np.moveaxis(user[..., :-1], -1, 0), np.moveaxis(moshi[..., 1:], -1, 0)
    after, logits = dialogue(state, heard, text[1:], said)
    assert [leaf.shape for leaf in jax.tree.leaves(after)] == [leaf.shape for leaf in jax.tree.leaves(state)]

    def columns(codes: np.ndarray) -> np.ndarray:
        """After the start frame, delayed."""
        start = np.full((1, 4, 1), 32)
        codes = np.concatenate([start, codes], -1)
        return np.concatenate([codes[:, :1], np.concatenate([start[:, 1:], codes[:, 1:, :-1]], -1)], 1)[..., :steps]

    ids = np.concatenate([[60], text[:-1, 0]])[None]
    whole = model(input_ids=ids, user_audio_codes=columns(user), moshi_audio_codes=columns(moshi))
    assert_close(logits, np.asarray(whole.logits[0, 1:]), 1e-5)


class TestSlots:
    def test_arrays_of_jax_compile_nothing(
        self, sampling: FlaxMoshiStream, count_compilations: Callable[[], int]
    ) -> None:
        """They are made before: making them is what JAX compiles programs for."""
        sampling.warmup()
        audio, codes, ids = jnp.asarray(user_audio(3, 1)), jnp.asarray(user_codes(3, 1)[..., 0]), jnp.arange(3)
        rows, numbers, key = jnp.array([True, False, True]), jnp.full(3, 0.5), jax.random.key(1)
        state = sampling.init()
        count_compilations()
        for heard in ({"user_audio": audio}, {"user_audio_codes": codes}):
            for options in ({}, {"active": rows}, {"forced_text_ids": ids, "forced_audio_codes": codes}):
                state, _ = sampling.step(state, **heard, **options)
        state = sampling.reset(state, rows, key, forced_text_ids=ids)
        sampling.configure(state, rows, temperature=numbers)
        assert count_compilations() == 0

    def test_dialogues_come_and_go(
        self, sampling: FlaxMoshiStream, alone: FlaxMoshiStream, count_compilations: Callable[[], int]
    ) -> None:
        """Each is as if it had been alone, whoever sits beside it; and nothing is compiled for it."""
        rng, steps = np.random.default_rng(7), 90
        sampling.warmup()
        audio = user_audio(3, steps, seed=8)
        keys = [jax.random.split(jax.random.key(seed), 3) for seed in range(40)]
        state = sampling.init(keys[0])
        # of every slot its dialogues: which keys, and what was heard and said
        slots: list[list[tuple[int, list[Any]]]] = [[(0, [])] for _ in range(3)]
        count_compilations()
        for k in range(steps):
            if rng.random() < 0.15:
                rows = rng.random(3) < 0.5
                state = sampling.reset(state, rows, keys[k % 40])
                state = sampling.configure(state, ~rows & rows, temperature=0.1)
                for row in np.flatnonzero(rows):
                    slots[row].append((k % 40, []))
            active = rng.random(3) < 0.8
            now = audio[..., 16 * k : 16 * (k + 1)]
            state, frame = sampling.step(state, now, active=active)
            frame = jax.tree.map(np.asarray, frame)
            np.testing.assert_array_equal(frame.valid, active)
            assert (frame.text_ids[~active] == -1).all()
            assert (frame.audio[~active] == 0).all()
            for row in np.flatnonzero(active):
                said = {name: leaf[row] for name, leaf in frame.items()}
                slots[row][-1][1].append((now[row], said))
        assert count_compilations() == 0
        dialogues = [(row, *dialogue) for row in range(3) for dialogue in slots[row] if len(dialogue[1]) > 2]
        assert len(dialogues) > 8
        for row, seed, frames in dialogues[::2]:
            state = alone.init(keys[seed][row : row + 1])
            for now, said in frames:
                state, frame = alone.step(state, now[None])
                assert frame.text_ids[0] == said["text_ids"]
                np.testing.assert_array_equal(frame.audio_codes[0], said["audio_codes"])
                assert_close(frame.audio[0], said["audio"], 1e-5)

    def test_resting_slots_keep_every_leaf(self, sampling: FlaxMoshiStream) -> None:
        """But for the step of a ring that the slot will write before it reads it."""
        state, _ = run(sampling, sampling.init(), user_codes(3, 5))

        def leaves(state: StreamState) -> dict[str, np.ndarray]:
            return {name: np.asarray(leaf) for name, leaf in named_leaves(sampling.get_slot(state, 1)).items()}

        before = leaves(state)
        after = leaves(sampling.step(state, user_audio(3, 1), active=np.array([True, False, True]))[0])
        changed = {name for name in before if (after[name] != before[name]).any()}
        assert changed and all(".cache.keys." in name or ".cache.values." in name for name in changed)
        for name in changed:
            slots = {slot for _, slot, _ in np.argwhere(after[name] != before[name])}
            slot = before[name.split(".cache.")[0] + ".cache.slot"][0]
            assert slots <= {slot, slot + 1}

    def test_what_resting_slots_are_given_does_not_matter(self, greedy: FlaxMoshiStream) -> None:
        """Not even where it is no sound and no code."""
        audio, active = user_audio(2, 6), np.array([True, False])
        nonsense = audio.copy()
        nonsense[1] = np.nan
        said = []
        for second in (audio, nonsense):
            state = greedy.init()
            for k in range(3):
                forced = np.array([-1, 999 if second is nonsense else 1])
                now = second[..., 16 * k : 16 * (k + 1)]
                state, _ = greedy.step(state, now, active=active, forced_text_ids=forced)
            codes = np.array([[1] * 4, [-7 if second is nonsense else 3] * 4])
            state, _ = greedy.step(state, user_audio_codes=codes, active=active)
            frames = []
            state, frame = greedy.step(state, audio[..., :16])
            frames.append(jax.tree.map(np.asarray, frame))
            # a new dialogue finds nothing of it in the rings either
            state = greedy.reset(state, ~active)
            for k in range(3):
                state, frame = greedy.step(state, audio[..., 16 * k : 16 * (k + 1)])
                frames.append(jax.tree.map(np.asarray, frame))
            said.append(gathered(frames))
            floats = [leaf for leaf in named_leaves(state).values() if jnp.issubdtype(leaf.dtype, jnp.floating)]
            assert all(np.isfinite(leaf).all() for leaf in floats)
        assert_same(*said)

    def test_numbers_of_each_slot(self, model: Moshi, sampling: FlaxMoshiStream, alone: FlaxMoshiStream) -> None:
        codes, keys = user_codes(3, 12), jax.random.split(jax.random.key(0), 3)
        numbers = {"temperature": [0.1, 3.0, 1.0], "top_k": [1, 60, 5], "depth_decoder_temperature": [1.0, 0.5, 2.0]}
        state = sampling.configure(sampling.init(keys), **{name: np.array(row) for name, row in numbers.items()})
        _, together = run(sampling, state, codes)
        for row in range(3):
            state = alone.configure(alone.init(keys[row : row + 1]), **{name: numbers[name][row] for name in numbers})
            _, single = run(alone, state, codes[row : row + 1])
            np.testing.assert_array_equal(single["audio_codes"][0], together["audio_codes"][row])

    def test_only_the_rows_that_are_named(self, sampling: FlaxMoshiStream) -> None:
        state = sampling.configure(sampling.init(), np.array([False, True, False]), temperature=0.2, top_k=7)
        assert_close(state.dialogue.numbers["temperature"][:, 0], np.array([0.7, 0.2, 0.7]), 1e-6)
        np.testing.assert_array_equal(state.dialogue.numbers["top_k"][:, 0], [25, 7, 25])

    def test_what_slots_begin_with(self, sampling: FlaxMoshiStream) -> None:
        numbers = sampling.numbers
        assert numbers["top_k"] == 25 and numbers["temperature"] == pytest.approx(0.7)
        sampling.check_numbers(**numbers)
        state = sampling.init().dialogue.numbers
        assert {name: state[name][0, 0].item() for name in numbers} == numbers

    def test_top_p_of_each_slot(self, model: Moshi) -> None:
        """The vocabulary is sorted where the candidates of a slot are too few."""
        options = {"do_sample": True, "top_k": 0, "temperature": 2.0, "depth_decoder_do_sample": False}
        stream, codes = model.streaming(2, top_p=0.5, **options), user_codes(2, 8)

        def texts(*top_p: float) -> np.ndarray:
            return run(stream, stream.configure(stream.init(), top_p=np.array(top_p)), codes)[1]["text_ids"]

        wide, narrow = texts(0.99, 0.99), texts(0.1, 0.1)
        assert (wide != narrow).any(axis=-1).all()
        np.testing.assert_array_equal(texts(0.99, 0.1), [wide[0], narrow[1]])
        np.testing.assert_array_equal(texts(0.1, 0.99), [narrow[0], wide[1]])

    def test_keys_of_a_slot_that_begins_anew(self, sampling: FlaxMoshiStream) -> None:
        """Without a key, another dialogue; with the key of the first, the same."""
        codes, key = user_codes(3, 12), jax.random.key(3)
        everyone = np.ones(3, dtype=bool)
        state, first = run(sampling, sampling.init(key), codes)
        state, second = run(sampling, sampling.reset(state, everyone), codes)
        assert (first["audio_codes"] != second["audio_codes"]).mean() > 0.5
        _, third = run(sampling, sampling.reset(state, everyone, key), codes)
        assert_same(third, first)


class TestStateIsData:
    def test_saved_restored_and_moved(self, sampling: FlaxMoshiStream, tmp_path: Path) -> None:
        codes, more = user_codes(3, 8), user_codes(3, 70, seed=4)
        state, _ = run(sampling, sampling.init(), codes)
        sampling.save_state(state, tmp_path / "all.safetensors")
        moved = sampling.get_slot(state, 0)
        sampling.save_state(moved, tmp_path / "one.safetensors")
        _, expected = run(sampling, state, more)
        assert_same(run(sampling, sampling.load_state(tmp_path / "all.safetensors"), more)[1], expected)
        # slot 0 goes on at slot 2 of another batch, from either file
        for name in ("one.safetensors", "all.safetensors"):
            other, _ = run(sampling, sampling.init(jax.random.key(77)), user_codes(3, 3, seed=9))
            row = sampling.load_state(tmp_path / name, slot=0)
            other = sampling.set_slot(other, 2, row)
            _, actual = run(sampling, other, more[[1, 2, 0]])
            assert_same({n: a[2] for n, a in actual.items()}, {n: a[0] for n, a in expected.items()})

    def test_keys_of_another_generator(
        self, sampling: FlaxMoshiStream, alone: FlaxMoshiStream, tmp_path: Path
    ) -> None:
        """What they draw would depend on the neighbours; and files are read wherever another one is the default."""
        codes = user_codes(3, 8)
        with jax.default_prng_impl("rbg"):
            keys = jax.random.split(jax.random.key(5), 3)
            state, together = run(sampling, sampling.init(keys), codes)
            _, single = run(alone, alone.init(keys[1:2]), codes[1:2])
            sampling.save_state(state, tmp_path / "state.safetensors")
            state = sampling.load_state(tmp_path / "state.safetensors")
        assert_same({name: array[1] for name, array in together.items()}, {n: a[0] for n, a in single.items()})
        again = sampling.load_state(tmp_path / "state.safetensors")
        assert_same(run(sampling, state, codes)[1], run(sampling, again, codes)[1])

    def test_in_another_process(
        self, model: Moshi, greedy: FlaxMoshiStream, tmp_path: Path, keeping: dict[str, str]
    ) -> None:
        model.save_pretrained(tmp_path / "model")
        state, _ = run(greedy, greedy.init(), user_codes(2, 5))
        greedy.save_state(state, tmp_path / "state.safetensors")
        np.save(tmp_path / "codes.npy", user_codes(2, 6, seed=2))
        script = """
import sys
import numpy as np
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
folder = sys.argv[1]
model = FlaxMoshiForConditionalGeneration.from_pretrained(f"{folder}/model")
stream = model.streaming(2, do_sample=False, depth_decoder_do_sample=False)
state, codes, said = stream.load_state(f"{folder}/state.safetensors"), np.load(f"{folder}/codes.npy"), []
for k in range(codes.shape[-1]):
    state, frame = stream.step(state, user_audio_codes=codes[..., k])
    said.append(np.asarray(frame.audio))
np.save(f"{folder}/said.npy", np.concatenate(said, -1))
"""
        subprocess.run([sys.executable, "-c", script, tmp_path], env=os.environ | keeping, check=True)
        _, expected = run(greedy, state, user_codes(2, 6, seed=2))
        assert_close(np.load(tmp_path / "said.npy"), expected["audio"], 1e-5)

    def test_places_that_are_no_good(self, greedy: FlaxMoshiStream, tmp_path: Path) -> None:
        state = greedy.init()
        with pytest.raises(ValueError, match=f"`path` is '{tmp_path}', which is a folder: give the name of a file"):
            greedy.save_state(state, tmp_path)
        with pytest.raises(FileNotFoundError, match=f"`path` is .*, but there is no folder {tmp_path}/no: make it"):
            greedy.save_state(state, tmp_path / "no" / "state.safetensors")
        assert not list(tmp_path.iterdir())

    def test_files_that_are_no_good(self, model: Moshi, greedy: FlaxMoshiStream, tmp_path: Path) -> None:
        state, path = greedy.init(), tmp_path / "state.safetensors"
        greedy.save_state(state, path)
        good = path.read_bytes()

        def refused(message: str, stream: FlaxMoshiStream = greedy, **options: Any) -> None:
            with pytest.raises(ValueError, match=message):
                stream.load_state(path, **options)

        for damaged in (good[:-10], good[:40], b"", b"nothing of the kind"):
            path.write_bytes(damaged)
            refused("damaged")
        for place in np.linspace(len(good) // 2, len(good) - 1, 5).astype(int):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            refused("damaged")
        path.write_bytes(good.replace(b"checksums", b"checksumz"))
        refused("lacks checksums")
        path.write_bytes(good)
        refused("batch of 2, but the stream has 1 slots", model.streaming(1, **GREEDY))
        refused("`slot` is 2", slot=2)
        refused("`slot` is -1", slot=-1)
        other = Moshi(tiny_moshi_config(sliding_window=WINDOW - 1, max_position_embeddings=WINDOW))
        refused("another configuration", other.streaming(2, **GREEDY))
        model_file = tmp_path / "flax_model.safetensors"
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is no state"):
            greedy.load_state(model_file)
        with pytest.raises(FileNotFoundError, match="`path`"):
            greedy.load_state(tmp_path / "absent")

    def test_senseless_values(self, sampling: FlaxMoshiStream, tmp_path: Path) -> None:
        """In files whose checksums are right."""
        state, path = sampling.init(), tmp_path / "state.safetensors"
        named = {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}
        for name, value, message in (
            ("dialogue.text_ids", 61, r"dialogue.text_ids must be in \[0, 61\)"),
            ("dialogue.audio_codes", 33, r"dialogue.audio_codes must be in \[0, 33\)"),
            ("dialogue.user_codes", -1, "dialogue.user_codes must be"),
            ("dialogue.forced_codes", 10**6, "`forced_codes` has the id 1000000"),
            ("dialogue.cache.slot", WINDOW, "dialogue.cache.slot must be"),
            ("encoder.cache.slot", 10**6, "encoder.cache.slot must be"),
            ("decoder.cache.filled", -5, "decoder.cache.filled must be"),
            ("dialogue.numbers.top_k", -3, "`top_k` must be"),
            ("dialogue.numbers.temperature", 0, "`temperature` must be"),
        ):
            wrong = {**named, name: np.full_like(named[name], value)}
            write_safetensors(path, {**wrong, ORIGIN: origin_tensor(state.origin)}, STATE_FORMAT)
            with pytest.raises(ValueError, match=message):
                sampling.load_state(path)

    def test_the_bound_of_top_k_belongs_to_the_state(self, model: Moshi, sampling: FlaxMoshiStream) -> None:
        wide = model.streaming(3, ignore_first_user_frame=True, **{**SAMPLE, "top_k": 65})
        with pytest.raises(ValueError, match="kind of stream"):
            sampling.step(wide.init(), user_audio(3, 1))


@pytest.mark.parametrize("heard", ["user_audio", "user_audio_codes"])
def test_callers_may_write_their_next_frame_at_once(greedy: FlaxMoshiStream, heard: str) -> None:
    """A step returns before it is computed; what it was given is the caller's again."""
    user = {
        "user_audio": user_audio(2, 1),
        "user_audio_codes": user_codes(2, 1)[..., 0],
    }[heard]
    inputs = {
        heard: user,
        "active": np.array([True, False]),
        "forced_text_ids": np.array([3, 4], np.int32),
        "forced_audio_codes": user_codes(2, 1, seed=1)[..., 0],
    }
    expected, frame = greedy.step(greedy.init(), **inputs)
    mine = {name: aligned(array) for name, array in inputs.items()}
    state, again = greedy.step(late(greedy.init()), **mine)
    for array in mine.values():
        array[...] = 1
    jax.tree.map(np.testing.assert_array_equal, again, frame)
    for name, leaf in named_leaves(state).items():
        np.testing.assert_array_equal(leaf, named_leaves(expected)[name], name)


class TestKyutaisBeginning:
    def test_the_first_frame_is_not_heard(self, kyutais: FlaxMoshiStream, greedy: FlaxMoshiStream) -> None:
        codes = user_codes(2, 12)
        _, actual = run(kyutais, kyutais.init(), codes)
        np.testing.assert_array_equal(actual["valid"][:, 0], False)
        np.testing.assert_array_equal(actual["text_ids"][:, 0], -1)
        np.testing.assert_array_equal(actual["audio_codes"][..., 0], -1)
        np.testing.assert_array_equal(actual["audio"][..., :16], 0)
        _, expected = run(greedy, greedy.init(), codes[..., 1:])
        later = {name: values[..., 1:] for name, values in actual.items() if name != "audio"}
        assert_same({**later, "audio": actual["audio"][..., 16:]}, expected)

    def test_after_a_reset_too(self, kyutais: FlaxMoshiStream) -> None:
        codes = user_codes(2, 4)
        state, first = run(kyutais, kyutais.init(), codes)
        _, again = run(kyutais, kyutais.reset(state, np.array([True, False])), codes)
        np.testing.assert_array_equal(again["valid"], [[False, True, True, True], [True] * 4])
        np.testing.assert_array_equal(again["audio_codes"][0], first["audio_codes"][0])

    def test_forcing_goes_with_the_first_step(self, kyutais: FlaxMoshiStream) -> None:
        text, codes = np.array([3, -1]), user_codes(2, 1)[..., 0]
        with pytest.raises(ValueError, match="go with the first step"):
            kyutais.init(forced_text_ids=text)
        state, _ = kyutais.step(kyutais.init(), user_audio_codes=codes, forced_text_ids=text)
        _, frame = kyutais.step(state, user_audio_codes=codes)
        assert frame.text_ids[0] == 3


class TestFaults:
    """Every mistake is told before the state is consumed: the dialogue goes on with the next good frame."""

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({}, "Pass one of `user_audio` and `user_audio_codes`"),
            ({"user_audio": user_audio(2, 1), "user_audio_codes": user_codes(2, 1)[..., 0]}, "Pass one of"),
            ({"user_audio": user_audio(2, 1)[..., :15]}, r"`user_audio` must have the shape \(2, 1, 16\)"),
            ({"user_audio": user_audio(2, 2)}, "`user_audio` must have the shape.*one frame of every slot"),
            ({"user_audio": user_audio(1, 1)}, "`user_audio` must have the shape.*one frame of every slot"),
            ({"user_audio": user_audio(2, 1)[:, 0]}, "`user_audio` must have the shape.*one frame of every slot"),
            ({"user_audio": np.zeros((2, 1, 16), np.int16)}, "`user_audio` must be floats.*int16"),
            ({"user_audio": np.full((2, 1, 16), np.nan)}, "`user_audio` has samples that are NaN"),
            (
                {"user_audio": np.full((2, 1, 16), np.inf, np.float32)},
                "`user_audio` has samples that are NaN",
            ),
            ({"user_audio": np.full((2, 1, 16), 1e300)}, r"`user_audio` has samples of up to 1e\+300"),
            ({"user_audio_codes": user_codes(2, 1)}, "`user_audio_codes` must be the codes of one frame"),
            ({"user_audio_codes": np.full((2, 4), 32)}, "`user_audio_codes` has the id 32"),
            ({"user_audio_codes": np.full((2, 4), -1)}, "`user_audio_codes` has the id -1"),
            ({"user_audio_codes": np.zeros((2, 4))}, "`user_audio_codes` must hold integer ids"),
            ({"active": np.ones(3, bool)}, "`active` must be booleans"),
            ({"active": np.ones(2, int)}, "`active` must be booleans"),
            ({"forced_text_ids": np.array([60, -1])}, "`forced_text_ids` has the id 60"),
            ({"forced_text_ids": np.array([[1, 2]])}, "`forced_text_ids` must be one token for each slot"),
            ({"forced_audio_codes": np.full((2, 4), 32)}, "`forced_audio_codes` has the id 32"),
            ({"forced_audio_codes": np.full((2, 3), 3)}, "`forced_audio_codes` must be the codes of one frame"),
        ],
    )
    def test_bad_frames(self, greedy: FlaxMoshiStream, arguments: dict[str, Any], message: str) -> None:
        state = greedy.init()
        if arguments and not {"user_audio", "user_audio_codes"} & set(arguments):
            arguments = {"user_audio": user_audio(2, 1), **arguments}
        with pytest.raises(ValueError, match=message):
            greedy.step(state, **arguments)
        greedy.step(state, user_audio(2, 1))

    @pytest.mark.parametrize(
        "key, message",
        [
            (jnp.ones(2), "`prng_key` must be a key"),
            (jax.random.split(jax.random.key(0), 3), "`prng_key` must be one key or one per row"),
        ],
    )
    def test_bad_keys(self, greedy: FlaxMoshiStream, key: jax.Array, message: str) -> None:
        state = greedy.init()
        with pytest.raises(ValueError, match=message):
            greedy.init(key)
        with pytest.raises(ValueError, match=message):
            greedy.reset(state, np.ones(2, bool), key)
        greedy.step(state, user_audio(2, 1))

    def test_states_of_others(self, model: Moshi, greedy: FlaxMoshiStream) -> None:
        audio = user_audio(2, 1)
        for state, message in (
            (model.streaming(1, ignore_first_user_frame=True).init(), "`state` has a batch of 1, but 2 is needed"),
            (
                Moshi(tiny_moshi_config()).streaming(2, ignore_first_user_frame=True).init(),
                r"`state` is of another configuration",
            ),
        ):
            for call in (
                lambda state: greedy.step(state, audio),
                lambda state: greedy.reset(state, np.ones(2, bool)),
                lambda state: greedy.get_slot(state, 0),
                lambda state: greedy.configure(state),
            ):
                with pytest.raises(ValueError, match=message):
                    call(state)
        state = greedy.init()
        greedy.step(state, audio)
        with pytest.raises(ValueError, match="`state` was consumed"):
            greedy.step(state, audio)

    @pytest.mark.parametrize("slot", [2, -1, np.int64(5), True])
    def test_slots_that_are_not_there(self, greedy: FlaxMoshiStream, slot: Any) -> None:
        state = greedy.init()
        with pytest.raises(ValueError, match=r"`slot` is .* the slots 0 to 1"):
            greedy.get_slot(state, slot)
        with pytest.raises(ValueError, match=r"`slot` is .* the slots 0 to 1"):
            greedy.set_slot(state, slot, greedy.get_slot(state, 0))
        with pytest.raises(ValueError, match="`row` has a batch of 2"):
            greedy.set_slot(state, 0, state)

    def test_a_slot_may_be_set_to_itself(self, alone: FlaxMoshiStream) -> None:
        state = alone.init()
        alone.step(alone.set_slot(state, 0, state), user_audio(1, 1))

    @pytest.mark.parametrize(
        "rows, message",
        [(np.ones(3, bool), "`rows` must be booleans"), (np.array([0, 1]), "`rows` must be booleans")],
    )
    def test_rows(self, greedy: FlaxMoshiStream, rows: Any, message: str) -> None:
        state = greedy.init()
        with pytest.raises(ValueError, match=message):
            greedy.reset(state, rows)
        with pytest.raises(ValueError, match=message):
            greedy.configure(state, rows)

    @pytest.mark.parametrize(
        "numbers, message",
        [
            ({"temperatur": 1.0}, "without `temperatur`.*Did you mean `temperature`"),
            ({"top_p": 0.5}, "The stream was made without `top_p`; its numbers are: `temperature`, `top_k`"),
            ({"temperature": 0.0}, "`temperature` must be a number above 0"),
            ({"temperature": [1.0, 1.0]}, "`temperature` must be a number, or one for each slot"),
            ({"temperature": "hot"}, "`temperature` must be a number, or one for each slot"),
            ({"top_k": 65}, r"`top_k` must be in \[1, 64\] in this stream"),
            ({"depth_decoder_top_k": 0}, r"`depth_decoder_top_k` must be in \[1, 64\]"),
            ({"top_k": 2.5}, "`top_k` must be a whole number"),
            ({"top_k": np.nan}, "`top_k` must be a whole number"),
            ({"depth_decoder_top_k": [3, np.inf, 3]}, "`depth_decoder_top_k` must be a whole number"),
            ({"temperature": 1e-45}, r"`temperature` must be .* \[1e-30, 1e30\]"),
        ],
    )
    def test_bad_numbers(self, sampling: FlaxMoshiStream, numbers: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            sampling.configure(sampling.init(), **numbers)
        with pytest.raises(ValueError, match=message):
            sampling.check_numbers(**numbers)

    def test_traced_numbers(self, sampling: FlaxMoshiStream) -> None:
        def configure(numbers: Any) -> Any:
            return sampling.configure(sampling.init(), temperature=numbers)

        for numbers in (0.5, [0.5, 0.5, 0.5]):
            with pytest.raises(ValueError, match="`temperature` is traced"):
                jax.jit(configure)(numbers)

    def test_greedy_streams_have_no_numbers(self, greedy: FlaxMoshiStream) -> None:
        with pytest.raises(ValueError, match="none, as it does not sample"):
            greedy.configure(greedy.init(), temperature=1.0)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, but is 0"),
            ({"tempreature": 1.0}, "no argument `tempreature`.*`temperature`"),
            ({"max_new_tokens": 5}, "`max_new_tokens` has no meaning in a stream"),
            ({"num_beams": 2}, "`num_beams` has no meaning in a stream"),
            ({"eos_token_id": 2}, "`eos_token_id` has no meaning in a stream"),
            ({"output_scores": True}, "`output_scores` has no meaning in a stream"),
            ({"repetition_penalty": 1.2}, "`repetition_penalty=1.2` needs a history"),
            ({"no_repeat_ngram_size": 2}, "`no_repeat_ngram_size=2` needs a history"),
            ({"guidance_scale": 3}, "`guidance_scale=3` is not supported"),
            ({"depth_decoder_max_length": 3}, "`depth_decoder_max_length` must be 5"),
            ({"temperature": 0.0, "do_sample": True}, "`temperature` must be a number above 0"),
            ({"suppress_tokens": list(range(60))}, "No token is left by `suppress_tokens`, which forbid all 60"),
            ({"depth_decoder_suppress_tokens": list(range(32))}, "No token is left by `depth_decoder_suppress"),
        ],
    )
    def test_options(self, model: Moshi, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            model.streaming(**options)

    @pytest.mark.parametrize("size", ["2", 2.0, True])
    def test_wrong_types(self, model: Moshi, greedy: FlaxMoshiStream, size: Any, unchecked_types: None) -> None:
        with pytest.raises(ValueError, match=f"`batch_size` must be a whole number of at least 1, but is {size!r}"):
            model.streaming(batch_size=size)
        with pytest.raises(ValueError, match=r"`prng_key` must be a key of .*, but is 'seed'"):
            greedy.init(prng_key="seed")

    @pytest.mark.parametrize(
        "fields",
        [
            {"num_beams": 2},
            {"num_return_sequences": 3, "do_sample": True},
            {"max_time": 3.0},
            {"output_scores": True, "return_dict_in_generate": True},
            {"output_logits": True, "return_dict_in_generate": True},
            {"output_attentions": True, "return_dict_in_generate": True},
            {"output_hidden_states": True, "return_dict_in_generate": True},
        ],
        ids=lambda fields: next(iter(fields)),
    )
    def test_configurations_of_other_results(
        self, model: Moshi, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name, value = next(iter(fields.items()))
        with pytest.raises(ValueError, match=f"`{name}={value}` .* no meaning in a stream.*: leave it unset"):
            model.streaming(1, GenerationConfig(**fields))
        monkeypatch.setattr(model, "generation_config", GenerationConfig(**fields))
        with pytest.raises(ValueError, match=f"`{name}={value}` .* no meaning in a stream"):
            model.streaming(1)

    def test_configuration_of_the_released_checkpoints(self, model: Moshi, monkeypatch: pytest.MonkeyPatch) -> None:
        """With what their conversion writes, and the defaults that some versions write out."""
        codes = {"do_sample": True, "temperature": 0.8, "top_k": 25, "min_length": 5, "max_length": 5}
        released = GenerationConfig(
            do_sample=True,
            temperature=0.7,
            top_k=25,
            max_length=40,
            pad_token_id=3,
            bos_token_id=1,
            eos_token_id=2,
            cache_implementation="sliding_window",
            depth_decoder_config={**codes, "cache_implementation": "sliding_window"},
            num_beams=1,
            num_return_sequences=1,
            output_attentions=False,
            output_scores=False,
        )
        monkeypatch.setattr(model, "generation_config", released)
        assert set(model.streaming(1)._numbers) == {
            f"{p}{n}" for p in ("", "depth_decoder_") for n in ("temperature", "top_k")
        }

    def test_lengths_and_ends_of_a_configuration_are_for_generate(self, model: Moshi) -> None:
        shared = GenerationConfig(max_length=40, eos_token_id=2, pad_token_id=3, do_sample=False)
        model.streaming(1, shared)
        with pytest.raises(ValueError, match=r"`repetition_penalty=1.5` needs a history"):
            model.streaming(1, GenerationConfig(repetition_penalty=1.5))


class TestPrograms:
    def test_processors(self, model: Moshi) -> None:
        """Those of the text that need no history, and all of the codes."""
        stream = model.streaming(
            2, suppress_tokens=list(range(30)), depth_decoder_suppress_tokens=list(range(16)), **GREEDY
        )
        _, out = run(stream, stream.init(), user_codes(2, 12))
        assert (out["text_ids"] >= 30).all()
        assert (out["audio_codes"][:, 0] >= 16).all()

    def test_a_step_copies_neither_weights_nor_caches(self, model: Moshi) -> None:
        stream = model.streaming(3, **GREEDY)
        state = stream.init()
        shared = ({name: part for name, part in model.params.items() if name != "audio_encoder"}, stream.samplings)
        leaves, structure = jax.tree.flatten((shared[0], tuple(shared[1])))
        program = model.compiled(on_mesh, (1,), function=next_frame, structure=structure, mesh=None)
        program = program.lower(tuple(leaves), state.dialogue, stream._blank, stream._all, *stream._free).compile()
        cache = state.dialogue.cache
        sizes = large_weights(shared[0]) | {cache.keys[0].size}
        moves = [
            line
            for line in program.as_text().splitlines()
            if any(f" {move}(" in line for move in ("copy", "transpose", "concatenate"))
            and any(int(np.prod([int(n) for n in shape.split(",") if n] or [1])) in sizes for shape in shapes(line))
        ]
        assert moves == []
        assert program.memory_analysis().alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(cache))

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_lowers_for_tpus(self, model: Moshi, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without implicit promotion, but inside of flax's own LayerNorm; the state is in the model's dtype."""
        for name in ("_compute_stats", "_normalize"):
            monkeypatch.setattr(normalization, name, with_promotion(getattr(normalization, name)))
        other = Moshi(model.config, dtype=dtype, _do_init=False)
        stream = other.streaming(2, params=model.params, ignore_first_user_frame=True, top_p=0.9, **SAMPLE)
        with jax.numpy_dtype_promotion("strict"):
            assert "stablehlo" in tpu_module(stream.step, stream.init(), user_audio(2, 1))
            state, frame = jax.eval_shape(stream.step, stream.init(), user_audio(2, 1))
        assert {leaf.dtype for leaf in state.dialogue.cache.keys + state.encoder.histories} == {jnp.dtype(dtype)}
        assert frame.audio.dtype == jnp.float32

    @pytest.mark.parametrize("half", ["encoder", "decoder"])
    def test_without_a_half_of_mimi(self, model: Moshi, half: str) -> None:
        config = tiny_moshi_config(sliding_window=WINDOW, max_position_embeddings=WINDOW)
        setattr(config.audio_encoder_config, f"{half}_config", None)
        partial = Moshi(config, _do_init=False)
        codec = {name: model.params["audio_encoder"][name] for name in partial.params_shape_tree["audio_encoder"]}
        params = {**model.params, "audio_encoder": codec}
        if half == "decoder":
            with pytest.raises(ValueError, match="`return_audio_waveforms=True` needs the audio decoder"):
                partial.streaming(2, params=params)
        stream = partial.streaming(2, params=params, return_audio_waveforms=half == "encoder", **GREEDY)
        state, frame = stream.step(stream.init(), user_audio_codes=user_codes(2, 1)[..., 0])
        assert frame.valid.all() and (frame.audio is None) == (half == "decoder")
        if half == "encoder":
            with pytest.raises(ValueError, match="needs Mimi's encoder"):
                stream.step(state, user_audio(2, 1))
        stream.warmup()


def shapes(line: str) -> list[str]:
    return re.findall(r"= \w+\[([\d,]*)\]", line)


ON_FOUR_DEVICES = """
import sys
import jax
import numpy as np
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, MoshiPrompt

model = FlaxMoshiForConditionalGeneration.from_pretrained(sys.argv[1])
books = model.config.num_codebooks
prompt = MoshiPrompt(np.arange(3), np.ones((books, 3), int), np.zeros((books, 3), int))
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
options = {"do_sample": True, "depth_decoder_do_sample": True}
one, spread = model.streaming(8, **options), model.streaming(8, mesh=mesh, **options)
states = [one.init(), spread.init()]


def both(call):
    states[:] = [call(stream, state) for stream, state in zip((one, spread), states)]


one.warmup(3), spread.warmup(3)
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
)
state = spread.configure(spread.init(jax.random.key(0)), np.ones(8, bool), top_k=3)
compiled.clear()  # of splitting the key
silence, everyone = np.zeros((8, 1, one.frame_size), np.float32), np.ones(8, bool)
state, _ = spread.step(state, silence, active=everyone, forced_text_ids=np.full(8, 5))
state = spread.configure(spread.reset(state, everyone, prompt=prompt), everyone, temperature=0.5)
assert not compiled, compiled

rng = np.random.default_rng(0)
for k in range(10):
    audio, active = rng.uniform(-1, 1, (8, 1, one.frame_size)).astype(np.float32), rng.random(8) < 0.7
    frames = []
    for index, stream in enumerate((one, spread)):
        states[index], frame = stream.step(states[index], audio, active=active)
        frames.append(frame)
    for name in ("text_ids", "audio_codes", "valid"):
        np.testing.assert_array_equal(*(np.asarray(frame[name]) for frame in frames))
    np.testing.assert_allclose(*(np.asarray(frame.audio) for frame in frames), atol=1e-5)
    if k == 4:
        both(lambda stream, state: stream.reset(state, np.arange(8) % 3 == 0))
        both(lambda stream, state: stream.configure(state, np.arange(8) < 4, top_k=5))
        both(lambda stream, state: stream.set_slot(state, 6, stream.get_slot(state, 1)))
        both(lambda stream, state: stream.reset(state, np.arange(8) > 6, prompt=prompt))
        spread.save_state(states[1], sys.argv[2])
        states[1] = spread.load_state(sys.argv[2])
    for leaf in jax.tree.leaves((states[1], frames[1])):
        assert leaf.sharding.spec[0] == "data" and len(leaf.addressable_shards) == 4, leaf.sharding
try:
    model.streaming(6, mesh=mesh)
except ValueError as error:
    assert "`batch_size` is 6, but the axis 'data' of `mesh` has 4 devices" in str(error), error
else:
    raise AssertionError("six slots cannot be spread over four devices")
"""


def test_slots_on_four_devices(tmp_path: Path, keeping: dict[str, str]) -> None:
    environment = {
        **os.environ,
        **keeping,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
    }
    command = [sys.executable, "-c", ON_FOUR_DEVICES, str(RANDOM_MODEL), str(tmp_path / "state.safetensors")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr


def test_meshes_that_do_not_fit(model: Moshi) -> None:
    device = np.array(jax.devices()[:1])
    with pytest.raises(ValueError, match="`mesh` must have the axis 'data'"):
        model.streaming(2, mesh=jax.sharding.Mesh(device, ("tensor",)))
