"""The server over real sockets: what callers hear, who is refused, what ends a dialogue, what it tells of itself."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import jax
import numpy as np
import pytest
import sphn
from aiohttp import web

from tests.serving.fake_stream import FRAME, FakeStream, spoken_alone
from tests.serving.house import KEY, SEEDS, Reply, as_audio, in_a_loop, read, serving, speech
from transformers_moshi_flax.serving.caller import Limits
from transformers_moshi_flax.serving.codecs import Pcm16
from transformers_moshi_flax.serving.engine import Engine
from transformers_moshi_flax.serving.gate import Addresses, Gate
from transformers_moshi_flax.serving.logs import LOGGER, JsonLines
from transformers_moshi_flax.serving.metrics import Metrics
from transformers_moshi_flax.serving.protocol import Control, Kind
from transformers_moshi_flax.serving.server import PAGE_FILES, Server

ROOT = Path(__file__).resolve().parents[2]


def alone(said: np.ndarray) -> np.ndarray:
    """The stream's own answer to int16 samples."""
    return spoken_alone(said.astype(np.float32) / 32768, KEY)


@in_a_loop
async def test_pcm_is_that_of_the_stream_alone():
    said = speech(5)
    async with serving() as house, house.call() as caller:
        for piece in np.array_split(said.reshape(-1), 11):
            await caller.send_bytes(as_audio(piece))
        reply = await read(caller, 5)
    assert np.array_equal(reply.samples, alone(said))
    assert reply.kinds[:2] == [Kind.HANDSHAKE, Kind.METADATA]
    assert reply.metadata["format"] == "pcm16" and reply.metadata["key"] == list(KEY)
    assert reply.metadata["frame_rate"] == 12.5 and reply.metadata["sampling"] == FakeStream.numbers
    # the ids 4 to 8: three bytes of one character, and two words
    assert reply.words.startswith("€ 7")


@in_a_loop
async def test_a_sample_may_be_cut():
    said = speech(2)
    data = said.tobytes()
    async with serving() as house, house.call() as caller:
        for piece in (data[:1001], data[1001:3000], data[3000:]):
            await caller.send_bytes(bytes([Kind.AUDIO]) + piece)
        reply = await read(caller, 2)
    assert np.array_equal(reply.samples, alone(said))


def over_opus(samples: np.ndarray) -> np.ndarray:
    """What arrives of ``(frames, FRAME)`` floats."""
    writer, reader = sphn.OpusStreamWriter(24_000), sphn.OpusStreamReader(24_000)
    heard = [reader.append_bytes(writer.append_pcm(frame)) for frame in samples]
    return np.concatenate(heard).reshape(-1, FRAME)


def said_over_opus(samples: np.ndarray, key: tuple[int, int] = KEY) -> np.ndarray:
    """The stream's own answer, with Opus on the way there and back."""
    return over_opus(answers(over_opus(samples), key))


def answers(samples: np.ndarray, key: tuple[int, int] = KEY) -> np.ndarray:
    """The stream's own answer to floats."""
    stream = FakeStream(1)
    state = stream.reset(stream.init(), np.ones(1, bool), np.array([key], np.uint32))
    said = []
    for frame in samples:
        state, reply = stream.step(state, frame[None, None], np.ones(1, bool))
        said.append(reply.audio[0, 0])
    return np.array(said)


@in_a_loop
@pytest.mark.parametrize("cut", [10_000, 100], ids=["whole", "cut anywhere"])
async def test_opus_is_that_of_the_stream_alone(cut: int):
    said = speech(6).astype(np.float32) / 32768
    writer, reader = sphn.OpusStreamWriter(24_000), sphn.OpusStreamReader(24_000)
    async with serving() as house, house.call(SEEDS) as caller:
        for frame in said:
            data = writer.append_pcm(frame)
            for at in range(0, len(data), cut):
                await caller.send_bytes(bytes([Kind.AUDIO]) + data[at : at + cut])
        reply = await read(caller, 6)
    heard = np.concatenate([reader.append_bytes(data) for data in reply.audio]).reshape(-1, FRAME)
    assert np.array_equal(heard, said_over_opus(said))
    assert reply.metadata["format"] == "opus"


