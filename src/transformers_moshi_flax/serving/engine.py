"""One thread that steps all dialogues, on a clock of its own.

Whoever holds a dialogue asks for something and goes on: beginning, pausing and leaving wait in a queue until the
thread comes to it, between two steps. What Moshi says is handed to a function that must not wait.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, UInt32

from ..generation.arrays import on_device
from ..generation.configuration import DEFAULTS
from ..models.moshi.generation_flax_moshi import DEPTH_PREFIX
from ..models.moshi.pcm import PcmDialogue
from ..models.moshi.stream_options import resolve_stream_sampling
from .metrics import Metrics

LARGEST_TOP_K = 250
"""What callers may ask for at least."""

PATIENCE = 2
"""Steps that a dialogue rests for while its caller's audio is late; then its caller is heard to be silent."""


NO_SLOT = -1

NOTHING: Future = Future()
"""The prompt of a dialogue that begins from nothing, after one that did not."""
NOTHING.set_result(None)


@dataclass(eq=False)
class Seat:
    """A caller's place in the stream.

    Attributes:
        slot: of the stream; -1 while it waits for one.
        numbers: of sampling, where they are not the stream's.
        key: of the sampling, two words.
        prompt: what the dialogue begins from, once it is there; None for nothing.
        begun: done once the dialogue has begun; what is fed before is not heard.
    """

    slot: int
    numbers: dict[str, float | int]
    key: UInt32[np.ndarray, "2"]
    prompt: Future | None = None
    begun: Future = field(default_factory=Future)
    # known to the engine's thread alone
    heard: bool = False
    paused: bool = False
    waited: int = 0
    frames: int = 0
    left: bool = False


@dataclass(frozen=True)
class Said:
    """What Moshi says in a frame of one dialogue.

    Attributes:
        seat: of the dialogue.
        audio: samples.
        text_id: of the frame.
        heard: what its caller was heard saying in the frame.
        number: of the frame in the dialogue, from 0.
    """

    seat: Seat
    audio: Float[np.ndarray, "frame_size"]
    text_id: int
    heard: Float[np.ndarray, "frame_size"]
    number: int


