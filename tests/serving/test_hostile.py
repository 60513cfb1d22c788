"""Bad clients of every kind beside a good one, whose audio does not change by a bit."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable

import aiohttp
import numpy as np
import pytest
import sphn

from tests.serving.house import House, Reply, as_audio, in_a_loop, read, serving, speech
from tests.serving.test_server import alone
from transformers_moshi_flax.serving.protocol import Kind


def opus(frames: int) -> bytes:
    writer = sphn.OpusStreamWriter(24_000)
    return b"".join(writer.append_pcm(frame.astype(np.float32) / 32768) for frame in speech(frames, 4))


async def sent(house: House, *messages: bytes, query: str = "") -> tuple[Reply, int]:
    """What a caller gets who sends these, and the code by which the server closes."""
    async with house.call(query) as caller:
        for data in messages:
            await caller.send_bytes(data)
        return await read(caller), caller.close_code


async def garbage(house: House) -> str:
    reply, code = await sent(house, bytes([Kind.AUDIO]) + os.urandom(3000))
    assert code == 1007
    return reply.errors[0]


async def truncated(house: House) -> str:
    """A page lacks its end, as in what a client makes that has no segments above 255 bytes."""
    data = opus(3)
    cut = data.index(b"OggS", 100) + 60
    reply, code = await sent(house, bytes([Kind.AUDIO]) + data[:cut], bytes([Kind.AUDIO]) + data[cut + 200 :])
    assert code == 1007
    return reply.errors[0]


async def no_opus(house: House) -> str:
    """Whole pages whose packets are none."""
    body = bytes(range(200, 250)) * 4
    page = b"OggS\0\0" + bytes(20) + bytes([1, 200]) + body
    reply, code = await sent(house, *[bytes([Kind.AUDIO]) + page] * 50, bytes([Kind.AUDIO]) + b"no page")
    assert code in (1007, 1008)
    return reply.errors[0]


async def bomb(house: House) -> str:
    """A page of many short packets, each of which is 60 ms of silence when it is decoded."""
    page = b"OggS\0\0" + bytes(20) + bytes([255]) + bytes([1] * 255) + bytes([0x18] * 255)
    reply, code = await sent(house, bytes([Kind.AUDIO]) + page)
    assert code == 1007
    return reply.errors[0]


async def words(house: House) -> str:
    async with house.call("format=pcm16") as caller:
        await caller.send_str("hello")
        reply = await read(caller)
        assert caller.close_code == 1003
        return reply.errors[0]


async def giant(house: House) -> str:
    async with house.call("format=pcm16") as caller:
        await caller.send_bytes(bytes(2_000_000))
        await read(caller)
        assert caller.close_code == 1009
    return "1009"


async def flood(house: House) -> str:
    """An hour of audio at once."""
    async with house.call("format=pcm16") as caller:
        message = as_audio(speech(50, 2))
        try:
            for _ in range(1000):
                await caller.send_bytes(message)
        except ConnectionError:
            pass
        reply = Reply()
        while not caller.closed:
            received = await caller.receive(30)
            if received.type == aiohttp.WSMsgType.BINARY:
                reply.take(received.data)
    return (reply.errors or ["too much at once"])[0]


async def pings(house: House) -> str:
    reply, code = await sent(house, *[bytes([Kind.PING]) + bytes(60_000)] * 5, query="format=pcm16")
    assert code == 1008
    return reply.errors[0]


async def reset(house: House) -> str:
    """The line is cut in the middle of a frame."""
    host, port = house.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    _, writer = await asyncio.open_connection(sock=connection)
    writer.write(
        f"GET /api/chat HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    )
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.write(bytes([0x82, 0x80 | 100]))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
    await house.until(lambda: house.figure("moshi_dialogues_ended_total", reason="lost") > 0)
    return "lost"


async def malformed(house: House) -> str:
    """No websocket at all after the upgrade, and handshakes that are none."""
    host, port = house.url.removeprefix("http://").split(":")
    for lines in ("\0\0\0\r\n\r\n", "GET /api/chat HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n\r\n", "GET"):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(lines.encode())
        await writer.drain()
        writer.close()
    async with house.call("format=pcm16") as caller:
        caller._writer.transport.write(b"\xff" * 100)
        await read(caller)
        assert caller.close_code == 1002
    return "1002"


ACTS: list[tuple[Callable[[House], Awaitable[str]], str]] = [
    (garbage, "no Ogg"),
    (truncated, "no O"),
    (no_opus, "no Og"),
    (bomb, "packets"),
    (words, "binary"),
    (giant, "1009"),
    (flood, "too much"),
    (pings, "too much"),
    (reset, "lost"),
    (malformed, "1002"),
]


@pytest.mark.parametrize("act, told", ACTS, ids=[act.__name__ for act, _ in ACTS])
@in_a_loop
async def test_the_good_caller_hears_what_it_would_alone(act: Callable[[House], Awaitable[str]], told: str):
    said = speech(8)
    async with serving(slots=2) as house, house.call() as good:
        await good.send_bytes(as_audio(said[:2]))
        before = await read(good, 2)
        bad = asyncio.create_task(act(house))
        heard = []
        for frame in said[2:6]:
            await good.send_bytes(as_audio(frame))
            heard.append((await read(good, 1)).samples)
            await asyncio.sleep(0.01)
        assert told in await bad
        await house.until(lambda: house.server.engine.free_slots == 1)
        await good.send_bytes(as_audio(said[6:]))
        after = await read(good, 2)
        everything = np.concatenate([before.samples, *heard, after.samples])
        assert np.array_equal(everything, alone(said))
        assert len(house.server.callers) == 1
