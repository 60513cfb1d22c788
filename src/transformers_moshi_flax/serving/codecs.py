"""Audio as it travels: a continuous Ogg stream of Opus, or samples as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import sphn
from jaxtyping import Float

from ..models.moshi.pcm import INT16_SCALE, from_float
from .protocol import ProtocolError

UNSUPPORTED = 1007
"""The code by which a websocket is closed for a payload that cannot be read."""

CAPTURE = b"OggS"
HEADER_BYTES = 27
PACKETS = 100
"""Most packets of a page, 2 s of the usual 20 ms: decoding holds up other callers."""


class Codec(Protocol):
    """One caller's audio, both ways; what was sent before is part of what is read."""

    def decode(self, payload: bytes) -> Iterator[Float[np.ndarray, "samples"]]:
        """The samples that are complete with ``payload``, in pieces that are read one by one.

        Raises:
            ProtocolError: it cannot be read.
        """

    def encode(self, samples: Float[np.ndarray, "samples"]) -> bytes:
        """The payload for a frame of samples in [-1, 1]; empty while there is nothing to send yet."""


class OggOpus:
    """A continuous Ogg stream of mono Opus.

    Args:
        rate: samples a second.
    """

    def __init__(self, rate: int):
        self._reader, self._writer = sphn.OpusStreamReader(rate), sphn.OpusStreamWriter(rate)
        self._rest = b""

    def decode(self, payload: bytes) -> Iterator[Float[np.ndarray, "samples"]]:
        """As :class:`Codec`; a page a piece. Pages may be cut anywhere."""
        self._rest += payload
        while (size := page_size(self._rest)) is not None:
            page, self._rest = self._rest[:size], self._rest[size:]
            try:
                samples = self._reader.append_bytes(page)
            except ValueError as problem:
                raise ProtocolError(f"audio that is no Opus: {problem}", UNSUPPORTED) from problem
            if len(samples):
                yield samples

    def encode(self, samples: Float[np.ndarray, "samples"]) -> bytes:
        """As :class:`Codec`."""
        return self._writer.append_pcm(np.clip(samples, -1, 1))


def page_size(data: bytes) -> int | None:
    """How long the page is that ``data`` begins with; None while it is not complete.

    Raises:
        ProtocolError: this is no page, or one of more than :data:`PACKETS` packets.
    """
    if data[:4] != CAPTURE[: len(data)]:
        raise ProtocolError("audio that is no Ogg stream; samples as they are go with format=pcm16", UNSUPPORTED)
    if len(data) < HEADER_BYTES or len(data) < HEADER_BYTES + data[26]:
        return None
    lengths = data[HEADER_BYTES : HEADER_BYTES + data[26]]
    # a packet ends with the first segment that is not full
    if sum(length < 255 for length in lengths) > PACKETS:
        raise ProtocolError(f"a page of Ogg with more than {PACKETS} packets; send at most 2 s a page", UNSUPPORTED)
    size = HEADER_BYTES + len(lengths) + sum(lengths)
    return size if len(data) >= size else None


class Pcm16:
    """Samples as little-endian integers of 16 bits.

    Args:
        rate: samples a second, which both sides know.
    """

    def __init__(self, rate: int):
        self._rest = b""

    def decode(self, payload: bytes) -> Iterator[Float[np.ndarray, "samples"]]:
        """As :class:`Codec`; a sample may be cut."""
        data = self._rest + payload
        whole = len(data) // 2 * 2
        self._rest = data[whole:]
        if whole:
            yield np.frombuffer(data[:whole], "<i2").astype(np.float32) / INT16_SCALE

    def encode(self, samples: Float[np.ndarray, "samples"]) -> bytes:
        """As :class:`Codec`; rounded, and clipped beyond [-1, 1]."""
        return from_float(samples, np.int16).astype("<i2").tobytes()


CODECS: dict[str, type[OggOpus] | type[Pcm16]] = {"opus": OggOpus, "pcm16": Pcm16}
"""By the value of ``format`` in a client's query."""