class Engine:
    """Steps the dialogues of a stream.

    A dialogue takes part in a step once a frame of its caller has come. If none has, its time stands still for
    ``PATIENCE`` steps, and then silence is heard, until more comes. Before its caller's first frame it does not begin.

    Args:
        stream: a ``FlaxMoshiStream``.
        metrics: what is counted.
        numbers: of sampling, for callers that do not ask for others (default: the stream's).
        realtime: whether there is a step every frame's time. Otherwise there is one whenever a frame is complete, and
            none without.
        buffer_frames: the most that is kept of what a caller has sent; the oldest goes first.
        queue: how many callers may wait for a slot; they get one in the order in which they came.
    """

    def __init__(
        self,
        stream: Any,
        metrics: Metrics,
        numbers: dict[str, float | int] | None = None,
        realtime: bool = True,
        buffer_frames: int = 25,
        queue: int = 0,
    ):
        self.stream = stream
        self.numbers = dict(stream.numbers if numbers is None else numbers)
        self._metrics, self._realtime = metrics, realtime
        self._buffer_frames = buffer_frames
        self._free = set(range(stream.batch_size))
        # whoever waits does so because no slot is free: both change together
        self._waiting: deque[Seat] = deque()
        self.queue = queue
        self._lock = threading.Lock()
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._arrivals: SimpleQueue[Seat] = SimpleQueue()
        self._seats: dict[int, Seat] = {}
        self._something = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="moshi-engine", daemon=True)
        metrics.slots.set(stream.batch_size)

    def warmup(self, prompt_frames: int = 0) -> None:
        """Compile all that dialogues need: afterwards nobody who comes or goes makes anything be compiled.

        Args:
            prompt_frames: of the longest prompt that dialogues are to begin from; 0 for none.
        """
        self.stream.warmup(prompt_frames)
        self._dialogue = PcmDialogue(self.stream, active=False, buffer_frames=self._buffer_frames)
        self._begin(Seat(0, self.numbers, np.zeros(2, np.uint32)))
        self._dialogue.step()
        self._dialogue.leave(0)
        self._seats.clear()

    def start(
        self,
        say: Callable[[list[Said]], object],
        fail: Callable[[BaseException], object],
        move_up: Callable[[], object] = lambda: None,
    ) -> None:
        """Begin to step, after :meth:`warmup`.

        Args:
            say: takes what Moshi says in a step; called in the engine's thread, it must not wait.
            fail: takes what has ended the thread, and all dialogues with it.
            move_up: called in the thread whenever those who wait may have another :meth:`position`.
        """
        self._say, self._fail, self._move_up = say, fail, move_up
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the present step, and wait for that."""
        self._stopped = True
        self._something.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def free_slots(self) -> int:
        """How many more dialogues there may be."""
        return len(self._free)

    @property
    def is_full(self) -> bool:
        """Whether all slots are taken, and all places in the queue."""
        with self._lock:
            return not self._free and len(self._waiting) >= self.queue

    def take_seat(
        self, numbers: dict[str, float | int], key: UInt32[np.ndarray, "2"], prompt: Future | None = None
    ) -> Seat | None:
        """A place for a new dialogue, which begins between the next steps, or in the queue; None if all are taken.

        Args:
            numbers: of sampling, where they are not to be the engine's; as checked by ``stream.check_numbers``.
            key: of the sampling, two words; the dialogue depends on it, and not on the slot.
            prompt: what the dialogue begins from; it waits for it.
        """
        seat = Seat(NO_SLOT, {**self.numbers, **numbers}, key, prompt)
        with self._lock:
            if self._free:
                self._give(seat, min(self._free))
                self._free.remove(seat.slot)
            elif len(self._waiting) < self.queue:
                self._waiting.append(seat)
                self._metrics.waiting.set(len(self._waiting))
            else:
                return None
        return seat

    def position(self, seat: Seat) -> int:
        """Where in the queue a caller is: 1 is next, 0 has a slot."""
        with self._lock:
            return self._waiting.index(seat) + 1 if seat in self._waiting else 0

    def feed(self, seat: Seat, samples: Float[np.ndarray, "samples"]) -> int:
        """Add to what a caller says; how many of the oldest samples were dropped for it."""
        dropped = self._dialogue.feed(samples, seat.slot)
        self._something.set()
        return dropped

    def forget(self, seat: Seat) -> None:
        """Let what a caller has said and was not heard yet not be heard."""
        self._dialogue.input.clear(seat.slot)

    def pause(self, seat: Seat, paused: bool) -> None:
        """Let a dialogue's time stand still, or go on."""
        self._order(lambda: setattr(seat, "paused", paused))

    def restart(self, seat: Seat, prompt: Future | None = None) -> Future:
        """Begin a dialogue anew, with the same key; what is fed before the future is done is not heard.

        Args:
            seat: whose.
            prompt: what it begins from, in place of the prompt so far.
        """
        done: Future = Future()
        if prompt is None:
            self._order(lambda: self._restart(seat, done))
        else:
            prompt.add_done_callback(lambda _: self._order(lambda: self._restart(seat, done, prompt)))
        return done

    def leave(self, seat: Seat) -> None:
        """End a dialogue; its place is free after the present step."""
        self._order(lambda: self._leave(seat))

    # --------------------------------------------------------------------------------------- in the thread

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.put(order)
        self._something.set()

    def _run(self) -> None:
        try:
            self._keep_stepping()
        except BaseException as error:
            self._fail(error)

    def _keep_stepping(self) -> None:
        period = self.stream.frame_size / self.stream.sampling_rate
        due = time.perf_counter()
        while not self._stopped:
            self._something.clear()
            self._obey()
            slots = self._ready()
            if slots.any():
                self._step(slots)
            elif not self._realtime or not self._seats:
                self._something.wait()
                due = time.perf_counter()
                continue
            if self._realtime:
                due += period
                now = time.perf_counter()
                if now > due:
                    if slots.any():
                        self._metrics.late.inc()
                    due = now
                time.sleep(due - now)

    def _obey(self) -> None:
        """What was asked for; of those who have come one alone begins, as the others speak meanwhile."""
        while not self._orders.empty():
            self._orders.get()()
        if not self._arrivals.empty():
            seat = self._arrivals.get()
            # who has left already has no future to wait for
            if seat.begun.set_running_or_notify_cancel():
                failure = None if seat.prompt is None else seat.prompt.exception()
                if failure is not None:
                    seat.prompt = None
                self._begin(seat)
                if failure is None:
                    seat.begun.set_result(None)
                else:
                    seat.begun.set_exception(failure)
            if not self._arrivals.empty():
                self._something.set()

    def _ready(self) -> Bool[np.ndarray, "slots"]:
        """Which dialogues take part in the step."""
        buffered = self._dialogue.input.buffered_samples
        slots = np.zeros(self.stream.batch_size, bool)
        for slot, seat in self._seats.items():
            complete = buffered[slot] >= self.stream.frame_size
            seat.heard |= bool(complete)
            if seat.paused or not seat.heard:
                continue
            seat.waited = 0 if complete else seat.waited + 1
            late = self._realtime and seat.waited > PATIENCE
            if late:
                self._metrics.missing.inc()
            slots[slot] = complete or late
        return slots

    def _step(self, slots: Bool[np.ndarray, "slots"]) -> None:
        with self._metrics.steps.time():
            frame = self._dialogue.step(slots)
        said = []
        for slot, audio in frame.audio.items():
            seat = self._seats[slot]
            said.append(Said(seat, audio, frame.text_ids[slot], frame.user_audio[slot], seat.frames))
            seat.frames += 1
        self._say(said)

    def _begin(self, seat: Seat) -> None:
        rows = np.arange(self.stream.batch_size) == seat.slot
        dialogue = self._dialogue
        dialogue.state = self.stream.configure(dialogue.state, rows, **seat.numbers)
        dialogue.join(seat.slot, self._keys(seat), _result(seat.prompt))
        self._seats[seat.slot] = seat

    def _restart(self, seat: Seat, done: Future, prompt: Future | None = None) -> None:
        if self._seats.get(seat.slot) is seat and done.set_running_or_notify_cancel():
            if prompt is not None and (failure := prompt.exception()) is not None:
                done.set_exception(failure)
                return
            seat.prompt = prompt or seat.prompt
            self._dialogue.reset(seat.slot, self._keys(seat), _result(seat.prompt))
            seat.heard, seat.waited, seat.frames = False, 0, 0
            done.set_result(None)

    def _leave(self, seat: Seat) -> None:
        if seat.left:
            return
        seat.left = True
        # who no longer waits for the beginning may have cancelled it already
        seat.begun.cancel()
        if self._seats.get(seat.slot) is seat:
            del self._seats[seat.slot]
            self._dialogue.leave(seat.slot)
        with self._lock:
            if seat in self._waiting:
                self._waiting.remove(seat)
            elif self._waiting:
                self._give(self._waiting.popleft(), seat.slot)
            else:
                self._free.add(seat.slot)
            self._metrics.waiting.set(len(self._waiting))
        self._move_up()

    def _give(self, seat: Seat, slot: int) -> None:
        seat.slot = slot
        if seat.prompt is None:
            self._arrive(seat)
        else:
            seat.prompt.add_done_callback(lambda _: self._arrive(seat))

    def _arrive(self, seat: Seat) -> None:
        self._arrivals.put(seat)
        self._something.set()

    def _keys(self, seat: Seat) -> UInt32[jax.Array, "slots 2"]:
        """The key for every slot, since one key alone would be folded with the slot's number."""
        return on_device(np.tile(seat.key, (self.stream.batch_size, 1)))


