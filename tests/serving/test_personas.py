"""Personas: which there are, what is kept of them, and callers who ask for one."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from tests.configs import tiny_moshi_config
from tests.serving.fake_stream import FakeStream, spoken_alone
from tests.serving.house import KEY, SEEDS, House, Tokenizer, as_audio, in_a_loop, read, serving, speech
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, IdleCodes, MoshiPrompt
from transformers_moshi_flax.models.moshi.prompt_flax_moshi import voice_codes
from transformers_moshi_flax.serving.engine import Engine
from transformers_moshi_flax.serving.metrics import Metrics
from transformers_moshi_flax.serving.personas import Busy, Personas, read_voices
from transformers_moshi_flax.serving.protocol import HANDSHAKE

IDLE = IdleCodes(np.array([1, 2], np.int32), np.array([3, 4], np.int32))
VOICES = {
    name: MoshiPrompt.from_codes(np.full((2, frames), code), IDLE.user)
    for name, frames, code in (("ada", 3, 5), ("bo", 2, 6))
}
LONGEST = 40


class Pieces(Tokenizer):
    """A piece a word."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [len(word) for word in text.split()]


def personas_of(stream: Any, kept: int = 3) -> Personas:
    return Personas(stream, Pieces(), IDLE, VOICES, kept, LONGEST)


def sum_of(prompt: MoshiPrompt) -> int:
    """What the fake stream makes of it."""
    return int(prompt.text_ids.sum() + prompt.moshi_codes.sum() + prompt.user_codes.sum())


@pytest.fixture
def stream() -> FakeStream:
    stream = FakeStream(2)
    stream.warmup(LONGEST)
    return stream


class TestPersonas:
    def test_a_persona_is_voice_and_text(self, stream: FakeStream) -> None:
        personas = personas_of(stream)
        found = personas.find("ada", " be  brief ")
        assert found is not None and (found.voice, found.text) == ("ada", "be brief")
        assert np.array_equal(found.prompt.text_ids, of_persona("ada", "be brief").text_ids)
        assert personas.find(None, "  ") is None and personas.find("", None) is None

    @pytest.mark.parametrize("voice", ["eve", "../ada", "/etc/passwd", "ada.safetensors", "..", "ada\0", "a" * 10_000])
    def test_a_voice_is_one_of_the_names(self, stream: FakeStream, voice: str) -> None:
        with pytest.raises(ValueError, match=r"there is no voice .* there are: ada, bo") as refused:
            personas_of(stream).find(voice, None)
        assert len(str(refused.value)) < 200

    def test_a_persona_may_be_too_long(self, stream: FakeStream) -> None:
        personas = personas_of(stream)
        longest = LONGEST - 2 - 2 * 6 - 2  # without the voice, the pauses, what is around the text
        found = personas.find("bo", "no " * longest)
        assert found is not None and found.prompt.frames == LONGEST
        with pytest.raises(ValueError, match="41 frames, but 40 are allowed"):
            personas.find("bo", "no " * (longest + 1))
        with pytest.raises(ValueError, match="characters, at most 640"):
            personas.find(None, "a" * 641)

    def test_pieces_that_the_model_does_not_know(self, stream: FakeStream) -> None:
        with pytest.raises(ValueError, match="has the id 350"):
            personas_of(stream).find(None, "a" * 350)

    def test_voices_of_no_use_are_told_at_once(self, stream: FakeStream) -> None:
        voices = {"eve": MoshiPrompt.from_codes(np.zeros((2, LONGEST), int), IDLE.user)}
        with pytest.raises(ValueError, match="the voice 'eve': voice and text have 46 frames, but 40 are allowed"):
            Personas(stream, Pieces(), IDLE, voices, 1, LONGEST)

    def test_states_are_made_once_and_the_last_ones_are_kept(self, stream: FakeStream) -> None:
        personas = personas_of(stream, kept=2)
        wanted = [personas.find(None, text) for text in ("one", "two", "three")]
        first = personas.state(wanted[0])
        assert first.result(10) == sum_of(wanted[0].prompt) and personas.state(wanted[0]) is first
        personas.state(wanted[1]).result(10)
        assert personas.state(wanted[0]) is first  # the other one is the oldest now
        personas.state(wanted[2]).result(10)
        assert personas.state(wanted[0]) is first and len(stream.prefilled) == 3
        personas.state(wanted[1]).result(10)
        assert len(stream.prefilled) == 4
        personas.close()

    def test_who_brings_too_many_new_ones_waits(self, stream: FakeStream, monkeypatch: pytest.MonkeyPatch) -> None:
        held = threading.Event()
        monkeypatch.setattr(stream, "prefill", lambda prompt, capacity: held.wait(10))
        personas = personas_of(stream)
        one, two, three = (personas.find(None, text) for text in ("one", "two", "three"))
        states = [personas.state(one), personas.state(two)]
        with pytest.raises(Busy):
            personas.state(three)
        assert personas.state(one) is states[0]
        held.set()
        assert all(state.result(10) for state in states) and personas.state(three).result(10)
        personas.close()

    def test_one_that_has_failed_is_tried_again(self, stream: FakeStream, monkeypatch: pytest.MonkeyPatch) -> None:
        personas = personas_of(stream)
        persona = personas.find("ada", None)
        with monkeypatch.context() as broken:
            broken.setattr(stream, "prefill", lambda *_: 1 / 0)
            assert isinstance(personas.state(persona).exception(10), ZeroDivisionError)
        assert personas.state(persona).result(10) == sum_of(persona.prompt)
        personas.close()


