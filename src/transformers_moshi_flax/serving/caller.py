"""One caller's dialogue: what comes from the websocket, what goes to it, and why it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from .dialect import FAILED, LEFT, LOST, SLOW, Answer, Audio, Dialect, Ending, Message, Order
from .engine import Engine, Said, Seat
from .logs import LOGGER
from .metrics import Metrics
from .protocol import ProtocolError
from .recording import Recording

SEND_BUFFER = 65_536
"""Bytes that the system keeps for a caller who does not read: about as much again as the queue of frames."""

CLOSING_SECONDS = 2.0
"""How long a caller may take to notice that the dialogue has ended."""

LEAST_COST = 0.005
"""Seconds of sound that a message counts as at least: the shortest that browsers send."""

COST_OF_BYTE = 1 / 64_000
"""Seconds of sound that a message counts as at least for each of its bytes: as samples of 16 bits in base64."""

FULL = 0.5
"""Seconds of sound that a message that is no audio counts as for each of its kilobytes."""


@dataclass(frozen=True)
class Limits:
    """What a caller may use.

    Attributes:
        max_seconds: of a dialogue.
        idle_seconds: without audio.
        message_bytes: of one message.
        burst_seconds: of audio at once; beyond, a caller may send twice as fast as one speaks.
        unread_frames: that wait for a caller who does not read.
        heartbeat_seconds: between pings; a caller who does not answer is gone.
    """

    max_seconds: float = 3600.0
    idle_seconds: float = 30.0
    message_bytes: int = 262_144
    burst_seconds: float = 30.0
    unread_frames: int = 50
    heartbeat_seconds: float = 10.0


class Allowance:
    """How much a caller may send: ``burst`` seconds of sound at once, and two a second.

    Args:
        burst: seconds.
        clock: of seconds.
    """

    def __init__(self, burst: float, clock: Callable[[], float] = time.monotonic):
        self._burst, self._clock = burst, clock
        self._left, self._then = burst, clock()

    def spend(self, seconds: float) -> None:
        """Count what was sent.

        Raises:
            ProtocolError: it is too much.
        """
        now = self._clock()
        self._left = min(self._burst, self._left + 2 * (now - self._then)) - seconds
        self._then = now
        if self._left < 0:
            raise ProtocolError("too much at once; send audio as fast as one speaks", WSCloseCode.POLICY_VIOLATION)


class Caller:
    """A caller whose websocket is open.

    Args:
        websocket: which.
        request: that it came by.
        dialect: that is spoken on it.
        engine: that steps the dialogue.
        seat: in the engine.
        max_steps: frames after which the dialogue ends, if at all.
        limits: of every caller.
        metrics: what is counted.

    Attributes:
        frames: of Moshi that were sent.
        recording: of the dialogue, if there is to be one.
    """

    def __init__(
        self,
        websocket: web.WebSocketResponse,
        request: web.BaseRequest,
        dialect: Dialect,
        engine: Engine,
        seat: Seat,
        max_steps: int | None,
        limits: Limits,
        metrics: Metrics,
    ):
        self._websocket, self._request, self._dialect = websocket, request, dialect
        self._engine, self._seat, self._max_steps = engine, seat, max_steps
        self._limits, self._metrics = limits, metrics
        self._rate = engine.stream.sampling_rate
        self._said: asyncio.Queue[Said] = asyncio.Queue(limits.unread_frames)
        self._ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._moved, self._greeted, self._sending = asyncio.Event(), asyncio.Event(), asyncio.Lock()
        self._waited = engine.position(seat) > 0 or (seat.prompt is not None and not seat.prompt.done())
        self._paused = False
        self._heard_at = 0.0
        self.frames = 0
        self.recording: Recording | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the dialogue has no slot yet."""
        return self._engine.position(self._seat) > 0

    def hear(self, said: Said) -> None:
        """Take a frame of Moshi's; never waits. A caller who does not keep up is dropped."""
        if self.recording is not None:
            self.recording.put(said)
        try:
            self._said.put_nowait(said)
        except asyncio.QueueFull:
            self.end(SLOW)

    def move_up(self) -> None:
        """The queue has moved."""
        self._moved.set()

    def end(self, ending: Ending) -> None:
        """End the dialogue; the first reason counts."""
        if not self._ended.done():
            self._ended.set_result(ending)

    async def converse(self, begin: Callable[[], dict[str, Any]]) -> Ending:
        """Wait for the dialogue to begin, and hold it until it ends.

        Args:
            begin: called when it begins; gives what the caller is told of it.
        """
        works = (self._listen, partial(self._speak, begin), self._watch_the_time)
        tasks = [asyncio.create_task(self._until_it_ends(work)) for work in works]
        try:
            return await self._ended
        finally:
            for task in tasks:
                task.cancel()

    async def say_goodbye(self, ending: Ending) -> None:
        """Tell the caller why, and close the websocket. Who does not read is not waited for."""
        if ending.reason == "slow":
            if self._request.transport is not None:
                self._request.transport.abort()
            return
        try:
            async with asyncio.timeout(2 * CLOSING_SECONDS):
                if not self._websocket.closed:
                    await self._send(self._dialect.end(ending))
                await self._websocket.close(code=ending.code, message=(ending.words or "").encode()[:120])
        except (ConnectionError, TimeoutError):
            if self._request.transport is not None:
                self._request.transport.abort()

    async def _until_it_ends(self, work: Callable[[], Awaitable[Ending]]) -> None:
        try:
            self.end(await work())
        except ConnectionError:
            self.end(LOST)
        except ProtocolError as error:
            self.end(Ending("malformed", str(error), error.code))
        except Exception:
            LOGGER.exception("a dialogue has failed")
            self.end(FAILED)

    async def _send(self, messages: Iterable[Message]) -> None:
        """Send all of them, one after the other, whoever is cancelled meanwhile.

        aiohttp lets all who send wait for the same future: the goodbye would be cancelled with whoever waits as well.
        """
        await asyncio.shield(self._send_in_order(messages))

    async def _send_in_order(self, messages: Iterable[Message]) -> None:
        async with self._sending:
            for message in messages:
                if isinstance(message, bytes):
                    await self._websocket.send_bytes(message)
                else:
                    await self._websocket.send_str(message)

    async def _watch_the_time(self) -> Ending:
        """Until the dialogue has lasted for as long as it may, or there was no audio for too long."""
        await self._greeted.wait()
        self._heard_at = begin = time.monotonic()
        end = begin + self._limits.max_seconds
        while True:
            quiet_until = self._heard_at + self._limits.idle_seconds
            now = time.monotonic()
            if now >= end:
                words = f"a dialogue lasts {self._limits.max_seconds:g} s at most"
                return Ending("length", words, WSCloseCode.GOING_AWAY)
            if now >= quiet_until:
                words = f"there was no audio for {self._limits.idle_seconds:g} s"
                return Ending("idle", words, WSCloseCode.GOING_AWAY)
            await asyncio.sleep(min(end, quiet_until) - now)

    async def _listen(self) -> Ending:
        """Take what comes from the websocket."""
        if not self._waited:
            # it begins at once: what has come until then is heard
            await self._greeted.wait()
        allowance = Allowance(self._limits.burst_seconds)
        while True:
            received = await self._websocket.receive()
            if received.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
                if self._websocket.close_code == WSCloseCode.ABNORMAL_CLOSURE:
                    return LOST
                return Ending("malformed") if received.type == WSMsgType.ERROR else LEFT
            if received.type != self._dialect.message_type:
                words = f"messages are {self._dialect.message_type.name.lower()}"
                raise ProtocolError(words, WSCloseCode.UNSUPPORTED_DATA)
            paid = max(LEAST_COST, COST_OF_BYTE * len(received.data))
            allowance.spend(paid)
            meant = self._dialect.read(received.data)
            if isinstance(meant, Audio):
                await self._hear_caller(meant, allowance, paid)
            else:
                await self._obey(meant)
                await self._send(meant.messages)
                # afterwards: whoever has sent too much learns what was wrong with it
                allowance.spend(FULL * len(received.data) / 1024)
            # the next message may be there already: others come first
            await asyncio.sleep(0)

    async def _hear_caller(self, audio: Audio, allowance: Allowance, paid: float) -> None:
        """Let the engine hear it. In the queue it is read alone, as later audio may depend on it.

        ``paid`` seconds of its sound have been spent already.
        """
        for samples in audio.pieces:
            seconds = len(samples) / self._rate
            allowance.spend(max(0.0, seconds - paid))
            paid = max(0.0, paid - seconds)
            if self._greeted.is_set() and not self._paused:
                dropped = self._engine.feed(self._seat, samples)
                self._metrics.dropped.inc(dropped / self._rate)
            await asyncio.sleep(0)
        self._heard_at = time.monotonic()

    async def _obey(self, meant: Answer) -> None:
        order = meant.order
        if order is None:
            return
        if order == Order.FORGET:
            if self._greeted.is_set():  # before, there is nothing to be forgotten
                self._engine.forget(self._seat)
        elif not self._greeted.is_set():
            await self._send(self._dialect.object("the dialogue has not begun yet"))
        elif order == Order.RESTART:
            await asyncio.wrap_future(self._engine.restart(self._seat, meant.prompt))
        else:
            self._paused = order == Order.PAUSE
            self._engine.pause(self._seat, self._paused)

    async def _speak(self, begin: Callable[[], dict[str, Any]]) -> Ending:
        """Send what there is to say: where in the queue the caller is, and then what Moshi says."""
        await self._wait()
        await self._send(self._dialect.greet(begin()))
        self._greeted.set()
        while True:
            await self._send(self._dialect.say(await self._said.get()))
            self.frames += 1
            if self.frames == self._max_steps:
                return Ending("length", f"max_steps={self.frames} has been reached")

    async def _wait(self) -> None:
        """Until the dialogue begins."""
        told = 0
        while position := self._engine.position(self._seat):
            if position != told:
                await self._send(self._dialect.queued(position))
                told = position
            await self._moved.wait()
            self._moved.clear()
        await asyncio.wrap_future(self._seat.begun)
