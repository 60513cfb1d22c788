"""Words with times -> text ids of frames, by the rules of Kyutai's fine-tuning code.

A word's pieces begin in the frame in which it starts, one piece a frame; the frame before is end-of-PAD if it would be
PAD; all other frames are PAD. One rule departs from Kyutai's default: where a word starts before the pieces of the
last one are all placed, its pieces queue behind them, and none is lost (there ``keep_and_shift=True``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

MAIN_SPEAKER = "SPEAKER_MAIN"
"""The label of what Moshi says; all other labels are the user's."""


@dataclass(frozen=True)
class Word:
    """A word of an alignment; times in seconds."""

    text: str
    start: float
    end: float
    speaker: str


@dataclass(frozen=True)
class AlignedText:
    """The text of one speaker, frame by frame.

    Attributes:
        ids: ``(frames,)`` int32.
        misplaced: words left out because they start outside of the recording, or end before they start.
        cut: pieces left out because the recording ends before their turn.
        unknown: pieces left out because the tokenizer does not know their characters.
    """

    ids: Int32[np.ndarray, "frames"]
    misplaced: int = 0
    cut: int = 0
    unknown: int = 0


def parse_words(alignments: Any) -> list[Word]:
    """The words of ``[[word, [start, end], speaker], …]``, in the order of their starts.

    Raises:
        ValueError: something else, or a time that is not finite; the message names the entry.
    """
    if not isinstance(alignments, Sequence) or isinstance(alignments, str):
        raise ValueError(f"`alignments` must be a list of [word, [start, end], speaker], got {alignments!r:.80}")
    words = []
    for place, entry in enumerate(alignments):
        try:
            text, (start, end), speaker = entry
        except (TypeError, ValueError):
            raise ValueError(
                f"`alignments[{place}]` must be [word, [start, end], speaker], got {entry!r:.80}"
            ) from None
        if not isinstance(text, str) or not isinstance(speaker, str):
            raise ValueError(f"`alignments[{place}]` must have a word and a speaker in quotes, got {entry!r:.80}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"`alignments[{place}]` has half of a surrogate pair in {entry!r:.80}") from None
        times = _seconds(start), _seconds(end)
        if not all(map(math.isfinite, times)):
            raise ValueError(f"`alignments[{place}]` must have two finite times in seconds, got {entry!r:.80}")
        words.append(Word(text, *times, speaker))
    return sorted(words, key=lambda word: word.start)


def _seconds(time: Any) -> float:
    """A time of JSON; NaN for what is no number, or too large for one."""
    try:
        return float(time) if isinstance(time, int | float) else math.nan
    except OverflowError:
        return math.nan


def align_words(
    words: Iterable[Word],
    frames: int,
    encode: Callable[[str], Sequence[int]],
    *,
    frame_rate: float = 12.5,
    pad_token_id: int = 3,
    end_of_pad_token_id: int = 0,
) -> AlignedText:
    """Lay the words of one speaker on frames.

    Args:
        words: in any order; those that start together keep theirs.
        frames: of the recording.
        encode: word -> ids of its pieces. Pieces of the two ids below are left out: Moshi's tokenizer gives the
            latter to characters that it does not know.
        frame_rate: frames a second.
        pad_token_id: id of the frames without a new piece.
        end_of_pad_token_id: id of the frame before the first piece after PAD.

    Returns:
        The ids, and what could not be placed.
    """
    ids = np.full(frames, pad_token_id, np.int32)
    misplaced = cut = unknown = 0
    free = 0  # the first frame behind all pieces so far
    for word in sorted(words, key=lambda word: word.start):
        start = word.start * frame_rate  # may be infinite
        if not 0 <= start < frames or word.end < word.start:
            misplaced += 1
            continue
        found = list(encode(word.text.strip()))
        pieces = [piece for piece in found if piece not in (pad_token_id, end_of_pad_token_id)]
        unknown += len(found) - len(pieces)
        first = max(math.floor(start), free)
        placed = pieces[: frames - first]
        cut += len(pieces) - len(placed)
        if not placed:
            continue
        if first > free:
            ids[first - 1] = end_of_pad_token_id
        ids[first : first + len(placed)] = placed
        free = first + len(placed)
    return AlignedText(ids, misplaced, cut, unknown)
