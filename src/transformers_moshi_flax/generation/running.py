"""The host's side of generation: runs the loop in pieces where somebody is watching, in one go otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from .arrays import host_copy

AnyState = TypeVar("AnyState", bound=Any)
"""A state with ``position``, ``finished`` and, where there is a streamer, ``sequences``."""

PIECE_SECONDS = 0.04
"""Time of a piece that streamed generation aims at: short to the ear, long beside the call of a program."""


class StopGeneration(Exception):
    """A streamer may raise it from ``put``: generation stops and returns what there is."""


def run(
    advance: Callable[[AnyState, int], AnyState],
    state: AnyState,
    prompt_length: int,
    max_length: int,
    streamer: Any = None,
    max_time: float | None = None,
    audio_codes: Callable[[AnyState, int, int], np.ndarray] | None = None,
) -> AnyState:
    """Generates up to ``max_length`` steps.

    Args:
        advance: takes a state on until so many steps are in use; the state given to it is gone afterwards.
        state: as the prompt left it.
        prompt_length: steps of the prompt.
        max_length: steps in all.
        streamer: with ``put(tokens)`` for the ``(batch, prompt)`` ids of the prompt and then the ``(batch,)`` ids of
            every new step in turn, ``end()``, and, if it takes audio, ``put_audio_codes(codes)`` for the
            ``(batch, codebooks, frames)`` undelayed codes of new steps.
        max_time: seconds after which no further piece is begun.
        audio_codes: the undelayed codes of a range of steps of a state.
    """
    if streamer is None and max_time is None:
        return advance(state, max_length)
    begin = time.monotonic()
    if streamer is not None:
        try:
            streamer.put(host_copy(state.sequences)[:, :prompt_length])
        except StopGeneration:
            max_length = prompt_length
    steps, piece, heard = prompt_length, 1, prompt_length
    if not hasattr(streamer, "put_audio_codes"):
        audio_codes = None
    while steps < max_length:
        before = time.monotonic()
        state = advance(state, min(steps + piece, max_length))
        reached, done = int(host_copy(state.position)), bool(host_copy(state.finished).all())
        seconds = time.monotonic() - before
        if streamer is not None:
            try:
                for tokens in host_copy(state.sequences)[:, steps:reached].T:
                    streamer.put(tokens)
                # the delayed codebooks of a frame come one step later
                if audio_codes is not None and reached - 1 > heard:
                    streamer.put_audio_codes(audio_codes(state, heard, reached - 1))
                    heard = reached - 1
            except StopGeneration:
                break
        steps = reached
        if done or (max_time is not None and time.monotonic() - begin >= max_time):
            break
        # the first piece may have compiled the program and says nothing then; growing slowly gets there all the same
        if seconds < PIECE_SECONDS / 2:
            piece *= 2
        elif seconds > 2 * PIECE_SECONDS and piece > 1:
            piece //= 2
    if streamer is not None:
        streamer.end()
    return jax.block_until_ready(state)