@in_a_loop
async def test_beyond_the_slots_callers_are_refused_before_the_upgrade():
    async with serving(slots=1) as house:
        async with house.call() as caller:
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await house.call()
            assert refused.value.status == 503 and int(refused.value.headers["Retry-After"]) > 0
            # a page cannot see that; it asks without the upgrade
            status, words = await house.text("/api/chat?format=pcm16")
            assert status == 503 and "all 1 places" in words
            assert house.figure("moshi_refusals_total", reason="full") == 1
            await caller.send_bytes(as_audio(speech(1)))
            await read(caller, 1)
        await house.until(lambda: house.server.engine.free_slots == 1)
        assert (await house.text("/api/chat?format=pcm16"))[0] == 426
        async with house.call() as caller:
            said = speech(2, 7)
            await caller.send_bytes(as_audio(said))
            assert np.array_equal((await read(caller, 2)).samples, alone(said))


@in_a_loop
@pytest.mark.parametrize("format", ["pcm16", "opus"])
async def test_in_the_queue_callers_are_told_their_place_and_heard_when_it_is_their_turn(format: str):
    query = f"format={format}&{SEEDS}"
    async with serving(slots=1, queue=2) as house:
        async with house.call() as speaks, house.call() as next_one, house.call(query) as last:
            reading, waiting = asyncio.create_task(read(next_one)), Reply()
            waiting.take(await last.receive_bytes())
            with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
                await house.call()
            status, words = await house.text("/api/chat?format=pcm16")
            assert status == 503 and "all 1 places are taken, and all 2 in the queue" in words
            assert house.figure("moshi_waiting") == 2 and house.figure("moshi_dialogues") == 1
            # what is said in the queue is not heard, by nobody
            said = speech(7).astype(np.float32) / 32768
            writer = sphn.OpusStreamWriter(24_000)
            payloads = [
                writer.append_pcm(f) if format == "opus" else (f * 32768).astype("<i2").tobytes() for f in said
            ]
            for payload in payloads[:3]:
                await last.send_bytes(bytes([Kind.AUDIO]) + payload)
            await last.send_bytes(bytes([Kind.CONTROL, Control.PAUSE]))
            waiting.take(await last.receive_bytes())
            await next_one.close()
            waiting.take(await last.receive_bytes())
            assert (await reading).positions == [1]
            await speaks.close()
            waiting.take(await last.receive_bytes())
            assert waiting.kinds == [Kind.METADATA, Kind.ERROR, Kind.METADATA, Kind.HANDSHAKE]
            assert waiting.positions == [2, 1] and waiting.errors == ["the dialogue has not begun yet"]
            for payload in payloads[3:]:
                await last.send_bytes(bytes([Kind.AUDIO]) + payload)
            heard = await read(last, 4)
            if format == "pcm16":
                assert np.array_equal(heard.samples, spoken_alone(said[3:], KEY))
            else:
                reader = sphn.OpusStreamReader(24_000)
                samples = np.concatenate([reader.append_bytes(part) for part in heard.audio])
                assert np.array_equal(samples.reshape(-1, FRAME), over_opus(answers(over_opus(said)[3:])))
        assert house.figure("moshi_dialogues_ended_total", reason="left") == 2
        assert house.figure("moshi_waiting") == 0