@pytest.fixture(scope="module")
def model() -> FlaxMoshiForConditionalGeneration:
    return FlaxMoshiForConditionalGeneration(tiny_moshi_config(), seed=3)


class TestVoices:
    def test_recordings_and_codes(self, model: FlaxMoshiForConditionalGeneration, tmp_path: Path) -> None:
        idle = IdleCodes.of(model)
        samples = np.random.default_rng(0).integers(-9000, 9000, 16 * 30 + 3).astype(np.int16)
        soundfile.write(tmp_path / "ada.wav", samples, 24_000)
        stored = MoshiPrompt.from_codes(np.arange(12).reshape(4, 3), idle.user)
        stored.save(tmp_path / "bo.safetensors")
        (tmp_path / "notes.txt").write_text("no voice")
        (tmp_path / ".hidden.wav").write_text("no voice")
        voices = read_voices(tmp_path, model, idle)
        assert list(voices) == ["ada", "bo"] and np.array_equal(voices["bo"].moshi_codes, stored.moshi_codes)
        codes = voice_codes(model, samples.astype(np.float32) / 32768)
        assert np.array_equal(voices["ada"].moshi_codes, codes) and codes.shape == (4, 31)

    def test_folders_of_no_use(self, model: FlaxMoshiForConditionalGeneration, tmp_path: Path) -> None:
        idle, folder = IdleCodes.of(model), tmp_path / "voices"
        with pytest.raises(OSError):
            read_voices(folder, model, idle)
        folder.mkdir()
        with pytest.raises(ValueError, match="there is no voice in"):
            read_voices(folder, model, idle)
        MoshiPrompt.from_codes(np.zeros((2, 3), int), np.zeros(2, int)).save(folder / "small.safetensors")
        with pytest.raises(ValueError, match=r"'small.safetensors': `prompt` has 2 codebooks"):
            read_voices(folder, model, idle)
        (folder / "small.safetensors").unlink()
        MoshiPrompt.from_codes(np.zeros((4, 3), int), idle.user).save(tmp_path / "far.safetensors")
        (folder / "near.safetensors").symlink_to(tmp_path / "far.safetensors")
        with pytest.raises(ValueError, match=r"'near.safetensors' leads out of the folder"):
            read_voices(folder, model, idle)
        (folder / "near.safetensors").unlink()
        for name in ("a.wav", "a.flac"):
            soundfile.write(folder / name, np.zeros(100, np.int16), 24_000)
        with pytest.raises(ValueError, match="two voices are called 'a'"):
            read_voices(folder, model, idle)


