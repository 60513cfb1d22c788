"""Words with times -> text ids of frames, by the rules of Kyutai's fine-tuning code.

A word's pieces begin in the frame in which it starts, one piece a frame; the frame before is end-of-PAD if it would be
PAD; all other frames are PAD. One rule departs from Kyutai's default: where a word starts before the pieces of the
last one are all placed, its pieces queue behind them, and none is lost (there ``keep_and_shift=True``). How late they
are is counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32

MAIN_SPEAKER = "SPEAKER_MAIN"
"""The label that Kyutai's tools give to what Moshi says; all other labels are the user's."""


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
        pieces: how many are placed.
        late: how many of them are placed behind their turn, because those of words before them were not all placed.
        largest_lag: the most frames that a piece is behind its turn.
    """

    ids: Int32[np.ndarray, "frames"]
    misplaced: int = 0
    cut: int = 0
    unknown: int = 0
    pieces: int = 0
    late: int = 0
    largest_lag: int = 0


WITHOUT_TIMES = "words without times"
WITHOUT_SPEAKER = "words without a speaker"
NO_WORDS = "entries that are no words"


def parse_words(alignments: Any, left_out: Counter[str] | None = None) -> list[Word]:
    """The words of ``[[word, [start, end], speaker], …]``, in the order of their starts.

    Aligners give no times to what their dictionary lacks, such as numerals, and diarisers no speaker where they are
    not sure. An entry that is no whole word is left out, and the others are read. Numbers may be in quotes.

    Args:
        alignments: of the JSON beside a recording.
        left_out: how many entries are left out is added here: :data:`WITHOUT_TIMES` (both, or one of them, are null,
            missing or not finite), :data:`WITHOUT_SPEAKER`, :data:`NO_WORDS`.

    Raises:
        ValueError: it is no list; or it has entries, and none is a word: the message has the first one.
    """
    if not isinstance(alignments, Sequence) or isinstance(alignments, str):
        raise ValueError(f"`alignments` must be a list of [word, [start, end], speaker], got {alignments!r:.80}")
    words: list[Word] = []
    wrong: Counter[str] = Counter()
    for entry in alignments:
        found = _word(entry)
        if isinstance(found, Word):
            words.append(found)
        else:
            wrong[found] += 1
    if wrong and not words:
        raise ValueError(
            f"`alignments` has no entry that is [word, [start, end], speaker], with times in seconds: all are "
            f"{' or '.join(wrong)}, the first is {alignments[0]!r:.80}"
        )
    if left_out is not None:
        left_out.update(wrong)
    return sorted(words, key=lambda word: word.start)


def _word(entry: Any) -> Word | str:
    """The word of an entry, or why it is left out."""
    if not isinstance(entry, Sequence) or isinstance(entry, str) or not entry:
        return NO_WORDS
    text, times, speaker, *more = [*entry, None, None][: max(3, len(entry))]
    if more or not isinstance(text, str) or not text.strip() or not _is_encodable(text):
        return NO_WORDS
    if not isinstance(times, Sequence) or isinstance(times, str) or len(times) != 2:
        return WITHOUT_TIMES if times is None or (isinstance(times, Sequence) and len(times) < 2) else NO_WORDS
    start, end = map(_seconds, times)
    if not (math.isfinite(start) and math.isfinite(end)):
        return WITHOUT_TIMES
    if isinstance(speaker, int) and not isinstance(speaker, bool):
        speaker = str(speaker)  # diarisers count
    if not isinstance(speaker, str) or not speaker or not _is_encodable(speaker):
        return WITHOUT_SPEAKER
    return Word(text, start, end, speaker)


def _is_encodable(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


_NUMBER = re.compile(r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*")


def _seconds(time: Any) -> float:
    """A time of JSON; NaN for what is no number, or too large for one."""
    is_number = isinstance(time, int | float) and not isinstance(time, bool)
    if not is_number and not (isinstance(time, str) and _NUMBER.fullmatch(time)):
        return math.nan
    try:
        return float(time)
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
        The ids, what could not be placed, and what is late.
    """
    ids = np.full(frames, pad_token_id, np.int32)
    misplaced = cut = unknown = placed_pieces = late = largest_lag = 0
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
        placed_pieces += len(placed)
        if lag := first - math.floor(start):
            late, largest_lag = late + len(placed), max(largest_lag, lag)
    return AlignedText(ids, misplaced, cut, unknown, placed_pieces, late, largest_lag)
