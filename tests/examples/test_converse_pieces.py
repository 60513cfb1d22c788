"""Sentences in codes, and dialogues that are put together of them."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.examples.test_converse import speak_tones
from transformers_moshi_flax import FlaxMimiModel
from transformers_moshi_flax.cli.checkpoints import EMBEDDED_MODEL
from transformers_moshi_flax.training.data.prepared import open_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.converse import pieces as module
from examples.converse.assembling import LISTENED, RECKONED, RECKONED_ALOUD, REPEATED, Assembler, write_dataset
from examples.converse.pieces import (
    AFTER,
    DROPPED,
    FRAME,
    Piece,
    Row,
    draw_rows,
    read_pieces,
    spoken_row,
    write_pieces,
)
from examples.converse.sentences import all_words, exchanges
from examples.converse.voices import SAMPLING_RATE, Voice
from transformers import MimiConfig

QUESTIONS = 30
IDLE_FRAMES = 30
"""Of silence, so that silence alone has no more kinds of frames."""


@pytest.fixture(autouse=True)
def voices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Voice, "__call__", speak_tones)


@pytest.fixture(scope="module")
def codec() -> FlaxMimiModel:
    """One with codes of several values, and little to compute."""
    model = FlaxMimiModel(
        MimiConfig(
            num_filters=2,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
            upsampling_ratios=[4, 5, 6, 8],
            frame_rate=12.5,
            codebook_size=16,
            codebook_dim=8,
            vector_quantization_hidden_dimension=8,
            num_quantizers=2,
            sliding_window=8,
            upsample_groups=16,
        )
    )
    draw = np.random.default_rng(0)
    leaves = flatten_dict(model.params)
    for path, leaf in leaves.items():
        if path[-1] == "embed_sum":
            leaves[path] = draw.standard_normal(leaf.shape).astype(np.float32)
        elif path[-1] == "cluster_usage":
            leaves[path] = np.ones_like(leaf)
    model.params = unflatten_dict(leaves)
    return model


@pytest.fixture(scope="module")
def folder(codec: FlaxMimiModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    codec.save_pretrained(folder / "codec")
    with pytest.MonkeyPatch.context() as patches:
        make_small(patches)
        write_pieces(folder / "codec", folder / "pieces", QUESTIONS)
    return folder


def make_small(patches: pytest.MonkeyPatch) -> None:
    """Tones, in a thread, in parts of a few rows."""
    patches.setattr(Voice, "__call__", speak_tones)
    patches.setattr(module, "ProcessPoolExecutor", lambda number, mp_context: ThreadPoolExecutor(number))
    patches.setattr(module, "PART", 8)
    patches.setattr(module, "IDLE", IDLE_FRAMES)


def test_words_of_a_piece_lie_where_they_are_heard() -> None:
    said = (("question", "what is one plus two"), ("stop", "stop"), ("again", "again please"))
    for speaker, sentences in (("user", said), ("moshi", (("word", "one"), ("word", "A")))):
        for seed in range(4):
            pieces, sound = spoken_row(Row(speaker, sentences, (seed,)))
            assert [(piece.kind, piece.text) for piece, _, _ in pieces] == list(sentences)
            assert len(sound) == pieces[-1][2] * FRAME and pieces[0][1] >= DROPPED
            ends = [0]
            for piece, first, last in pieces:
                assert [word for word, _, _ in piece.words] == piece.text.split()
                loud = np.flatnonzero(np.abs(sound[first * FRAME : last * FRAME]) > 0.05) / SAMPLING_RATE
                assert loud[0] == pytest.approx(piece.words[0][1], abs=0.01)
                assert piece.words[-1][2] == pytest.approx(piece.end, abs=0.01)
                assert loud[-1] >= piece.end - 0.01  # an echo may follow
                assert last * 0.08 - (first * 0.08 + piece.end) >= AFTER * 0.08 and first >= ends[-1]
                ends.append(last)
            again, same = spoken_row(Row(speaker, sentences, (seed,)))
            assert again == pieces and np.array_equal(sound, same)


def test_held_out_sentences_are_not_spoken() -> None:
    held_out = {text for each in exchanges() if each.held_out for text in (each.question, each.answer)}
    known = {text for each in exchanges() if not each.held_out for text in (each.question, each.answer)}
    rows = draw_rows(30, 5000)
    drawn = [sentence for row in rows for sentence in row.sentences]
    assert not {text for _, text in drawn} & (held_out - known)
    assert len({row.seed for row in rows}) == len(rows)
    wanted = sorted({word for each in exchanges() for word in each.answer.split()})
    assert wanted == sorted(text for kind, text in drawn if kind == "word")
    assert sum(kind in ("question", "stop", "again") for kind, _ in drawn) == 5000
    assert all((row.speaker == "moshi") == (kind == "word") for row in rows for kind, _ in row.sentences)


def test_codes_are_those_of_the_sound(codec: FlaxMimiModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    found = read_pieces(folder / "pieces")
    rows = draw_rows(30, QUESTIONS)
    wanted = [sentence if row.sentences else (row.speaker, "") for row in rows for sentence in row.sentences or [()]]
    assert [(piece.kind, piece.text) for piece, _ in found] == wanted
    first_user = next(place for place, row in enumerate(rows) if row.speaker == "user" and row.sentences)
    pieces, sound = spoken_row(rows[first_user])
    codes = np.asarray(codec.encode(sound[None, None]).audio_codes)[0]
    before = sum(max(len(row.sentences), 1) for row in rows[:first_user])
    for (piece, first, last), (same, heard) in zip(pieces, found[before:]):
        assert piece == same and np.array_equal(heard, codes[:, first:last])
    assert len(np.unique(codes)) > 2


def test_parts_that_are_there_are_not_spoken_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "pieces").iterdir()}
    make_small(monkeypatch)
    lost = folder / "pieces" / "part-000.json"
    kept = lost.read_text()
    lost.unlink()
    write_pieces(folder / "codec", folder / "pieces", QUESTIONS)
    assert lost.read_text() == kept
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "pieces").iterdir()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"part-000.json", "part-000.safetensors", "done"} and len(before) > 3


WORDS = all_words()


def encode(word: str) -> list[int]:
    """One piece a word."""
    return [4 + WORDS.index(word)]


def spans(text: Any) -> list[int]:
    """Frames with words."""
    return np.flatnonzero((text != 3) & (text != 0)).tolist()


def _a_little_later(piece: Piece) -> Piece:
    """Words that begin within a frame, as those of voices do: rounded, the very beginning may be the frame before."""
    return replace(piece, words=[(word, begin + 1e-3, end) for word, begin, end in piece.words])


def test_answers_begin_when_the_question_has_ended(folder: Path) -> None:
    found = read_pieces(folder / "pieces")
    # codes that tell who speaks
    marks = {"word": 2, "moshi": 1, "user": 3, "question": 4, "stop": 4, "again": 4}
    found = [(_a_little_later(piece), np.full_like(codes, marks[piece.kind])) for piece, codes in found]
    assembler = Assembler(found, encode)
    begins = {encode(each.answer.split()[0])[0] for each in exchanges()}
    for seed in range(20):
        made = assembler.dialogue("one", np.random.default_rng(seed))
        text = made.moshi_text_tokens
        assert made.moshi_audio_tokens.shape == made.user_audio_tokens.shape == (2, len(text))
        assert set(np.unique(made.moshi_audio_tokens)) <= {1, 2} and set(np.unique(made.user_audio_tokens)) <= {3, 4}
        # what Moshi says is in the frames in which it speaks
        frames = spans(text)
        assert frames and (made.moshi_audio_tokens[0, frames] == 2).all()
        asks = np.flatnonzero(np.diff((made.user_audio_tokens[0] == 4).astype(int)) == 1)
        assert asks[0] < frames[0]
        assert text[frames[0]] in begins


def test_what_is_heard_is_written_down_when_it_has_been_said(folder: Path, tmp_path: Path) -> None:
    assembler = Assembler(read_pieces(folder / "pieces"), encode)
    made = assembler.listening("one", np.random.default_rng(0))
    questions = {tuple(encode(word)[0] for word in each.question.split()) for each in exchanges()}
    written = tuple(int(made.moshi_text_tokens[frame]) for frame in spans(made.moshi_text_tokens))
    assert any(written[: len(question)] == question for question in questions)
    assert len({tuple(column) for column in made.moshi_audio_tokens.T}) <= IDLE_FRAMES
    write_dataset(tmp_path / "rows", assembler.listening, 3, (0,))
    dataset = open_dataset(tmp_path / "rows")
    assert len(dataset) == 3
    assert dataset[1].frames == assembler.listening("x", np.random.default_rng([0, 1])).frames


def test_words_are_put_together(folder: Path) -> None:
    found = [(_a_little_later(piece), codes) for piece, codes in read_pieces(folder / "pieces")]
    words = {piece.text: (piece, codes) for piece, codes in found if piece.kind == "word"}
    assembler = Assembler(found, encode)
    text = "one plus two is three"
    piece, codes = assembler._spoken(text)
    assert [word for word, _, _ in piece.words] == text.split()
    start = 0
    for place, (word, begin, end) in enumerate(piece.words):
        alone, heard = words[word]
        assert round(begin / 0.08 - 0.1) == start and begin - start * 0.08 == pytest.approx(alone.words[0][1])
        frames = heard.shape[1] if place == 4 else int(np.ceil(alone.end / 0.08 - 1e-6))
        assert np.array_equal(codes[:, start : start + frames], heard[:, :frames])
        assert start * 0.08 <= begin < end <= (start + frames) * 0.08
        start += frames
    assert codes.shape[1] == start
    lengths = set()
    for until in np.linspace(0.05, 0.95, 10):
        cut, heard = assembler._spoken(text, until)
        lengths.add(len(cut.words))
        assert cut.words == piece.words[: len(cut.words)] and cut.end <= max(
            until * piece.end + 0.08, words["one"][0].end
        )
        assert heard.shape[1] - cut.end / 0.08 >= AFTER - 1
    assert lengths >= {1, 2, 3, 4} and 5 not in lengths


def test_pieces_fit_into_silence() -> None:
    """Codes that are put together are those of a recording but for a few, also where pieces begin and end."""
    codec = FlaxMimiModel.from_pretrained(EMBEDDED_MODEL, dtype=np.float32)
    row = Row("moshi", (("word", "one"), ("word", "A"), ("word", "hello")), (5,))
    pieces, sound = spoken_row(row)
    codes = np.asarray(codec.encode(sound[None, None]).audio_codes)[0]
    silence = np.asarray(codec.encode(np.zeros((1, 1, 120 * FRAME), np.float32)).audio_codes)[0][:, -1:]
    for _, first, last in pieces:
        alone = np.zeros(140 * FRAME, np.float32)
        alone[60 * FRAME : (60 + last - first) * FRAME] = sound[first * FRAME : last * FRAME]
        recorded = np.asarray(codec.encode(alone[None, None]).audio_codes)[0]
        assembled = np.repeat(silence, 140, axis=1)
        assembled[:, 60 : 60 + last - first] = codes[:, first:last]
        same = recorded == assembled
        behind = 60 + last - first
        assert same[:, 20:60].all() and same[:, 60:behind].mean() > 0.95 and same[:, behind:].mean() > 0.98


def test_questions_are_answered_without_a_voice(folder: Path) -> None:
    assembler = Assembler(read_pieces(folder / "pieces"), encode)
    answers = {tuple(encode(word)[0] for word in each.answer.split()) for each in exchanges()}
    for seed in range(5):
        made = assembler.answering("one", np.random.default_rng(seed))
        written = tuple(int(made.moshi_text_tokens[frame]) for frame in spans(made.moshi_text_tokens))
        assert any(written[: len(answer)] == answer for answer in answers)
        assert len({tuple(column) for column in made.moshi_audio_tokens.T}) <= IDLE_FRAMES
        assert made.frames <= LISTENED


def test_questions_are_said_again(folder: Path) -> None:
    assembler = Assembler(read_pieces(folder / "pieces"), encode)
    questions = {tuple(encode(word)[0] for word in each.question.split()) for each in exchanges()}
    made = assembler.repeating("one", np.random.default_rng(1))
    written = tuple(int(made.moshi_text_tokens[frame]) for frame in spans(made.moshi_text_tokens))
    assert any(written[: len(question)] == question for question in questions)
    assert len({tuple(column) for column in made.moshi_audio_tokens.T}) <= IDLE_FRAMES and made.frames <= LISTENED


@pytest.mark.parametrize("aloud", [False, True])
def test_sums_are_said_to_nobody(folder: Path, aloud: bool) -> None:
    pieces = read_pieces(folder / "pieces")
    known = {each.answer for each in exchanges() if each.topic == "sum" and not each.held_out}
    assembler = Assembler(pieces, encode)
    made = (assembler.sums_aloud if aloud else assembler.sums)("one", np.random.default_rng(1))
    written = [int(made.moshi_text_tokens[frame]) for frame in spans(made.moshi_text_tokens)]
    sums = {tuple(encode(word)[0] for word in text.split()) for text in known}
    whole = [tuple(written[start : start + 5]) for start in range(0, len(written), 5)]
    assert set(whole[:-1]) <= sums and len(whole) > 3
    silent = {tuple(column) for column in assembler._silence.T}
    assert ({tuple(column) for column in made.moshi_audio_tokens.T} <= silent) != aloud
    if not aloud:
        assert made.frames <= LISTENED
    entries = 1 + max(int(codes.max()) for _, codes in pieces)
    assert len(np.unique(made.user_audio_tokens)) > 0.9 * entries


@pytest.mark.parametrize(
    "mixed,parts,share",
    [
        ("answering_or_repeating", ("answering", "repeating"), REPEATED),
        ("answering_or_sums", ("answering", "sums"), RECKONED),
        ("dialogue_or_sums", ("dialogue", "sums_aloud"), RECKONED_ALOUD),
    ],
)
def test_rows_are_mixed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mixed: str, parts: tuple[str, str], share: float
) -> None:
    assembler = Assembler(read_pieces(folder / "pieces"), encode)
    for part in parts:
        monkeypatch.setattr(assembler, part, lambda name, draw, part=part: part)
    made = [getattr(assembler, mixed)("one", np.random.default_rng(seed)) for seed in range(400)]
    assert abs(made.count(parts[1]) / 400 - share) < 0.08 and set(made) == set(parts)
