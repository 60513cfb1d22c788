"""Generation in pieces: what a streamer hears, and what ends it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from transformers_moshi_flax.generation import StopGeneration, running
from transformers_moshi_flax.generation.decoding import State

PROMPT, MAXIMUM, BATCH = 3, 40, 2


class Clock:
    """Time that passes only in the loop: ``seconds`` for every column."""

    def __init__(self, seconds: float):
        self.now, self.seconds = 0.0, seconds

    def monotonic(self) -> float:
        return self.now


class Loop:
    """An ``advance`` that writes each column's number and remembers where it was asked to go; both rows end at
    ``end``."""

    def __init__(self, clock: Clock, end: int = MAXIMUM):
        self.clock, self.end, self.asked = clock, end, []

    def state(self, position: int) -> State:
        ids = np.tile(np.arange(MAXIMUM, dtype=np.int32), (BATCH, 1))
        return State(
            position=jnp.int32(position),
            cache=None,
            sequences=jnp.asarray(np.where(ids < position, ids, -7)),
            lengths=jnp.full((BATCH,), position, dtype=jnp.int32),
            finished=jnp.full((BATCH,), position >= self.end),
            streams=None,
            records={},
        )

    def __call__(self, state: State, until: int) -> State:
        self.asked.append(until)
        reached = min(until, self.end)
        self.clock.now += self.clock.seconds * (reached - int(state.position))
        return self.state(reached)


class TextStreamer:
    def __init__(self, stop_after: int | None = None):
        self.tokens: list[np.ndarray] = []
        self.ended, self.stop_after = 0, stop_after

    def put(self, value: np.ndarray) -> None:
        self.tokens.append(value)
        if len(self.tokens) - 1 == self.stop_after:
            raise StopGeneration

    def end(self) -> None:
        self.ended += 1


class Streamer(TextStreamer):
    def __init__(self, stop_after: int | None = None):
        super().__init__(stop_after)
        self.audio: list[np.ndarray] = []

    def put_audio_codes(self, codes: np.ndarray) -> None:
        self.audio.append(codes)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(0.012)
    monkeypatch.setattr(running.time, "monotonic", clock.monotonic)
    return clock


def run(loop: Loop, **options: Any) -> State:
    return running.run(loop, loop.state(PROMPT), PROMPT, MAXIMUM, **options)


def columns(state: State, begin: int, end: int) -> np.ndarray:
    return np.asarray(state.sequences)[:, None, begin:end]


def test_in_one_go_if_nobody_watches(clock: Clock) -> None:
    loop = Loop(clock)
    assert int(run(loop).position) == MAXIMUM
    assert loop.asked == [MAXIMUM]


def test_streamer_hears_every_column_once_and_in_order(clock: Clock) -> None:
    loop, streamer = Loop(clock), Streamer()
    run(loop, streamer=streamer, audio_codes=columns)
    np.testing.assert_array_equal(streamer.tokens[0], np.tile(np.arange(PROMPT), (BATCH, 1)))
    np.testing.assert_array_equal(np.stack(streamer.tokens[1:], 1), np.tile(np.arange(PROMPT, MAXIMUM), (BATCH, 1)))
    # the codes of the last column have not all come
    audio = np.concatenate(streamer.audio, axis=2)
    np.testing.assert_array_equal(audio[0, 0], np.arange(PROMPT, MAXIMUM - 1))
    assert streamer.ended == 1


def test_streamer_without_audio(clock: Clock) -> None:
    streamer = TextStreamer()
    run(Loop(clock), streamer=streamer, audio_codes=columns)
    assert len(streamer.tokens) == 1 + MAXIMUM - PROMPT


def test_pieces_grow_while_they_are_short_and_shrink_when_they_are_long(clock: Clock) -> None:
    loop = Loop(clock)
    run(loop, streamer=Streamer())
    sizes = np.diff([PROMPT, *loop.asked])
    assert sizes[:4].tolist() == [1, 2, 2, 2]
    clock.seconds = 0.0001
    loop = Loop(clock)
    run(loop, streamer=Streamer())
    assert np.diff([PROMPT, *loop.asked])[:5].tolist() == [1, 2, 4, 8, 16]
    clock.seconds = 10.0
    loop = Loop(clock)
    run(loop, streamer=Streamer())
    assert np.diff([PROMPT, *loop.asked]).max() == 1


def test_rows_that_have_ended_end_it(clock: Clock) -> None:
    streamer = Streamer()
    state = run(Loop(clock, end=9), streamer=streamer)
    assert int(state.position) == 9
    assert len(streamer.tokens) == 1 + 9 - PROMPT
    assert streamer.ended == 1


def test_streamer_can_stop_it(clock: Clock) -> None:
    streamer = Streamer(stop_after=5)
    state = run(Loop(clock), streamer=streamer)
    assert PROMPT + 5 <= int(state.position) < MAXIMUM
    assert streamer.ended == 1


def test_other_errors_of_the_streamer_are_raised(clock: Clock) -> None:
    class Broken(Streamer):
        def put(self, value: np.ndarray) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Loop(clock), streamer=Broken())


def test_max_time_ends_it_soon_after(clock: Clock) -> None:
    state = run(Loop(clock), max_time=0.12)
    assert PROMPT + 10 <= int(state.position) <= PROMPT + 10 + 2
