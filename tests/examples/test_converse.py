"""The corpus of dialogues: what is said, when it is said, and what is kept from training."""

from __future__ import annotations

import ctypes.util
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from transformers_moshi_flax.training.codec.recordings import open_recordings
from transformers_moshi_flax.training.data.alignment import parse_words

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.converse import dialogues  # noqa: E402
from examples.converse.dialogues import (  # noqa: E402
    MOSHI,
    USER,
    Dialogue,
    in_a_room,
    lay_out,
    write_dialogues,
    write_monologues,
    write_utterances,
)
from examples.converse.sentences import I_DO_NOT_KNOW, NUMBERS, STOP, exchanges  # noqa: E402
from examples.converse.voices import FRAME, SAMPLING_RATE, Spoken, Voice, WordByWord, pronounced, split_words  # noqa: E402

EVERYTHING = exchanges()


def speak_tones(voice: Voice, text: str) -> Spoken:
    """Every word is a fifth of a second of a tone."""
    words = split_words(text)
    time = np.arange(round(0.2 * len(words) * SAMPLING_RATE)) / SAMPLING_RATE
    spoken = [(word, 0.2 * place, 0.2 * place + 0.2) for place, word in enumerate(words)]
    return Spoken(np.sin(2 * np.pi * 300 * time).astype(np.float32), spoken)


def test_answers_are_right() -> None:
    sums = [each for each in EVERYTHING if each.topic == "sum"]
    for each in sums:
        first, sign, second, _, result = each.answer.split()
        values = [NUMBERS.index(word) for word in (first, second, result)]
        assert values[0] + (values[1] if sign == "plus" else -values[1]) == values[2]
        assert first in each.question.split() and second in each.question.split()
    answers = {each.question: each.answer for each in EVERYTHING}
    assert answers["what comes after sunday"] == "after sunday comes monday"
    assert answers["which letter follows Y"] == "after Y comes Z"
    assert answers["how do you spell cat"] == "C A T"
    assert answers["what is the opposite of cold"] == "the opposite of cold is hot"
    assert answers["who won the game"] == I_DO_NOT_KNOW
    # what a question asks for is certain
    assert len(answers) == len(EVERYTHING)


def test_what_is_held_out_never_occurs_in_training() -> None:
    held_out = [each for each in EVERYTHING if each.held_out]
    assert 0.05 < len(held_out) / len(EVERYTHING) < 0.15
    assert {"sum", "spelling", "echo", "after"} <= {each.topic for each in held_out}
    splits = defaultdict(set)
    for each in EVERYTHING:
        if each.topic in ("sum", "echo"):  # in whatever phrasing
            splits[each.topic, each.answer].add(each.held_out)
    assert all(len(found) == 1 for found in splits.values())
    known = {word for each in EVERYTHING if not each.held_out and each.topic == "sum" for word in each.answer.split()}
    assert set(NUMBERS) <= known


def test_a_dialogue_says_when_each_word_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogues, "speak", speak_tones)
    chosen = [each for each in EVERYTHING if each.topic == "sum"]
    cut = asked_again = 0
    for number in range(40):
        draw = np.random.default_rng(number)
        dialogue, seconds = lay_out([chosen[draw.integers(len(chosen))] for _ in range(4)], Voice("any"), draw)
        audio = dialogue.recording(seconds)
        assert len(audio) % 1920 == 0
        for word, (begin, end), speaker in dialogue.words:
            sound = audio[round(begin * SAMPLING_RATE) : round(end * SAMPLING_RATE), int(speaker == USER)]
            assert np.abs(sound).max() > 0.9, (number, word)
        for speaker in (MOSHI, USER):
            # and nothing else is heard but what has words
            times = [times for _, times, who in dialogue.words if who == speaker]
            spoken = sum(end - begin for begin, end in times)
            heard = (np.abs(audio[:, int(speaker == USER)]) > 1e-6).sum() / SAMPLING_RATE
            assert heard <= spoken + 0.01
        for exchange in dialogue.exchanges:
            (asks, asked), (begin, end) = exchange["asked"], exchange["answered"]
            # 0.3 to 0.7 s, and then to the nearest frame
            assert asks < asked < begin and 0.25 < begin - asked < 0.75 and begin <= end
            said = " ".join(w for w, (start, _), who in dialogue.words if who == MOSHI and begin <= start < end)
            if exchange["cut_off"]:
                cut += 1
                assert exchange["answer"].startswith(said)
                user = min(start for _, (start, _), who in dialogue.words if who == USER and start > begin)
                assert end - user <= 0.5
            else:
                assert said == exchange["answer"]
            asked_again += exchange["topic"] == "again"
    assert cut > 5 and asked_again > 2


