"""The inner monologue with its times."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax.cli.errors import one_line
from transformers_moshi_flax.cli.transcript import (
    END_OF_PAD,
    LINE_LENGTH,
    PAD,
    LiveWords,
    Timed,
    joined,
    subtitles,
    timed_words,
    to_record,
    to_srt,
)

RATE = 12.5


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(RANDOM_MODEL)


def frames_of(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_words_have_the_times_of_their_pieces(tokenizer):
    hello, i_am = frames_of(tokenizer, "Hello,"), frames_of(tokenizer, "I am")
    assert len(hello) == 4 and len(i_am) == 3
    ids = [PAD, END_OF_PAD, *hello, PAD, PAD, END_OF_PAD, i_am[0], i_am[1], PAD, i_am[2], PAD]
    words = timed_words(np.array(ids, np.int32), tokenizer, RATE)
    assert words == [Timed("Hello,", 0.16, 0.48), Timed("I", 0.72, 0.8), Timed("am", 0.8, 1.04)]


def test_what_is_no_piece_is_no_word(tokenizer):
    ids = [PAD, END_OF_PAD, *tokenizer.all_special_ids, len(tokenizer), -1]
    assert timed_words(np.array(ids, np.int32), tokenizer, RATE) == []


@pytest.mark.parametrize("seed", range(5))
def test_words_as_they_come_are_those_of_the_whole(tokenizer, seed: int):
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, len(tokenizer), 200, np.int32)
    ids[draw.random(200) < 0.6] = PAD
    live = LiveWords(tokenizer, RATE)
    given = [(frame, word) for frame, token in enumerate(ids.tolist()) for word in live.put(token)]
    assert [word for _, word in given] + live.end() == timed_words(ids, tokenizer, RATE)
    # none is told before its last piece
    assert all(word.end <= (frame + 1) / RATE + 1e-6 for frame, word in given)
    assert live.end() == []


def test_a_word_is_told_when_the_next_one_begins_or_after_a_pause(tokenizer):
    hello, i = frames_of(tokenizer, "Hello,"), frames_of(tokenizer, "I")
    live = LiveWords(tokenizer, RATE)
    told = [live.put(token) for token in [PAD, *hello, PAD, *i, *[PAD] * 20]]
    frames = [frame for frame, words in enumerate(told) if words]
    assert frames == [1 + len(hello) + 1, 1 + len(hello) + 1 + len(i) - 1 + 10]


@pytest.mark.parametrize("seed", range(5))
def test_words_together_are_the_decoded_text(tokenizer, seed: int):
    ids = np.random.default_rng(seed).integers(0, len(tokenizer), 200, np.int32)
    words = timed_words(ids, tokenizer, RATE)
    pieces = [int(token) for token in ids if token not in (PAD, END_OF_PAD)]
    assert joined(words) == one_line(tokenizer.decode(pieces, skip_special_tokens=True))
    assert all(word.start < word.end for word in words)
    assert all(one.end <= other.start for one, other in pairwise(words))


def test_record_has_every_token(tokenizer):
    ids = np.array([PAD, *frames_of(tokenizer, "I"), len(tokenizer)], np.int32)
    record = to_record(ids, tokenizer, RATE)
    assert record["text"] == "I"
    assert record["words"] == [{"text": "I", "start": 0.08, "end": 0.16}]
    assert record["tokens"] == [
        {"frame": 0, "start": 0.0, "id": PAD, "piece": "<pad>"},
        {"frame": 1, "start": 0.08, "id": int(ids[1]), "piece": "▁I"},
        {"frame": 2, "start": 0.16, "id": len(tokenizer), "piece": None},
    ]


def test_lines_end_with_a_sentence_a_pause_or_when_full():
    long = [Timed(word * 10, 20.0 + at, 20.5 + at) for at, word in enumerate("abcde")]
    words = [
        Timed("Well.", 0.0, 0.1),
        Timed("I", 0.2, 0.3),
        Timed("think", 1.0, 1.5),
        Timed("so", 2.3, 2.4),
        *long,
        Timed("w" * 50, 25.2, 25.3),
    ]
    lines = subtitles(words, duration=25.9)
    assert [line.text for line in lines] == [
        "Well.",
        "I think",
        "so",
        f"{'a' * 10} {'b' * 10} {'c' * 10}",
        *[f"{'d' * 10} {'e' * 10}", "w" * 42, "w" * 8],
    ]
    assert [line.start for line in lines] == [0.0, 0.2, 2.3, 20, 23, 25.2, 25.284]
    # a second longer than the last word, but neither into the next line nor beyond the end
    assert [line.end for line in lines] == [0.2, 2.3, 3.4, 23, 25.2, 25.284, 25.9]


@pytest.fixture(scope="module")
def japanese() -> PreTrainedTokenizerFast:
    """No piece begins with a space; unknown characters are bytes."""
    special = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0)]
    pieces = [(character, -1.0) for character in "もしはい元気です。"] + [
        (f"<0x{byte:02X}>", -9.0) for byte in range(256)
    ]
    model = Tokenizer(Unigram(special + pieces, 0, byte_fallback=True))
    model.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", pad_token="<pad>")


def spoken(tokenizer: PreTrainedTokenizerFast, frames: int, **texts: str) -> np.ndarray:
    """One id a frame, of the pieces of each text from the frame of its name on (``at_10``)."""
    ids = np.full(frames, PAD, np.int32)
    for name, text in texts.items():
        start = int(name.removeprefix("at_"))
        pieces = tokenizer.convert_tokens_to_ids(
            [
                piece
                for character in text
                for piece in (character if character in "もしはい元気です。" else bytes_of(character))
            ]
        )
        ids[start : start + len(pieces)] = pieces[: frames - start]
    return ids


def bytes_of(character: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in character.encode()]


def test_words_without_spaces_end_by_time(japanese):
    words = timed_words(spoken(japanese, 500, at_10="もし", at_400="はい", at_402="です"), japanese, RATE)
    assert words == [Timed("もし", 0.8, 0.96, False), Timed("はいです", 32.0, 32.32, False)]
    assert joined(words) == "もしはいです"
    assert [line.text for line in subtitles(words, 40.0)] == ["もし", "はいです"]


def test_words_without_spaces_end_with_sentences_and_lines(japanese):
    words = timed_words(spoken(japanese, 40, at_3="元気。もし。"), japanese, RATE)
    assert [word.text for word in words] == ["元気。", "もし。"]
    assert [line.text for line in subtitles(words, 4.0)] == ["元気。", "もし。"]
    long = timed_words(spoken(japanese, 400, at_10="もしはい元気です" * 40), japanese, RATE)
    assert joined(long) == "もしはい元気です" * 40
    lines = subtitles(long, 40.0)
    assert {len(line.text) for line in lines[:-1]} == {LINE_LENGTH} and len(lines[-1].text) <= LINE_LENGTH
    assert lines[1].start == (10 + LINE_LENGTH) / RATE


def test_half_a_character_is_left_out(japanese):
    (word,) = timed_words(spoken(japanese, 8, at_2="も😀"), japanese, RATE)
    assert word.text == "も😀"
    (word,) = timed_words(spoken(japanese, 6, at_2="も😀"), japanese, RATE)  # the dialogue ends in it
    assert word.text == "も"
    assert timed_words(spoken(japanese, 4, at_2="😀"), japanese, RATE) == []
    # nor is one cut by the end of a line
    words = timed_words(spoken(japanese, 90, at_2="も" * 41 + "😀" * 9), japanese, RATE)
    assert joined(words) == "も" * 41 + "😀" * 9


def test_srt():
    lines = [Timed("Hello, I am", 0.16, 1.04), Timed("here", 3723.4567, 3724.0)]
    assert to_srt(lines) == (
        "1\n00:00:00,160 --> 00:00:01,040\nHello, I am\n\n2\n01:02:03,457 --> 01:02:04,000\nhere\n"
    )
    assert to_srt([]) == ""
