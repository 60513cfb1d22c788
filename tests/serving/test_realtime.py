"""OpenAI's realtime events, spoken by the ``openai`` package, whose types every event of ours is held against."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
from openai.types.realtime import RealtimeServerEvent
from pydantic import BaseModel, TypeAdapter
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.serving.fake_stream import FRAME, FakeStream
from tests.serving.house import SEEDS, House, Tokenizer, as_audio, in_a_loop, read, serving, speech
from tests.serving.test_kyutai_client import real_engine, said_by_a_real_model
from tests.serving.test_server import alone, example_with, fresh_server, until_ready
from transformers_moshi_flax.models.moshi.pcm import from_float
from transformers_moshi_flax.serving import logs
from transformers_moshi_flax.serving.caller import Limits
from transformers_moshi_flax.serving.dialect import FAILED, LEFT, SHUTDOWN, Dialect, Ending
from transformers_moshi_flax.serving.gate import Gate
from transformers_moshi_flax.serving.realtime import FOREIGN, Realtime
from transformers_moshi_flax.serving.words import Words

EVENTS = TypeAdapter(RealtimeServerEvent)
SEED_QUERY = dict(part.split("=") for part in SEEDS.split("&"))
OURS = {"id", "object", "dialogue"}
"""What a session has beyond the type of its events: two that the API's sessions have, and one of our own."""

BEGINNING = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
]
ENDING = [
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "conversation.item.done",
    "response.output_item.done",
    "response.done",
]


def check(event: dict[str, Any]) -> None:
    """An event is one of OpenAI's to the last field, or our only own."""
    if event["type"] == "queue.position":
        assert event.keys() == {"type", "event_id", "position"}
        return
    parsed = EVENTS.validate_python(event, strict=True)
    assert parsed.type == event["type"]
    session = getattr(parsed, "session", None)
    for model in models_in(parsed):
        # in the queue there is no dialogue yet
        assert set(model.model_extra or ()) - {"dialogue"} == (OURS - {"dialogue"} if model is session else set())


def models_in(value: Any) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
        value = [getattr(value, name) for name in type(value).model_fields]
    if isinstance(value, list):
        for part in value:
            yield from models_in(part)


class Ear:
    """What a client of ``openai`` hears, each event checked.

    Attributes:
        events: all, as JSON.
    """

    def __init__(self, connection: Any):
        self.connection = connection
        self.events: list[dict[str, Any]] = []

    async def hear(self) -> dict[str, Any]:
        """The next event."""
        data = await asyncio.wait_for(self.connection.recv_bytes(), 30)
        event = json.loads(data)
        check(event)
        # as users of the package see it
        assert self.connection.parse_event(data).type == event["type"]
        self.events.append(event)
        return event

    async def until(self, kind: str, times: int = 1) -> dict[str, Any]:
        """Hear on until there were so many of a kind in all; the last of them."""
        while len(self.of(kind)) < times:
            await self.hear()
        return self.of(kind)[times - 1]

    async def to_the_end(self) -> ConnectionClosed:
        """Hear on until the server closes."""
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                await self.hear()
        return closed.value

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]

    @property
    def kinds(self) -> list[str]:
        return [event["type"] for event in self.events]

    @property
    def samples(self) -> np.ndarray:
        """By frames."""
        data = b"".join(base64.b64decode(event["delta"]) for event in self.of("response.output_audio.delta"))
        return np.frombuffer(data, "<i2").reshape(-1, FRAME)

    @property
    def words(self) -> str:
        return "".join(event["delta"] for event in self.of("response.output_audio_transcript.delta"))

    async def say(self, samples: np.ndarray) -> None:
        await self.connection.input_audio_buffer.append(audio=base64.b64encode(samples.tobytes()).decode())

    async def send(self, event: Any) -> None:
        """An event as it is, or text that may be none."""
        await self.send_raw(event if isinstance(event, str) else json.dumps(event))

    async def send_raw(self, data: str | bytes) -> None:
        """A message that the package would not send."""
        await self.connection._connection.send(data)


@asynccontextmanager
async def calling(house: House, key: str = "no token", query: dict[str, str] = SEED_QUERY) -> AsyncIterator[Ear]:
    """A connection of the ``openai`` package."""
    url = house.url.replace("http://", "ws://")
    async with openai.AsyncOpenAI(api_key=key, websocket_base_url=f"{url}/v1") as client:
        async with client.realtime.connect(model="fake", extra_query=query) as connection:
            yield Ear(connection)


