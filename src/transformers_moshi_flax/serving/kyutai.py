"""Kyutai's websocket, as a caller speaks it."""

from __future__ import annotations

from typing import Any

from aiohttp import WSMsgType

from . import protocol
from .codecs import CODECS
from .dialect import Answer, Audio, Ending, Message, Order
from .engine import Said
from .protocol import Control, Kind
from .words import Words

ORDERS: dict[int, Order] = {
    Control.START: Order.GO_ON,
    Control.PAUSE: Order.PAUSE,
    Control.RESTART: Order.RESTART,
}
"""Nobody takes turns, which the other one is about."""


class Kyutai:
    """The messages of :mod:`.protocol`.

    Args:
        format: of the audio, of :data:`CODECS`.
        rate: samples a second.
        tokenizer: of the model.
    """

    message_type = WSMsgType.BINARY

    def __init__(self, format: str, rate: int, tokenizer: Any):
        self._codec, self._words = CODECS[format](rate), Words(tokenizer)

    def read(self, data: bytes) -> Audio | Answer:
        """As :class:`Dialect`."""
        kind, payload = data[:1], data[1:]
        if kind == bytes([Kind.AUDIO]):
            return Audio(self._codec.decode(payload))
        if kind == bytes([Kind.PING]):
            return Answer((protocol.message(Kind.PING),))
        if kind == bytes([Kind.CONTROL]):
            order = ORDERS.get(payload[0]) if len(payload) == 1 else None
            words = "control messages are start (0), pause (2) and restart (3); nobody takes turns"
            return Answer(order=order) if order else Answer((protocol.error(words),))
        if kind and kind != bytes([Kind.HANDSHAKE]):
            words = f"a message of kind {kind[0]} means nothing from a client; it was not heard"
            return Answer((protocol.error(words),))
        return Answer()

    def queued(self, position: int) -> list[Message]:
        """As :class:`Dialect`: metadata, which all of Kyutai's clients can bear before the handshake."""
        return [protocol.metadata({"queue_position": position})]

    def greet(self, about: dict[str, Any]) -> list[Message]:
        """As :class:`Dialect`."""
        return [protocol.HANDSHAKE, protocol.metadata(about)]

    def say(self, said: Said) -> list[Message]:
        """As :class:`Dialect`."""
        sound, words = self._codec.encode(said.audio), self._words.put(said.text_id)
        messages: list[Message] = []
        if sound:
            messages.append(protocol.message(Kind.AUDIO, sound))
        if words:
            messages.append(protocol.text(words))
        return messages

    def object(self, words: str) -> list[Message]:
        """As :class:`Dialect`."""
        return [protocol.error(words)]

    def end(self, ending: Ending) -> list[Message]:
        """As :class:`Dialect`."""
        return [] if ending.words is None else [protocol.error(ending.words)]
