"""Text files as tokens: what is read, what ends a text, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.training.text.runs import WORDS, draw_texts, write_lines, write_tokenizer
from transformers_moshi_flax.training.text.texts import Texts, read_texts, tokenized


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("w1 w2\nw3")
    (tmp_path / "empty.txt").write_text("")
    write_lines(tmp_path / "b" / "lines.jsonl", ["w4 w5", "", "w6"])
    (tmp_path / "b" / "c" / "page.md").write_text("w7")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    return tmp_path


def split(texts: Texts) -> list[list[int]]:
    return [texts.tokens[begin:end].tolist() for begin, end in zip(texts.begins, texts.ends)]


def test_files_and_lines_are_texts(folder: Path) -> None:
    assert list(read_texts(folder)) == ["w1 w2\nw3", "w7", "w4 w5", "w6"]
    assert list(read_texts(folder / "a.txt")) == ["w1 w2\nw3"]


def test_each_ends_with_the_end_of_text(folder: Path) -> None:
    tokenizer = write_tokenizer(folder)
    (folder / "a.txt").write_text("w1 w2 w0")  # which has its end already
    assert split(tokenized(folder, tokenizer, WORDS)) == [[1, 2, 0], [7, 0], [4, 5, 0], [6, 0]]
    assert split(tokenized(folder / "b", tokenizer, WORDS, start=WORDS))[0] == [WORDS, 7, 0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, ["there is no", "none.txt"]),
        ("data.csv", b"w1", ["data.csv", ".txt", ".jsonl"]),
        ("latin.txt", "é".encode("latin-1"), ["latin.txt", "UTF-8"]),
        ("lines.jsonl", b'{"text": "w1"}\n\n{"text": w2}\n', ["lines.jsonl", "line 3", "no JSON"]),
        ("lines.jsonl", b'{"words": "w1"}\n', ["line 1", '"text"']),
        ("lines.jsonl", b"[1]\n", ["line 1", '"text"']),
        ("blank.txt", b"", ["blank.txt", "no text"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, words: list[str]) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        tokenized(tmp_path / name, tokenizer, WORDS)
    for word in words:
        assert word in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    path = write_lines(tmp_path / "train.jsonl", ["w1 w30"])
    with pytest.raises(ValueError, match="the id 30, but the model has the ids 0 to 19"):
        tokenized(path, tokenizer, 20)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end of text"):
        tokenized(path, tokenizer, WORDS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no \.txt"):
        list(read_texts(tmp_path / "empty"))


def test_a_share_is_held_out(tmp_path: Path) -> None:
    """Every text is on one side, and the seed alone decides on which."""
    texts = tokenized(write_lines(tmp_path / "t.jsonl", draw_texts()), write_tokenizer(tmp_path / "t"), WORDS)
    train, held_out = texts.parted(0.2, seed=1)
    assert (len(train), len(held_out)) == (8, 2)
    assert sorted(split(train) + split(held_out)) == sorted(split(texts))
    again, other = texts.parted(0.2, seed=1), texts.parted(0.2, seed=2)
    assert again[0].fingerprint == train.fingerprint != other[0].fingerprint
    with pytest.raises(ValueError, match="there is one only"):
        texts.chosen(np.array([3])).parted(0.5, seed=0)