@in_a_loop
async def test_in_the_queue_bad_clients_and_the_end_are_as_elsewhere(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, LOGGER.name)
    async with serving(slots=1, queue=2, idle_seconds=0.5) as house, house.call() as speaks:
        async with house.call("") as bad:
            await bad.receive_bytes()
            await bad.send_bytes(bytes([Kind.AUDIO]) + b"no Opus")
            assert "no Ogg" in (await read_errors(bad, 1))[0]
        await house.until(lambda: house.figure("moshi_waiting") == 0)
        async with house.call() as waits:
            await waits.receive_bytes()
            for _ in range(8):  # nobody is idle in the queue
                await asyncio.sleep(0.1)
                await speaks.send_bytes(as_audio(speech(1)))
            assert house.figure("moshi_waiting") == 1
            draining = asyncio.create_task(house.server._drain(0.5))
            assert (await read(waits)).errors == ["the server is shutting down"]
            assert (await read(speaks, 8)).errors == []
            await draining
    lines = [record.fields | {"event": record.getMessage()} for record in caplog.records]
    left = [line["reason"] for line in lines if line["event"] == "caller leaves the queue"]
    assert left == ["malformed", "shutdown"]


@in_a_loop
@pytest.mark.parametrize(
    "query, words",
    [("text_topk=9999", ["text_topk", "9999"]), ("repetition_penalty=1.3", ["repetition_penalty"])],
)
async def test_what_cannot_be_had_is_refused_by_name(query: str, words: list[str]):
    async with serving() as house:
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await house.call(query)
        assert refused.value.status == 400
        status, text = await house.text(f"/api/chat?{query}")
        assert status == 400 and all(word in text for word in words)


@in_a_loop
async def test_what_was_asked_for_reaches_the_stream():
    async with serving() as house:
        async with house.call("format=pcm16&text_temperature=0.3&audio_topk=7") as caller:
            reply = await read_greeting(caller)
        assert reply["sampling"] == {**FakeStream.numbers, "temperature": 0.3, "depth_decoder_top_k": 7}
        assert house.server.engine.stream.configured[-1][1] == reply["sampling"]


async def read_greeting(caller: aiohttp.ClientWebSocketResponse) -> dict:
    assert (await caller.receive_bytes())[0] == Kind.HANDSHAKE
    greeting = await caller.receive_bytes()
    assert greeting[0] == Kind.METADATA
    return json.loads(greeting[1:])


@in_a_loop
async def test_a_dialogue_ends_after_its_steps_its_time_or_silence():
    async with serving(slots=3, idle_seconds=0.3, max_seconds=1.0) as house:
        async with house.call(f"format=pcm16&{SEEDS}&max_steps=3") as caller:
            await caller.send_bytes(as_audio(speech(5)))
            reply = await read(caller)
            assert len(reply.audio) == 3 and "max_steps=3" in reply.errors[0]
        async with house.call() as caller:
            reply = await read(caller)
            assert "no audio for 0.3 s" in reply.errors[0] and caller.close_code == 1001
        async with house.call() as caller:
            reading = asyncio.create_task(read(caller))
            while not reading.done():
                await asyncio.sleep(0.05)
                if not caller.closed:
                    await caller.send_bytes(as_audio(speech(1)))
            assert "lasts 1 s at most" in reading.result().errors[0]
        assert house.figure("moshi_dialogues_ended_total", reason="length") == 2
        assert house.figure("moshi_dialogues_ended_total", reason="idle") == 1
        assert house.figure("moshi_dialogues") == 0


@in_a_loop
async def test_control_and_ping():
    said = speech(4)
    async with serving() as house, house.call() as caller:
        await caller.send_bytes(as_audio(said[0]))
        first = await read(caller, 1)
        await caller.send_bytes(bytes([Kind.PING]))
        await caller.send_bytes(bytes([Kind.CONTROL, Control.PAUSE]))
        await caller.send_bytes(as_audio(said[1]))  # is not heard
        await caller.send_bytes(bytes([Kind.CONTROL, Control.START]))
        await caller.send_bytes(as_audio(said[2]))
        second = await read(caller, 1)
        await caller.send_bytes(bytes([Kind.CONTROL, Control.RESTART]))
        await caller.send_bytes(bytes([Kind.CONTROL, Control.END_TURN]))
        await caller.send_bytes(bytes([Kind.TEXT]) + b"hello")
        errors = await read_errors(caller, 2)
        await caller.send_bytes(as_audio(said[3]))
        third = await read(caller, 1)
    assert np.array_equal(np.concatenate([first.samples, second.samples]), alone(said[[0, 2]]))
    assert Kind.PING in second.kinds
    assert "nobody takes turns" in errors[0] and "kind 2" in errors[1]
    assert np.array_equal(third.samples, alone(said[3:]))