def words_of(frames: int) -> str:
    """What the fake stream writes in so many frames."""
    words = Words(Tokenizer())
    return "".join(words.put(4 + age) for age in range(frames))


@in_a_loop
async def test_openai_s_client_hears_what_our_stream_says():
    said = speech(6)
    async with serving() as house, calling(house) as ear:
        session = (await ear.hear())["session"]
        for piece in np.array_split(said.reshape(-1), 13):
            await ear.say(piece)
        await ear.until("response.output_audio.delta", 6)
        await ear.until("response.output_audio_transcript.delta", 4)
        async with house.call() as other:
            await other.send_bytes(as_audio(said))
            by_kyutai_s = await read(other, 6)
    assert np.array_equal(ear.samples, alone(said)) and np.array_equal(ear.samples, by_kyutai_s.samples)
    # the last frame's words come after its audio
    assert ear.words == words_of(6) == "€ 7 8 9" and ear.words.startswith(by_kyutai_s.words)
    assert ear.kinds[:6] == ["session.created", *BEGINNING, "response.output_audio.delta"]
    assert session["model"] == "fake" and session["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": 24_000}
    assert session["dialogue"]["key"] == [1, 2] and session["dialogue"]["sampling"] == FakeStream.numbers
    ids = [event["event_id"] for event in ear.events]
    assert len(set(ids)) == len(ids)


@pytest.mark.slow
def test_the_same_with_a_real_model():
    engine, tokenizer = real_engine()
    said = speech(12)

    async def talk() -> Ear:
        query = {"audio_seed": "1", "text_seed": "1", "max_steps": "12"}
        async with serving(engine=engine, tokenizer=tokenizer) as house, calling(house, query=query) as ear:
            await ear.say(said)
            await ear.to_the_end()
        return ear

    ear = in_a_loop(talk)()
    samples, words = said_by_a_real_model(engine, tokenizer, said.astype(np.float32) / 32768)
    assert np.array_equal(ear.samples, from_float(samples, np.int16)) and ear.words == words
    assert ear.of("response.output_audio_transcript.done")[0]["transcript"] == words


@in_a_loop
async def test_a_sample_may_be_cut_between_messages():
    said = speech(2)
    data = said.tobytes()
    async with serving() as house, calling(house) as ear:
        for part in (data[:1001], b"", data[1001:3000], data[3000:]):
            await ear.send({"type": "input_audio_buffer.append", "audio": base64.b64encode(part).decode()})
        await ear.until("response.output_audio.delta", 2)
    assert np.array_equal(ear.samples, alone(said)) and not ear.of("error")


@in_a_loop
async def test_a_session_can_be_what_it_is_and_nothing_else():
    sound = {"type": "audio/pcm", "rate": 24_000}
    async with serving() as house, calling(house) as ear:
        created = (await ear.hear())["session"]
        audio = {"input": {"format": sound, "turn_detection": None}, "output": {"speed": 1}}
        await ear.connection.session.update(
            session={"type": "realtime", "model": "fake", "output_modalities": ["audio"], "audio": audio}
        )
        assert (await ear.hear())["session"] == created
        await ear.connection.session.update(session=created)
        assert (await ear.hear())["session"] == created
        for change, param in [
            ({"instructions": "be brief"}, "session.instructions"),
            ({"output_modalities": ["text"]}, "session.output_modalities"),
            ({"tools": [{"type": "function", "name": "f"}]}, "session.tools"),
            ({"model": "other"}, "session.model"),
            ({"max_output_tokens": 100}, "session.max_output_tokens"),
            ({"temperature": 0.5}, "session.temperature"),
            ({"audio": {"output": {"voice": "alloy"}}}, "session.audio.output.voice"),
            ({"audio": {"output": {"speed": 1.5}}}, "session.audio.output.speed"),
            ({"audio": {"output": {"speed": True}}}, "session.audio.output.speed"),
            ({"audio": {"input": {"format": {"type": "audio/pcmu"}}}}, "session.audio.input.format.type"),
            ({"audio": {"input": {"format": {**sound, "rate": 16_000}}}}, "session.audio.input.format.rate"),
            ({"audio": {"input": {"turn_detection": {"type": "server_vad"}}}}, "session.audio.input.turn_detection"),
            ({"audio": {"input": {"noise_reduction": {"type": "near_field"}}}}, "session.audio.input.noise_reduction"),
            ({"audio": [1]}, "session.audio"),
            ({"type": "transcription"}, "session.type"),
            ({"\ud800" * 500: 1}, "session." + "?" * 80),
            ({"audio": 10**4000}, "session.audio"),
        ]:
            session = {"type": "realtime", **change}
            await ear.send({"type": "session.update", "event_id": param, "session": session})
            error = (await ear.hear())["error"]
            assert error["type"] == "invalid_request_error" and error["code"] == "invalid_value", error
            assert error["param"] == param and f"`{param}`" in error["message"]
            assert error["event_id"] == param
        await still_goes_on(ear)


