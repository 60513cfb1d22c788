"""``moshi-flax talk``: with a recording and by the computer's devices, to a server on loopback."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.serving.fake_stream import FRAME, spoken_alone
from tests.serving.house import House, serving, speech
from tests.serving.sound_card import sound_card
from tests.serving.test_server import said_over_opus
from transformers_moshi_flax.cli import talk
from transformers_moshi_flax.serving.client import chat_address
from transformers_moshi_flax.serving.gate import Gate

FRAMES = 5
SAID = speech(FRAMES)
HEARD = SAID.astype(np.float32) / 32768


@contextmanager
def house(**options: Any) -> Iterator[House]:
    """A server that runs in another thread."""
    ready: list[House] = []
    begun, stop = threading.Event(), threading.Event()

    async def run() -> None:
        async with serving(**options) as found:
            ready.append(found)
            begun.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert begun.wait(30)
        yield ready[0]
    finally:
        stop.set()
        thread.join()


def ended(server: House) -> float:
    """How many callers have left by themselves, when the server has noticed the last one."""
    end = time.monotonic() + 30
    while server.server.callers and time.monotonic() < end:
        time.sleep(0.01)
    return server.figure("moshi_dialogues_ended_total", reason="left")


@pytest.fixture
def question(tmp_path: Path) -> Path:
    path = tmp_path / "question.wav"
    soundfile.write(path, SAID.reshape(-1), 24_000, subtype="PCM_16")
    return path


@pytest.mark.parametrize("format", ["pcm16", "opus"])
def test_a_recording_is_answered(moshi_flax, question: Path, tmp_path: Path, format: str) -> None:
    output = tmp_path / "dialogue.wav"
    args = ["--user-audio", question, "--output", output, "--extra-seconds", 0.16, "--format", format, "--seed", 3]
    with house() as server:
        result = moshi_flax("talk", server.url, *args)
        assert ended(server) == 1
    assert result.code == 0, result.err
    moshi, user = soundfile.read(output, dtype="int16")[0].T.reshape(2, -1, FRAME)
    assert np.array_equal(user[:FRAMES], SAID) and not user[FRAMES:].any()
    silence = np.zeros((2, FRAME))
    if format == "pcm16":
        wanted = spoken_alone(np.concatenate([HEARD, silence]).astype(np.float32), (3, 3))
        assert np.array_equal(moshi[: FRAMES + 2], wanted)
    else:
        wanted = said_over_opus(np.concatenate([HEARD, silence]).astype(np.float32), (3, 3))
        np.testing.assert_allclose(moshi[: FRAMES + 2] / 32768, wanted, atol=1e-4)
    assert result.out.startswith("€ 7 8 9 10") and result.out.endswith("\n") and result.out.count("\n") == 1
    assert "fake" in result.err and "dialogue.wav" in result.err


def test_options_reach_the_server(moshi_flax, question: Path) -> None:
    with house() as server:
        args = ["--temperature", 0.5, "--top-k", 7, "--depth-temperature", 0.6, "--depth-top-k", 9]
        result = moshi_flax("talk", server.url, "--user-audio", question, "--extra-seconds", 0, *args)
        ((_, numbers),) = server.server.engine.stream.configured[-1:]
    assert result.code == 0, result.err
    assert numbers == {
        "temperature": 0.5,
        "top_k": 7,
        "depth_decoder_temperature": 0.6,
        "depth_decoder_top_k": 9,
    }


def test_why_nobody_is_let_in(moshi_flax, question: Path, tmp_path: Path) -> None:
    with house(gate=Gate(["secret"]), slots=1) as server:
        result = moshi_flax("talk", server.url, "--user-audio", question)
        assert result.code == 1 and result.err.count("\n") == 1 and "says no (401)" in result.err
        (tmp_path / "token").write_text("secret\nother\n")
        args = ["--user-audio", question, "--auth-token-file", tmp_path / "token", "--extra-seconds", 0]
        assert moshi_flax("talk", server.url, *args).code == 0
        result = moshi_flax("talk", server.url, *args, "--temperature", 1000)
        assert result.code == 1 and "says no (400)" in result.err and "text_temperature" in result.err
        for asked, name in (("--voice", "voice_prompt"), ("--text-prompt", "text_prompt")):
            result = moshi_flax("talk", server.url, *args, asked, "ada")
            assert (
                result.code == 1 and "says no (400)" in result.err and f"`{name}`: there are no personas" in result.err
            )
        assert ended(server) == 1
        seat = server.server.engine.take_seat({}, np.zeros(2, np.uint32))
        result = moshi_flax("talk", server.url, *args)
        assert result.code == 1 and "all 1 places are taken" in result.err and "again in 10 s" in result.err
        server.server.engine.leave(seat)


def test_what_a_dialogue_that_is_ended_has_said_is_kept(moshi_flax, question: Path, tmp_path: Path) -> None:
    output = tmp_path / "dialogue.flac"
    with house(max_seconds=2.0) as server:
        args = ["--user-audio", question, "--output", output, "--format", "pcm16", "--extra-seconds", 30]
        result = moshi_flax("talk", server.url, *args)
    assert result.code == 1 and "a dialogue lasts 2 s at most" in result.err
    samples, rate = soundfile.read(output)
    assert rate == 24_000 and 0 < len(samples) < 4 * rate and samples[:, 0].any()


def test_who_waits_is_told(moshi_flax, question: Path) -> None:
    with house(slots=1, queue=1) as server:
        seat = server.server.engine.take_seat({}, np.zeros(2, np.uint32))
        threading.Timer(1.0, server.server.engine.leave, [seat]).start()
        result = moshi_flax("talk", server.url, "--user-audio", question, "--extra-seconds", 0)
    assert result.code == 0 and "number 1 in the queue" in result.err


def test_microphone_and_speakers(moshi_flax, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # devices ask for blocks of other lengths too
    devices = sound_card(monkeypatch, HEARD, block=FRAME // 2)
    monkeypatch.setattr(talk.importlib.util, "find_spec", lambda name: sys.modules[name])

    def interrupt() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and ("out" not in devices or len(devices["out"].played) < 2 * FRAMES):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    output = tmp_path / "dialogue.wav"
    with house() as server:
        threading.Thread(target=interrupt, daemon=True).start()
        result = moshi_flax("talk", server.url, "--format", "pcm16", "--seed", 3, "--output", output)
    assert result.code == 0, result.err
    wanted = spoken_alone(HEARD, (3, 3))
    assert np.array_equal(np.concatenate(devices["out"].played) * 32768, wanted.reshape(-1))
    moshi, user = soundfile.read(output, dtype="int16")[0].T
    assert np.array_equal(moshi, wanted.reshape(-1)) and np.array_equal(user, SAID.reshape(-1))


def test_without_devices(moshi_flax, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Exception):
        pass

    def refuse(**options: Any) -> None:
        raise Broken("no default device")

    stub: Any = ModuleType("sounddevice")
    stub.InputStream = stub.OutputStream = refuse
    stub.PortAudioError = Broken
    monkeypatch.setitem(sys.modules, "sounddevice", stub)
    monkeypatch.setattr(talk.importlib.util, "find_spec", lambda name: stub)
    result = moshi_flax("talk")
    assert result.code == 2 and "--user-audio" in result.err and "no default device" in result.err


@pytest.mark.parametrize(
    "args, words",
    [
        (["ftp://somewhere"], ["URL", "'ftp://somewhere'", "http://localhost:8998"]),
        (["http://"], ["URL", "no address"]),
        (["--format", "mp3"], ["--format", "'mp3'", "opus, pcm16"]),
        (["--extra-seconds", "inf"], ["--extra-seconds", "at most an hour"]),
        (["--user-audio", "nowhere.wav"], ["--user-audio", "nowhere.wav"]),
        (["--output", "dialogue.mp3"], ["--output", "dialogue.mp3", ".wav"]),
        (["--auth-token-file", os.devnull], ["--auth-token-file", "one a line"]),
        (["--ssl-ca", "nowhere.pem"], ["--ssl-ca", "nowhere.pem"]),
        ([], ["sounddevice", "--user-audio"]),
    ],
)
def test_mistakes_are_one_line(moshi_flax, monkeypatch: pytest.MonkeyPatch, args: list[str], words: list[str]) -> None:
    find = talk.importlib.util.find_spec
    missing = lambda name: None if name == "sounddevice" else find(name)  # noqa: E731
    monkeypatch.setattr(talk.importlib.util, "find_spec", missing)
    result = moshi_flax("talk", *args)
    assert result.code == 2 and result.err.count("\n") == 1
    assert all(word in result.err for word in words), result.err


def test_where_no_server_is(moshi_flax, question: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    result = moshi_flax("talk", url, "--user-audio", question)
    assert result.code == 1 and "no server can be reached" in result.err and "moshi-flax serve" in result.err


def test_addresses() -> None:
    wanted = "http://localhost:8998/api/chat"
    given = ("localhost:8998", "http://localhost:8998", "http://localhost:8998/", "ws://localhost:8998/api/chat")
    assert [chat_address(each) for each in given] == [wanted] * 4
    assert chat_address("wss://host") == "https://host/api/chat"