async def read_errors(caller: aiohttp.ClientWebSocketResponse, count: int) -> list[str]:
    errors: list[str] = []
    while len(errors) < count:
        data = await caller.receive_bytes()
        if data[0] == Kind.ERROR:
            errors.append(data[1:].decode())
    return errors


@in_a_loop
async def test_a_caller_who_does_not_read_is_dropped_and_the_others_are_not_held_up():
    """It never takes anything from its socket, while it speaks."""
    async with serving(slots=2, buffer_frames=500, burst_seconds=1e6) as house:
        _, writer = await slow_caller(house.url)
        said = speech(3)
        async with house.call() as good:
            frame = as_audio(speech(12, 3))
            header = bytes([0x82, 0x80 | 127]) + len(frame).to_bytes(8, "big") + bytes(4)
            for _ in range(200):
                writer.write(header + frame)
                await asyncio.sleep(0.01)
                if house.figure("moshi_dialogues_ended_total", reason="slow"):
                    break
            await good.send_bytes(as_audio(said))
            assert np.array_equal((await read(good, 3)).samples, alone(said))
            await house.until(lambda: house.figure("moshi_dialogues_ended_total", reason="slow") == 1)
        writer.close()


async def slow_caller(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A websocket by hand whose client reads nothing more than the answer to the upgrade."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader, writer = await asyncio.open_connection(sock=connection, limit=2**12)
    writer.write(
        f"GET /api/chat?format=pcm16 HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    )
    assert b"101" in await reader.readline()
    return reader, writer


@in_a_loop
async def test_what_it_tells_of_itself():
    async with serving(slots=2) as house, house.call() as caller:
        await caller.send_bytes(as_audio(speech(1)))
        await read(caller, 1)
        assert await house.text("/health") == (200, '{"status": "ready"}')
        status, figures = await house.text("/metrics")
        assert status == 200 and "moshi_dialogues 1.0" in figures and "moshi_slots 2.0" in figures
        assert 'moshi_step_seconds_bucket{le="0.08"}' in figures and "moshi_late_steps_total 0.0" in figures
        about = json.loads((await house.text("/api/build_info"))[1])
        assert about["model"] == "fake" and about["slots"] == 2 and about["sample_rate"] == 24_000
        for path in PAGE_FILES:
            async with house.session.get(house.url + path) as answer:
                assert answer.status == 200 and "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert (await house.text("/../server.py"))[0] == 404


@in_a_loop
async def test_tokens_are_asked_for():
    async with serving(gate=Gate(["one", "zwei-ü"])) as house:
        for options in ({}, {"headers": {"Authorization": "Bearer on"}}, {"headers": {"Authorization": "Basic one"}}):
            for path in ("/api/chat", "/api/build_info", "/metrics"):
                assert (await house.text(path, **options))[0] == 401
        assert (await house.text("/api/build_info", headers={"Authorization": "Bearer one"}))[0] == 200
        assert (await house.text("/api/build_info", params={"token": "zwei-ü"}))[0] == 200
        assert (await house.text("/health"))[0] == (await house.text("/"))[0] == 200
        async with house.call("format=pcm16&token=one") as caller:
            await read_greeting(caller)
        assert house.figure("moshi_refusals_total", reason="token") == 9


@in_a_loop
async def test_pages_of_other_servers_are_kept_out():
    async with serving(gate=Gate(origins=["https://friend.example/"], local=True)) as house:
        own = house.url
        for headers, status in [
            ({}, 426),
            ({"Origin": own}, 426),
            ({"Origin": "https://friend.example"}, 426),
            ({"Host": "friend.example"}, 426),
            ({"Host": "localhost:1234"}, 426),
            ({"Origin": "https://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": "http://127.0.0.1:1"}, 403),
            # a name of theirs that was turned to this address
            ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
            ({"Host": "[broken"}, 403),
            ({"Origin": "http://[broken"}, 403),
        ]:
            assert (await house.text("/api/chat?format=pcm16", headers=headers))[0] == status, headers


@in_a_loop
async def test_one_address_has_so_many_and_no_more_in_the_queue_either():
    async with serving(slots=1, queue=5, per_address=2) as house:
        async with house.call() as first, house.call() as waits:
            await waits.receive_bytes()
            with pytest.raises(aiohttp.WSServerHandshakeError, match="429"):
                await house.call()
            status, words = await house.text("/api/chat?format=pcm16")
            assert status == 429 and "2 of 2 dialogues" in words
            other = aiohttp.TCPConnector(local_addr=("127.0.0.2", 0))
            async with aiohttp.ClientSession(connector=other) as session:
                async with session.ws_connect(f"{house.url}/api/chat?format=pcm16") as caller:
                    await caller.receive_bytes()
            await waits.close()
            await house.until(lambda: not house.server.addresses._held or house.figure("moshi_waiting") == 0)
            async with house.call() as waits:
                await waits.receive_bytes()
            assert house.figure("moshi_refusals_total", reason="address") == 2
            await first.send_bytes(as_audio(speech(1)))
            await read(first, 1)
        await house.until(lambda: not house.server.addresses._held)  # nothing is kept of who was here


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8:1:2::1", "2001:db8:1:2:3:4:5:6", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        (None, "", True),
    ],
)
def test_addresses_are_those_that_one_caller_can_have(one: str | None, other: str, same: bool):
    addresses = Addresses(1)
    with addresses.hold(one):
        if same:
            with pytest.raises(web.HTTPTooManyRequests):
                addresses.check(other)
        else:
            addresses.check(other)
    addresses.check(other)
    with Addresses().hold(one), Addresses().hold(one):
        pass


