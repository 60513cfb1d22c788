"""The inner monologue with its times: words, subtitles (SRT) and JSON."""

from __future__ import annotations

import itertools
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
"""Most characters of a subtitle: what a screen has room for in one line."""

PAUSE = 0.8
"""Seconds of silence after which a new subtitle begins; where no spaces are written, a new word too."""

SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")  # noqa: RUF001 (fullwidth on purpose)

LINGER = 1.0
"""Seconds that a subtitle stays after its last word, unless the next one comes: a word can be over in one frame."""


@dataclass(frozen=True)
class Timed:
    """Words and when they are said, in seconds from the beginning of the dialogue.

    Attributes:
        text: without white space around it.
        start, end: in seconds.
        spaced: whether there is a space before it, if there is something before it.
    """

    text: str
    start: float
    end: float
    spaced: bool = True


def is_piece(token: int, tokenizer: Any) -> bool:
    """Whether a text id is a piece of a word: no padding, no special token, and in the vocabulary."""
    return 0 <= token < len(tokenizer) and token not in (PAD, END_OF_PAD) and token not in tokenizer.all_special_ids


@dataclass
class _Group:
    """The pieces of a word, said from the frame ``start`` to the one before ``end``."""

    pieces: list[int]
    start: int
    end: int
    spaced: bool


def timed_words(text_ids: Int[np.ndarray, "frames"], tokenizer: Any, frame_rate: float) -> list[Timed]:
    """The words of one id a frame. A word lasts from the frame of its first piece to the end of that of its last.

    In languages that are written without spaces, a word ends with a sentence, before a pause, or when a line is full.
    """
    groups: list[_Group] = []
    for frame, token in enumerate(text_ids.tolist()):
        if not is_piece(token, tokenizer):
            continue
        spaced = tokenizer.convert_ids_to_tokens(token).startswith(WORD_START)
        if not groups or spaced or _ends(groups[-1], token, frame, tokenizer, frame_rate):
            groups.append(_Group([token], frame, frame + 1, spaced))
        else:
            groups[-1].pieces.append(token)
            groups[-1].end = frame + 1
    words = [
        Timed(
            clean(tokenizer.decode(group.pieces)),
            seconds(group.start, frame_rate),
            seconds(group.end, frame_rate),
            group.spaced,
        )
        for group in groups
    ]
    return [word for word in words if word.text]


def _ends(group: _Group, token: int, frame: int, tokenizer: Any, frame_rate: float) -> bool:
    """Whether a word ends before a piece that does not begin with a space."""
    if round((frame - group.end) / frame_rate, 6) >= PAUSE:
        return True
    text = tokenizer.decode(group.pieces)
    if text.endswith(HALF):  # the piece is to complete the character
        return False
    longer = clean(tokenizer.decode([*group.pieces, token]))
    return text.endswith(SENTENCE_ENDS[3:]) or len(longer) > LINE_LENGTH


HALF = "\ufffd"
"""Stands for bytes that make no character: of one that is not complete when the dialogue ends, for example."""


def clean(text: str) -> str:
    """``text`` in one line, without what is no character."""
    return one_line(text.replace(HALF, ""))


def joined(words: Sequence[Timed]) -> str:
    """The text that the words make."""
    return "".join(" " * (word.spaced and number > 0) + word.text for number, word in enumerate(words))


def seconds(frame: int, frame_rate: float) -> float:
    """When a frame begins, to the microsecond."""
    return round(frame / frame_rate, 6)


class LiveWords:
    """The words of a dialogue as they are said: each is given once, when it is certain to be whole.

    Args:
        tokenizer: of the text.
        frame_rate: frames a second.
    """

    def __init__(self, tokenizer: Any, frame_rate: float):
        self._tokenizer, self._frame_rate = tokenizer, frame_rate
        self._begin = 0
        self._ids: list[int] = []

    def put(self, text_id: int) -> list[Timed]:
        """The words that the id of the next frame ends: the one before a word that begins, or before a pause."""
        self._ids.append(text_id)
        words = self._words()
        now = seconds(self._begin + len(self._ids), self._frame_rate)
        whole = [word for word, after in zip(words, [*words[1:], None]) if after or round(now - word.end, 6) >= PAUSE]
        if whole:
            # words begin with frames of their own
            used = round(whole[-1].end * self._frame_rate) - self._begin
            self._begin, self._ids = self._begin + used, self._ids[used:]
        elif not words:
            self._begin, self._ids = self._begin + len(self._ids), []
        return whole

    def end(self) -> list[Timed]:
        """The words that are left when the dialogue ends."""
        words, self._ids = self._words(), []
        return words

    def _words(self) -> list[Timed]:
        found = timed_words(np.array(self._ids, np.int32), self._tokenizer, self._frame_rate)
        offset = seconds(self._begin, self._frame_rate)
        return [replace(word, start=round(word.start + offset, 6), end=round(word.end + offset, 6)) for word in found]


def subtitles(words: Sequence[Timed], duration: float) -> list[Timed]:
    """Words gathered to short lines, which end with a sentence, before a pause, or when they are full.

    Args:
        words: in the order in which they are said.
        duration: of the dialogue, in seconds; no line stays longer.
    """
    lines: list[Timed] = []
    for word in itertools.chain.from_iterable(map(_cut, words)):
        if lines and not lines[-1].text.endswith(SENTENCE_ENDS):
            line = lines[-1]
            text = joined([line, word])
            if len(text) <= LINE_LENGTH and round(word.start - line.end, 6) < PAUSE:
                lines[-1] = Timed(text, line.start, word.end)
                continue
        lines.append(word)
    ends = [line.start for line in lines[1:]] + [duration]
    return [replace(line, end=round(min(line.end + LINGER, end), 6)) for line, end in zip(lines, ends)]


def _cut(word: Timed) -> list[Timed]:
    """A word in parts that have room in a line, said at an even pace."""
    if len(word.text) <= LINE_LENGTH:
        return [word]
    pace = (word.end - word.start) / len(word.text)
    return [
        Timed(
            word.text[at : at + LINE_LENGTH],
            round(word.start + at * pace, 6),
            round(word.start + min(at + LINE_LENGTH, len(word.text)) * pace, 6),
            word.spaced and at == 0,
        )
        for at in range(0, len(word.text), LINE_LENGTH)
    ]


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
        "text": joined(words),
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