def _result(future: Future | None) -> Any:
    return None if future is None else future.result()


def stream_for_callers(
    model: Any, slots: int, sampling: dict[str, Any], pin_prompt: bool = False
) -> tuple[Any, dict[str, float | int]]:
    """A stream whose callers may choose temperature and top-k of text and audio, and the numbers of those who don't.

    Args:
        model: a ``FlaxMoshiForConditionalGeneration``.
        slots: of the stream.
        sampling: options of ``model.streaming``, of which greedy ones become a ``top_k`` of 1.
        pin_prompt: as of ``model.streaming``.

    Returns:
        The stream, and the numbers for :class:`Engine`.

    Raises:
        ValueError: as ``model.streaming``.
    """
    *samplings, own = resolve_stream_sampling(model.generation_defaults(), None, sampling, model.config)
    sizes = (model.config.vocab_size, model.config.audio_vocab_size)
    numbers = {name: number.item() for name, number in own.items()}
    options = dict(sampling)
    for prefix, chosen, size in zip(("", DEPTH_PREFIX), samplings, sizes):
        greedy = {} if chosen.do_sample else {f"{prefix}temperature": DEFAULTS["temperature"], f"{prefix}top_k": 1}
        # sampling without a top-k takes all
        numbers = {f"{prefix}top_k": size, **numbers, **greedy}
        options |= {
            f"{prefix}do_sample": True,
            f"{prefix}temperature": numbers[f"{prefix}temperature"],
            f"{prefix}top_k": max(LARGEST_TOP_K, numbers[f"{prefix}top_k"]),
        }
    return model.streaming(batch_size=slots, pin_prompt=pin_prompt, **options), numbers
