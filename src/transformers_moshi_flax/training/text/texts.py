"""Text files -> tokens, all in memory, text by text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

SUFFIXES = (".txt", ".md")
LINES = ".jsonl"
AT_ONCE = 1000
"""Texts that the tokenizer gets at once."""


@dataclass(frozen=True)
class Texts:
    """Texts as tokens.

    Attributes:
        tokens: of all texts behind one another, ``(tokens,)`` int32.
        ends: where each of them ends, ``(texts,)`` int64.
    """

    tokens: Int[np.ndarray, "tokens"]
    ends: Int[np.ndarray, "texts"]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def begins(self) -> Int[np.ndarray, "texts"]:
        """Where each of them begins."""
        return np.concatenate([[0], self.ends[:-1]]).astype(np.int64)

    @property
    def fingerprint(self) -> str:
        """Changes with what they hold."""
        return hashlib.sha256(self.tokens.tobytes() + self.ends.tobytes()).hexdigest()

    def chosen(self, numbers: Int[np.ndarray, "chosen"]) -> Texts:
        """Some of them."""
        begins = self.begins
        return joined([self.tokens[begins[number] : self.ends[number]] for number in numbers])

    def parted(self, share: float, seed: int) -> tuple[Texts, Texts]:
        """Most of them, and a share of them (at least one) that is drawn by the seed.

        Raises:
            ValueError: there is one text only.
        """
        if len(self) < 2:
            raise ValueError(
                f"{share} of the texts are to be held out, but there is one only; give more texts, such as its parts "
                "as JSON lines, or held-out texts of their own"
            )
        order = np.random.default_rng([seed, len(self)]).permutation(len(self))
        count = min(max(1, round(share * len(self))), len(self) - 1)
        return self.chosen(np.sort(order[count:])), self.chosen(np.sort(order[:count]))


def joined(texts: Sequence[Int[np.ndarray, "_"]]) -> Texts:
    """Texts behind one another."""
    tokens = np.concatenate([np.zeros((0,), np.int32), *texts]).astype(np.int32)
    return Texts(tokens, np.cumsum([len(text) for text in texts], dtype=np.int64))


def read_texts(path: str | Path) -> Iterator[str]:
    """The texts of a file, or of all files of a folder in the order of their names; empty ones are left out.

    A file of text is one text, a line of a ``.jsonl`` file another (its ``text``).

    Raises:
        ValueError: there is no such file, or none in the folder; a file is not UTF-8, or a line no JSON with ``text``.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (*SUFFIXES, LINES) and file.is_file())
        if not files:
            raise ValueError(f"{str(path)!r} has no {', '.join((*SUFFIXES, LINES))} in it; give a folder of texts")
    elif not path.is_file():
        raise ValueError(f"there is no {str(path)!r}; give a text, JSON lines or a folder of such files")
    elif path.suffix not in (*SUFFIXES, LINES):
        raise ValueError(f"{str(path)!r} must end in {', '.join(SUFFIXES)} (a text) or {LINES} (JSON lines)")
    else:
        files = [path]
    for file in files:
        try:
            content = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(file)!r} is not UTF-8 ({error}); convert it") from error
        yield from filter(None, _lines(file, content) if file.suffix == LINES else [content])


def _lines(file: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{str(file)!r}, line {number}: no JSON ({error})") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{str(file)!r}, line {number}: it has no text; write {{"text": "..."}}')
        yield text


def tokenized(path: str | Path, tokenizer: Any, vocab_size: int, start: int | None = None) -> Texts:
    """The texts at ``path`` as tokens, each ended by the tokenizer's end of text.

    Args:
        path: see :func:`read_texts`.
        tokenizer: of ``transformers``; what it puts around a text (such as a beginning) stays.
        vocab_size: of the model.
        start: an id that begins every text instead, if the model has one outside of its vocabulary.

    Raises:
        ValueError: as of :func:`read_texts`; the tokenizer has no end of text, or ids that the model has not; there is
            nothing to be predicted.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end of text (eos_token), which is to part texts; give it one")
    texts: list[np.ndarray] = []
    waiting: list[str] = []

    def tokenize() -> None:
        options = {"add_special_tokens": start is None, "verbose": False}
        for ids in tokenizer(waiting, **options)["input_ids"] if waiting else ():
            ids = [*ids] if start is None else [start, *ids]
            texts.append(np.array(ids if ids[-1:] == [end] else [*ids, end], np.int32))
        waiting.clear()

    for text in read_texts(path):
        waiting.append(text)
        if len(waiting) == AT_ONCE:
            tokenize()
    tokenize()
    found = joined([text for text in texts if len(text) > 1])
    if not len(found):
        raise ValueError(f"{str(path)!r} has no text in it")
    known = found.tokens[found.tokens != start] if start is not None else found.tokens
    if known.size and known.max() >= vocab_size:
        raise ValueError(
            f"{str(path)!r}: the tokenizer gives the id {known.max()}, but the model has the ids 0 to "
            f"{vocab_size - 1}; give the model's own tokenizer"
        )
    return found
