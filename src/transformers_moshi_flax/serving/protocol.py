"""The messages of Kyutai's websocket: binary, the first byte is the kind."""

from __future__ import annotations

import enum
import json
from typing import Any

RATE, FRAME = 24_000, 1920
"""What clients take for granted: samples a second, samples a frame."""


class Kind(enum.IntEnum):
    """What a message holds."""

    HANDSHAKE = 0
    AUDIO = 1
    TEXT = 2
    CONTROL = 3
    METADATA = 4
    ERROR = 5
    PING = 6


class Control(enum.IntEnum):
    """What a control message asks for: its second byte."""

    START = 0
    END_TURN = 1
    PAUSE = 2
    RESTART = 3


def message(kind: Kind, payload: bytes = b"") -> bytes:
    """A message as it is sent."""
    return bytes([kind]) + payload


HANDSHAKE = message(Kind.HANDSHAKE, bytes(8))
"""With the versions of protocol and model, two integers of 32 bits that are zero."""


def text(words: str) -> bytes:
    """What Moshi says, as it goes on."""
    return message(Kind.TEXT, words.encode())


def error(words: str) -> bytes:
    """Why something was refused, or why the dialogue ends."""
    return message(Kind.ERROR, words.encode())


def metadata(fields: dict[str, Any]) -> bytes:
    """What a dialogue is held with."""
    return message(Kind.METADATA, json.dumps(fields).encode())


class ProtocolError(ValueError):
    """A client has sent what the protocol does not have; the dialogue cannot go on.

    Attributes:
        code: of the websocket's closing.
    """

    def __init__(self, words: str, code: int):
        super().__init__(words)
        self.code = code