@in_a_loop
async def test_compilations_and_memory_are_told(monkeypatch: pytest.MonkeyPatch):
    def compile_something() -> None:
        jax.jit(lambda x: x + 41).lower(np.zeros(3, np.float32)).compile()

    async with serving() as house:
        compile_something()
        assert house.figure("moshi_compilations_total") == 1
        resident = house.figure("process_resident_memory_bytes")
        assert 10e6 < resident < 1e12
        assert "moshi_device_memory_bytes{" not in (await house.text("/metrics"))[1]  # this backend does not tell
        stats = {"bytes_in_use": 5, "peak_bytes_in_use": 7, "bytes_limit": 9, "num_allocs": 1}
        devices = [
            SimpleNamespace(id=id, memory_stats=lambda told=told: told) for id, told in enumerate([stats, None])
        ]
        monkeypatch.setattr("jax.local_devices", lambda: devices)
        figures = (await house.text("/metrics"))[1]
        for line in ('bytes{device="0"} 5.0', 'peak_bytes{device="0"} 7.0', 'limit_bytes{device="0"} 9.0'):
            assert f"moshi_device_memory_{line}" in figures
        assert 'device="1"' not in figures
    compile_something()
    assert house.figure("moshi_compilations_total") == 1  # of another time


@in_a_loop
async def test_logs_are_json_lines_without_content(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, LOGGER.name)
    async with serving() as house:
        async with house.call(f"format=pcm16&{SEEDS}&token=secret") as caller:
            await caller.send_bytes(as_audio(speech(2)))
            await read(caller, 2)
        await house.until(lambda: len(caplog.records) >= 2)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert [line["event"] for line in lines] == ["dialogue begins", "dialogue ends"]
    assert lines[1]["reason"] == "left" and lines[1]["frames"] == 2 and lines[0]["peer"] == "127.0.0.1"
    assert "secret" not in json.dumps(lines) and "€" not in json.dumps(lines, ensure_ascii=False)


