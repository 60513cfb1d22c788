"""What a caller asks for in the query: the names of Kyutai's Rust backend, and PersonaPlex's for personas."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt32

from ..models.moshi.generation_flax_moshi import DEPTH_PREFIX
from .codecs import CODECS
from .personas import Persona, Personas

NUMBERS = {
    "text_temperature": "temperature",
    "text_topk": "top_k",
    "audio_temperature": f"{DEPTH_PREFIX}temperature",
    "audio_topk": f"{DEPTH_PREFIX}top_k",
}
"""The numbers of sampling, by their names in a query."""

NEUTRAL = {"repetition_penalty": 1.0, "pad_mult": 0.0}
"""What an endless dialogue cannot do, and the value that asks for nothing; Kyutai's page always sends them."""

IGNORED_WITH_NEUTRAL = "repetition_penalty_context"
PERSONA = ("voice_prompt", "text_prompt")
KNOWN = (
    *NUMBERS,
    "text_seed",
    "audio_seed",
    "max_steps",
    "format",
    "token",
    *PERSONA,
    *NEUTRAL,
    IGNORED_WITH_NEUTRAL,
)


@dataclass(frozen=True)
class Wishes:
    """A dialogue as a caller wants it.

    Attributes:
        format: of the audio, of :data:`CODECS`.
        numbers: of sampling, by their names in the stream; those that were asked for.
        key: of the sampling: ``audio_seed`` and ``text_seed``, drawn where neither was given.
        max_steps: frames until the dialogue ends, or None.
        persona: who Moshi is to be, or None.
    """

    format: str
    numbers: dict[str, float | int]
    key: UInt32[np.ndarray, "2"]
    max_steps: int | None
    persona: Persona | None

    @classmethod
    def read(cls, query: Mapping[str, str], stream: Any, personas: Personas | None = None) -> Wishes:
        """Read and check a query.

        Args:
            query: of the request.
            stream: of the dialogues.
            personas: those that there are.

        Raises:
            ValueError: an unknown name, a value that is none, or one that the stream cannot have.
        """
        for name in query:
            if name not in KNOWN:
                raise ValueError(f"`{name}` is not known here; there are: {', '.join(KNOWN)}")
        format = query.get("format", "opus")
        if format not in CODECS:
            raise ValueError(f"`format`={format} is none of: {', '.join(CODECS)}")
        for name, neutral in NEUTRAL.items():
            if name in query and _number(name, query[name]) != neutral:
                raise ValueError(f"`{name}`={query[name]} is not possible in an endless dialogue; leave it out")
        numbers: dict[str, float | int] = {}
        for name, ours in NUMBERS.items():
            if name in query:
                numbers[ours] = _whole(name, query[name], 1) if "topk" in name else _number(name, query[name])
        for prefix in ("", DEPTH_PREFIX):
            if numbers.get(f"{prefix}temperature") == 0:
                numbers |= {f"{prefix}temperature": 1.0, f"{prefix}top_k": 1}
        try:
            stream.check_numbers(**numbers)
        except ValueError as error:
            names = ", ".join(f"`{name}`={query[name]}" for name in NUMBERS if name in query)
            raise ValueError(f"{names}: {error}") from error
        seeds = [_whole(name, query[name], 0) if name in query else None for name in ("audio_seed", "text_seed")]
        if seeds == [None, None]:
            seeds = [secrets.randbits(32), secrets.randbits(32)]
        max_steps = _whole("max_steps", query["max_steps"], 1) if "max_steps" in query else None
        key = np.array([seed or 0 for seed in seeds], np.uint32)
        return cls(format, numbers, key, max_steps, _persona(query, personas))

    @classmethod
    def read_for_model(
        cls, query: Mapping[str, str], stream: Any, model: str, personas: Personas | None = None
    ) -> Wishes:
        """As :meth:`read`, of OpenAI's realtime endpoint: with a ``model``, and of one format.

        Raises:
            ValueError: as :meth:`read`; another ``model``, or a ``format``.
        """
        rest = dict(query)
        if (asked := rest.pop("model", model)) != model:
            raise ValueError(f"`model`={asked} is not served here, but {model}")
        if "format" in rest:
            raise ValueError("`format` cannot be chosen here: audio is 16-bit PCM at 24 kHz, in base64")
        return cls.read({**rest, "format": "pcm16"}, stream, personas)


def _persona(query: Mapping[str, str], personas: Personas | None) -> Persona | None:
    """Raises ``ValueError`` for one that cannot be had."""
    asked = {name: query[name] for name in PERSONA if query.get(name)}
    if not asked:
        return None
    names = ", ".join(f"`{name}`" for name in asked)
    if personas is None:
        raise ValueError(f"{names}: there are no personas here; see --voices and --personas")
    try:
        return personas.find(asked.get("voice_prompt"), asked.get("text_prompt"))
    except ValueError as error:
        raise ValueError(f"{names}: {error}") from error


def _number(name: str, text: str) -> float:
    """Raises ``ValueError`` unless it is finite."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`{name}`={text} is no finite number")
    return number


def _whole(name: str, text: str, least: int) -> int:
    """Raises ``ValueError`` unless it is an integer from ``least`` on, of 32 bits."""
    if not (text.isascii() and text.isdigit() and least <= int(text[:20]) < 2**32):
        raise ValueError(f"`{name}`={text} is no integer in [{least}, 2**32)")
    return int(text)
