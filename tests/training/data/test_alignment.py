"""Words are laid on frames by the documented rules, and no piece is lost without being counted."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax.training.data.alignment import (
    NO_WORDS,
    WITHOUT_SPEAKER,
    WITHOUT_TIMES,
    AlignedText,
    Word,
    align_words,
    parse_words,
)

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
    tokenizer = AutoTokenizer.from_pretrained(RANDOM_MODEL)
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


def test_lag_is_counted() -> None:
    """Six pieces a word, a word every two frames: the n-th word is 4 n frames late."""
    words = [said("abcdef", 0.16 * number) for number in range(5)]
    text = align_words(words, 100, spell)
    assert (text.pieces, text.late, text.largest_lag) == (30, 24, 16)
    # a pause lets the text catch up
    text = align_words([*words, said("ab", 8.0)], 110, spell)
    assert (text.pieces, text.late, text.largest_lag) == (32, 24, 16)
    text = align_words([said("ab", 0.16), said("ab", 0.32)], 100, spell)
    assert (text.pieces, text.late, text.largest_lag) == (4, 0, 0)
    # what is cut is not placed
    text = align_words(words, 7, spell)
    assert (text.pieces, text.late, text.largest_lag, text.cut) == (7, 1, 4, 17) and text.misplaced == 1


def test_parse() -> None:
    words = parse_words([["b", [1, 2.5], "SPEAKER_MAIN"], ["a", [0.5, 1], "x"]])
    assert words == [Word("a", 0.5, 1.0, "x"), Word("b", 1.0, 2.5, "SPEAKER_MAIN")]
    assert parse_words([["a", ["0.5", " 1e0 "], 3]]) == [Word("a", 0.5, 1.0, "3")]
    assert parse_words([["a", [2, 1], "x"]]) == [Word("a", 2.0, 1.0, "x")]  # which align_words counts
    assert parse_words([]) == parse_words(()) == []


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (["2016,", [None, None], "x"], WITHOUT_TIMES),
        (["2016,", [0.5, None], "x"], WITHOUT_TIMES),
        (["2016,", [None, 0.5], "x"], WITHOUT_TIMES),
        (["2016,", None, "x"], WITHOUT_TIMES),
        (["2016,", [], "x"], WITHOUT_TIMES),
        (["2016,", [0.5], "x"], WITHOUT_TIMES),
        (["2016,"], WITHOUT_TIMES),
        (["2016,", [0.5, np.nan], "x"], WITHOUT_TIMES),
        (["2016,", [-np.inf, 0.5], "x"], WITHOUT_TIMES),
        (["2016,", [10**400, 1], "x"], WITHOUT_TIMES),
        (["2016,", ["1e999", 1], "x"], WITHOUT_TIMES),
        (["2016,", ["nan", 1], "x"], WITHOUT_TIMES),
        (["2016,", ["", ""], "x"], WITHOUT_TIMES),
        (["2016,", ["0:05", "0:06"], "x"], WITHOUT_TIMES),
        (["2016,", [False, True], "x"], WITHOUT_TIMES),
        (["2016,", [{}, []], "x"], WITHOUT_TIMES),
        (["2016,", [0.5, 0.6], None], WITHOUT_SPEAKER),
        (["2016,", [0.5, 0.6], ""], WITHOUT_SPEAKER),
        (["2016,", [0.5, 0.6]], WITHOUT_SPEAKER),
        (["2016,", [0.5, 0.6], ["x"]], WITHOUT_SPEAKER),
        (["2016,", [0.5, 0.6], "x\ud800"], WITHOUT_SPEAKER),
        ([None, [0.5, 0.6], "x"], NO_WORDS),
        (["", [0.5, 0.6], "x"], NO_WORDS),
        (["  ", [0.5, 0.6], "x"], NO_WORDS),
        ([2016, [0.5, 0.6], "x"], NO_WORDS),
        ([[0.5, 0.6], "x"], NO_WORDS),
        (["2016", [0.5, 0.6, 0.7], "x"], NO_WORDS),
        (["2016", 0.5, 0.6, "x"], NO_WORDS),
        (["2016", "0.5", "x"], NO_WORDS),
        (["a\ud800", [0.5, 0.6], "x"], NO_WORDS),
        ({"word": "2016", "start": 0.5, "end": 0.6}, NO_WORDS),
        ("2016", NO_WORDS),
        ([], NO_WORDS),
        (None, NO_WORDS),
        (3, NO_WORDS),
    ],
)
def test_a_word_that_lacks_something_costs_that_word(entry: Any, why: str) -> None:
    before, after = ["in", [0.2, 0.4], "x"], ["ok", [0.9, 1.1], "y"]
    left_out: Counter[str] = Counter()
    words = parse_words([before, entry, after, entry], left_out)
    assert [word.text for word in words] == ["in", "ok"] and left_out == {why: 2}
    with pytest.raises(
        ValueError, match=rf"`alignments` has no entry that is .*: all are {why}, the first is "
    ) as told:
        parse_words([entry], left_out)
    assert f"{entry!r:.80}" in str(told.value) and left_out == {why: 2}


@pytest.mark.parametrize("alignments", ["words", {"a": 1}, None, 3])
def test_no_list(alignments: Any) -> None:
    with pytest.raises(ValueError, match=r"`alignments` must be a list of \[word, "):
        parse_words(alignments)
