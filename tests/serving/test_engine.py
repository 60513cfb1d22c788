"""The thread that steps: who takes part, what is waited for, who begins and leaves, and its clock."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.serving.fake_stream import FRAME, FakeStream, spoken_alone
from transformers_moshi_flax.models.moshi.pcm import from_float
from transformers_moshi_flax.serving.engine import PATIENCE, Engine, Said, Seat
from transformers_moshi_flax.serving.metrics import Metrics

KEY = np.array([1, 2], np.uint32)
SOON = 20.0


class Heard:
    """What an engine says, in the order in which it comes."""

    def __init__(self) -> None:
        self.frames: queue.Queue[Said] = queue.Queue()
        self.failures: list[BaseException] = []
        self.moves = 0

    def say(self, said: list[Said]) -> None:
        for frame in said:
            self.frames.put(frame)

    def move_up(self) -> None:
        self.moves += 1

    def of(self, seat: Seat, count: int) -> np.ndarray:
        """The next ``count`` frames, all of one seat."""
        found = [self.frames.get(timeout=SOON) for _ in range(count)]
        assert all(frame.seat is seat for frame in found)
        return np.array([from_float(frame.audio, np.int16) for frame in found])


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[Engine, Heard]]]:
    """Engines that run, each of a fake stream, and what they say."""
    engines = []

    def start(slots: int = 2, **options: object) -> tuple[Engine, Heard]:
        options = {"realtime": False, **options}
        engine, heard = Engine(FakeStream(slots), Metrics(), **options), Heard()
        engine.warmup()
        engine.start(heard.say, heard.failures.append, heard.move_up)
        engines.append(engine)
        return engine, heard

    yield start
    for engine in engines:
        engine.stop()


def speech(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (frames, FRAME)).astype(np.float32)


def begun(engine: Engine, key: np.ndarray = KEY, **numbers: float) -> Seat:
    seat = engine.take_seat(numbers, key)
    assert seat is not None
    seat.begun.result(SOON)
    return seat


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def value(engine: Engine, name: str) -> float:
    return engine._metrics.registry.get_sample_value(name) or 0.0


def test_a_dialogue_is_that_of_the_stream_alone(start):
    engine, heard = start()
    seat, said = begun(engine), speech(5)
    for piece in np.array_split(said.reshape(-1), 13):
        engine.feed(seat, piece)
    assert np.array_equal(heard.of(seat, 5), spoken_alone(said, (1, 2)))
    assert heard.frames.empty()


def test_neighbours_do_not_matter(start):
    engine, heard = start(slots=3)
    first, said = begun(engine), speech(6)
    found = []
    for number, frame in enumerate(said):
        other = begun(engine, np.array([9, number], np.uint32))
        engine.feed(first, frame)
        found.append(heard.of(first, 1)[0])
        engine.feed(other, speech(1, number)[0])
        heard.of(other, 1)
        engine.leave(other)
    assert np.array_equal(found, spoken_alone(said, (1, 2)))


def test_slots_are_taken_given_back_and_begin_anew(start):
    engine, heard = start(slots=2)
    seats = [begun(engine), begun(engine)]
    assert engine.take_seat({}, KEY) is None and engine.free_slots == 0
    engine.feed(seats[1], speech(1)[0])
    heard.of(seats[1], 1)
    engine.leave(seats[1])
    deadline = time.monotonic() + SOON
    while not engine.free_slots and time.monotonic() < deadline:
        time.sleep(0.01)
    again, said = begun(engine), speech(2, 5)
    assert again.slot == seats[1].slot
    engine.feed(again, said.reshape(-1))
    assert np.array_equal(heard.of(again, 2), spoken_alone(said, (1, 2)))


@pytest.mark.parametrize("gives_up", [False, True])
def test_who_leaves_before_it_begins_gives_its_slot_back(gives_up: bool):
    engine = Engine(FakeStream(1), Metrics(), realtime=False)
    engine.warmup()
    gone = engine.take_seat({}, KEY)
    if gives_up:  # as those do whose task is cancelled while they wait
        gone.begun.cancel()
    for _ in range(2):  # once is enough, and twice frees nothing more
        engine.leave(gone)
    engine.start(lambda said: None, lambda error: None)
    deadline = time.monotonic() + SOON
    while not engine.free_slots and time.monotonic() < deadline:
        time.sleep(0.01)
    seat = begun(engine)
    engine.stop()
    assert gone.begun.cancelled() and seat.slot == gone.slot


def test_who_leaves_the_slot_twice_does_not_take_it_from_the_next(start):
    engine, _ = start(slots=1, queue=2)
    first = begun(engine)
    gone, last = engine.take_seat({}, KEY), engine.take_seat({}, KEY)
    for seat in (gone, gone, first, first, gone):
        engine.leave(seat)
    last.begun.result(SOON)
    assert last.slot == 0 and engine.position(last) == 0 and engine.free_slots == 0


def test_those_who_wait_are_served_in_their_order(start):
    engine, heard = start(slots=1, queue=3)
    first = begun(engine)
    waiting = [engine.take_seat({}, KEY) for _ in range(3)]
    assert engine.take_seat({}, KEY) is None and engine.is_full
    assert [engine.position(seat) for seat in [first, *waiting]] == [0, 1, 2, 3]
    assert value(engine, "moshi_waiting") == 3
    engine.leave(waiting[1])  # does not want to wait any longer
    until(lambda: not engine.is_full)
    assert [engine.position(seat) for seat in waiting] == [1, 0, 2] and waiting[1].begun.cancelled()
    late = engine.take_seat({}, KEY)
    for leaving, next_one in [(first, waiting[0]), (waiting[0], waiting[2]), (waiting[2], late)]:
        assert not next_one.begun.done()
        engine.leave(leaving)
        next_one.begun.result(SOON)
        assert next_one.slot == 0 and engine.position(next_one) == 0
        said = speech(1, 6)
        engine.feed(next_one, said[0])
        assert np.array_equal(heard.of(next_one, 1), spoken_alone(said, (1, 2)))
    assert value(engine, "moshi_waiting") == 0 and not engine.is_full and engine.free_slots == 0
    engine.leave(late)
    until(lambda: engine.free_slots == 1)
    # whenever the queue has moved: one has left it, three got a slot, and the last one made room
    assert heard.moves == 5


def test_numbers_are_those_of_the_caller_and_else_the_engine_s(start):
    engine, _ = start(slots=2, numbers={"temperature": 0.9, "top_k": 3})
    begun(engine, temperature=0.1)
    begun(engine)
    assert engine.stream.configured[-2:] == [([0], {"temperature": 0.1, "top_k": 3}), ([1], engine.numbers)]


def test_time_stands_still_while_paused(start):
    engine, heard = start()
    seat, said = begun(engine), speech(3)
    engine.pause(seat, True)
    other = begun(engine)  # the pause has been obeyed by then
    engine.feed(seat, said.reshape(-1))
    engine.feed(other, said[0])
    heard.of(other, 1)
    assert heard.frames.empty()
    engine.pause(seat, False)
    assert np.array_equal(heard.of(seat, 3), spoken_alone(said, (1, 2)))


def test_restart_is_a_new_dialogue_with_the_same_key(start):
    engine, heard = start()
    seat, said = begun(engine), speech(3)
    engine.feed(seat, said[0])
    heard.of(seat, 1)
    engine.restart(seat)
    begun(engine)
    engine.feed(seat, said[1:].reshape(-1))
    assert np.array_equal(heard.of(seat, 2), spoken_alone(said[1:], (1, 2)))


def test_the_newest_audio_wins(start):
    engine, heard = start(buffer_frames=2)
    seat, said = begun(engine), speech(4)
    engine.pause(seat, True)
    begun(engine)
    assert engine.feed(seat, said.reshape(-1)) == 2 * FRAME
    engine.pause(seat, False)
    assert np.array_equal(heard.of(seat, 2), spoken_alone(said[2:], (1, 2)))


def test_in_real_time_late_audio_is_waited_for_and_then_silence(start):
    engine, heard = start(realtime=True)
    seat, said = begun(engine), speech(1)
    begin = time.perf_counter()
    time.sleep(0.3)
    assert heard.frames.empty()  # nobody has said a word yet
    engine.feed(seat, said[0])
    silent = np.zeros((2, FRAME), np.float32)
    assert np.array_equal(heard.of(seat, 3), spoken_alone(np.concatenate([said, silent]), (1, 2)))
    # a frame after 0.3 s, then patience, then two of silence
    assert time.perf_counter() - begin >= 0.3 + 0.08 * (PATIENCE + 2) - 0.08
    assert value(engine, "moshi_missing_frames_total") >= 2


def test_in_real_time_frames_come_one_after_another_and_late_steps_are_counted(start):
    engine, heard = start(realtime=True)
    step = engine.stream.step

    def slow(*args: object, **options: object) -> tuple:
        time.sleep(0.1)
        return step(*args, **options)

    seat = begun(engine)
    begin = time.perf_counter()
    engine.feed(seat, speech(4).reshape(-1))
    heard.of(seat, 4)
    assert time.perf_counter() - begin >= 3 * 0.08 - 0.01
    before = value(engine, "moshi_late_steps_total")
    engine.stream.step = slow
    engine.feed(seat, speech(2).reshape(-1))
    heard.of(seat, 2)
    deadline = time.monotonic() + SOON
    while value(engine, "moshi_late_steps_total") == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert value(engine, "moshi_late_steps_total") > before
    assert value(engine, "moshi_step_seconds_count") >= 6


def test_what_ends_the_thread_is_told(start):
    engine, heard = start()
    seat = begun(engine)

    def broken(*args: object, **options: object) -> tuple:
        raise RuntimeError("the device is gone")

    engine.stream.step = broken
    engine.feed(seat, speech(1)[0])
    deadline = time.monotonic() + SOON
    while not heard.failures and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "the device is gone" in str(heard.failures[0])
