"""The inner monologue with its times: words, subtitles (SRT) and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from transformers_moshi_flax.cli.errors import one_line

# Moshi's text stream: 3 fills the frames without a new word piece, 0 announces the next word
END_OF_PAD, PAD = 0, 3

WORD_START = "▁"
"""How a piece begins that begins a word, in SentencePiece's vocabularies."""

LINE_LENGTH = 42
"""Most characters of a subtitle, unless one word is longer: what a screen has room for in one line."""

PAUSE = 0.8
"""Seconds of silence after which a new subtitle begins."""

LINGER = 1.0
"""Seconds that a subtitle stays after its last word, unless the next one comes: a word can be over in one frame."""


@dataclass(frozen=True)
class Timed:
    """Words and when they are said, in seconds from the beginning of the dialogue."""

    text: str
    start: float
    end: float


def is_piece(token: int, tokenizer: Any) -> bool:
    """Whether a text id is a piece of a word: no padding, no special token, and in the vocabulary."""
    return 0 <= token < len(tokenizer) and token not in (PAD, END_OF_PAD) and token not in tokenizer.all_special_ids


def timed_words(text_ids: Int[np.ndarray, "frames"], tokenizer: Any, frame_rate: float) -> list[Timed]:
    """The words of one id a frame. A word lasts from the frame of its first piece to the end of that of its last."""
    # (first frame, frame after the last, pieces) of each word
    groups: list[tuple[int, int, list[int]]] = []
    for frame, token in enumerate(text_ids.tolist()):
        if not is_piece(token, tokenizer):
            continue
        if not groups or tokenizer.convert_ids_to_tokens(token).startswith(WORD_START):
            groups.append((frame, frame + 1, [token]))
        else:
            start, _, pieces = groups[-1]
            groups[-1] = (start, frame + 1, [*pieces, token])
    words = [
        Timed(one_line(tokenizer.decode(pieces)), seconds(start, frame_rate), seconds(end, frame_rate))
        for start, end, pieces in groups
    ]
    return [word for word in words if word.text]


def seconds(frame: int, frame_rate: float) -> float:
    """When a frame begins, to the microsecond."""
    return round(frame / frame_rate, 6)


def subtitles(words: Sequence[Timed], duration: float) -> list[Timed]:
    """Words gathered to short lines, which end with a sentence, before a pause, or when they are full.

    Args:
        words: in the order in which they are said.
        duration: of the dialogue, in seconds; no line stays longer.
    """
    lines: list[Timed] = []
    for word in words:
        if lines and not lines[-1].text.endswith((".", "!", "?")):
            line = lines[-1]
            text = f"{line.text} {word.text}"
            if len(text) <= LINE_LENGTH and round(word.start - line.end, 6) < PAUSE:
                lines[-1] = Timed(text, line.start, word.end)
                continue
        lines.append(word)
    ends = [line.start for line in lines[1:]] + [duration]
    return [replace(line, end=round(min(line.end + LINGER, end), 6)) for line, end in zip(lines, ends)]


def to_srt(lines: Sequence[Timed]) -> str:
    """The text of an SRT file."""
    blocks = (
        f"{number}\n{_srt_time(line.start)} --> {_srt_time(line.end)}\n{line.text}\n"
        for number, line in enumerate(lines, start=1)
    )
    return "\n".join(blocks)


def _srt_time(moment: float) -> str:
    rest, milliseconds = divmod(round(moment * 1000), 1000)
    rest, second = divmod(rest, 60)
    hour, minute = divmod(rest, 60)
    return f"{hour:02}:{minute:02}:{second:02},{milliseconds:03}"


def to_record(text_ids: Int[np.ndarray, "frames"], tokenizer: Any, frame_rate: float) -> dict[str, Any]:
    """Every token and every word with its time, for JSON."""
    known = len(tokenizer)
    words = timed_words(text_ids, tokenizer, frame_rate)
    return {
        "frame_rate": frame_rate,
        "text": " ".join(word.text for word in words),
        "words": [{"text": word.text, "start": word.start, "end": word.end} for word in words],
        "tokens": [
            {
                "frame": frame,
                "start": seconds(frame, frame_rate),
                "id": token,
                "piece": tokenizer.convert_ids_to_tokens(token) if 0 <= token < known else None,
            }
            for frame, token in enumerate(text_ids.tolist())
        ],
    }
