"""What protocols have in common: a caller is heard and answered in messages of one of them."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from aiohttp import WSCloseCode, WSMsgType
from jaxtyping import Float

from .engine import Said

Message = bytes | str
"""As a websocket sends it: binary, or text."""


class Order(enum.Enum):
    """What a caller can ask for during a dialogue."""

    GO_ON = enum.auto()
    PAUSE = enum.auto()
    RESTART = enum.auto()
    FORGET = enum.auto()
    """What was said and not heard yet."""


@dataclass(frozen=True)
class Audio:
    """A message that was audio.

    Attributes:
        pieces: that are complete with it, in [-1, 1]; reading them may raise ``ProtocolError``.
    """

    pieces: Iterator[Float[np.ndarray, "samples"]]


@dataclass(frozen=True)
class Answer:
    """A message that was something else.

    Attributes:
        messages: to be sent.
        order: to be carried out before.
        prompt: with ``Order.RESTART``, what the dialogue then begins from, once it is there.
    """

    messages: tuple[Message, ...] = ()
    order: Order | None = None
    prompt: Future | None = None


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


@runtime_checkable
class Dialect(Protocol):
    """A protocol as one caller speaks it; what was said before may be part of what is said.

    Attributes:
        message_type: that the caller's messages have.
    """

    message_type: WSMsgType

    def read(self, data: Any) -> Audio | Answer:
        """What a message of the caller means.

        Raises:
            ProtocolError: nothing, and the dialogue cannot go on.
        """

    def queued(self, position: int) -> list[Message]:
        """Where in the queue the caller is, 1 is next."""

    def greet(self, about: dict[str, Any]) -> list[Message]:
        """The dialogue begins, and with what."""

    def say(self, said: Said) -> list[Message]:
        """A frame of Moshi's."""

    def object(self, words: str) -> list[Message]:
        """Why something was not done; the dialogue goes on."""

    def end(self, ending: Ending) -> list[Message]:
        """The dialogue ends, and why."""