def house(**options: Any) -> Any:
    engine = Engine(FakeStream(2), Metrics(), realtime=False, queue=options.pop("queue", 0))
    engine.warmup(LONGEST)
    return serving(engine=engine, tokenizer=Pieces(), personas=lambda engine: personas_of(engine.stream), **options)


async def dialogue(house: House, query: str, said: np.ndarray) -> Any:
    async with house.call(f"format=pcm16&{SEEDS}&{query}") as socket:
        assert await socket.receive_bytes() == HANDSHAKE  # before, a new persona is not there yet
        await socket.send_bytes(as_audio(said))
        return await read(socket, len(said))


def of_persona(voice: str | None, text: str | None) -> MoshiPrompt:
    return MoshiPrompt.of_persona(IDLE, VOICES[voice] if voice else None, text, Pieces())


def alone(said: np.ndarray, voice: str | None, text: str | None) -> np.ndarray:
    prompt = of_persona(voice, text)
    return spoken_alone(said.astype(np.float32) / 32768, KEY, sum_of(prompt))


class TestCallers:
    @in_a_loop
    async def test_a_dialogue_begins_from_its_persona(self) -> None:
        said = speech(3)
        async with house() as at:
            for query, voice, text in (
                ("voice_prompt=ada&text_prompt=be+brief", "ada", "be brief"),
                ("voice_prompt=bo", "bo", None),
                ("text_prompt=be+brief", None, "be brief"),
                ("voice_prompt=ada&text_prompt=be+brief", "ada", "be brief"),
            ):
                reply = await dialogue(at, query, said)
                assert np.array_equal(reply.samples, alone(said, voice, text))
                assert reply.metadata["voice_prompt"] == voice and reply.metadata["text_prompt"] == (text or "")
            reply = await dialogue(at, "", said)
            assert np.array_equal(reply.samples, spoken_alone(said.astype(np.float32) / 32768, KEY))
            assert "voice_prompt" not in reply.metadata
            assert len(at.server.engine.stream.prefilled) == 3

    @in_a_loop
    async def test_begun_anew_it_is_the_same_persona(self) -> None:
        said = speech(2)
        async with house() as at, at.call(f"format=pcm16&{SEEDS}&voice_prompt=ada") as socket:
            await socket.receive_bytes()
            for _ in range(2):
                await socket.send_bytes(as_audio(said))
                assert np.array_equal((await read(socket, 2)).samples, alone(said, "ada", None))
                await socket.send_bytes(b"\x03\x03")

    @pytest.mark.parametrize(
        ("query", "words"),
        [
            ("voice_prompt=..%2Fada", "there is no voice '../ada'; there are: ada, bo"),
            ("voice_prompt=%2Fetc%2Fpasswd", "there is no voice '/etc/passwd'"),
            ("text_prompt=" + "no+" * 40, "48 frames, but 40 are allowed"),
            ("text_prompt=" + "a" * 700, "700 characters, at most 640"),
        ],
    )
    def test_what_cannot_be_is_refused(self, query: str, words: str) -> None:
        @in_a_loop
        async def refused() -> None:
            async with house() as at:
                status, text = await at.text(f"/api/chat?{query}")
                assert status == 400 and words in text
                status, text = await at.text(f"/v1/realtime?{query}")
                assert status == 400 and words in text

        refused()

    @in_a_loop
    async def test_without_personas_there_are_none(self) -> None:
        async with serving() as at:
            status, text = await at.text("/api/chat?text_prompt=wise")
            assert status == 400 and "there are no personas here" in text
            about = json.loads((await at.text("/api/build_info"))[1])
            assert about["personas"] is False and about["voices"] == []

    @in_a_loop
    async def test_pages_learn_of_the_voices(self) -> None:
        async with house() as at:
            about = json.loads((await at.text("/api/build_info"))[1])
            assert about["personas"] is True and about["voices"] == ["ada", "bo"]

    @in_a_loop
    async def test_who_waits_for_a_persona_holds_up_nobody(self) -> None:
        said, held = speech(2), threading.Event()
        async with house() as at:
            stream = at.server.engine.stream
            prefill = stream.prefill
            stream.prefill = lambda *given: (held.wait(20), prefill(*given))[1]
            async with at.call(f"format=pcm16&{SEEDS}&voice_prompt=ada") as slow:
                await slow.send_bytes(as_audio(said))  # before the handshake: not heard
                assert np.array_equal(
                    (await dialogue(at, "", said)).samples, spoken_alone(said.astype(np.float32) / 32768, KEY)
                )
                # a third one is refused, and has made nobody work
                async with at.call(f"format=pcm16&{SEEDS}") as second:
                    with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
                        await dialogue(at, "voice_prompt=bo", said)
                    held.set()
                    await slow.receive()
                    await slow.send_bytes(as_audio(said))
                    assert np.array_equal((await read(slow, 2)).samples, alone(said, "ada", None))
                    await second.close()
            assert len(stream.prefilled) == 1

    @in_a_loop
    async def test_whoever_leaves_before_the_persona_is_there_gives_the_place_back(self) -> None:
        held = threading.Event()
        async with house() as at:
            stream = at.server.engine.stream
            prefill = stream.prefill
            stream.prefill = lambda *given: (held.wait(20), prefill(*given))[1]
            async with at.call(f"format=pcm16&{SEEDS}&voice_prompt=ada") as socket:
                await socket.close()
            await at.until(lambda: at.server.engine.free_slots == 2)
            held.set()
            said = speech(2)
            assert np.array_equal((await dialogue(at, "voice_prompt=ada", said)).samples, alone(said, "ada", None))
            assert at.server.engine.free_slots >= 1 and len(stream.prefilled) == 1

    @in_a_loop
    async def test_a_persona_that_fails_ends_that_dialogue_alone(self) -> None:
        said = speech(2)
        async with house() as at:
            at.server.engine.stream.prefill = lambda *_: 1 / 0
            async with at.call(f"format=pcm16&{SEEDS}&voice_prompt=ada") as socket:
                reply = await read(socket)
                assert "the server has failed" in reply.errors[0] and not reply.audio
            await at.until(lambda: at.server.engine.free_slots == 2)
            reply = await dialogue(at, "", said)
            assert np.array_equal(reply.samples, spoken_alone(said.astype(np.float32) / 32768, KEY))


