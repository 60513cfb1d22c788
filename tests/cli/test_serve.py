"""``moshi-flax serve``: what is refused before anything is loaded, and a server from the command to its end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import soundfile

from tests.random_model import RANDOM_MODEL
from tests.serving.fake_stream import FakeStream
from tests.serving.house import SEEDS, Tokenizer, as_audio, read, speech
from tests.serving.test_server import alone, until_ready
from transformers_moshi_flax.cli import checkpoints, serve
from transformers_moshi_flax.serving.engine import Engine

CERTIFICATE = Path(__file__).parents[1] / "serving" / "certificate.pem"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    "args, words",
    [
        (["--host", "0.0.0.0"], ["--host", "'0.0.0.0'", "--auth-token-file", "--no-auth"]),
        (["--host", "no.such.host.invalid"], ["--host", "cannot listen at"]),
        (["--ssl-cert", "cert.pem"], ["--ssl-cert, --ssl-key", "give both"]),
        (["--ssl-cert", __file__, "--ssl-key", __file__], ["--ssl-cert, --ssl-key", "cannot use"]),
        (["--auth-token-file", "nowhere.txt"], ["--auth-token-file", "nowhere.txt"]),
        (["--auth-token-file", os.devnull], ["--auth-token-file", "one a line"]),
        (["--temperature", "0", "--top-k", "5"], ["--top-k", "no effect"]),
        (["--slots", "0"], ["--slots"]),
        (["--queue", "-1"], ["--queue"]),
        (["--per-address", "0"], ["--per-address"]),
        (["--record", __file__], ["--record", "cannot write in", "test_serve.py"]),
        (["--record", "/proc/nowhere"], ["--record", "cannot write in"]),
        (["--record", ".", "--max-seconds", "50000"], ["--record", "--max-seconds", "44739"]),
        (["--model", str(RANDOM_MODEL), "--voices", "/nowhere"], ["--voices", "'/nowhere'"]),
        (["--model", str(RANDOM_MODEL), "--voices", ".", "--personas", "0"], ["--personas", "--voices", "at least 1"]),
        (["--model", str(RANDOM_MODEL), "--persona-frames", "9"], ["--personas", "--persona-frames", "at least 1"]),
        (
            ["--model", str(RANDOM_MODEL), "--personas", "1", "--persona-frames", "9999"],
            ["--persona-frames", "at most"],
        ),
        (["--port", "0", "--model", "nowhere"], ["--model", "nowhere"]),
    ],
)
def test_mistakes_are_one_line(moshi_flax, args: list[str], words: list[str]):
    result = moshi_flax("serve", "--port", 0, *args)
    assert result.code == 2 and result.err.count("\n") == 1
    assert all(word in result.err for word in words), result.err


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(moshi_flax, monkeypatch):
    monkeypatch.setattr(serve, "load", None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        result = moshi_flax("serve", "--port", other.getsockname()[1])
    assert result.code == 2 and "cannot listen" in result.err


def test_what_is_not_installed_is_named(moshi_flax, monkeypatch):
    find = serve.importlib.util.find_spec
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None if name == "sphn" else find(name))
    result = moshi_flax("serve")
    assert result.code == 2 and "sphn not installed" in result.err and "[serve]" in result.err


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command serves a fake stream; the loggers are afterwards as they were."""

    def load(
        source: str, dtype: Any, slots: int, queue: int, sampling: dict, wanted: Any, metrics: Any, notes: Any
    ) -> tuple:
        engine = Engine(FakeStream(slots), metrics, realtime=False, queue=queue)
        engine.warmup()
        return engine, Tokenizer(), None

    monkeypatch.setattr(serve, "load", load)
    handlers = logging.getLogger().handlers
    yield
    logging.getLogger().handlers = handlers


class Visitor(threading.Thread):
    """Talks with the server, and ends it by a signal."""

    def __init__(self, url: str, headers: dict[str, str], tls: ssl.SSLContext | bool = True):
        super().__init__()
        self.url, self.headers, self.tls = url, headers, tls
        self.heard: np.ndarray | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            asyncio.run(asyncio.wait_for(self.visit(), 60))
        except BaseException as error:
            self.error = error
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    async def visit(self) -> None:
        connector = aiohttp.TCPConnector(ssl=self.tls)
        async with aiohttp.ClientSession(connector=connector, headers=self.headers) as session:
            await until_ready(session, self.url)
            async with session.ws_connect(f"{self.url}/api/chat?format=pcm16&{SEEDS}") as chat:
                await chat.send_bytes(as_audio(speech(2)))
                self.heard = (await read(chat, 2)).samples


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "TLS and token"])
def test_from_the_command_to_its_end(moshi_flax, fake, tmp_path: Path, secured: bool):
    port, args, headers, tls = free_port(), [], {}, True
    if secured:
        (tmp_path / "tokens").write_text("first\nsecond\n")
        args = ["--ssl-cert", CERTIFICATE, "--ssl-key", CERTIFICATE, "--auth-token-file", tmp_path / "tokens"]
        args += ["--record", tmp_path / "kept"]
        headers, tls = {"Authorization": "Bearer second"}, ssl.create_default_context(cafile=CERTIFICATE)
    visitor = Visitor(f"http{'s' * secured}://localhost:{port}", headers, tls)
    visitor.start()
    result = moshi_flax("serve", "--port", port, "--grace", 5, *args)
    visitor.join()
    if visitor.error:
        raise visitor.error
    assert result.code == 0
    assert np.array_equal(visitor.heard, alone(speech(2)))
    first, *lines = [line for line in result.err.splitlines() if line.strip()]
    assert f"http{'s' * secured}://127.0.0.1:{port}/" in first and checkpoints.NOTICE in first
    events = [json.loads(line)["event"] for line in lines]
    if secured:
        (dialogue,) = (tmp_path / "kept").iterdir()
        assert json.loads((dialogue / "dialogue.json").read_text())["frames"] == 2
        events.remove("recorded")  # whenever the disk is done, at the latest before the end
    assert events[0] == "ready" and events[-2:] == ["draining", "stopped"]


@pytest.mark.slow
def test_the_embedded_model_answers_kyutai_s_protocol(tmp_path: Path):
    """A process of its own, as users start it."""
    command = [sys.executable, "-c", "from transformers_moshi_flax.cli import main; main()", "serve"]
    soundfile.write(tmp_path / "ada.wav", speech(3).reshape(-1), 24_000)
    server = subprocess.Popen(
        [*command, "--model", str(RANDOM_MODEL), "--port", "0", "--slots", "2", "--voices", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    assert server.stderr is not None
    try:
        seen = ""
        for line in server.stderr:
            seen += line
            if found := re.search(r'"port": (\d+)', line):
                break
        else:
            raise AssertionError(seen)

        async def talk() -> None:
            url = f"http://127.0.0.1:{found[1]}/api/chat?format=pcm16&voice_prompt=ada&text_prompt=be+brief"
            async with aiohttp.ClientSession() as session, session.ws_connect(url) as chat:
                await chat.receive_bytes()  # the handshake, before which a new persona hears nothing
                await chat.send_bytes(as_audio(speech(4)))
                reply = await read(chat, 4)
                assert reply.metadata["voice_prompt"] == "ada" and reply.metadata["voices"] == ["ada"]
                assert reply.samples.any() and reply.metadata["model"] == RANDOM_MODEL.name

        asyncio.run(talk())
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
