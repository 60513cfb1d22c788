"""One caller's dialogue: what comes from the websocket, what goes to it, and why it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import WSCloseCode, WSMsgType, web

from . import protocol
from .codecs import CODECS
from .engine import Engine, Said, Seat
from .logs import LOGGER
from .metrics import Metrics
from .protocol import Control, Kind, ProtocolError
from .wishes import Wishes
from .words import Words

SEND_BUFFER = 65_536
"""Bytes that the system keeps for a caller who does not read: about as much again as the queue of frames."""

CLOSING_SECONDS = 2.0
"""How long a caller may take to notice that the dialogue has ended."""

LEAST_COST = 0.005
"""Seconds of sound that a message counts as at least: the shortest that browsers send."""

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


@dataclass(frozen=True)
class Ending:
    """Why a dialogue ends.

    Attributes:
        reason: a word for logs and metrics.
        words: for the caller, unless there is nobody to tell.
        code: by which the websocket is closed.
    """

    reason: str
    words: str | None = None
    code: int = WSCloseCode.OK


LEFT = Ending("left")
LOST = Ending("lost")
SLOW = Ending("slow")
FAILED = Ending("failed", "the server has failed; nothing is wrong with what you have sent", 1011)
SHUTDOWN = Ending("shutdown", "the server is shutting down", WSCloseCode.GOING_AWAY)


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
        engine: that steps the dialogue.
        seat: in the engine.
        wishes: what was asked for.
        words: turns ids into text.
        limits: of every caller.
        metrics: what is counted.

    Attributes:
        frames: of Moshi that were sent.
    """

    def __init__(
        self,
        websocket: web.WebSocketResponse,
        request: web.BaseRequest,
        engine: Engine,
        seat: Seat,
        wishes: Wishes,
        words: Words,
        limits: Limits,
        metrics: Metrics,
    ):
        self._websocket, self._request = websocket, request
        self._engine, self._seat, self._wishes = engine, seat, wishes
        self._words, self._limits, self._metrics = words, limits, metrics
        self._rate = engine.stream.sampling_rate
        self._codec = CODECS[wishes.format](self._rate)
        self._said: asyncio.Queue[Said] = asyncio.Queue(limits.unread_frames)
        self._ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._paused = False
        self.frames = 0

    def hear(self, said: Said) -> None:
        """Take a frame of Moshi's; never waits. A caller who does not keep up is dropped."""
        try:
            self._said.put_nowait(said)
        except asyncio.QueueFull:
            self.end(SLOW)

    def end(self, ending: Ending) -> None:
        """End the dialogue; the first reason counts."""
        if not self._ended.done():
            self._ended.set_result(ending)

    async def converse(self, greeting: dict[str, Any]) -> Ending:
        """Hold the dialogue until it ends.

        Args:
            greeting: the metadata that follow the handshake.
        """
        timer = asyncio.get_running_loop().call_later(
            self._limits.max_seconds,
            self.end,
            Ending("length", f"a dialogue lasts {self._limits.max_seconds:g} s at most", WSCloseCode.GOING_AWAY),
        )
        tasks: list[asyncio.Task[None]] = []
        try:
            await asyncio.wait([asyncio.wrap_future(self._seat.begun), self._ended], return_when="FIRST_COMPLETED")
            for part in (protocol.HANDSHAKE, protocol.metadata(greeting)):
                await self._websocket.send_bytes(part)
            tasks += [asyncio.create_task(self._until_it_ends(work)) for work in (self._listen, self._speak)]
            return await self._ended
        except ConnectionError:
            return LOST
        finally:
            timer.cancel()
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
                if ending.words is not None and not self._websocket.closed:
                    await self._websocket.send_bytes(protocol.error(ending.words))
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

    async def _listen(self) -> Ending:
        """Take what comes from the websocket."""
        allowance = Allowance(self._limits.burst_seconds)
        quiet_until = time.monotonic() + self._limits.idle_seconds
        while True:
            try:
                received = await self._websocket.receive(max(0.001, quiet_until - time.monotonic()))
            except TimeoutError:
                seconds = f"{self._limits.idle_seconds:g}"
                return Ending("idle", f"there was no audio for {seconds} s", WSCloseCode.GOING_AWAY)
            if received.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
                if self._websocket.close_code == WSCloseCode.ABNORMAL_CLOSURE:
                    return LOST
                return Ending("malformed") if received.type == WSMsgType.ERROR else LEFT
            if received.type != WSMsgType.BINARY:
                raise ProtocolError("messages are binary, the first byte is the kind", WSCloseCode.UNSUPPORTED_DATA)
            kind, payload = received.data[:1], received.data[1:]
            if kind == bytes([Kind.AUDIO]):
                allowance.spend(LEAST_COST)
                await self._hear_caller(payload, allowance)
                quiet_until = time.monotonic() + self._limits.idle_seconds
            else:
                allowance.spend(LEAST_COST + FULL * len(payload) / 1024)
                await self._answer(kind, payload)
            # the next message may be there already: others come first
            await asyncio.sleep(0)

    async def _hear_caller(self, payload: bytes, allowance: Allowance) -> None:
        for samples in self._codec.decode(payload):
            allowance.spend(max(0.0, len(samples) / self._rate - LEAST_COST))
            if not self._paused:
                dropped = self._engine.feed(self._seat, samples)
                self._metrics.dropped.inc(dropped / self._rate)
            await asyncio.sleep(0)

    async def _answer(self, kind: bytes, payload: bytes) -> None:
        """What is no audio."""
        if kind == bytes([Kind.PING]):
            await self._websocket.send_bytes(protocol.message(Kind.PING))
        elif kind == bytes([Kind.CONTROL]):
            await self._control(payload)
        elif kind and kind != bytes([Kind.HANDSHAKE]):
            await self._websocket.send_bytes(
                protocol.error(f"a message of kind {kind[0]} means nothing from a client; it was not heard")
            )

    async def _control(self, payload: bytes) -> None:
        if payload in (bytes([Control.START]), bytes([Control.PAUSE])):
            self._paused = payload[0] == Control.PAUSE
            self._engine.pause(self._seat, self._paused)
        elif payload == bytes([Control.RESTART]):
            self._engine.restart(self._seat)
        else:
            await self._websocket.send_bytes(
                protocol.error("control messages are start (0), pause (2) and restart (3); nobody takes turns")
            )

    async def _speak(self) -> Ending:
        """Send what Moshi says."""
        while True:
            said = await self._said.get()
            sound = self._codec.encode(said.audio)
            if sound:
                await self._websocket.send_bytes(protocol.message(Kind.AUDIO, sound))
            words = self._words.put(said.text_id)
            if words:
                await self._websocket.send_bytes(protocol.text(words))
            self.frames += 1
            if self.frames == self._wishes.max_steps:
                return Ending("length", f"max_steps={self.frames} has been reached")
