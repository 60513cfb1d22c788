"""Crops of audio of any rate and format, and what cannot be used."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile

from transformers_moshi_flax.training.codec.recordings import (
    CropMaker,
    CropPlan,
    evaluation_crops,
    open_recordings,
)

RATE = 24_000


def tone(seconds: float, rate: int = RATE, hertz: float = 300.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good and bad files."""
    soundfile.write(tmp_path / "a.wav", tone(1.0), RATE)
    (tmp_path / "deeper").mkdir()
    both = np.stack([tone(1.5, 44_100), tone(1.5, 44_100, 500)], axis=-1)
    soundfile.write(tmp_path / "deeper" / "b.flac", both, 44_100)
    soundfile.write(tmp_path / "c.ogg", tone(2.0, 16_000), 16_000)
    soundfile.write(tmp_path / "short.wav", tone(0.1), RATE)
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    (tmp_path / "notes.txt").write_text("not looked at")
    return tmp_path


def make(folder: Path, samples: int = 4800, seed: int = 0, **options: object) -> CropMaker:
    found = open_recordings(folder)
    plan = CropPlan(found, batch_size=4, samples=samples, sampling_rate=RATE, seed=seed)
    return CropMaker(found, plan, (0, 4), samples, RATE, **options)


def test_a_folder_has_every_channel_and_says_what_is_skipped(folder: Path) -> None:
    found = open_recordings(folder)
    assert [(each.id, each.channel) for each in found.recordings] == [
        ("a.wav", 0),
        ("c.ogg", 0),
        ("deeper/b.flac", 0),
        ("deeper/b.flac", 1),
    ]
    assert found.seconds == pytest.approx(6.0, abs=0.01)
    assert found.skipped["short.wav"] == "it has 0.10 s, fewer than data.least_seconds"
    assert found.skipped["broken.wav"].startswith("it cannot be read as audio")
    stereo = open_recordings(folder, audio_channels=2)
    assert [(each.id, each.channel) for each in stereo.recordings] == [("deeper/b.flac", None)]
    assert "1 channels, but the codec has 2" in stereo.skipped["a.wav"]


