"""Dialogues on disk: whole ones in place, with both voices, words and settings; a disk's faults touch no dialogue."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.serving.fake_stream import FRAME
from tests.serving.house import House, as_audio, in_a_loop, read, serving, speech
from tests.serving.test_server import alone
from transformers_moshi_flax.serving import recording
from transformers_moshi_flax.serving.engine import Said, Seat
from transformers_moshi_flax.serving.metrics import Metrics
from transformers_moshi_flax.serving.protocol import Control, Kind
from transformers_moshi_flax.serving.recording import Recorder, Recording
from transformers_moshi_flax.training.data.alignment import parse_words


def kept(folder: Path) -> list[Path]:
    """The dialogues in place, in the order in which they were finished."""
    return sorted((path for path in folder.iterdir() if path.name[0] != "."), key=lambda path: path.stat().st_mtime_ns)


def figure(house: House, result: str) -> float:
    return house.figure("moshi_recordings_total", result=result)


@in_a_loop
async def test_both_voices_the_words_and_the_settings(tmp_path: Path):
    said = speech(8)
    async with serving(record=tmp_path / "new" / "folder") as house:
        folder = tmp_path / "new" / "folder"
        async with house.call("format=pcm16&audio_seed=1&text_seed=2&text_topk=7") as caller:
            await caller.send_bytes(as_audio(said[:3]))
            reply = await read(caller, 3)
            await house.until(lambda: bool(list(folder.glob(".*Z-*"))))
            # it is not in place while it lasts
            assert kept(folder) == [] and reply.metadata["recorded"]
            await caller.send_bytes(as_audio(said[3:]))
            await read(caller, 5)
        await house.until(lambda: figure(house, "written") == 1)
        (dialogue,) = folder.iterdir()
        assert dialogue.stat().st_mode & 0o777 == 0o700
        samples, rate = soundfile.read(dialogue / "dialogue.wav", dtype="int16")
        moshi, user = samples.T.reshape(2, -1, FRAME)
        assert rate == 24_000 and np.array_equal(moshi, alone(said)) and np.array_equal(user, said)
        record = json.loads((dialogue / "dialogue.json").read_text("utf-8"))
        assert record["text_ids"] == list(range(4, 12)) and record["frames"] == 8
        assert record["words"][0] == {"text": "€", "start": 0.0, "end": 0.24}
        assert record["words"][1] == {"text": "7", "start": 0.24, "end": 0.32}
        assert [word.text for word in parse_words(record["alignments"])] == ["€", *map(str, range(7, 12))]
        assert record["sampling"]["top_k"] == 7 and record["key"] == [1, 2] and record["model"] == "fake"
        assert record["end_reason"] == "left" and record["channels"] == ["moshi", "user"]
        assert "peer" not in record and json.loads((await house.text("/api/build_info"))[1])["recorded"]


@in_a_loop
async def test_a_dialogue_that_begins_anew_is_another_one_and_who_says_nothing_leaves_nothing(tmp_path: Path):
    said = speech(5)
    async with serving(record=tmp_path) as house:
        async with house.call(), house.call() as caller:
            await caller.send_bytes(as_audio(said[:2]))
            await read(caller, 2)
            await caller.send_bytes(bytes([Kind.CONTROL, Control.RESTART]))
            await caller.send_bytes(as_audio(said[2:]))
            await read(caller, 3)
        await house.until(lambda: figure(house, "written") == 2)
        first, second = kept(tmp_path)
        for dialogue, part, reason in [(first, said[:2], "restart"), (second, said[2:], "left")]:
            samples, _ = soundfile.read(dialogue / "dialogue.wav", dtype="int16")
            assert np.array_equal(samples[:, 1].reshape(-1, FRAME), part)
            assert np.array_equal(samples[:, 0].reshape(-1, FRAME), alone(part))
            assert json.loads((dialogue / "dialogue.json").read_text())["end_reason"] == reason
    assert len(list(tmp_path.iterdir())) == 2


@in_a_loop
async def test_without_a_recorder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    async with serving() as house, house.call() as caller:
        await caller.send_bytes(as_audio(speech(2)))
        assert not (await read(caller, 2)).metadata["recorded"]
    assert list(tmp_path.iterdir()) == []


@contextmanager
def a_full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size``, as if there were no more room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@in_a_loop
async def test_a_full_disk_is_logged_and_touches_no_dialogue(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    said = speech(30)
    async with serving(record=tmp_path, buffer_frames=40) as house:
        async with house.call() as caller:
            with a_full_disk(100_000):  # 13 frames
                await caller.send_bytes(as_audio(said[:20]))
                first = await read(caller, 20)
                await house.until(lambda: figure(house, "failed") == 1)
            await caller.send_bytes(as_audio(said[20:]))
            second = await read(caller, 10)
        assert np.array_equal(np.concatenate([first.samples, second.samples]), alone(said))
        assert list(tmp_path.iterdir()) == []
        (failure,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert failure.getMessage() == "a dialogue is not recorded" and "File too large" in failure.fields["error"]
        # once there is room again, the next one is kept
        async with house.call() as caller:
            await caller.send_bytes(as_audio(said[:2]))
            await read(caller, 2)
        await house.until(lambda: figure(house, "written") == 1)
    assert len(kept(tmp_path)) == 1


@in_a_loop
async def test_a_folder_that_is_gone_is_logged_and_touches_no_dialogue(tmp_path: Path):
    folder, said = tmp_path / "folder", speech(3)
    async with serving(record=folder) as house, house.call() as caller:
        folder.rmdir()
        await caller.send_bytes(as_audio(said))
        assert np.array_equal((await read(caller, 3)).samples, alone(said))
        await house.until(lambda: figure(house, "failed") == 1)
    assert not folder.exists()


def said(number: int) -> Said:
    silence = np.zeros(FRAME, np.float32)
    return Said(Seat(0, {}, np.zeros(2, np.uint32)), silence, 3, silence, number)


def begin(recorder: Recorder) -> Recording:
    return recorder.begin(1, {"sample_rate": 24_000})


def test_a_disk_that_does_not_keep_up_costs_the_recording_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recording, "PENDING_FRAMES", 5)
    recorder = Recorder(tmp_path, lambda ids: [], Metrics())
    stuck = threading.Event()
    slow, quick = begin(recorder), begin(recorder)
    recorder.do(stuck.wait)
    for number in range(7):
        slow.put(said(number))
        if number < 5:
            quick.put(said(number))
    slow.end("left")
    quick.end("left")
    stuck.set()
    recorder.stop()
    assert [record.fields["error"] for record in caplog.records if record.levelno == logging.ERROR] == [
        "the disk does not keep up"
    ]
    (dialogue,) = tmp_path.iterdir()
    assert soundfile.info(dialogue / "dialogue.wav").frames == 5 * FRAME


def test_stopping_waits_for_what_there_is_but_not_for_ever(tmp_path, monkeypatch, caplog):
    recorder = Recorder(tmp_path, lambda ids: [], Metrics())
    one = begin(recorder)
    for number in range(500):
        one.put(said(number))
    one.end("shutdown")
    recorder.stop()
    assert len(kept(tmp_path)) == 1
    monkeypatch.setattr(recording, "STOP_SECONDS", 0.1)
    recorder, stuck = Recorder(tmp_path, lambda ids: [], Metrics()), threading.Event()
    recorder.do(stuck.wait)
    recorder.stop()
    assert caplog.records[-1].getMessage().startswith("recordings are not all written")
    stuck.set()


def test_a_killed_server_leaves_nothing_in_place(tmp_path: Path):
    script = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from tests.serving.test_recording import Metrics, Recorder, begin, said
recorder = Recorder(Path({str(tmp_path)!r}), lambda ids: [], Metrics())
one = begin(recorder)
for number in range(50):
    one.put(said(number))
while not list(Path({str(tmp_path)!r}).glob(".*/dialogue.wav")):
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert kept(tmp_path) == [] and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_in_is_told_at_once(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Recorder(tmp_path / "file" / "folder", lambda ids: [], Metrics())
    assert os.listdir(tmp_path) == ["file"]


@in_a_loop
async def test_dialogues_at_once_do_not_mix(tmp_path: Path):
    async with serving(slots=2, record=tmp_path) as house:

        async def talk(seed: int) -> None:
            async with house.call() as caller:
                for frame in speech(6, seed):
                    await caller.send_bytes(as_audio(frame))
                    await read(caller, 1)

        await asyncio.gather(talk(1), talk(2))
        await house.until(lambda: figure(house, "written") == 2)
    found = [
        soundfile.read(path / "dialogue.wav", dtype="int16")[0].T.reshape(2, -1, FRAME) for path in kept(tmp_path)
    ]
    for moshi, user in found:
        assert np.array_equal(moshi, alone(user))
    assert {user.tobytes() for _, user in found} == {speech(6, seed).tobytes() for seed in (1, 2)}