async def still_goes_on(ear: Ear) -> None:
    """The dialogue is as if nothing had been said yet."""
    said = speech(2, 8)
    await ear.say(said)
    await ear.until("response.output_audio.delta", 2)
    assert np.array_equal(ear.samples, alone(said))


REFUSED: list[tuple[Any, str, str | None]] = [
    *[({"type": kind}, "unsupported_event", "type") for kind in FOREIGN],
    ({"type": "transcription_session.update", "session": {}}, "unknown_event", "type"),
    ({"type": "response.output_audio.delta", "delta": ""}, "unknown_event", "type"),
    ({"type": ["input_audio_buffer.append"]}, "unknown_event", "type"),
    ({"type": None}, "unknown_event", "type"),
    ({}, "unknown_event", "type"),
    ({"type": "session.update"}, "invalid_value", "session.type"),
    ({"type": "session.update", "session": None}, "invalid_value", "session.type"),
    ({"type": "session.update", "session": "realtime"}, "invalid_value", "session.type"),
    ({"type": "input_audio_buffer.append"}, "invalid_value", "audio"),
    *[
        ({"type": "input_audio_buffer.append", "audio": audio}, "invalid_value", "audio")
        for audio in ["AAA", "AAA=AAA=", "AA AA", "AA-_", "ÄÄÄÄ", "\ud800AAA", None, 5, ["AAAA"], {"AAAA": 1}, True]
    ],
]


@in_a_loop
async def test_what_is_refused_is_named_and_the_dialogue_goes_on():
    async with serving(burst_seconds=1000.0) as house, calling(house) as ear:
        await ear.hear()
        for number, (event, code, param) in enumerate(REFUSED):
            await ear.send({**event, "event_id": f"mine_{number}"})
            error = (await ear.hear())["error"]
            assert (error["code"], error["param"]) == (code, param), event
            assert error["event_id"] == f"mine_{number}" and error["type"] == "invalid_request_error"
        await still_goes_on(ear)


def test_every_event_that_clients_have_is_known():
    """None of the package's is an unknown one."""
    from typing import get_args

    from openai.types.realtime import RealtimeClientEvent

    kinds = {
        get_args(event.model_fields["type"].annotation)[0] for event in get_args(get_args(RealtimeClientEvent)[0])
    }
    done = {"session.update", "input_audio_buffer.append", "input_audio_buffer.clear"}
    assert len(kinds) > 10 and kinds <= done | set(FOREIGN)


NO_EVENTS = {
    "no JSON": "hello",
    "nothing": "",
    "no number": '{"type": "session.update", "session": NaN}',
    "infinite": '{"type": "session.update", "session": -Infinity}',
    "two": "{}{}",
    "deep": "[" * 3_000,
    "deep and whole": "[" * 1_500 + "]" * 1_500,
    "a number of digits": "9" * 4_500,
    "a list": '[{"type": "input_audio_buffer.clear"}]',
    "a number": "1e999",
    "null": "null",
    "a byte order mark": "\ufeff{}",
}


@in_a_loop
async def test_messages_that_are_no_events_are_told_so():
    async with serving(burst_seconds=1000.0) as house, calling(house) as ear:
        await ear.hear()
        for name, text in NO_EVENTS.items():
            await ear.send(text)
            error = (await ear.hear())["error"]
            assert error["code"] in ("invalid_json", "unknown_event") and error["event_id"] is None, name
        for given, told in [("x" * 512, "x" * 512), ("x" * 513, None), (5, None), ("\ud800", "?"), ("é\n€", "é\n€")]:
            await ear.send({"type": "none", "event_id": given})
            assert (await ear.hear())["error"]["event_id"] == told
        await still_goes_on(ear)