def test_folders_behind_links_and_what_is_not_read(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As where the data lie on several disks."""
    disk = tmp_path_factory.mktemp("disk")
    (folder / "deeper/b.flac").rename(disk / "b.flac")
    (folder / "deeper").rmdir()
    (folder / "deeper").symlink_to(disk)
    (disk / "again").symlink_to(folder)
    (disk / "phone.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    (folder / "lost.wav").symlink_to(disk / "nowhere.wav")
    found = open_recordings(folder)
    assert "deeper/b.flac" in {each.id for each in found.recordings}
    assert len(found.recordings) == 4
    assert {"deeper/phone.m4a", "lost.wav"} <= set(found.skipped)


def test_a_manifest_has_texts(folder: Path) -> None:
    lines = [{"path": "c.ogg", "text": "a tone"}, {"path": "deeper/b.flac"}, {"path": "missing.wav"}]
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = open_recordings(folder / "all.jsonl")
    assert [each.text for each in found.recordings] == ["a tone", None, None]
    assert "cannot be read" in found.skipped["missing.wav"]
    lines[0]["text"] = "two\u2028lines"
    text = "\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "all.jsonl").write_bytes(text.encode())
    assert open_recordings(folder / "all.jsonl").recordings[0].text == "two\u2028lines"


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "line 1: { must be"),
        ('{"path": 3}', "must be"),
        ('{"path": "a.wav", "text": 3}', "must be"),
        ('{"path": "a.wav"}\n{"path": "a.wav"}', "line 2: 'a.wav' is listed twice"),
        ('{"path": "broken.wav"}', "has no audio that can be used .broken.wav: it cannot be read"),
        ("", "has no audio that can be used$"),
    ],
)
def test_bad_manifests(folder: Path, text: str, message: str) -> None:
    (folder / "all.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_recordings(folder / "all.jsonl")
    with pytest.raises(ValueError, match="'nowhere' is not there; give a folder"):
        open_recordings("nowhere")


@pytest.mark.parametrize(
    "name, rate, hertz", [("a.wav", RATE, 300), ("deeper/b.flac", 44_100, 500), ("c.ogg", 0, 300)]
)
def test_a_part_is_where_it_belongs_at_the_rate_of_the_codec(folder: Path, name: str, rate: int, hertz: int) -> None:
    recording = [each for each in open_recordings(folder).recordings if each.id == name][-1]
    start = 3001
    found = recording.read(RATE, start, 6000)
    expected = 0.5 * np.sin(2 * np.pi * hertz * (start + np.arange(6000)) / RATE)
    assert found.shape == (1, 6000)
    # at another rate the place of the first sample is rounded
    np.testing.assert_allclose(found[0], expected, atol=2e-3 if rate == RATE else 0.08)


def test_what_is_behind_the_end_is_silence(folder: Path) -> None:
    recording = open_recordings(folder).recordings[0]
    found = recording.read(RATE, 20_000, 8000)
    assert np.abs(found[0, :4000]).max() > 0.4 and not found[0, 4000:].any()
    assert recording.read(RATE).shape == (1, RATE)


def test_a_batch_depends_on_seed_and_number_alone(folder: Path) -> None:
    first = make(folder)(7)["audio"]
    assert first.shape == (4, 1, 4800) and first.dtype == np.float32
    np.testing.assert_array_equal(make(folder)(7)["audio"], first)
    maker = make(folder)
    for process in range(2):
        own = CropMaker(maker.recordings, maker.plan, (2 * process, 2 * process + 2), 4800, RATE)
        np.testing.assert_array_equal(own(7)["audio"], first[2 * process : 2 * process + 2])
    assert not np.array_equal(make(folder)(8)["audio"], first)
    assert not np.array_equal(make(folder, seed=1)(7)["audio"], first)
    assert make(folder).plan.fingerprint == make(folder).plan.fingerprint != make(folder, seed=1).plan.fingerprint


def test_gain_and_noise(folder: Path) -> None:
    plain, loud = make(folder)(0)["audio"], make(folder, gain_db=12.0)(0)["audio"]
    gains = 20 * np.log10(loud.std(axis=-1) / plain.std(axis=-1))
    assert np.abs(gains).max() <= 12.01 and gains.std() > 1
    assert np.abs(loud).max() <= 1
    noise = make(folder, noise_probability=1.0, noise_snr_db=10.0)(0)["audio"] - plain
    ratios = 20 * np.log10(plain.std(axis=-1) / noise.std(axis=-1))
    assert ((ratios > 9) & (ratios < 31)).all()


def test_silent_and_broken_crops_are_drawn_anew(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    soundfile.write(folder / "z.wav", np.zeros(RATE * 10), RATE)
    maker = make(folder)
    (folder / "c.ogg").write_bytes((folder / "c.ogg").read_bytes()[:60])
    with caplog.at_level(logging.WARNING):
        for number in range(4):
            assert (np.abs(maker(number)["audio"]).max(axis=(1, 2)) > 0.1).all()
    assert "a recording is left out: c.ogg: it cannot be read" in caplog.text
    for file in folder.glob("**/*.*"):
        if file.is_file() and file.name != "z.wav":
            file.unlink()
    with pytest.raises(
        ValueError, match=r"50 crops one after another cannot be used, the last of them: z\.wav is silent"
    ):
        make(folder)(0)


def test_samples_that_are_none(folder: Path) -> None:
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    soundfile.write(folder / "loud.wav", np.full(RATE, 3000.0), RATE, subtype="FLOAT")
    by_id = {each.id: each for each in open_recordings(folder).recordings}
    with pytest.raises(ValueError, match="NaN or infinite"):
        by_id["nan.wav"].read(RATE)
    with pytest.raises(ValueError, match="samples of up to 3e"):
        by_id["loud.wav"].read(RATE)


def test_evaluation_hears_everything_once(folder: Path) -> None:
    found = open_recordings(folder)
    options = {"batch_size": 4, "samples": 6000, "sampling_rate": RATE}
    batches = [make() for make in evaluation_crops(found, **options, most=100, rows=(0, 4))]
    # 4 + 8 + 6 + 6 crops of a quarter of a second
    assert sum(batch["weights"].sum() for batch in batches) == 24
    assert all(batch["audio"].shape == (4, 1, 6000) for batch in batches)
    few = [make() for make in evaluation_crops(found, **options, most=3, rows=(0, 4))]
    assert len(few) == 1 and few[0]["weights"].tolist() == [1, 1, 1, 0]
    assert not few[0]["audio"][3].any()
