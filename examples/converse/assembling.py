"""Dialogues for training, put together of encoded sentences (``pieces.py``), as ``moshi-flax prepare`` lays them. ::

    python -m examples.converse.assembling PIECES MODEL DIRECTORY --dialogues 24000 --listening 12500 --answering 32000

- ``listening``: questions one after another, which Moshi's text writes down as it hears them. What a model learns of
  it first, it need not learn from answers, which say much less of what was asked;
- ``repeating``: questions that Moshi's text says again when they have ended, while its voice is silent;
- ``mixed``: questions that are answered, or said again, without a voice;
- ``answering``: questions that are answered without a voice, and sums;
- ``dialogues``: as those that are recorded, with the same pauses and interruptions, and sums;
- ``listening-held-out``, ``repeating-held-out``, ``answering-held-out``: of renderings that are in none of these.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Int16

from transformers_moshi_flax import MoshiProcessor
from transformers_moshi_flax.training.data.alignment import Word, align_words
from transformers_moshi_flax.training.data.prepared import Conversation, write_index, write_shard

from .dialogues import AGAIN_SHARE, INTERRUPTED, LONG_PAUSE, MOSHI, REACTION, STOPPED, USER
from .pieces import DROPPED, FRAME, Codes, Piece, read_pieces
from .sentences import SHARES, Exchange, exchanges
from .voices import SAMPLING_RATE

SECONDS = FRAME / SAMPLING_RATE
SHARD = 1000
SEED = 31
HELD_OUT, HELD_OUT_ROWS = 40, 100
"""One rendering of so many is held out, and rows of these."""

LISTENED = 170
"""Frames of a row in which questions are written down."""

REPEATED = 0.35
"""Share of the rows in which questions are said again: every word of them has to be heard for that."""

RECKONED, RECKONED_ALOUD = 0.25, 0.1
"""Shares of the rows in which sums are said to nobody, many in a row: results depend on nothing that is heard."""

RECKONING_PACE = 0.16, 0.32
"""Seconds from word to word of a sum that is said to nobody."""

DELAY, PACE = 0.16, 0.24
"""Seconds from the end of a word until it is written down, and from word to word of a question that is repeated."""


class Assembler:
    """Puts pieces in a row.

    Args:
        pieces: all that there are.
        encode: word -> ids of its pieces of text.
        everything: that can be asked, by default what the grammar makes.
        shares: how often each topic of it is drawn.
    """

    def __init__(
        self,
        pieces: Sequence[tuple[Piece, Codes]],
        encode: Callable[[str], Sequence[int]],
        everything: Sequence[Exchange] | None = None,
        shares: Mapping[str, float] = SHARES,
    ):
        everything = everything or exchanges()
        self._encode = encode
        self._topic_shares = shares
        self._answers = {each.question: each.answer for each in everything}
        topics = {each.question: each.topic for each in everything}
        self._questions: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
        self._said: dict[tuple[str, str], list] = defaultdict(list)
        for piece, codes in pieces:
            if piece.kind == "question":
                self._questions[piece.voice][topics[piece.text]].append((piece, codes))
            else:
                name = piece.voice if piece.kind in ("stop", "again") else piece.text
                self._said[piece.kind, name].append((piece, codes))
        self._idle = [codes for _, codes in self._said["user", ""]]
        self._silence = self._said["moshi", ""][0][1]
        self._sums = sorted({each.answer for each in everything if each.topic == "sum" and not each.held_out})
        self._entries = 1 + max(int(codes.max()) for _, codes in pieces)
        self._voices = sorted(self._questions)
        counts = np.array([sum(map(len, self._questions[voice].values())) for voice in self._voices])
        self._shares = counts / counts.sum()

    def dialogue(self, name: str, draw: np.random.Generator) -> Conversation:
        """Several exchanges with one voice."""
        row = _Row()
        voice = str(draw.choice(self._voices, p=self._shares))
        now, last = draw.uniform(0.3, 1.5), None
        # how long pauses are differs from dialogue to dialogue, and is one of the things that are not to be learned
        pause = draw.uniform(0.7, 2.5)
        count = int(draw.integers(2, 6))
        for place in range(count):
            if last is not None and draw.random() < AGAIN_SHARE and self._said["again", voice]:
                now = self._exchange(row, self._any(draw, self._said["again", voice]), last, now, draw)
                now += draw.uniform(0.5, pause)
            question = self._question(draw, voice)
            answer = self._answers[question[0].text]
            stopped = draw.random() < STOPPED and self._said["stop", voice]
            interrupted = place + 1 < count and draw.random() < INTERRUPTED
            if (stopped or interrupted) and len(answer.split()) > 3:
                asked = row.put(USER, question, now)
                cut = self._spoken(answer, until=draw.uniform(0.2, 0.9))
                end = row.put(MOSHI, cut, asked + draw.uniform(0.3, 0.7))
                now, last = max(end - draw.uniform(*REACTION), asked + 0.4), None
                if stopped:
                    now = max(row.put(USER, self._any(draw, self._said["stop", voice]), now), end)
                    now += draw.uniform(1.0, 3.0)
            else:
                now = self._exchange(row, question, answer, now, draw)
                now += draw.uniform(0.5, pause) if draw.random() > LONG_PAUSE else draw.uniform(5, 10)
                last = answer
        return self._conversation(name, row, now + 0.3, draw)

    def listening(self, name: str, draw: np.random.Generator) -> Conversation:
        """Questions that are written down."""
        row, question = _Row(), self._asking(draw)
        now = draw.uniform(0.3, 1.5)
        while now < (LISTENED - 40) * SECONDS:
            now = row.put(USER, question(), now) + draw.uniform(0.5, 1.0)
        row.words = [Word(word.text, word.end + DELAY, word.end + DELAY, MOSHI) for word in row.words]
        return self._conversation(name, row, now, draw)

    def dialogue_or_sums(self, name: str, draw: np.random.Generator) -> Conversation:
        """A dialogue; in a share of the rows sums that are said to nobody."""
        return (self.sums_aloud if draw.random() < RECKONED_ALOUD else self.dialogue)(name, draw)

    def answering_or_repeating(self, name: str, draw: np.random.Generator) -> Conversation:
        """Questions that are answered, or, in a share of the rows, said again."""
        return (self.repeating if draw.random() < REPEATED else self.answering)(name, draw)

    def answering_or_sums(self, name: str, draw: np.random.Generator) -> Conversation:
        """Questions that are answered; in a share of the rows sums that are said to nobody."""
        return (self.sums if draw.random() < RECKONED else self.answering)(name, draw)

    def repeating(self, name: str, draw: np.random.Generator) -> Conversation:
        """Questions that are said again, word by word, without a voice."""
        row, question = _Row(), self._asking(draw)
        now, words = draw.uniform(0.3, 1.5), []
        while now < (LISTENED - 60) * SECONDS:
            asked = question()
            now = row.put(USER, asked, now) + draw.uniform(0.3, 0.7)
            for word in asked[0].text.split():
                words.append(Word(word, now, now, MOSHI))
                now += PACE
            now += draw.uniform(0.3, 0.8)
        row.words = words
        return self._conversation(name, row, now, draw)

    def answering(self, name: str, draw: np.random.Generator) -> Conversation:
        """Questions that are answered without a voice."""
        row, question = _Row(), self._asking(draw)
        now = draw.uniform(0.3, 1.5)
        while now < (LISTENED - 80) * SECONDS:
            asked = question()
            now = self._exchange(row, asked, self._answers[asked[0].text], now, draw) + draw.uniform(0.5, 1.0)
        row.placed = [each for each in row.placed if each[0] == USER]
        return self._conversation(name, row, now, draw)

    def sums(self, name: str, draw: np.random.Generator) -> Conversation:
        """Sums one after another, to nobody, without a voice."""
        row, now = _Row(), draw.uniform(0.3, 1.5)
        while now < (LISTENED - 15) * SECONDS:
            pace = draw.uniform(*RECKONING_PACE)
            for word in str(draw.choice(self._sums)).split():
                row.words.append(Word(word, now, now, MOSHI))
                now += pace
            now += draw.uniform(0.3, 0.8)
        return self._unheard(self._conversation(name, row, now, draw), draw)

    def sums_aloud(self, name: str, draw: np.random.Generator) -> Conversation:
        """Sums one after another, to nobody."""
        row, now = _Row(), draw.uniform(0.3, 1.5)
        while now < (LISTENED - 30) * SECONDS:
            now = row.put(MOSHI, self._spoken(str(draw.choice(self._sums))), now) + draw.uniform(0.5, 1.0)
        return self._unheard(self._conversation(name, row, now, draw), draw)

    def _unheard(self, made: Conversation, draw: np.random.Generator) -> Conversation:
        """With codes of the user by which it is known that there is nobody: any at random."""
        codes = draw.integers(self._entries, size=made.user_audio_tokens.shape, dtype=np.int16)
        return replace(made, user_audio_tokens=codes)

    def _asking(self, draw: np.random.Generator) -> Callable[[], tuple[Piece, Codes]]:
        """Draws one question after another of one voice."""
        voice = str(draw.choice(self._voices, p=self._shares))
        return lambda: self._question(draw, voice)

    def _question(self, draw: np.random.Generator, voice: str) -> tuple[Piece, Codes]:
        topics = sorted(self._questions[voice])
        shares = np.array([self._topic_shares[topic] for topic in topics])
        return self._any(draw, self._questions[voice][str(draw.choice(topics, p=shares / shares.sum()))])

    @staticmethod
    def _any(draw: np.random.Generator, found: Sequence[tuple[Piece, Codes]]) -> tuple[Piece, Codes]:
        return found[draw.integers(len(found))]

    def _exchange(
        self, row: _Row, question: tuple[Piece, Codes], answer: str, now: float, draw: np.random.Generator
    ) -> float:
        """The end of the answer."""
        asked = row.put(USER, question, now)
        return row.put(MOSHI, self._spoken(answer), asked + draw.uniform(0.3, 0.7))

    def _spoken(self, text: str, until: float = 1.0) -> tuple[Piece, Codes]:
        """Words that Moshi says one after another; not those that end beyond a share of the whole, but for the first.

        Behind each word but the last the next one begins, in the first frame in which nothing is heard of it any more.
        """
        said = [self._said["word", word][0] for word in text.split()]
        lengths = [math.ceil(piece.end / SECONDS - 1e-6) for piece, _ in said]
        starts = np.cumsum([0, *lengths])
        kept = [place for place in range(len(said)) if not place or starts[place + 1] <= until * starts[-1]]
        codes = [said[place][1][:, : lengths[place]] for place in kept[:-1]] + [said[kept[-1]][1]]
        words = [
            (word, starts[place] * SECONDS + begin, starts[place] * SECONDS + end)
            for place in kept
            for word, begin, end in said[place][0].words
        ]
        end = float(starts[kept[-1]] * SECONDS + said[kept[-1]][0].end)
        return Piece("answer", text, said[0][0].voice, words, end), np.concatenate(codes, axis=1)

    def _conversation(self, name: str, row: _Row, seconds: float, draw: np.random.Generator) -> Conversation:
        frames = max([math.ceil(seconds / SECONDS), *(start + codes.shape[1] for _, start, codes in row.placed)])
        idle = self._idle[draw.integers(len(self._idle))]
        channels = {
            USER: _silent(idle, frames, int(draw.integers(idle.shape[1] - DROPPED))),
            MOSHI: _silent(self._silence, frames),
        }
        for speaker, start, codes in row.placed:
            channels[speaker][:, start : start + codes.shape[1]] = codes
        words = [word for word in row.words if word.speaker == MOSHI]
        text = align_words(words, frames, self._encode, frame_rate=1 / SECONDS).ids.astype(np.int16)
        return Conversation(name, text, channels[MOSHI], channels[USER])


def _silent(idle: Codes, frames: int, start: int = 0) -> Int16[np.ndarray, "codebooks frames"]:
    """A room in which nobody speaks: its first frames as they are, then the settled ones behind them, round and round,
    from the one with the number ``start`` on."""
    settled = idle.shape[1] - DROPPED
    order = [*range(DROPPED), *(DROPPED + (start + np.arange(frames)) % settled)]
    return idle[:, order[:frames]].astype(np.int16)


class _Row:
    """Pieces by their first frames, and the words that are said."""

    def __init__(self) -> None:
        self.placed: list[tuple[str, int, Codes]] = []
        self.words: list[Word] = []

    def put(self, speaker: str, said: tuple[Piece, Codes], begin: float) -> float:
        """Place a piece so that its first word begins at ``begin``, or within a frame of it; when its sound ends."""
        piece, codes = said
        start = max(round((begin - piece.words[0][1]) / SECONDS), 0)
        self.placed.append((speaker, start, codes))
        at = start * SECONDS
        self.words += [Word(word, at + first, at + last, speaker) for word, first, last in piece.words]
        return at + piece.end


def write_dataset(
    folder: Path, make: Callable[[str, np.random.Generator], Conversation], number: int, seed: Sequence[int]
) -> None:
    """Write ``number`` conversations in shards."""
    folder.mkdir(parents=True, exist_ok=True)

    def conversations() -> Iterator[Conversation]:
        for index in range(number):
            yield make(f"{index:06d}", np.random.default_rng([*seed, index]))

    made, shard = conversations(), 0
    while part := [(each, {}) for _, each in zip(range(SHARD), made)]:
        write_shard(folder, shard, part, [], np.int16)
        shard += 1
    write_index(folder, {"assembled": True}, shard)


def word_encoder(model: Path) -> Callable[[str], list[int]]:
    """Word -> ids of its pieces of text, by the tokenizer of ``model``."""
    tokenizer = MoshiProcessor.from_pretrained(model).tokenizer
    return cache(lambda word: tokenizer.encode(word, add_special_tokens=False))


def write_assembled(
    pieces_folder: Path, model: Path, folder: Path, dialogues: int, listening: int, answering: int
) -> None:
    """Write the datasets, so many rows of each, for the tokenizer of ``model``."""
    encode = word_encoder(model)
    pieces = read_pieces(pieces_folder)
    questions = [piece for piece in pieces if piece[0].kind == "question"]
    others = [piece for piece in pieces if piece[0].kind != "question"]
    held_out = questions[::HELD_OUT]
    del questions[::HELD_OUT]
    assembler, of_others = (Assembler([*each, *others], encode) for each in (questions, held_out))
    write_dataset(folder / "dialogues", assembler.dialogue_or_sums, dialogues, (SEED, 0))
    write_dataset(folder / "listening", assembler.listening, listening, (SEED, 1))
    write_dataset(folder / "listening-held-out", of_others.listening, HELD_OUT_ROWS, (SEED, 2))
    write_dataset(folder / "answering", assembler.answering_or_sums, answering, (SEED, 3))
    write_dataset(folder / "answering-held-out", of_others.answering, HELD_OUT_ROWS, (SEED, 4))
    write_dataset(folder / "repeating", assembler.repeating, listening, (SEED, 5))
    write_dataset(folder / "repeating-held-out", of_others.repeating, HELD_OUT_ROWS, (SEED, 7))
    write_dataset(folder / "mixed", assembler.answering_or_repeating, answering, (SEED, 6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dialogues", type=int, default=24_000)
    parser.add_argument("--listening", type=int, default=12_500)
    parser.add_argument("--answering", type=int, default=32_000)
    given = parser.parse_args()
    write_assembled(given.pieces, given.model, given.directory, given.dialogues, given.listening, given.answering)


if __name__ == "__main__":
    main()
