"""``moshi-flax demo``: both sides of a dialogue with the recorded user, printed, as sound and as a picture."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import soundfile

from transformers_moshi_flax.cli.checkpoints import EMBEDDED_QUESTION, EMBEDDED_USER, NOTICE
from transformers_moshi_flax.cli.demo import words_of
from transformers_moshi_flax.cli.transcript import Timed

ANSWERS = ["three plus six is nine", "after tuesday comes wednesday", "a tomato is red"]


@pytest.fixture(autouse=True)
def embedded_model() -> None:
    """The one that ships."""


def test_the_user_is_answered(moshi_flax, tmp_path: Path) -> None:
    output, picture = tmp_path / "demo.wav", tmp_path / "demo.png"
    result = moshi_flax("demo", "--output", output, "--picture", picture)
    assert result.code == 0, result.err
    lines = [re.fullmatch(r" *([\d.]+) s  (you  |Moshi)  (.*)", line).groups() for line in result.out.splitlines()]
    questions = [" ".join(word.text for word in each) for each in sentences()]
    told = [(speaker.strip(), said) for _, speaker, said in lines]
    assert told == [line for pair in zip(questions, ANSWERS) for line in (("you", pair[0]), ("Moshi", pair[1]))]
    begins = [float(time) for time, speaker, _ in lines if speaker == "you  "]
    assert begins == pytest.approx([words[0].start for words in sentences()], abs=0.06)
    written, rate = soundfile.read(output)
    user, _ = soundfile.read(EMBEDDED_USER)
    assert rate == 24_000 and written.shape == (len(user), 2)
    assert np.abs(written[:, 1] - user).max() < 2**-14
    assert loudness(written[:, 0]) > 1e-3
    assert matplotlib.image.imread(picture).shape[1] > 1000
    assert NOTICE in result.err and str(picture) in result.err
    again = moshi_flax("demo", "--output", output)
    assert again.code == 2 and "--overwrite" in again.err


def test_recordings_have_their_words() -> None:
    assert [word.text for word in words_of(EMBEDDED_QUESTION)] == [word.text for word in sentences()[0]]
    samples, rate = soundfile.read(EMBEDDED_USER)
    for words in sentences():
        begin, end = round(words[0].start * rate), round(words[-1].end * rate)
        assert loudness(samples[begin:end]) > 10 * max(loudness(samples[begin - 9_000 : begin - 500]), 1e-3)
        assert len(samples) - end > 3 * rate


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--output", "demo.mp3"), "--output"),
        (("--picture", "demo.jpg"), "--picture"),
        (("--model", "nowhere"), "--model"),
        (("--output", EMBEDDED_USER), "--output"),
    ],
)
def test_mistakes(moshi_flax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = moshi_flax("demo", *args)
    assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def sentences() -> list[list[Timed]]:
    """The words of each question of the recording."""
    found: list[list[Timed]] = []
    for word in words_of(EMBEDDED_USER):
        if not found or word.start - found[-1][-1].end > 1:
            found.append([])
        found[-1].append(word)
    return found


def loudness(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples))))
