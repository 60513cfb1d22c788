"""A server of fake dialogues on loopback, in the loop of the test, and what clients do with it."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import numpy as np
from aiohttp import web

from tests.serving.fake_stream import FRAME, FakeStream
from transformers_moshi_flax.cli.transcript import timed_words
from transformers_moshi_flax.serving.caller import Limits
from transformers_moshi_flax.serving.engine import Engine
from transformers_moshi_flax.serving.gate import Gate
from transformers_moshi_flax.serving.metrics import Metrics
from transformers_moshi_flax.serving.personas import Personas
from transformers_moshi_flax.serving.protocol import Kind
from transformers_moshi_flax.serving.recording import Recorder
from transformers_moshi_flax.serving.server import Server

Result = TypeVar("Result")
SEEDS = "audio_seed=1&text_seed=2"
KEY = (1, 2)


class Tokenizer:
    """Names its tokens by their numbers, but for three that are bytes of a character."""

    all_special_ids = (1, 2)
    pieces = {4: "<0xE2>", 5: "<0x82>", 6: "<0xAC>"}

    def __len__(self) -> int:
        return 300

    def convert_ids_to_tokens(self, number: int) -> str:
        return self.pieces.get(number, f"▁{number}")

    def decode(self, numbers: list[int]) -> str:
        pieces = [self.convert_ids_to_tokens(number) for number in numbers]
        data = b"".join(
            bytes([int(p[3:5], 16)]) if p.startswith("<0x") else p.replace("▁", " ").encode() for p in pieces
        )
        return data.decode("utf-8", "replace").strip()


@dataclass
class House:
    """A server that runs.

    Attributes:
        server: it.
        url: where, without a slash at the end.
        session: to ask it.
    """

    server: Server
    url: str
    session: aiohttp.ClientSession

    def call(self, query: str = "format=pcm16&" + SEEDS, **options: Any) -> Any:
        """A websocket, for ``async with``."""
        return self.session.ws_connect(f"{self.url}/api/chat?{query}", **options)

    async def text(self, path: str, **options: Any) -> tuple[int, str]:
        """Status and text of an answer."""
        async with self.session.get(self.url + path, **options) as answer:
            return answer.status, await answer.text()

    def figure(self, name: str, **labels: str) -> float:
        """Of the metrics; 0 for what has not been counted yet."""
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it; fails after a while."""
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(
    slots: int = 2,
    gate: Gate | None = None,
    buffer_frames: int = 25,
    queue: int = 0,
    engine: Engine | None = None,
    tokenizer: Any = None,
    record: Path | None = None,
    per_address: int | None = None,
    personas: Callable[[Engine], Personas] | None = None,
    **limits: Any,
) -> AsyncIterator[House]:
    """A house whose dialogues are fake, unless there is an ``engine``, warmed up."""
    metrics = Metrics()
    if engine is None:
        engine = Engine(FakeStream(slots), metrics, realtime=False, buffer_frames=buffer_frames, queue=queue)
        engine.warmup()
    about = {"model": "fake", "notice": None}
    tokenizer = tokenizer or Tokenizer()
    words = functools.partial(timed_words, tokenizer=tokenizer, frame_rate=12.5)
    recorder = None if record is None else Recorder(record, words, metrics)
    made = None if personas is None else personas(engine)
    server = Server(engine, tokenizer, metrics, about, gate, Limits(**limits), recorder, per_address, made)
    runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        async with aiohttp.ClientSession() as session:
            yield House(server, f"http://{host}:{port}", session)
    finally:
        await runner.cleanup()


def in_a_loop(test: Callable[..., Coroutine[Any, Any, Result]]) -> Callable[..., Result]:
    """Run a test that is a coroutine; it fails if it takes too long."""

    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> Result:
        return asyncio.run(asyncio.wait_for(test(*args, **options), 120))

    return run


@dataclass
class Reply:
    """What has come from a server: by kind, and in which order the kinds came; ``positions`` in the queue."""

    kinds: list[Kind] = field(default_factory=list)
    audio: list[bytes] = field(default_factory=list)
    words: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    positions: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def take(self, data: bytes) -> None:
        """A message."""
        kind, payload = Kind(data[0]), data[1:]
        self.kinds.append(kind)
        if kind == Kind.AUDIO:
            self.audio.append(payload)
        elif kind == Kind.TEXT:
            self.words += payload.decode()
        elif kind == Kind.METADATA:
            fields = json.loads(payload)
            if "queue_position" in fields:
                self.positions.append(fields["queue_position"])
            else:
                self.metadata = fields
        elif kind == Kind.ERROR:
            self.errors.append(payload.decode())

    @property
    def samples(self) -> np.ndarray:
        """Of PCM, by frames."""
        return np.frombuffer(b"".join(self.audio), "<i2").reshape(-1, FRAME)


async def read(socket: aiohttp.ClientWebSocketResponse, frames: int | None = None) -> Reply:
    """All that comes until the server closes, or until there are ``frames`` of audio."""
    reply = Reply()
    while frames is None or len(reply.audio) < frames:
        received = await socket.receive(30)
        if received.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING):
            break
        assert received.type == aiohttp.WSMsgType.BINARY, received
        reply.take(received.data)
    return reply


def speech(frames: int, seed: int = 0) -> np.ndarray:
    """Noise that 16 bits have exactly, ``(frames, FRAME)`` int16."""
    return np.random.default_rng(seed).integers(-9000, 9000, (frames, FRAME)).astype("<i2")


def as_audio(samples: np.ndarray) -> bytes:
    """The message with these samples."""
    return bytes([Kind.AUDIO]) + samples.tobytes()
