"""A dialogue with a server, over Kyutai's websocket: what is said goes there, what Moshi says comes back."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import aiohttp
import numpy as np
from jaxtyping import Float

from . import protocol
from .codecs import CODECS
from .protocol import RATE, Kind

QUIET_SECONDS = 20.0
"""How long a server may say nothing at all before it is given up."""


class Listener(Protocol):
    """Is told what comes from the server."""

    def sound(self, samples: Float[np.ndarray, "samples"]) -> None:
        """What Moshi says, at 24 kHz."""

    def words(self, text: str) -> None:
        """The same in words, as it goes on."""

    def queued(self, position: int) -> None:
        """There is no place yet; 1 is next."""

    def begun(self, about: dict[str, Any]) -> None:
        """The dialogue begins; with what, as the server tells it."""


class NoDialogue(ConnectionError):
    """The server cannot be reached, lets nobody in, or has ended the dialogue; the message is for people."""


def chat_address(url: str) -> str:
    """Where the websocket of the server at ``url`` is.

    Raises:
        ValueError: it is no address of a server.
    """
    kind, separator, rest = url.partition("://")
    if not separator:
        kind, rest = "http", url
    schemes = {"http": "http", "https": "https", "ws": "http", "wss": "https"}
    host = rest.partition("/")[0]
    if kind not in schemes or not host:
        raise ValueError(f"{url!r} is no address of a server; give one as http://localhost:8998")
    return f"{schemes[kind]}://{host}/api/chat"


async def talk(
    url: str,
    user: AsyncIterator[Float[np.ndarray, "samples"]],
    listener: Listener,
    format: str = "opus",
    query: Mapping[str, str] | None = None,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
) -> None:
    """Hold a dialogue until the user has no more to say; what Moshi says then is not waited for.

    Args:
        url: of the server, such as ``http://localhost:8998``.
        user: what is said, in pieces of any length in [-1, 1] at 24 kHz, each when it is to be heard.
        listener: is told what comes.
        format: of the audio, of :data:`CODECS`.
        query: of sampling, by the names of Kyutai's Rust backend.
        token: where the server wants one.
        tls: to check the server's certificate with; None takes the authorities of the system.

    Raises:
        ValueError: ``url`` is none.
        NoDialogue: the server cannot be reached, lets nobody in, or has ended the dialogue.
    """
    address, codec = chat_address(url), CODECS[format](RATE)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    asked = {**(query or {}), "format": format}
    async with aiohttp.ClientSession(headers=headers) as session:
        try:
            websocket = await session.ws_connect(address, params=asked, ssl=tls or True, max_msg_size=0)
        except aiohttp.WSServerHandshakeError as refusal:
            raise NoDialogue(await _why(session, address, asked, tls, refusal)) from refusal
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise NoDialogue(f"no server can be reached at {url} ({error}); `moshi-flax serve` is one") from error
        begun = asyncio.Event()
        async with websocket:
            tasks = [
                asyncio.create_task(_hear(websocket, codec, listener, begun)),
                asyncio.create_task(_say(websocket, codec, user, begun)),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                # while one still listens: else the connection is lost to the server, and not ended
                await websocket.close()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


async def _why(
    session: aiohttp.ClientSession,
    address: str,
    query: Mapping[str, str],
    tls: ssl.SSLContext | None,
    refusal: aiohttp.WSServerHandshakeError,
) -> str:
    """A handshake that fails has no words; the same question without one is answered."""
    try:
        async with session.get(address, params=query, ssl=tls or True) as answer:
            words = (await answer.text()).strip() if answer.status == refusal.status else ""
            later = answer.headers.get("Retry-After")
    except (aiohttp.ClientError, OSError, TimeoutError):
        words, later = "", None
    told = words or refusal.message
    return f"the server says no ({refusal.status}): {told}" + (f"; again in {later} s" if later else "")


async def _hear(websocket: Any, codec: Any, listener: Listener, begun: asyncio.Event) -> None:
    problem = ""
    while True:
        try:
            async with asyncio.timeout(QUIET_SECONDS if begun.is_set() else None):
                received = await websocket.receive()
        except TimeoutError as error:
            raise NoDialogue(f"the server has said nothing for {QUIET_SECONDS:g} s") from error
        if received.type == aiohttp.WSMsgType.CLOSING:  # by our own side
            return
        if received.type != aiohttp.WSMsgType.BINARY:
            raise NoDialogue(problem or f"the server has ended the dialogue ({websocket.close_code})")
        kind, payload = received.data[:1], received.data[1:]
        if kind == bytes([Kind.AUDIO]):
            for samples in codec.decode(payload):
                listener.sound(samples)
        elif kind == bytes([Kind.TEXT]):
            listener.words(payload.decode("utf-8", "replace"))
        elif kind == bytes([Kind.METADATA]):
            about = json.loads(payload)
            if "queue_position" in about:
                listener.queued(about["queue_position"])
            else:
                listener.begun(about)
        elif kind == bytes([Kind.HANDSHAKE]):
            begun.set()
        elif kind == bytes([Kind.ERROR]):
            problem = payload.decode("utf-8", "replace")


async def _say(websocket: Any, codec: Any, user: AsyncIterator[Any], begun: asyncio.Event) -> None:
    await begun.wait()
    async for samples in user:
        if payload := codec.encode(samples):
            try:
                await websocket.send_bytes(protocol.message(Kind.AUDIO, payload))
            except ConnectionError:
                return await asyncio.sleep(QUIET_SECONDS)  # who listens learns why