@in_a_loop
async def test_what_was_not_heard_yet_is_forgotten():
    said = speech(3)
    async with serving() as house, calling(house) as ear:
        await ear.say(said[0])
        await ear.until("response.output_audio.delta")
        # less than a frame, and half a sample
        await ear.say(said[1].view(np.int8)[:1001])
        await ear.connection.input_audio_buffer.clear()
        await ear.until("input_audio_buffer.cleared")
        await ear.say(said[2])
        await ear.until("response.output_audio.delta", 2)
    assert np.array_equal(ear.samples, alone(said[[0, 2]])) and not ear.of("error")


@in_a_loop
async def test_a_response_is_complete_when_its_dialogue_ends():
    """Order, and what each says of it."""
    async with serving(slots=4, idle_seconds=0.4, burst_seconds=5.0) as house:
        async with calling(house) as ear:
            await ear.say(speech(2))
            closed = await ear.to_the_end()
            assert closed.rcvd is not None and closed.rcvd.code == 1001
            assert ear.kinds[-7:] == [*ENDING, "error"]
            check_response(ear, "incomplete", {"type": "incomplete"})
            check_error(ear, "invalid_request_error", "idle", "no audio for 0.4 s")
        async with calling(house) as ear:  # nothing was ever said
            await ear.to_the_end()
            assert ear.kinds == ["session.created", "error"]
    async with serving(slots=4, max_seconds=1.2, burst_seconds=5.0) as house, calling(house) as ear:
        speaking = asyncio.create_task(keep_speaking(ear))
        await ear.to_the_end()
        await speaking
        check_response(ear, "incomplete", {"type": "incomplete"})
        check_error(ear, "invalid_request_error", "length", "lasts 1.2 s at most")
    async with serving(slots=4, burst_seconds=5.0) as house:
        async with calling(house, query={**SEED_QUERY, "max_steps": "4"}) as ear:
            await ear.say(speech(6))
            closed = await ear.to_the_end()
            assert closed.rcvd is not None and closed.rcvd.code == 1000
            assert ear.kinds[-6:] == ENDING and not ear.of("error")
            check_response(ear, "incomplete", {"type": "incomplete", "reason": "max_output_tokens"})
            assert np.array_equal(ear.samples, alone(speech(6))[:4])
        async with calling(house) as ear:
            await ear.say(speech(1))
            await ear.until("response.output_audio.delta")
            await ear.send_raw(b"\x01no text")
            closed = await ear.to_the_end()
            assert closed.rcvd is not None and closed.rcvd.code == 1003
            error = {"type": "invalid_request_error", "code": "malformed"}
            check_response(ear, "failed", {"type": "failed", "error": error})
            check_error(ear, "invalid_request_error", "malformed", "messages are text")
        async with calling(house) as ear:
            await ear.say(speech(1))
            await ear.until("response.output_audio.delta")
            house.server.engine.stream.step = broken
            await ear.say(speech(1))
            closed = await ear.to_the_end()
            assert closed.rcvd is not None and closed.rcvd.code == 1011
            assert ear.of("response.done")[0]["response"]["status"] == "failed"
            check_error(ear, "server_error", "failed", "the server has failed")


def broken(*args: object, **options: object) -> tuple:
    raise RuntimeError("the device is gone")


async def keep_speaking(ear: Ear) -> None:
    try:
        while True:
            await ear.say(speech(1))
            await asyncio.sleep(0.05)
    except ConnectionClosed:
        pass


def check_response(ear: Ear, status: str, details: dict[str, Any]) -> None:
    """All that belongs to the response tells the same of it."""
    (created,), (done,) = ear.of("response.created"), ear.of("response.done")
    response = done["response"]
    assert created["response"]["status"] == "in_progress" and created["response"]["id"] == response["id"]
    assert response["status"] == status and response["status_details"] == details
    (item,) = response["output"]
    assert item["status"] == "incomplete" and item["content"] == [{"type": "output_audio", "transcript": ear.words}]
    assert ear.of("response.output_item.done")[0]["item"] == ear.of("conversation.item.done")[0]["item"] == item
    assert ear.of("response.output_audio_transcript.done")[0]["transcript"] == ear.words
    assert ear.of("response.content_part.done")[0]["part"]["transcript"] == ear.words
    for event in ear.events:
        assert event.get("response_id", response["id"]) == response["id"]
        assert event.get("item_id", item["id"]) == item["id"]
    assert all(ear.kinds.count(kind) == 1 for kind in [*BEGINNING, *ENDING])


def check_error(ear: Ear, kind: str, code: str, words: str) -> None:
    """The last event, and the only error."""
    (error,) = ear.of("error")
    assert error is ear.events[-1]
    assert error["error"]["type"] == kind and error["error"]["code"] == code and words in error["error"]["message"]


