"""Sentences in codes, for dialogues that are put together of them. ::

    python -m examples.converse.pieces CODEC DIRECTORY --questions 24000

Most of a recorded dialogue is silence: spoken a few in a row, several times as many renderings of questions cost what
whole dialogues do. Codes depend on what was heard before; so a row begins with silence that is dropped, and between
sentences there is as much as it takes until silence has its own codes again: codes that change where pieces meet would
tell a model when somebody is about to speak. What Moshi says is put together of words that are encoded by themselves:
then the text alone tells the codes. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soxr
from jaxtyping import Float32, UInt8
from safetensors.numpy import load_file, save_file

from transformers_moshi_flax import FlaxMimiModel

from .dialogues import MOSHI_VOICE, USER_VOICES, in_a_room
from .sentences import AGAIN, SHARES, STOP, Exchange, exchanges
from .voices import FRAME, SAMPLING_RATE, Voice, WordByWord

DROPPED, AFTER, GAP = 20, 14, 16
"""Frames in which nobody speaks: dropped at the beginning of a row, kept after a sentence, between two of them."""

SENTENCES = 6
"""In a row, which one voice speaks in one room; of Moshi, words."""

IDLE = 220
"""Frames of a piece in which nobody speaks at all, from the first that was ever heard."""

MORE_VOICES = ("flite:slt", "espeak:en+m1", "espeak:en+f5", "espeak:en-us+m6", "espeak:en+m4", "espeak:en-us+f3")
"""Heard in training beside those of the dialogues, in a share of the sentences."""

MORE_SHARE, STOP_SHARE, AGAIN_SHARE = 0.25, 0.03, 0.04
PART, BATCH, STEP = 128, 8, 16
"""Rows of a file, rows that are encoded at once, and frames whose multiples they are padded to."""

DONE = "done"
"""Name of an empty file, which tells that all parts are there."""


Codes = UInt8[np.ndarray, "codebooks frames"]
Sentence = tuple[str, str]
"""Kind and text; see :class:`Piece`."""


@dataclass(frozen=True)
class Row:
    """What is spoken one after the other.

    Attributes:
        speaker: ``user`` or ``moshi``.
        sentences: none is a piece in which nobody speaks.
        seed: of voice, room and times.
    """

    speaker: str
    sentences: tuple[Sentence, ...]
    seed: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A sentence in a row.

    Attributes:
        kind: ``question``, ``stop``, ``again``, ``word`` (one that Moshi says), ``user`` or ``moshi`` (nobody speaks);
            ``answer`` of words that ``assembling.py`` puts together.
        text: what is said.
        voice: its name.
        words: with begin and end in seconds from the piece's first frame.
        end: seconds until the sound ends.
    """

    kind: str
    text: str
    voice: str
    words: list[tuple[str, float, float]]
    end: float


