"""``moshi-flax prepare`` with the embedded checkpoint: the dataset, the table, and mistakes."""

from __future__ import annotations

import json
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax.cli import prepare
from transformers_moshi_flax.training.data.loading import make_loader
from transformers_moshi_flax.training.data.prepared import open_dataset
from transformers_moshi_flax.training.data.preparing import Report

FRAME, RATE = 1920, 16_000


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither read nor fill the user's cache of compiled programs."""
    monkeypatch.setattr(prepare, "use_compilation_cache", lambda: None)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two recordings at 16 kHz, of 10 and 4 frames, and one that is not there."""
    lines = []
    for name, frames in (("one", 10), ("two", 4), ("none", 0)):
        lines.append(json.dumps({"path": f"{name}.wav", "duration": frames / 12.5}))
        if frames:
            noise = np.random.default_rng(frames).uniform(-0.3, 0.3, (frames * RATE * 2 // 25, 2))
            soundfile.write(tmp_path / f"{name}.wav", noise, RATE)
            words = [["you", [0.2, 0.3], "SPEAKER_MAIN"], ["to", [0.5, 0.6], "SPEAKER_MAIN"]]
            (tmp_path / f"{name}.json").write_text(json.dumps({"alignments": words}))
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_prepares_and_goes_on(moshi_flax, manifest: Path, tmp_path: Path):
    arguments = ("prepare", manifest, tmp_path / "out", "--model", RANDOM_MODEL, "--batch-size", 1)
    result = moshi_flax(*arguments)
    assert result.code == 0, result.err
    assert "2 conversations" in result.out and "14 frames" in result.out
    out = " ".join(result.out.replace("│", " ").split())  # the cells of the table are broken into lines
    assert "none.wav" in out and "there is no such file" in out
    assert "two.wav" in out and "words outside of the recording, or that end before they start: 1" in out
    assert "words by speaker: SPEAKER_MAIN: 4" in out and "late" not in out

    dataset = open_dataset(tmp_path / "out")
    assert dataset.ids == ["one.wav", "two.wav"] and dataset.lengths.tolist() == [10, 4]
    assert dataset[0].moshi_text_tokens.tolist() == [3, 0, 17, 3, 3, 0, 18, 3, 3, 3]
    options = {"vocab_size": 270, "audio_vocab_size": 128, "num_codebooks": 8}
    batch = next(make_loader(dataset, batch_size=2, max_length=11, shuffle=False, **options))
    assert batch["attention_mask"].sum(1).tolist() == [11, 5]

    again = moshi_flax(*arguments)
    assert again.code == 0 and "3 recordings done before" in again.out
    other = moshi_flax(*arguments, "--recordings-per-shard", 1)
    assert other.code == 2 and "OUT: " in other.err
    assert "was begun with another recordings_per_shard" in other.err


def test_labels_and_late_text(moshi_flax, manifest: Path, tmp_path: Path):
    words = [["to you", [0.1, 0.2], "SPEAKER_00"] for _ in range(7)] + [["to", [0.1, 0.2], "[x]"]]
    (tmp_path / "one.json").write_text(json.dumps({"alignments": words}))
    (tmp_path / "two.json").write_text(json.dumps({"alignments": [["to", [0.1, 0.2], "SPEAKER_01"]]}))
    arguments = ("prepare", manifest, tmp_path / "out", "--model", RANDOM_MODEL, "--batch-size", 1)
    result = moshi_flax(*arguments)
    assert result.code == 2 and "--main-speaker: no word of the recordings is of 'SPEAKER_MAIN'" in result.err
    assert "'SPEAKER_00' (7 words), '[x]' (1 word), 'SPEAKER_01' (1 word)" in result.err
    assert moshi_flax(*arguments, "--main-speaker", "").code == 2
    result = moshi_flax(*arguments, "--main-speaker", "SPEAKER_00")
    assert result.code == 0, result.err
    assert "words by speaker: SPEAKER_00: 7, SPEAKER_01: 1, [x]: 1" in result.out
    assert "text: 64% of the pieces are late, by up to 0.6 s" in result.out
    assert "no word of Moshi's (SPEAKER_00); there are SPEAKER_01 (--main-speaker)" in " ".join(result.out.split())


def test_a_codec_that_does_not_fit(moshi_flax, manifest: Path, tmp_path: Path):
    shutil.copytree(RANDOM_MODEL, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["audio_vocab_size"] //= 2
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    result = moshi_flax("prepare", manifest, tmp_path / "out", "--model", tmp_path / "model")
    assert result.code == 2 and "--model: `mimi` has " in result.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"manifest": "none.jsonl"}, "MANIFEST: "),
        ({"manifest": "one.wav"}, "MANIFEST: "),
        ({"out": "all.jsonl"}, "OUT: "),
        ({"model": "nowhere"}, "--model: there is no directory 'nowhere'"),
        ({"model": "."}, "--model: cannot load"),
    ],
)
def test_mistakes(moshi_flax, manifest: Path, tmp_path: Path, change: dict[str, str], message: str, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"manifest": "all.jsonl", "out": "out", "model": str(RANDOM_MODEL), **change}
    result = moshi_flax("prepare", given["manifest"], given["out"], "--model", given["model"])
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("moshi-flax: error: ") and message in line


def test_nothing_usable(moshi_flax, tmp_path: Path):
    (tmp_path / "all.jsonl").write_text('{"path": "none.wav"}')
    result = moshi_flax("prepare", tmp_path / "all.jsonl", tmp_path / "out", "--model", RANDOM_MODEL)
    assert result.code == 2 and "none of its recordings can be used" in result.err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["conversations"] == 0


def test_table_tells_missing_audio():
    console = Console(width=200, file=StringIO())
    prepare._show(Report(conversations=3, incomplete={"one.wav": ["ends after 1 s", "has more"]}), "x", console)
    told = console.file.getvalue()
    assert "recordings of which audio is missing: 1" in told and "audio is missing: ends after 1 s; has more" in told