def event(kind: str, **fields: Any) -> str:
    return json.dumps({"type": kind, **fields})


class TestRealtime:
    """Instructions and voice of a session, as long as nothing was said."""

    def session(self, **fields: Any) -> str:
        return event("session.update", session={"type": "realtime", **fields})

    @in_a_loop
    async def test_a_session_begins_anew_from_its_instructions(self) -> None:
        async with house() as at, at.session.ws_connect(f"{at.url}/v1/realtime?{SEEDS}") as socket:
            assert (await socket.receive_json())["session"]["instructions"] == ""
            await socket.send_str(self.session(instructions="be brief", audio={"output": {"voice": "ada"}}))
            updated = await socket.receive_json()
            assert updated["type"] == "session.updated", updated
            assert updated["session"]["instructions"] == "be brief"
            assert updated["session"]["audio"]["output"]["voice"] == "ada"
            assert await self.answer(socket, speech(2)) == alone(speech(2), "ada", "be brief").tobytes()
            # now it is too late
            await socket.send_str(self.session(instructions="be long"))
            refused = await self.next_of(socket, "error")
            assert refused["error"]["param"] == "session.instructions"

    @in_a_loop
    async def test_back_to_nothing(self) -> None:
        query = f"{SEEDS}&voice_prompt=bo&text_prompt=wise"
        async with house() as at, at.session.ws_connect(f"{at.url}/v1/realtime?{query}") as socket:
            created = (await socket.receive_json())["session"]
            assert created["instructions"] == "wise" and created["audio"]["output"]["voice"] == "bo"
            await socket.send_str(self.session(instructions="", audio={"output": {"voice": None}}))
            assert (await socket.receive_json())["type"] == "session.updated"
            expected = spoken_alone(speech(2).astype(np.float32) / 32768, KEY)
            assert await self.answer(socket, speech(2)) == expected.tobytes()

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"audio": {"output": {"voice": "../ada"}}}, "session.audio.output.voice"),
            ({"audio": {"output": {"voice": {"id": "ada"}}}}, "session.audio.output.voice"),
            ({"instructions": 7}, "session.instructions"),
            ({"instructions": "no " * 60}, "session.instructions"),
            ({"instructions": "wise", "tools": [{}]}, "session.tools"),
        ],
    )
    def test_what_cannot_be(self, fields: dict[str, Any], param: str) -> None:
        @in_a_loop
        async def refused() -> None:
            async with house() as at, at.session.ws_connect(f"{at.url}/v1/realtime?{SEEDS}") as socket:
                await socket.receive_json()
                await socket.send_str(self.session(**fields))
                assert (await socket.receive_json())["error"]["param"] == param
                await socket.send_str(self.session(instructions="", audio={"output": {"voice": None}}))
                assert (await socket.receive_json())["type"] == "session.updated"
                assert not at.server.engine.stream.prefilled

        refused()

    async def answer(self, socket: Any, said: np.ndarray) -> bytes:
        """The audio of as many frames as were said."""
        await socket.send_str(event("input_audio_buffer.append", audio=base64.b64encode(said.tobytes()).decode()))
        audio = b""
        while len(audio) < said.size * 2:
            audio += base64.b64decode((await self.next_of(socket, "response.output_audio.delta"))["delta"])
        return audio

    async def next_of(self, socket: Any, kind: str) -> dict[str, Any]:
        while (found := await socket.receive_json())["type"] != kind:
            assert found["type"] != "error", found
        return found