def draw_rows(
    seed: int, number: int, everything: Sequence[Exchange] | None = None, shares: Mapping[str, float] = SHARES
) -> list[Row]:
    """What is to be spoken, for :func:`spoken_row`.

    Args:
        seed: of all.
        number: of what users say: questions, and what they say to stop Moshi or to hear it again. Moshi says every
            word of its answers once.
        everything: that can be asked, by default what the grammar makes; what is held out is left out.
        shares: how often each topic of it is drawn.
    """
    known = [each for each in (everything or exchanges()) if not each.held_out]
    by_topic = {topic: sorted({each.question for each in known if each.topic == topic}) for topic in shares}
    names, sizes = list(shares), list(shares.values())
    draw = np.random.default_rng([seed, 0])
    shares = (1 - STOP_SHARE - AGAIN_SHARE, STOP_SHARE, AGAIN_SHARE)
    asked: list[Sentence] = []
    for kind in draw.choice(("question", "stop", "again"), number, p=shares).tolist():
        texts = {"question": by_topic[str(draw.choice(names, p=sizes))], "stop": STOP, "again": AGAIN}[kind]
        asked.append((kind, str(draw.choice(texts))))
    said = [("word", word) for word in sorted({word for each in known for word in each.answer.split()})]
    channels = [("user", asked[start : start + SENTENCES]) for start in range(0, len(asked), SENTENCES)]
    channels += [("moshi", said[start : start + SENTENCES]) for start in range(0, len(said), SENTENCES)]
    channels += [("user", [])] * max(number // 100, 1) + [("moshi", [])]
    rows = [Row(speaker, tuple(each), (seed, 1, place)) for place, (speaker, each) in enumerate(channels)]
    # of each kind in every part, so that some parts alone are a smaller set
    return [rows[place] for place in draw.permutation(len(rows))]


Spoken = list[tuple[Piece, int, int]]
"""Pieces with their first frames and those behind their last ones."""


def spoken_row(row: Row) -> tuple[Spoken, Float32[np.ndarray, "samples"]]:
    """The pieces of a row, and its sound in whole frames."""
    draw = np.random.default_rng(list(row.seed))
    is_user = row.speaker == "user"
    if not row.sentences:
        audio = np.zeros(IDLE * FRAME, np.float32)
        piece = Piece(row.speaker, "", "", [], 0.0)
        return [(piece, 0, IDLE)], in_a_room(audio, draw) if is_user else audio
    voice: Voice | WordByWord = _drawn_voice(draw) if is_user else MOSHI_VOICE
    throat = draw.uniform(0.9, 1.1) if is_user and draw.random() < 0.5 else 1.0
    pieces: Spoken = []
    sounds: list[tuple[int, Float32[np.ndarray, "heard"]]] = []
    start = DROPPED * FRAME + _within_a_frame(is_user, draw)
    for kind, text in row.sentences:
        audio, words = _sentence(voice, text, throat)
        first, last = start // FRAME, -(-(start + len(audio)) // FRAME) + AFTER
        offset = (start - first * FRAME) / SAMPLING_RATE
        words = [(word, begin + offset, end + offset) for word, begin, end in words]
        pieces.append((Piece(kind, text, voice.name, words, offset + len(audio) / SAMPLING_RATE), first, last))
        sounds.append((start, audio))
        # Moshi begins to speak with a frame
        start = (last + GAP - AFTER) * FRAME + _within_a_frame(is_user, draw)
    sound = np.zeros(pieces[-1][2] * FRAME, np.float32)
    for begin, audio in sounds:
        sound[begin : begin + len(audio)] = audio
    return pieces, in_a_room(sound, draw) if is_user else sound


def _within_a_frame(is_user: bool, draw: np.random.Generator) -> int:
    """Samples from the beginning of a frame until somebody speaks: Moshi at once."""
    return int(draw.integers(FRAME)) if is_user else 0


def _sentence(
    voice: Voice | WordByWord, text: str, throat: float
) -> tuple[Float32[np.ndarray, "samples"], list[tuple[str, float, float]]]:
    """Sound and words."""
    spoken = voice(text)
    audio, words = spoken.audio, spoken.words
    if throat != 1.0:  # formants move with the pitch
        audio = soxr.resample(audio, SAMPLING_RATE, SAMPLING_RATE * throat).astype(np.float32)
        words = [(word, begin * throat, end * throat) for word, begin, end in words]
    return audio, words


def _drawn_voice(draw: np.random.Generator) -> Voice:
    name = str(draw.choice(MORE_VOICES if draw.random() < MORE_SHARE else USER_VOICES))
    return Voice(name, round(float(draw.uniform(0.85, 1.17)), 2), round(float(draw.uniform(0.82, 1.2)), 2))


def _spoken_part(rows: Sequence[Row]) -> list[tuple[Spoken, Float32[np.ndarray, "samples"]]]:
    return [spoken_row(row) for row in rows]


class _Encoder:
    """Codes of sounds of like lengths, many at once."""

    def __init__(self, codec: FlaxMimiModel):
        self._params = codec.params
        self._encode = jax.jit(lambda params, audio: codec.encode(audio, params=params).audio_codes)

    def __call__(self, sounds: Sequence[Float32[np.ndarray, "samples"]]) -> list[Codes]:
        lengths = [len(sound) // FRAME for sound in sounds]
        found: list[Any] = [None] * len(sounds)
        order = sorted(range(len(sounds)), key=lambda index: lengths[index])
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            longest = -(-max(lengths[index] for index in rows) // STEP) * STEP
            audio = np.zeros((BATCH, 1, longest * FRAME), np.float32)
            for row, index in enumerate(rows):
                audio[row, 0, : len(sounds[index])] = sounds[index]
            codes = np.asarray(self._encode(self._params, audio))
            for row, index in enumerate(rows):
                found[index] = codes[row, :, : lengths[index]].astype(np.uint8)
        return found


def write_pieces(
    codec: Path,
    folder: Path,
    questions: int,
    seed: int = 30,
    everything: Sequence[Exchange] | None = None,
    shares: Mapping[str, float] = SHARES,
) -> None:
    """Speak and encode, a part at a time; see :func:`draw_rows`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = draw_rows(seed, questions, everything, shares)
    parts = [rows[start : start + PART] for start in range(0, len(rows), PART)]
    missing = [number for number in range(len(parts)) if not (folder / f"part-{number:03d}.json").exists()]
    encode = _Encoder(FlaxMimiModel.from_pretrained(codec))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        following = pool.submit(_spoken_part, parts[missing[0]]) if missing else None
        for place, number in enumerate(missing):
            made = following.result()
            following = pool.submit(_spoken_part, parts[missing[place + 1]]) if place + 1 < len(missing) else None
            codes = encode([sound for _, sound in made])
            kept = [
                (piece, each[:, first:last]) for (pieces, _), each in zip(made, codes) for piece, first, last in pieces
            ]
            save_file(
                {"codes": np.concatenate([each for _, each in kept], axis=1)},
                folder / f"part-{number:03d}.safetensors",
            )
            records = [
                [piece.kind, piece.text, piece.voice, piece.words, piece.end, each.shape[1]] for piece, each in kept
            ]
            # last, as it tells that the part is done
            (folder / f"part-{number:03d}.json").write_text(json.dumps(records), encoding="utf-8")
            print(f"part {number + 1} of {len(parts)}", flush=True)
    (folder / DONE).touch()


def read_pieces(folder: Path) -> list[tuple[Piece, Codes]]:
    """All pieces that have been encoded."""
    found = []
    for path in sorted(folder.glob("part-*.json")):
        codes, start = load_file(path.with_suffix(".safetensors"))["codes"], 0
        for kind, text, voice, words, end, frames in json.loads(path.read_text(encoding="utf-8")):
            piece = Piece(kind, text, voice, [tuple(word) for word in words], end)
            found.append((piece, codes[:, start : start + frames]))
            start += frames
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--questions", type=int, default=24_000)
    given = parser.parse_args()
    write_pieces(given.codec, given.directory, given.questions)


if __name__ == "__main__":
    main()
