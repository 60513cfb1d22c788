"""``moshi-flax ask``: what is heard is the question, what is written is both sides, and words come with times."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax.cli import ask, checkpoints, live
from transformers_moshi_flax.cli.audio import read_audio
from transformers_moshi_flax.cli.generate import Speaker
from transformers_moshi_flax.cli.transcript import Timed


@pytest.fixture(scope="module", autouse=True)
def one_model() -> Iterator[Speaker]:
    """The embedded model, loaded and compiled once."""
    speaker = Speaker.load(str(RANDOM_MODEL), None)
    stream = speaker.model.streaming(batch_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speaker.model, "streaming", lambda **options: stream)
        patch.setattr(Speaker, "load", lambda source, dtype: speaker)
        yield speaker


def test_a_recording_is_asked(moshi_flax, speech: Path, tmp_path: Path):
    output = tmp_path / "answer.flac"
    result = moshi_flax("ask", "--wav", speech, "--output", output, "--seconds", 1)
    assert result.code == 0, result.err
    written, rate = soundfile.read(output)
    user = read_audio(speech, 24_000)
    assert rate == 24_000 and len(written) == 12_000 + len(user) + 24_000
    assert not written[:12_000, 1].any() and not written[12_000 + len(user) :, 1].any()
    assert np.abs(written[12_000:, 1][: len(user)] - user).max() <= 2**-15
    assert written[:, 0].any()
    first, *lines = result.out.splitlines()
    assert first == f"   0.5 s  you    {speech}"
    assert lines and all("s  Moshi  " in line for line in lines)
    assert checkpoints.NOTICE in result.err


def test_a_question_is_spoken(moshi_flax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a program of that name, which gets the words and the options of espeak-ng."""
    program = tmp_path / "bin" / "espeak-ng"
    program.parent.mkdir()
    sound = tmp_path / "spoken.wav"
    soundfile.write(sound, np.full(22_050, 0.25), 22_050)
    program.write_text(f'#!/bin/sh\ncat > {tmp_path}/words\necho "$@" > {tmp_path}/options\ncat {sound}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    output = tmp_path / "answer.wav"
    result = moshi_flax("ask", "what is three plus four", "--output", output, "--seconds", 0)
    assert result.code == 0, result.err
    assert result.out.startswith("   0.5 s  you    what is three plus four\n")
    assert (tmp_path / "words").read_text() == "what is three plus four"
    assert "--stdout" in (tmp_path / "options").read_text()
    written, _ = soundfile.read(output)
    assert len(written) == 36_000 and abs(written[24_000, 1] - 0.25) < 1e-3


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_espeak_speaks() -> None:
    samples = ask.speech("what is three plus four", 24_000)
    assert samples.dtype == np.float32 and 1 < len(samples) / 24_000 < 4 and np.abs(samples).max() > 0.1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "QUESTION, --wav"),
        (("hello", "--wav", "question.wav"), "QUESTION, --wav"),
        (("  ",), "QUESTION"),
        (("hello", "--seconds", "nan"), "--seconds"),
        (("hello", "--output", "answer.mp3"), "--output"),
        (("--wav", "missing.wav"), "--wav"),
    ],
)
def test_mistakes(moshi_flax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple, message: str):
    monkeypatch.chdir(tmp_path)
    result = moshi_flax("ask", *args)
    assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1
    assert not list(tmp_path.glob("answer*"))


def test_without_espeak(moshi_flax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = moshi_flax("ask", "hello", "--output", tmp_path / "answer.wav")
    assert result.code == 2 and "apt-get install espeak-ng" in result.err and "--wav" in result.err


def test_a_pause_or_the_other_side_begins_a_line(capsys: pytest.CaptureFixture):
    printed = live.Printed()
    printed.add("Moshi", [Timed("three", 1.2, 1.3), Timed("plus", 1.5, 1.6)])
    printed.add("Moshi", [Timed("five", 4.0, 4.1), Timed("。", 4.1, 4.2, spaced=False)])
    printed.add("you", [Timed("stop", 4.2, 4.4)])
    printed.end()
    lines = ["   1.2 s  Moshi  three plus", "   4.0 s  Moshi  five。", "   4.2 s  you    stop"]
    assert capsys.readouterr().out.splitlines() == lines
