"""PCM of any length in, frames out, and back: what stands between a sound card or a socket and a stream.

Nothing here waits for input. The stream has its own clock, a frame every 80 ms: what has not come by then is silence,
and counted. Only NumPy; JAX's work is the stream's.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, Int16

from ...input_checks import Input, check_input, is_whole

PCM = Input(
    {"samples": None},
    "audio",
    may_be_empty=True,
    hint="mono, as (samples,) or (1, samples), floats or int16; mix channels down",
)
"""What is fed, once integers have become floats."""

INT16_SCALE = 32768
"""What 16-bit samples are divided by; the way back is exact."""


class _Locked:
    """What has a lock of its own, which is not copied and pickled with it: nobody may use it meanwhile."""

    _lock: threading.Lock

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())


class PcmBuffer(_Locked):
    """Holds each slot's samples until a whole frame of the batch is taken.

    A slot that has less than a frame gives what it has, and then silence: its speech goes on in the next frame, later
    by as much. A slot that has more than ``buffer_frames`` loses its *oldest* samples: the answer is to be about what
    is said now, and the lag never grows beyond the buffer. Both are counted. Any thread may feed while another takes.

    Args:
        batch_size: slots.
        frame_size: samples a frame.
        buffer_frames: the most that a slot holds, in frames (25 are 2 s). Give the whole length to feed a recording
            at once.

    Raises:
        ValueError: a size is not a positive integer.
    """

    def __init__(self, batch_size: int, frame_size: int, buffer_frames: int = 25):
        sizes = {"batch_size": batch_size, "frame_size": frame_size, "buffer_frames": buffer_frames}
        for name, size in sizes.items():
            if not is_whole(size) or size < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {size}")
        self.batch_size, self.frame_size = batch_size, frame_size
        # a ring for each slot; the counts of samples written and read only grow
        self._rings = np.zeros((batch_size, buffer_frames * frame_size), np.float32)
        self._written = [0] * batch_size
        self._read = [0] * batch_size
        self._missing = [0] * batch_size
        self._dropped = [0] * batch_size
        self._lock = threading.Lock()

    def feed(self, pcm: ArrayLike, slot: int = 0) -> int:
        """Append ``pcm`` to what a slot's user says.

        Args:
            pcm: any number of mono samples at the stream's rate, ``(samples,)`` or ``(1, samples)``; floats in
                [-1, 1] or int16.
            slot: whose.

        Returns:
            How many of the slot's oldest samples were dropped to make room.

        Raises:
            ValueError: another shape or dtype, NaN or infinite samples, no such slot. Then nothing is appended.
        """
        self.check_slot(slot)
        samples = _samples(pcm)
        capacity = self._rings.shape[1]
        newest = samples[-capacity:]
        with self._lock:
            end = self._written[slot] + len(samples)
            start = (end - len(newest)) % capacity
            np.put(self._rings[slot], np.arange(start, start + len(newest)), newest, mode="wrap")
            dropped = max(0, end - capacity - self._read[slot])
            self._written[slot] = end
            self._read[slot] += dropped
            self._dropped[slot] += dropped
        return dropped

    def take(self, active: Bool[np.ndarray, "batch"] | None = None) -> Float[np.ndarray, "batch 1 frame_size"]:
        """The next frame of every slot, float32.

        Args:
            active: slots whose time goes on; the others keep what they hold, miss nothing and give silence. None is
                all.

        Raises:
            ValueError: ``active`` has another shape.
        """
        if active is not None and np.shape(active) != (self.batch_size,):
            raise ValueError(f"`active` must have the shape ({self.batch_size},), but has {np.shape(active)}")
        frames = np.zeros((self.batch_size, 1, self.frame_size), np.float32)
        slots = range(self.batch_size) if active is None else np.flatnonzero(active)
        capacity = self._rings.shape[1]
        with self._lock:
            for slot in slots:
                there = min(self.frame_size, self._written[slot] - self._read[slot])
                start = self._read[slot] % capacity
                frames[slot, 0, :there] = self._rings[slot].take(np.arange(start, start + there), mode="wrap")
                self._read[slot] += there
                self._missing[slot] += self.frame_size - there
        return frames

    def clear(self, slot: int) -> None:
        """Forget what a slot holds, and its counts.

        Raises:
            ValueError: no such slot.
        """
        self.check_slot(slot)
        with self._lock:
            self._read[slot] = self._written[slot]
            self._missing[slot] = self._dropped[slot] = 0

    @property
    def missing_samples(self) -> Int[np.ndarray, "batch"]:
        """How many samples of silence stood in for late or missing ones, in each slot."""
        with self._lock:
            return np.array(self._missing, np.int64)

    @property
    def dropped_samples(self) -> Int[np.ndarray, "batch"]:
        """How many samples were dropped because the buffer was full, in each slot."""
        with self._lock:
            return np.array(self._dropped, np.int64)

    @property
    def buffered_samples(self) -> Int[np.ndarray, "batch"]:
        """How many samples wait to be heard in each slot: the lag that buffering adds."""
        with self._lock:
            return np.array(self._written, np.int64) - np.array(self._read, np.int64)

    def check_slot(self, slot: int) -> None:
        """Raises ``ValueError`` if there is no such slot."""
        if not is_whole(slot) or not 0 <= slot < self.batch_size:
            raise ValueError(f"`slot`={slot} is out of range: give one of the {self.batch_size} slots, from 0 on")


@dataclass(frozen=True)
class PcmFrame:
    """What Moshi says in one frame.

    Attributes:
        audio: by slot, for those that have a valid frame, ``(frame_size,)`` of the dialogue's ``output_dtype``.
        text_ids: by slot, as ``audio``.
        user_audio: what the slot's user is heard saying in it, by slot, as ``audio``, float32.
    """

    audio: dict[int, Float[np.ndarray, "frame_size"] | Int16[np.ndarray, "frame_size"]]
    text_ids: dict[int, int]
    user_audio: dict[int, Float[np.ndarray, "frame_size"]]


class PcmDialogue(_Locked):
    """A stream that is fed and read in PCM, its slots joined and left one by one.

    :meth:`feed` may be called from any thread, an audio callback for one, and never waits for a step. The other
    methods wait for one another.

    Args:
        stream: a ``FlaxMoshiStream``, of ``model.streaming(...)``.
        prng_key: for ``stream.init``.
        active: whether every slot is a dialogue from the start, or an array of bools, ``(batch,)``, which of them
            are; the others begin with :meth:`join`.
        output_dtype: of Moshi's samples, ``numpy.float32``, or ``numpy.int16``: rounded, and clipped beyond [-1, 1].
        buffer_frames: as in :class:`PcmBuffer`.

    Attributes:
        stream: the stream.
        state: its state; what waits in the buffer is not in it. Every step replaces it, and what the stream makes of
            it is to be put back: ``dialogue.state = stream.configure(dialogue.state, ...)``, while nobody steps.
        input: the :class:`PcmBuffer`, which has the counts of missing and dropped samples.

    Raises:
        ValueError: ``output_dtype`` is another one, ``active`` is neither a bool nor one for every slot, or the stream
            returns no waveforms, or not of one channel.
    """

    def __init__(
        self,
        stream: Any,
        prng_key: Any = None,
        active: ArrayLike = True,
        output_dtype: Any = np.float32,
        buffer_frames: int = 25,
    ):
        if not stream.return_audio_waveforms or stream.channels != 1:
            raise ValueError(
                "`stream` must return mono waveforms: make it with `return_audio_waveforms=True`, of a codec with one "
                "channel."
            )
        self._output_dtype = _checked_output_dtype(output_dtype)
        self._active = _checked_active(active, stream.batch_size)
        self.input = PcmBuffer(stream.batch_size, stream.frame_size, buffer_frames)
        self.stream = stream
        self.state = stream.init(prng_key=prng_key)
        self._lock = threading.Lock()

    @property
    def active(self) -> Bool[np.ndarray, "batch"]:
        """Which slots are dialogues now; a copy."""
        return self._active.copy()

    def feed(self, pcm: ArrayLike, slot: int = 0) -> int:
        """As :meth:`PcmBuffer.feed`. Before the slot is joined it is of no use: :meth:`join` begins with nothing."""
        return self.input.feed(pcm, slot)

    def step(self, slots: Bool[np.ndarray, "batch"] | None = None) -> PcmFrame:
        """Take one frame of every active slot's input, as far as it has come, and give Moshi's frame of the same time.

        Returns once Moshi's samples are on the host.

        Args:
            slots: of the active slots, those that take part; for the others time stands still, and they keep what they
                hold. None is all.

        Raises:
            ValueError: ``slots`` has another shape.
        """
        if slots is not None and np.shape(slots) != (self.stream.batch_size,):
            raise ValueError(f"`slots` must have the shape ({self.stream.batch_size},), but has {np.shape(slots)}")
        with self._lock:
            active = self.active if slots is None else self._active & slots
            audio = self.input.take(active)
            self.state, frame = self.stream.step(self.state, user_audio=audio, active=active)
        samples, text_ids = np.asarray(frame.audio), np.asarray(frame.text_ids)
        said = np.flatnonzero(np.asarray(frame.valid) & active).tolist()
        return PcmFrame(
            audio={slot: from_float(samples[slot, 0], self._output_dtype) for slot in said},
            text_ids={slot: int(text_ids[slot]) for slot in said},
            user_audio={slot: audio[slot, 0] for slot in said},
        )

    def reset(self, slot: int, prng_key: Any = None, prompt: Any = None) -> None:
        """Begin a slot's dialogue anew; what its user was to be heard saying is forgotten, and so are its counts.

        Args:
            slot: which.
            prng_key, prompt: for ``stream.reset``.

        Raises:
            ValueError: no such slot.
        """
        self.input.check_slot(slot)
        with self._lock:
            self._begin(slot, prng_key, prompt)

    def join(self, slot: int, prng_key: Any = None, prompt: Any = None) -> None:
        """:meth:`reset` a slot and let its time run.

        Raises:
            ValueError: no such slot, or it has been joined already.
        """
        self.input.check_slot(slot)
        with self._lock:
            if self._active[slot]:
                raise ValueError(f"`slot`={slot} is in a dialogue: `leave` it first, or `reset` it")
            self._begin(slot, prng_key, prompt)
            self._active[slot] = True

    def leave(self, slot: int) -> None:
        """Stop a slot's time; its counts stay until the next :meth:`join`.

        Raises:
            ValueError: no such slot, or it has not been joined.
        """
        self.input.check_slot(slot)
        with self._lock:
            if not self._active[slot]:
                raise ValueError(f"`slot`={slot} is in no dialogue: `join` it first")
            self._active[slot] = False

    def _begin(self, slot: int, prng_key: Any, prompt: Any) -> None:
        rows = np.arange(self.stream.batch_size) == slot
        self.state = self.stream.reset(self.state, rows, prng_key=prng_key, prompt=prompt)
        self.input.clear(slot)


def from_float(samples: Float[np.ndarray, "*shape"], dtype: Any) -> np.ndarray:
    """``samples`` as float32, or as int16: rounded to the nearest, clipped beyond [-1, 1]."""
    if dtype != np.int16:
        return samples.astype(np.float32)
    return np.clip(np.rint(samples * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1).astype(np.int16)


def _checked_output_dtype(dtype: Any) -> np.dtype:
    for allowed in (np.float32, np.int16):
        with contextlib.suppress(TypeError):  # NumPy knows no such type
            if np.dtype(dtype) == allowed:
                return np.dtype(allowed)
    raise ValueError(f"`output_dtype` must be numpy.float32 or numpy.int16, got {dtype!r}")


def _checked_active(active: Any, batch_size: int) -> Bool[np.ndarray, "batch"]:
    """One for every slot; a copy."""
    slots = np.asarray(active)
    if slots.dtype != np.bool_ or slots.shape not in ((), (batch_size,)):
        raise ValueError(
            f"`active` must be True, False or an array of {batch_size} bools, one for every slot, got {active!r}"
        )
    return np.full(batch_size, slots)


def _samples(pcm: ArrayLike) -> Float[np.ndarray, "samples"]:
    """Checked, as float32."""
    samples = np.asarray(pcm)
    if samples.ndim == 2 and samples.shape[0] == 1:
        samples = samples[0]
    if np.issubdtype(samples.dtype, np.int16):  # in either byte order
        samples = samples.astype(np.float32) / INT16_SCALE
    check_input("pcm", samples, PCM)
    return samples.astype(np.float32)