@in_a_loop
async def test_when_the_server_ends_they_are_told():
    server, listener, url = fresh_server()
    running = asyncio.create_task(server.run(listener, grace=0.3))
    async with aiohttp.ClientSession() as session:
        await until_ready(session, url)
        house = House(server, url, session)
        async with calling(house) as ear:
            await ear.say(speech(3))
            await ear.until("response.output_audio.delta", 3)
            server._signalled()
            closed = await ear.to_the_end()
    assert closed.rcvd is not None and closed.rcvd.code == 1001
    check_response(ear, "incomplete", {"type": "incomplete"})
    check_error(ear, "server_error", "shutdown", "the server is shutting down")
    await running


@in_a_loop
async def test_in_the_queue_it_is_told_its_place():
    async with serving(slots=1, queue=1) as house, calling(house) as speaks:
        await speaks.hear()
        async with calling(house) as waits:
            assert (await waits.hear())["position"] == 1
            with pytest.raises(InvalidStatus) as refused:
                async with calling(house):
                    pass
            assert refused.value.response.status_code == 503 and "Retry-After" in refused.value.response.headers
            # what is said in the queue is not heard
            await waits.say(speech(2, 5))
            await waits.connection.input_audio_buffer.clear()
            assert (await waits.hear())["type"] == "input_audio_buffer.cleared"
            await waits.connection.session.update(session={"type": "realtime"})
            assert (await waits.hear())["type"] == "session.updated"
            await speaks.connection.close()
            assert (await waits.hear())["type"] == "session.created"
            await still_goes_on(waits)


@in_a_loop
@pytest.mark.parametrize(
    "query, words",
    [
        ({"model": "gpt-realtime"}, "`model`=gpt-realtime is not served here, but fake"),
        ({"format": "opus"}, "`format` cannot be chosen here"),
        ({"intent": "transcription"}, "`intent` is not known here"),
        ({"text_topk": "9999"}, "`text_topk`=9999"),
    ],
)
async def test_a_query_that_cannot_be_had_is_refused(query: dict[str, str], words: str):
    async with serving() as house:
        with pytest.raises(InvalidStatus) as refused:
            async with calling(house, query=query):
                pass
        assert refused.value.response.status_code == 400 and words in refused.value.response.body.decode()
        async with house.session.ws_connect(f"{house.url}/v1/realtime") as caller:  # it is the only model anyway
            assert json.loads(await caller.receive_str())["session"]["model"] == "fake"


@in_a_loop
async def test_tokens_come_as_openai_s_clients_send_them():
    async with serving(gate=Gate(["sk-one"])) as house:
        async with calling(house, key="sk-one") as ear:
            assert (await ear.hear())["type"] == "session.created"
        with pytest.raises(InvalidStatus) as refused:
            async with calling(house, key="sk-two"):
                pass
        assert refused.value.response.status_code == 401
        # in browsers
        for key, status in [("openai-insecure-api-key.sk-one", 101), ("openai-insecure-api-key.sk-two", 401)]:
            for offered in (["realtime", key], ["realtime", key, "openai-beta.realtime-v1"], [key, "realtime"]):
                try:
                    async with house.session.ws_connect(f"{house.url}/v1/realtime", protocols=offered) as caller:
                        assert status == 101 and caller.protocol == "realtime"
                except aiohttp.WSServerHandshakeError as problem:
                    assert problem.status == status
        for odd in ("x-openai-insecure-api-key.sk-one", "openai-insecure-api-key.", "sk-one"):
            with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
                await house.session.ws_connect(f"{house.url}/v1/realtime", protocols=["realtime", odd])


@in_a_loop
async def test_a_token_among_the_subprotocols_is_not_logged(monkeypatch: pytest.MonkeyPatch):
    root, written = logging.getLogger(), io.StringIO()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    levels = {name: logging.getLogger(name).level for name in (logs.LOGGER.name, "aiohttp.websocket")}
    try:
        logs.log_to(written)
        async with serving(gate=Gate(["sk-secret"])) as house:
            url = f"{house.url}/v1/realtime"
            async with house.session.ws_connect(url, protocols=["openai-insecure-api-key.sk-secret"]) as caller:
                await caller.receive_str()
            await house.until(lambda: "dialogue ends" in written.getvalue())
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    assert "sk-secret" not in written.getvalue()


