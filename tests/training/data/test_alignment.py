"""Words are laid on frames by the documented rules, and no piece is lost without being counted."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import transformers_moshi_flax
from transformers_moshi_flax.training.data.alignment import AlignedText, Word, align_words, parse_words

EMBEDDED = Path(transformers_moshi_flax.__file__).parent / "assets" / "moshi-tiny-random"
PAD, END = 3, 0
RATE = 12.5


def spell(word: str) -> list[int]:
    """A piece a letter: "a" is 10."""
    return [ord(letter) - ord("a") + 10 for letter in word]


def said(text: str, start: float, end: float | None = None) -> Word:
    return Word(text, start, start if end is None else end, "SPEAKER_MAIN")


def ids(words: list[Word], frames: int) -> list[int]:
    return align_words(words, frames, spell).ids.tolist()


@pytest.mark.parametrize(
    ("words", "frames", "expected"),
    [
        ([], 2, [PAD, PAD]),
        ([said("ab", 0.16)], 6, [PAD, END, 10, 11, PAD, PAD]),
        # in the first frame there is none before it
        ([said("a", 0.0)], 2, [10, PAD]),
        # a frame lasts until just before the next one
        ([said("a", 0.1599)], 3, [END, 10, PAD]),
        # right behind a word there is no PAD to end
        ([said("ab", 0.08), said("c", 0.24)], 5, [END, 10, 11, 12, PAD]),
        # with one frame between, that frame ends it
        ([said("a", 0.08), said("c", 0.24)], 5, [END, 10, END, 12, PAD]),
        # pieces queue
        ([said("abc", 0.08), said("de", 0.16)], 7, [END, 10, 11, 12, 13, 14, PAD]),
        # in any order
        ([said("de", 0.16), said("abc", 0.08)], 7, [END, 10, 11, 12, 13, 14, PAD]),
        ([said("   ", 0.16)], 3, [PAD] * 3),
        ([said(" a ", 0.16)], 3, [PAD, END, 10]),
    ],
)
def test_places(words: list[Word], frames: int, expected: list[int]) -> None:
    assert ids(words, frames) == expected


def test_what_has_no_place_is_counted() -> None:
    words = [said("a", -0.01), said("b", 0.32), said("c", 0.2, 0.1), said("defg", 0.16), said("h", 1e308)]
    text = align_words(words, 4, spell)
    assert text.ids.tolist() == [PAD, END, 13, 14]
    assert (text.misplaced, text.cut, text.unknown) == (4, 2, 0)
    assert align_words([said("ab", 0.0)], 0, spell).misplaced == 1


def test_unknown_pieces_are_left_out() -> None:
    text = align_words([said("ab", 0.08)], 4, lambda word: [END, *spell(word), PAD])
    assert text.ids.tolist() == [END, 10, 11, PAD]
    assert text.unknown == 2


def test_with_moshis_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    text = align_words([said("you", 0.16)], 4, lambda word: tokenizer.encode(word, add_special_tokens=False))
    assert text.ids.tolist() == [PAD, END, 17, PAD]


def frame_by_frame(words: list[Word], frames: int) -> list[int]:
    """The same rules, told as a walk over the frames."""
    made = [PAD] * frames
    coming = deque(sorted(words, key=lambda word: word.start))
    queue: deque[int] = deque()
    for frame in range(frames):
        while coming and coming[0].start * RATE < frame + 1:
            queue.extend(spell(coming.popleft().text))
        if queue:
            if frame and made[frame - 1] == PAD:
                made[frame - 1] = END
            made[frame] = queue.popleft()
    return made


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.tuples(st.text("abcdefgh", max_size=5), st.floats(0, 2.5)), max_size=12),
    frames=st.integers(0, 40),
)
def test_equals_a_walk_over_the_frames(words: list[tuple[str, float]], frames: int) -> None:
    said_words = [said(text, start) for text, start in words]
    text: AlignedText = align_words(said_words, frames, spell)
    assert text.ids.tolist() == frame_by_frame(said_words, frames)
    inside = [word for word in said_words if word.start * RATE < frames]
    assert text.misplaced == len(words) - len(inside)
    pieces = [piece for word in sorted(inside, key=lambda word: word.start) for piece in spell(word.text)]
    placed = text.ids[(text.ids != PAD) & (text.ids != END)].tolist()
    assert placed == pieces[: len(placed)] and text.cut == len(pieces) - len(placed)


def test_parse() -> None:
    words = parse_words([["b", [1, 2.5], "SPEAKER_MAIN"], ["a", [0.5, 1], "x"]])
    assert words == [Word("a", 0.5, 1.0, "x"), Word("b", 1.0, 2.5, "SPEAKER_MAIN")]


@pytest.mark.parametrize(
    ("alignments", "message"),
    [
        ("words", "must be a list"),
        ({"a": 1}, "must be a list"),
        ([["a", [0, 1], "x"], ["b", [0, 1]]], r"`alignments\[1\]`"),
        ([["a", [0], "x"]], r"`alignments\[0\]`"),
        ([["a", 0.5, "x"]], r"`alignments\[0\]`"),
        ([3], r"`alignments\[0\]`"),
        ([[1, [0, 1], "x"]], "in quotes"),
        ([["a", [0, 1], None]], "in quotes"),
        ([["a", ["0", 1], "x"]], "two finite times"),
        ([["a", [0, np.nan], "x"]], "two finite times"),
        ([["a", [None, 1], "x"]], "two finite times"),
        ([["a", [10**400, 1], "x"]], "two finite times"),
        ([["a\ud800", [0, 1], "x"]], "half of a surrogate pair"),
    ],
)
def test_malformed(alignments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_words(alignments)
