"""The engine with a real model: dialogues are those of its stream alone, and coming and going compile nothing."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.serving.engine import Engine, Said, Seat, stream_for_callers
from transformers_moshi_flax.serving.metrics import Metrics
from transformers_moshi_flax.serving.wishes import Wishes

SLOTS = 3


@pytest.fixture(scope="module")
def model() -> FlaxMoshiForConditionalGeneration:
    return FlaxMoshiForConditionalGeneration(tiny_moshi_config(), seed=3)


@pytest.fixture(scope="module")
def running(model: FlaxMoshiForConditionalGeneration) -> Iterator[tuple[Engine, "queue.Queue[Said]"]]:
    stream, numbers = stream_for_callers(model, SLOTS, {"do_sample": True, "temperature": 0.7, "top_k": 25})
    engine, said = Engine(stream, Metrics(), numbers, realtime=False), queue.Queue()
    engine.warmup()
    engine.start(lambda frames: [said.put(frame) for frame in frames], lambda error: said.put(error))
    yield engine, said
    engine.stop()


def come(engine: Engine, query: dict[str, str]) -> Seat:
    wishes = Wishes.read(query, engine.stream)
    seat = engine.take_seat(wishes.numbers, wishes.key)
    assert seat is not None
    seat.begun.result(300)
    return seat


def hear(said: "queue.Queue[Said]", count: int) -> list[Said]:
    found = [said.get(timeout=300) for _ in range(count)]
    for frame in found:
        if isinstance(frame, BaseException):
            raise frame
    return found


def alone(engine: Engine, query: dict[str, str], audio: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The same dialogue in the stream itself, in another slot, without neighbours."""
    wishes, stream = Wishes.read(query, engine.stream), engine.stream
    rows = np.arange(SLOTS) == 2
    state = stream.init()
    state = stream.configure(state, rows, **{**engine.numbers, **wishes.numbers})
    state = stream.reset(state, rows, jnp.asarray(np.tile(wishes.key, (SLOTS, 1))))
    ids, samples = [], []
    for frame in audio:
        state, reply = stream.step(state, np.broadcast_to(frame, (SLOTS, 1, len(frame))), active=rows)
        ids.append(int(reply.text_ids[2]))
        samples.append(np.asarray(reply.audio)[2, 0])
    return ids, np.array(samples)


def test_coming_going_and_wishes_compile_nothing(running, count_compilations: Callable[[], int]):
    engine, said = running
    size = engine.stream.frame_size
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, (6, size)).astype(np.float32)
    first_wish = {"text_seed": "5", "audio_seed": "1"}
    second_wish = {"text_seed": "6", "text_temperature": "1.3", "audio_topk": "9", "text_topk": "200"}
    count_compilations()
    first = come(engine, first_wish)
    second = come(engine, second_wish)
    heard: dict[Seat, list[Said]] = {first: [], second: []}
    for number, frame in enumerate(audio):
        engine.feed(first, frame)
        heard[first] += hear(said, 1)
        if number % 2:
            engine.feed(second, frame)
            heard[second] += hear(said, 1)
        passing = come(engine, {"text_topk": str(1 + number), "text_temperature": "0"})
        engine.feed(passing, frame)
        hear(said, 1)
        engine.restart(passing)
        engine.pause(passing, True)
        engine.leave(passing)
        # its slot is free once somebody else's frame has gone through
        engine.feed(second, np.zeros(size, np.float32)) if number % 2 else engine.feed(
            first, np.zeros(size, np.float32)
        )
        heard[second if number % 2 else first] += hear(said, 1)
    assert count_compilations() == 0
    silence = np.zeros(size, np.float32)
    of_first = [part for number, frame in enumerate(audio) for part in ([frame] if number % 2 else [frame, silence])]
    of_second = [part for frame in audio[1::2] for part in (frame, silence)]
    for seat, wish, parts in ((first, first_wish, of_first), (second, second_wish, of_second)):
        ids, samples = alone(engine, wish, np.array(parts))
        assert [frame.text_id for frame in heard[seat]] == ids
        assert np.array_equal([frame.audio for frame in heard[seat]], samples)
        engine.leave(seat)


def test_greedy_callers_are_those_of_a_greedy_stream(running, model):
    engine, said = running
    size = engine.stream.frame_size
    audio = np.random.default_rng(1).uniform(-0.5, 0.5, (5, size)).astype(np.float32)
    greedy = model.streaming(1, do_sample=False, depth_decoder_do_sample=False)
    state, ids = greedy.init(), []
    for frame in audio:
        state, reply = greedy.step(state, frame[None, None])
        ids.append(int(reply.text_ids[0]))
    seat = come(engine, {"text_temperature": "0", "audio_temperature": "0"})
    engine.feed(seat, audio.reshape(-1))
    assert [frame.text_id for frame in hear(said, 5)] == ids
    engine.leave(seat)


def test_greedy_options_are_numbers_for_a_stream_that_samples(model):
    stream, numbers = stream_for_callers(model, 2, {"do_sample": False, "depth_decoder_do_sample": False})
    assert numbers == {
        "temperature": 1.0,
        "top_k": 1,
        "depth_decoder_temperature": 1.0,
        "depth_decoder_top_k": 1,
    }
    assert stream.numbers.keys() == numbers.keys()
    stream.check_numbers(top_k=250, depth_decoder_top_k=250, temperature=1.5)
