"""Kyutai's own client, without a sound device: what it would play is what our stream says, over Opus both ways."""

from __future__ import annotations

import asyncio
import itertools
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.random_model import RANDOM_MODEL
from tests.serving.house import in_a_loop, serving, speech
from tests.serving.sound_card import Device, sound_card
from tests.serving.test_server import over_opus, said_over_opus
from transformers_moshi_flax.cli.generate import Speaker
from transformers_moshi_flax.serving.engine import Engine, stream_for_callers
from transformers_moshi_flax.serving.metrics import Metrics
from transformers_moshi_flax.serving.words import Words

FRAMES = 8


class Printer:
    """What the client would show."""

    def __init__(self) -> None:
        self.words, self.complaints = "", []

    def log(self, level: str, message: str) -> None:
        if level != "info":
            self.complaints.append(message)

    def print_token(self, token: str) -> None:
        self.words += token

    def print_header(self) -> None: ...

    def print_pending(self) -> None: ...

    def print_lag(self) -> None: ...


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, Device]:
    """The devices that the client opens, by direction; the microphone hears ``speech``."""
    opened = sound_card(monkeypatch, speech(FRAMES).astype(np.float32) / 32768)
    monkeypatch.delitem(sys.modules, "moshi.client", raising=False)
    return opened


async def talk(devices: dict[str, Device], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Printer:
    """Let the client hear all that there is to hear; what it plays is in ``devices``."""
    import moshi.client

    # the client cannot ask for seeds
    monkeypatch.setattr("transformers_moshi_flax.serving.wishes.secrets.randbits", lambda bits: 1)
    printer = Printer()
    async with serving(**options) as house:
        where = Namespace(url=house.url, host=None, port=None, https=False)
        client = asyncio.create_task(moshi.client.run(printer, where))
        await house.until(lambda: client.done() or len(devices.get("out", Namespace(played=[])).played) == FRAMES)
        client.cancel()
        await asyncio.wait([client])
    assert printer.complaints == ["unknown message kind 0", "unknown message kind 4"]
    return printer


@in_a_loop
async def test_kyutai_s_client_plays_what_our_stream_says(devices: dict[str, Device], monkeypatch):
    printer = await talk(devices, monkeypatch)
    said = speech(FRAMES).astype(np.float32) / 32768
    assert np.array_equal(devices["out"].played, said_over_opus(said, (1, 1)))
    assert printer.words == "€ 7 8 9 10 11"


@in_a_loop
async def test_it_can_wait_in_the_queue(devices: dict[str, Device], monkeypatch):
    import moshi.client

    monkeypatch.setattr(sys.modules["sounddevice"], "InputStream", endless_microphone(devices))
    printer = Printer()
    async with serving(slots=1, queue=1) as house:
        async with house.call():
            where = Namespace(url=house.url, host=None, port=None, https=False)
            client = asyncio.create_task(moshi.client.run(printer, where))
            await house.until(lambda: bool(printer.complaints))
            await asyncio.sleep(0.2)
            assert house.figure("moshi_waiting") == 1 and not devices["out"].played
        await house.until(lambda: client.done() or len(devices["out"].played) > 3)
        assert not client.done()
        client.cancel()
        await asyncio.wait([client])
    # its place, and then what it says of every dialogue
    assert printer.complaints[:3] == [f"unknown message kind {kind}" for kind in (4, 0, 4)]
    assert printer.words.startswith("€ 7")


def endless_microphone(devices: dict[str, Device]) -> Callable[..., Device]:
    frames = itertools.cycle(speech(FRAMES).astype(np.float32) / 32768)
    return lambda callback, **options: devices.setdefault("in", Device(callback, frames))


@pytest.mark.slow
def test_the_same_with_a_real_model(devices: dict[str, Device], monkeypatch):
    engine, tokenizer = real_engine()
    printer = in_a_loop(talk)(devices, monkeypatch, engine=engine, tokenizer=tokenizer)
    answers, text = said_by_a_real_model(engine, tokenizer, over_opus(speech(FRAMES).astype(np.float32) / 32768))
    assert np.array_equal(devices["out"].played, over_opus(answers))
    assert printer.words == text


def real_engine() -> tuple[Engine, Any]:
    """Of the embedded model, and its tokenizer."""
    speaker = Speaker.load(str(RANDOM_MODEL), None)
    stream, numbers = stream_for_callers(speaker.model, 2, {})
    engine = Engine(stream, Metrics(), numbers, realtime=False)
    engine.warmup()
    return engine, speaker.tokenizer


def said_by_a_real_model(engine: Engine, tokenizer: Any, said: np.ndarray) -> tuple[np.ndarray, str]:
    """The answer of the engine's stream alone, in its other slot, to ``(frames, FRAME)`` floats; seeds are 1 and 1."""
    stream, rows, words = engine.stream, np.array([False, True]), Words(tokenizer)
    state = stream.configure(stream.init(), **engine.numbers)
    state = stream.reset(state, rows, jnp.full((2, 2), 1, jnp.uint32))
    answers, text = [], ""
    for frame in said:
        state, reply = stream.step(state, np.stack([frame, frame])[:, None], active=rows)
        answers.append(np.asarray(reply.audio)[1, 0])
        text += words.put(int(reply.text_ids[1]))
    return np.array(answers), text