def test_new_personas_compile_nothing(
    model: FlaxMoshiForConditionalGeneration, count_compilations: Callable[[], int]
) -> None:
    """With the real stream, whatever their lengths; and what is said is what the stream says alone."""
    from transformers_moshi_flax.serving.engine import stream_for_callers

    stream, numbers = stream_for_callers(model, 2, {"do_sample": True, "temperature": 0.7, "top_k": 25})
    idle = IdleCodes.of(model)
    voices = {"ada": MoshiPrompt.from_codes(np.arange(80).reshape(4, 20) % 32, idle.user)}
    personas = Personas(stream, Pieces(), idle, voices, 2, 100)
    engine = Engine(stream, Metrics(), numbers, realtime=False)
    engine.warmup(100)
    frames: list[Any] = []
    came = threading.Semaphore(0)
    engine.start(lambda said: [(frames.append(one), came.release()) for one in said], frames.append)
    audio = np.zeros(stream.frame_size, np.float32)
    key = np.array(KEY, np.uint32)
    count_compilations()
    for voice, text in (("ada", None), (None, "be " * 30), ("ada", "be " * 55), ("ada", None)):
        persona = personas.find(voice, text)
        seat = engine.take_seat({}, key, personas.state(persona))
        seat.begun.result(60)
        engine.feed(seat, audio)
        assert came.acquire(timeout=60)
        engine.restart(seat).result(60)
        engine.leave(seat)
    assert count_compilations() == 0
    engine.stop()
    personas.close()
    assert len(frames) == 4 and frames[0].text_id == frames[3].text_id
    rows = np.array([True, False])
    state = stream.configure(stream.init(), rows, **numbers)
    prompt = stream.prefill(personas.find("ada", "be " * 55).prompt)
    state = stream.reset(state, rows, jnp.asarray(np.tile(key, (2, 1))), prompt=prompt)
    _, frame = stream.step(state, np.zeros((2, 1, stream.frame_size), np.float32), active=rows)
    assert int(frame.text_ids[0]) == frames[2].text_id
    np.testing.assert_array_equal(np.asarray(frame.audio)[0, 0], frames[2].audio)