async def flood_of_audio(ear: Ear) -> str:
    """Faster than anybody speaks."""
    audio = base64.b64encode(speech(20).tobytes()).decode()
    return await flood(ear, {"type": "input_audio_buffer.append", "audio": audio}, 100)


async def flood_of_nothing(ear: Ear) -> str:
    """What is long to read, and has no audio."""
    return await flood(ear, {"type": "input_audio_buffer.append", "audio": "", "junk": [[]] * 60_000}, 15)


async def flood_of_refusals(ear: Ear) -> str:
    return await flood(ear, {"type": "response.create", "response": {"instructions": "again " * 200}}, 100)


async def flood(ear: Ear, event: dict[str, Any], times: int) -> str:
    """Send it, and read what comes meanwhile."""
    hearing = asyncio.create_task(last_words(ear))
    message = json.dumps(event)
    try:
        for _ in range(times):
            await ear.send(message)
    except ConnectionClosed:
        pass
    return await hearing


async def large_and_wrong(ear: Ear) -> str:
    """What was wrong with it is told before it is counted."""
    await ear.send({"type": "input_audio_buffer.append", "event_id": "large", "audio": "!" * 200_000})
    words = await last_words(ear)
    assert [event["error"]["event_id"] for event in ear.of("error")] == ["large", None]
    return words


async def larger_than_messages_may_be(ear: Ear) -> str:
    await ear.say(speech(80))
    closed = await ear.to_the_end()
    assert closed.rcvd is not None
    return str(closed.rcvd.code)


async def deep(ear: Ear) -> str:
    """Deeper than any recursion goes."""
    await ear.send('{"type":' + "[" * 200_000)
    await last_words(ear)
    return ear.of("error")[0]["error"]["code"]


async def binary(ear: Ear) -> str:
    await ear.send_raw(as_audio(speech(1)))
    return await last_words(ear)


async def last_words(ear: Ear) -> str:
    await ear.to_the_end()
    return ear.of("error")[-1]["error"]["message"]


ACTS: list[tuple[Callable[[Ear], Awaitable[str]], str]] = [
    (flood_of_audio, "too much"),
    (flood_of_nothing, "too much"),
    (flood_of_refusals, "too much"),
    (large_and_wrong, "too much"),
    (larger_than_messages_may_be, "1009"),
    (deep, "invalid_json"),
    (binary, "messages are text"),
]


@in_a_loop
@pytest.mark.parametrize("act, told", ACTS, ids=[act.__name__ for act, _ in ACTS])
async def test_bad_clients_touch_nobody_else(act: Callable[[Ear], Awaitable[str]], told: str):
    said = speech(8)
    # the fake stream answers a flood as fast as it comes, which nobody can read; that is not what is tried here
    async with serving(slots=2, unread_frames=2000) as house, calling(house) as good:
        await good.say(said[:2])
        await good.until("response.output_audio.delta", 2)
        async with calling(house) as ear:
            bad = asyncio.create_task(act(ear))
            for number in range(2, 8):
                await good.say(said[number])
                await good.until("response.output_audio.delta", number + 1)
                await asyncio.sleep(0.01)
            assert told in await bad
        await house.until(lambda: house.server.engine.free_slots == 1)
    assert np.array_equal(good.samples, alone(said)) and not good.of("error")


@in_a_loop
async def test_the_example_of_the_docs(capsys: pytest.CaptureFixture):
    names: dict[str, Any] = {}
    async with serving() as house:
        code = example_with("openai").replace("127.0.0.1:8998", house.url.removeprefix("http://"))
        exec(code.replace('model="kmhf/hf-moshiko"', 'model="fake"'), names)
        await names["talk"](speech(4).tobytes())
        await names["client"].close()
    assert capsys.readouterr().out == "€"  # which the third frame completes


def test_it_is_a_dialect_whose_endings_are_all_told():
    realtime = Realtime("fake", 24_000, Tokenizer())
    assert isinstance(realtime, Dialect)
    for ending, kinds in [(LEFT, []), (SHUTDOWN, ["error"]), (FAILED, ["error"]), (Ending("length", "max_steps"), [])]:
        events = [json.loads(message) for message in realtime.end(ending)]
        assert [event["type"] for event in events] == kinds
        for event in events:
            check(event)
    (told,) = [json.loads(message) for message in realtime.object("not now")]
    check(told)
    assert told["error"]["message"] == "not now"


def test_a_message_of_openai_s_clients_fits():
    """Two seconds of audio in one."""
    assert Limits().message_bytes > 2 * 48_000 * 4 / 3 + 1000