@in_a_loop
@pytest.mark.parametrize("twice", [False, True], ids=["grace", "a second signal"])
async def test_after_a_signal_who_speaks_has_a_while(twice: bool):
    server, listener, url = fresh_server()
    running = asyncio.create_task(server.run(listener, grace=60.0 if twice else 0.5))
    async with aiohttp.ClientSession() as session:
        await until_ready(session, url)
        async with session.ws_connect(f"{url}/api/chat?format=pcm16&{SEEDS}") as caller:
            await read_greeting(caller)
            os.kill(os.getpid(), signal.SIGTERM)
            while (await health(session, url))[0] == 200:
                await asyncio.sleep(0.01)
            assert await health(session, url) == (503, "draining")
            with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
                await session.ws_connect(f"{url}/api/chat?format=pcm16")
            said = speech(2)
            await caller.send_bytes(as_audio(said))
            assert np.array_equal((await read(caller, 2)).samples, alone(said))
            if twice:
                os.kill(os.getpid(), signal.SIGTERM)
            reply = await read(caller)
            assert reply.errors == ["the server is shutting down"] and caller.close_code == 1001
    assert await running is None


@in_a_loop
async def test_when_the_engine_fails_everybody_is_told_and_the_server_ends():
    server, listener, url = fresh_server()
    running = asyncio.create_task(server.run(listener))
    async with aiohttp.ClientSession() as session:
        await until_ready(session, url)
        async with session.ws_connect(f"{url}/api/chat?format=pcm16") as caller:
            await read_greeting(caller)

            def broken(*args: object, **options: object) -> tuple:
                raise RuntimeError("the device is gone")

            server.engine.stream.step = broken
            await caller.send_bytes(as_audio(speech(1)))
            reply = await read(caller)
            assert "the server has failed" in reply.errors[0] and caller.close_code == 1011
    with pytest.raises(RuntimeError, match="the device is gone"):
        await running


def fresh_server() -> tuple[Server, socket.socket, str]:
    """A server that does not run yet, its socket, and where it will be."""
    from tests.serving.house import Tokenizer

    metrics = Metrics()
    engine = Engine(FakeStream(2), metrics, realtime=False)
    engine.warmup()
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    return Server(engine, Tokenizer(), metrics, {"model": "fake", "notice": None}), listener, url


async def health(session: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    async with session.get(f"{url}/health") as answer:
        return answer.status, (await answer.json())["status"]


async def until_ready(session: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                assert await health(session, url) == (200, "ready")
                return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.01)


@in_a_loop
async def test_the_example_of_the_docs(capsys: pytest.CaptureFixture):
    names: dict[str, Any] = {}
    async with serving() as house:
        exec(example_with("aiohttp").replace("http://127.0.0.1:8998", house.url), names)
        await names["talk"](speech(4).tobytes())
    assert capsys.readouterr().out == "€"  # which the third frame completes


def example_with(package: str) -> str:
    """The only one of the docs that imports it."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text("utf-8"), re.S)
    (code,) = [example for example in examples if f"import {package}" in example or f"from {package}" in example]
    return code


def test_models_of_another_rate_are_refused():
    stream = FakeStream(1)
    stream.frame_size = 16
    with pytest.raises(ValueError, match=r"1920 samples at 24000 Hz.*16"):
        Server(Engine(stream, Metrics()), None, Metrics(), {})


def test_limits_and_formats_have_what_the_page_relies_on():
    assert Limits().message_bytes > 1 + 2 * FRAME
    assert (
        Pcm16(24_000).encode(np.array([2.0, -2.0, 0.5], np.float32))
        == np.array([32767, -32768, 16384], "<i2").tobytes()
    )
