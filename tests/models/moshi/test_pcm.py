"""PCM of any length in and out of frames: what is heard, what is missing, what is dropped, what is refused."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.models.moshi.pcm import PcmBuffer, PcmDialogue, from_float

FRAME = 4
# every sample tells which it is; exact in 16 bits and in float32
RAMP = (np.arange(1, 2000) / 4096).astype(np.float32)


class EchoStream:
    """Says what it hears, a row's age as its text; a row's first ``silent`` frames are not valid."""

    sampling_rate = 24_000
    return_audio_waveforms, channels = True, 1

    def __init__(self, batch_size: int = 1, silent: int = 0):
        self.batch_size, self.frame_size, self.silent = batch_size, FRAME, silent

    def init(self, prng_key: Any = None) -> np.ndarray:
        return np.zeros(self.batch_size, np.int32)

    def step(self, state: np.ndarray, user_audio: np.ndarray, active: np.ndarray) -> tuple:
        assert user_audio.shape == (self.batch_size, 1, FRAME) and user_audio.dtype == np.float32
        frame = SimpleNamespace(audio=user_audio, text_ids=state, valid=active & (state >= self.silent))
        return state + active.astype(np.int32), frame

    def reset(self, state: np.ndarray, rows: np.ndarray, prng_key: Any = None, prompt: Any = None) -> np.ndarray:
        return np.where(rows, 0, state).astype(np.int32)


def take(buffer: PcmBuffer, slot: int = 0) -> list[float]:
    return buffer.take()[slot, 0].tolist()


@given(
    chunks=st.lists(st.integers(0, 3 * FRAME), max_size=12),
    column=st.booleans(),
    kind=st.sampled_from(["f", ">f", "d", "e", "h", ">h"]),
)
def test_chunks_of_any_length_give_the_same_frames(chunks: list[int], column: bool, kind: str):
    total = sum(chunks)
    buffer = PcmBuffer(1, FRAME, buffer_frames=max(1, -(-total // FRAME)))
    sent = np.split(RAMP[:total], np.cumsum(chunks)[:-1]) if chunks else []
    for chunk in sent:
        chunk = (chunk * (32768 if kind.endswith("h") else 1)).astype(kind)
        assert buffer.feed(chunk[None] if column else chunk) == 0
    heard = np.concatenate([buffer.take()[0, 0] for _ in range(total // FRAME)] or [RAMP[:0]])
    np.testing.assert_array_equal(heard, RAMP[: len(heard)])
    assert buffer.buffered_samples.tolist() == [total % FRAME]
    assert buffer.missing_samples.tolist() == buffer.dropped_samples.tolist() == [0]


@settings(max_examples=200)
@given(
    acts=st.lists(
        st.one_of(
            st.tuples(st.just("feed"), st.integers(0, 1), st.integers(0, 5 * FRAME)),
            st.tuples(st.just("take"), st.integers(1, 3)),
            st.tuples(st.just("clear"), st.integers(0, 1)),
        ),
        max_size=30,
    )
)
def test_every_sample_is_heard_dropped_or_cleared(acts: list[tuple]):
    """The same as lists of samples, whatever comes in whatever order; frames 1, 2, 3 are of slots 0, 1 and both."""
    capacity = 3 * FRAME
    buffer = PcmBuffer(2, FRAME, buffer_frames=3)
    held: list[list[float]] = [[], []]
    missing, dropped, sent = [0, 0], [0, 0], 0
    for act, *given_ in acts:
        if act == "feed":
            slot, count = given_
            chunk, sent = RAMP[sent : sent + count], sent + count
            held[slot] += chunk.tolist()
            over = max(0, len(held[slot]) - capacity)
            held[slot] = held[slot][over:]
            dropped[slot] += over
            assert buffer.feed(chunk, slot) == over
        elif act == "take":
            active = np.array([bool(given_[0] & 1), bool(given_[0] & 2)])
            frames = buffer.take(active)
            for slot in (0, 1):
                expected = held[slot][:FRAME] if active[slot] else []
                if active[slot]:
                    held[slot] = held[slot][FRAME:]
                    missing[slot] += FRAME - len(expected)
                assert frames[slot, 0].tolist() == expected + [0.0] * (FRAME - len(expected))
        else:
            (slot,) = given_
            buffer.clear(slot)
            held[slot], missing[slot], dropped[slot] = [], 0, 0
        assert buffer.missing_samples.tolist() == missing
        assert buffer.dropped_samples.tolist() == dropped
        assert buffer.buffered_samples.tolist() == [len(samples) for samples in held]


def test_late_samples_are_heard_later():
    buffer = PcmBuffer(1, FRAME)
    buffer.feed(RAMP[:3])
    assert take(buffer) == [*RAMP[:3], 0]
    assert take(buffer) == [0] * FRAME
    assert buffer.missing_samples.tolist() == [1 + FRAME]
    buffer.feed(RAMP[3:8])
    assert take(buffer) == RAMP[3:7].tolist()


@pytest.mark.parametrize(
    ("pcm", "slot", "words"),
    [
        (np.array([0.0, np.nan], np.float32), 0, ["`pcm`", "NaN"]),
        (np.array([np.inf]), 0, ["`pcm`", "infinite"]),
        (np.array([1e300]), 0, ["`pcm`", "1e+300", "scale"]),
        (np.zeros((2, 4), np.float32), 0, ["`pcm`", "mono", "(2, 4)"]),
        (np.zeros((1, 1, 4), np.float32), 0, ["`pcm`", "(1, 1, 4)"]),
        (np.float32(0), 0, ["`pcm`", "()"]),
        (np.zeros(4, np.int32), 0, ["`pcm`", "int32", "int16"]),
        (np.zeros(4, np.uint8), 0, ["`pcm`", "uint8"]),
        (np.zeros(4, bool), 0, ["`pcm`", "bool"]),
        (np.zeros(4, complex), 0, ["`pcm`", "complex"]),
        (RAMP[:4], 2, ["`slot`=2", "2 slots"]),
        (RAMP[:4], -1, ["`slot`=-1"]),
    ],
    ids=str,
)
def test_what_cannot_be_heard_is_refused_before_it_is_buffered(pcm: np.ndarray, slot: int, words: list[str]):
    buffer = PcmBuffer(2, FRAME)
    buffer.feed(RAMP[:2])
    with pytest.raises(ValueError) as refusal:
        buffer.feed(pcm, slot)
    for word in words:
        assert word in str(refusal.value)
    assert buffer.buffered_samples.tolist() == [2, 0]
    buffer.feed(RAMP[2:4])
    assert take(buffer) == RAMP[:4].tolist()


@pytest.mark.parametrize("size", ["batch_size", "frame_size", "buffer_frames"])
def test_sizes_are_positive(size: str):
    with pytest.raises(ValueError, match=f"`{size}`"):
        PcmBuffer(**{"batch_size": 1, "frame_size": 1, "buffer_frames": 1, size: 0})


def test_int16_comes_back_as_it_was():
    every = np.arange(-32768, 32768).astype(np.int16)
    buffer = PcmBuffer(1, 65536)
    buffer.feed(every)
    heard = buffer.take()[0, 0]
    assert heard.min() == -1 and heard.max() < 1
    np.testing.assert_array_equal(from_float(heard, np.int16), every)


def test_samples_are_rounded_and_clipped():
    samples = np.array([0.4, 0.6, -0.6, 32767.4, 40_000, -32768, -1e9], np.float32) / 32768
    assert from_float(samples, np.int16).tolist() == [0, 1, -1, 32767, 32767, -32768, -32768]
    assert from_float(samples, np.float32) is not samples
    np.testing.assert_array_equal(from_float(samples, np.float32), samples)


def test_threads_feed_while_another_takes():
    threads, chunks, size = 4, 300, 3
    buffer = PcmBuffer(threads, FRAME, buffer_frames=1000)
    start = threading.Barrier(threads + 1)

    def speak(slot: int) -> None:
        start.wait()
        for index in range(chunks):
            buffer.feed(np.arange(index * size + 1, (index + 1) * size + 1, dtype=np.float32) / 1024, slot)

    speakers = [threading.Thread(target=speak, args=(slot,)) for slot in range(threads)]
    for speaker in speakers:
        speaker.start()
    start.wait()
    frames = []
    while any(speaker.is_alive() for speaker in speakers) or buffer.buffered_samples.any():
        frames.append(buffer.take()[:, 0])
    heard = np.concatenate(frames, axis=1)
    for slot in range(threads):
        assert (1024 * heard[slot][heard[slot] != 0]).tolist() == list(range(1, chunks * size + 1))
        assert buffer.missing_samples[slot] == np.count_nonzero(heard[slot] == 0)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_dialogue_speaks_pcm(dtype: type):
    dialogue = PcmDialogue(EchoStream(2), output_dtype=dtype)
    dialogue.feed(RAMP[:6], 1)
    frame = dialogue.step()
    assert frame.text_ids == {0: 0, 1: 0} and sorted(frame.audio) == [0, 1]
    assert frame.audio[1].dtype == dtype
    assert frame.audio[1].tolist() == (RAMP[:FRAME] * (32768 if dtype == np.int16 else 1)).tolist()
    assert frame.user_audio[1].tolist() == RAMP[:FRAME].tolist() and not frame.user_audio[0].any()
    assert dialogue.input.missing_samples.tolist() == [FRAME, 0]


def test_frames_that_are_not_valid_are_left_out():
    dialogue = PcmDialogue(EchoStream(2, silent=1))
    assert dialogue.step().audio == {}
    assert sorted(dialogue.step().audio) == [0, 1]
    dialogue.reset(1)
    assert sorted(dialogue.step().text_ids.items()) == [(0, 2)]


def test_slots_join_and_leave():
    dialogue = PcmDialogue(EchoStream(3), active=False)
    assert dialogue.step().audio == {}
    dialogue.feed(RAMP[:3], 1)  # nobody's yet
    dialogue.join(1)
    dialogue.feed(RAMP[10:14], 1)
    assert dialogue.active.tolist() == [False, True, False]
    frame = dialogue.step()
    assert list(frame.audio) == [1] and frame.audio[1].tolist() == RAMP[10:14].tolist()
    dialogue.join(0)
    assert dialogue.step().text_ids == {0: 0, 1: 1}
    assert dialogue.input.missing_samples.tolist() == [FRAME, FRAME, 0]
    dialogue.leave(1)
    assert dialogue.step().text_ids == {0: 1}
    assert dialogue.input.missing_samples.tolist() == [2 * FRAME, FRAME, 0]
    dialogue.join(1)
    assert dialogue.input.missing_samples.tolist() == [2 * FRAME, 0, 0]
    assert dialogue.step().text_ids == {0: 2, 1: 0}


def test_some_of_the_active_slots_take_part():
    dialogue = PcmDialogue(EchoStream(3), active=np.array([True, True, False]))
    for slot in (0, 1):
        dialogue.feed(RAMP[:FRAME], slot)
    frame = dialogue.step(np.array([False, True, True]))
    assert frame.text_ids == {1: 0} and dialogue.input.buffered_samples.tolist() == [FRAME, 0, 0]
    assert dialogue.input.missing_samples.tolist() == [0, 0, 0]
    assert dialogue.step().text_ids == {0: 0, 1: 1}
    with pytest.raises(ValueError, match=r"`slots` must have the shape \(3,\), but has \(2,\)"):
        dialogue.step(np.ones(2, bool))


def test_reset_forgets_what_was_not_heard_yet():
    dialogue = PcmDialogue(EchoStream(2), buffer_frames=2)
    for slot in (0, 1):
        assert dialogue.feed(RAMP[: 3 * FRAME], slot) == FRAME
    dialogue.step()
    dialogue.reset(0)
    assert dialogue.input.buffered_samples.tolist() == [0, FRAME]
    assert dialogue.input.dropped_samples.tolist() == [0, FRAME]
    dialogue.feed(RAMP[50:54], 0)
    frame = dialogue.step()
    assert frame.audio[0].tolist() == RAMP[50:54].tolist()
    assert frame.audio[1].tolist() == RAMP[2 * FRAME : 3 * FRAME].tolist()
    assert frame.text_ids == {0: 0, 1: 1}


@pytest.mark.parametrize(("act", "slot"), [("join", 0), ("leave", 1), ("join", 2), ("leave", -1), ("reset", 2)])
def test_slots_that_cannot(act: str, slot: int):
    dialogue = PcmDialogue(EchoStream(2))
    dialogue.leave(1)
    with pytest.raises(ValueError, match=f"`slot`={slot} "):
        getattr(dialogue, act)(slot)
    assert dialogue.active.tolist() == [True, False]
    assert dialogue.step().text_ids == {0: 0}


def test_some_slots_are_dialogues_from_the_start():
    given_ = np.array([True, False])
    dialogue = PcmDialogue(EchoStream(2), active=given_)
    dialogue.join(1)
    assert given_.tolist() == [True, False] and dialogue.active.tolist() == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dtype": np.int32}, r"`output_dtype` must be .*int32"),
        ({"output_dtype": "foo"}, r"`output_dtype` must be numpy\.float32 or numpy\.int16, got 'foo'"),
        ({"output_dtype": None}, r"`output_dtype` must be .*None"),
        ({"active": 1}, r"`active` must be True, False or an array of 2 bools, .*got 1"),
        ({"active": np.array([1, 0])}, r"`active` must be .*array\(\[1, 0\]\)"),
        ({"active": np.ones(3, bool)}, r"`active` must be .*array\(\[ True,  True,  True\]\)"),
    ],
    ids=str,
)
def test_options_of_the_wrong_kind(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        PcmDialogue(EchoStream(2), **options)


def test_what_is_taken_is_said_of_every_slot():
    with pytest.raises(ValueError, match=r"`active`.*\(2,\)"):
        PcmBuffer(2, FRAME).take(np.ones(3, bool))


def test_with_the_real_stream():
    """A dialogue that begins later, in another slot and in other chunks, hears and says the same."""
    model = FlaxMoshiForConditionalGeneration(tiny_moshi_config())
    stream = model.streaming(batch_size=2)
    later, frames = 3, 8
    size = stream.frame_size
    speech = np.random.default_rng(0).integers(-9000, 9000, frames * size).astype(np.int16)

    state, direct = stream.init(), []
    for samples in (speech / np.float32(32768)).astype(np.float32).reshape(frames, 1, 1, size):
        both = np.concatenate([samples, 0 * samples])
        state, reply = stream.step(state, user_audio=both, active=np.array([True, False]))
        direct.append((np.asarray(reply.audio)[0, 0], int(reply.text_ids[0])))

    dialogue = PcmDialogue(stream, active=False)
    dialogue.join(0)
    said: list[list[tuple]] = [[], []]
    chunks = {0: np.split(speech, frames), 1: np.array_split(speech, frames * 3)}
    for step in range(later + frames):
        if step == later:
            dialogue.join(1)
        for chunk in chunks[0][step : step + 1]:
            dialogue.feed(chunk, 0)
        for chunk in chunks[1][3 * (step - later) : 3 * (step - later + 1)] if step >= later else ():
            dialogue.feed(chunk[None] / 32768, 1)
        reply = dialogue.step()
        for slot, samples in reply.audio.items():
            said[slot].append((samples, reply.text_ids[slot]))
    assert dialogue.input.missing_samples.tolist() == [later * size, 0]
    assert dialogue.input.dropped_samples.tolist() == [0, 0]
    assert len(said[0]) == later + frames and len(said[1]) == frames
    for slot in (0, 1):
        for (audio, text_id), (expected_audio, expected_id) in zip(said[slot], direct):
            assert text_id == expected_id
            np.testing.assert_allclose(audio, expected_audio, rtol=0, atol=1e-5)
    assert max(np.abs(audio).max() for audio, _ in direct) > 1e-3


def test_streams_without_mono_waveforms_are_refused():
    for name, value in (("return_audio_waveforms", False), ("channels", 2)):
        stream = EchoStream()
        setattr(stream, name, value)
        with pytest.raises(ValueError, match="`stream` must return mono waveforms"):
            PcmDialogue(stream)


def test_slots_and_sizes_are_integers():
    with pytest.raises(ValueError, match="`batch_size` must be a positive integer"):
        PcmBuffer(True, FRAME)
    with pytest.raises(ValueError, match="`slot`"):
        PcmBuffer(2, FRAME).feed(np.zeros(3), slot=True)