def test_a_sentence_ends_with_a_whole_word() -> None:
    dialogue = Dialogue()
    end = dialogue.say(MOSHI, speak_tones(Voice("any"), "one two three four"), 1.0, until=1.5)
    assert [word for word, _, _ in dialogue.words] == ["one", "two"] and end == pytest.approx(1.4)
    assert dialogue.say(MOSHI, speak_tones(Voice("any"), "one two"), 3.0, until=3.1) == 3.0
    assert len(dialogue.words) == 2


def test_a_room_keeps_the_times() -> None:
    audio = np.zeros(SAMPLING_RATE, np.float32)
    audio[5000] = 0.9
    for seed in range(20):
        heard = in_a_room(audio, np.random.default_rng(seed))
        assert heard.shape == audio.shape and np.abs(heard).argmax() == 5000 and np.abs(heard).max() <= 1


def test_files_are_those_that_prepare_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dialogues, "speak", speak_tones)
    manifest = write_dialogues(tmp_path / "talks", EVERYTHING, 3, seed=1)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [line["path"] for line in lines] == ["00000.flac", "00001.flac", "00002.flac"]
    for line in lines:
        record = json.loads((manifest.parent / line["path"]).with_suffix(".json").read_text())
        words = parse_words(record["alignments"])
        assert {word.speaker for word in words} == {MOSHI, USER}
        audio, rate = soundfile.read(manifest.parent / line["path"])
        assert audio.shape[1] == 2 and len(audio) / rate == line["duration"] > words[-1].end
    before = (manifest.parent / "00001.flac").read_bytes()
    (manifest.parent / "00001.json").unlink()
    write_dialogues(tmp_path / "talks", EVERYTHING, 3, seed=1)
    assert (manifest.parent / "00001.flac").read_bytes() == before
    manifest = write_monologues(tmp_path / "alone", EVERYTHING, 2, seed=3)
    recordings = open_recordings(manifest, least_seconds=0.1).recordings
    assert len(recordings) == 2 and all(each.samples % 1920 == 0 for each in recordings)
    manifest = write_utterances(tmp_path / "single", EVERYTHING, 4, seed=2)
    recordings = open_recordings(manifest, least_seconds=0.1).recordings
    asked_or_said = {text for each in EVERYTHING for text in (each.question, each.answer)}
    assert len(recordings) == 4 and {each.text for each in recordings} <= asked_or_said


def test_a_word_sounds_the_same_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Voice, "__call__", speak_tones)
    voice = WordByWord(Voice("flite:slt"))
    assert voice.name == "flite:slt"
    alone, spoken = voice("two"), voice("one, two A")
    assert [word for word, _, _ in spoken.words] == ["one", "two", "A"]
    # a tone is two frames and a half
    assert [begin for _, begin, _ in spoken.words] == pytest.approx([0.0, 0.24, 0.48])
    assert len(spoken.audio) == 2 * 3 * FRAME + len(alone.audio)
    np.testing.assert_array_equal(spoken.audio[3 * FRAME : 3 * FRAME + len(alone.audio)], alone.audio)
    assert not spoken.audio[3 * FRAME + len(alone.audio) : 6 * FRAME].any()


def test_moshi_begins_with_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Voice, "__call__", speak_tones)
    for seed in range(5):
        dialogue, _ = lay_out(EVERYTHING[:4], Voice("any"), np.random.default_rng(seed))
        assert all(start % FRAME == 0 for start, _ in dialogue.channels[MOSHI])
        assert any(start % FRAME for start, _ in dialogue.channels[USER])


def test_letters_are_not_articles() -> None:
    assert pronounced("what comes after A") == "what comes after ay" and pronounced("a C A T") == "a c ay t"


@pytest.mark.parametrize("name", ["espeak:en-us+m3", "flite:slt", "flite:kal16"])
def test_voices_know_their_words(name: str) -> None:
    if name.startswith("flite") and ctypes.util.find_library("flite") is None and not _has("libflite.so.1"):
        pytest.skip("libflite1 is not installed (make voices)")
    spoken = Voice(name)("what is three plus four")
    slow = Voice(name, rate=0.8)("what is three plus four")
    assert [word for word, _, _ in spoken.words] == "what is three plus four".split()
    seconds = len(spoken.audio) / SAMPLING_RATE
    assert 0.8 < seconds < 3 and 1.1 < len(slow.audio) / len(spoken.audio) < 1.4
    ends = [end for _, _, end in spoken.words]
    assert all(begin < end <= seconds for _, begin, end in spoken.words) and ends == sorted(ends)
    again = Voice(name)("what is three plus four")
    # espeak-ng is a little longer or shorter after another rate
    assert abs(len(again.audio) - len(spoken.audio)) < 100
    if name.startswith("flite"):
        np.testing.assert_array_equal(again.audio, spoken.audio)


def _has(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def test_stop_is_short() -> None:
    assert all(len(text.split()) <= 2 for text in STOP)
