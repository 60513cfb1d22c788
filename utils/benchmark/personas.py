"""What a persona costs: a prompt run in one prefill beside its frames forced one by one, and to begin from it.

``python -m utils.benchmark.personas --size 68M --frames 137 --repeats 5`` prints a table in Markdown. The model has
random weights; all is measured in turns, and the least and the median are told. With ``--server`` it is a server of
the embedded model, in a process of its own, and callers over loopback: with no persona, a known one and new ones.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import aiohttp
import jax
import numpy as np
import typer
from transformers import MoshiConfig

from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, MoshiPrompt

from .settings import SIZES


def measure(size: str, frames: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds by what was done."""
    model = FlaxMoshiForConditionalGeneration(MoshiConfig(**SIZES[size].config))
    config, rng = model.config, np.random.default_rng(0)
    codes = rng.integers(0, config.audio_vocab_size, (2, config.num_codebooks, frames))
    prompt = MoshiPrompt(rng.integers(0, config.vocab_size, frames), *codes)
    stream = model.streaming(1)
    # forced frames need no waveforms
    silent = model.streaming(1, return_audio_waveforms=False)
    stream.warmup(frames), silent.warmup()
    known, everyone, key = stream.prefill(prompt, frames), np.ones(1, bool), jax.random.key(0)
    sound = np.zeros((1, stream.channels, stream.frame_size), np.float32)

    def force() -> Any:
        state = silent.init(key, prompt.text_ids[None, 0], prompt.moshi_codes[None, :, 0])
        for frame in range(frames):
            ahead = min(frame + 1, frames - 1)
            state, _ = silent.step(
                state,
                user_audio_codes=prompt.user_codes[None, :, frame],
                forced_text_ids=prompt.text_ids[None, ahead],
                forced_audio_codes=prompt.moshi_codes[None, :, ahead],
            )
        return state

    def step() -> Any:
        nonlocal state
        state, frame = stream.step(state, sound)
        return frame.audio

    def begin() -> Any:
        nonlocal state
        state = stream.reset(state, everyone, key, prompt=known)
        return state

    state = stream.init(key)
    ways: dict[str, Callable[[], Any]] = {
        "frames forced one by one": force,
        "prefill": lambda: stream.prefill(prompt, frames),
        "beginning from a known persona": begin,
        "a step": step,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way())
            if repeat:  # the first time is for what may be new
                found[name].append(1000 * (time.perf_counter() - start))
    return found


@contextmanager
def server() -> Iterator[str]:
    """The address of a server, which ends with the block."""
    code = "from transformers_moshi_flax.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--slots", "2", "--personas", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        ready = next(line for line in process.stderr if '"event": "ready"' in line)
        yield f"http://127.0.0.1:{json.loads(ready)['port']}/api/chat?format=pcm16"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


async def call(url: str) -> tuple[float, float]:
    """Milliseconds from the call to the handshake, and from there to the first frame, if the caller speaks at once."""
    frame = b"\x01" + bytes(3840)
    async with aiohttp.ClientSession() as session:
        begin = time.perf_counter()
        async with session.ws_connect(url) as chat:
            await chat.receive_bytes()
            greeted = time.perf_counter()
            await chat.send_bytes(frame)
            while (await chat.receive_bytes())[0] != 1:
                pass
            heard = time.perf_counter()
    return 1000 * (greeted - begin), 1000 * (heard - greeted)


async def measure_calls(url: str, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Of callers one after another, in turns."""
    known = "&text_prompt=you are known"
    await call(url + known)
    found: dict[str, list[tuple[float, float]]] = {"no persona": [], "a known persona": [], "a new persona": []}
    for repeat in range(repeats):
        new = f"&text_prompt=you are number {repeat} and {'very ' * 60}new"
        for name, query in zip(found, ("", known, new)):
            found[name].append(await call(url + query))
    return found


def main(
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "68M",
    frames: Annotated[int, typer.Option(help="Of the prompt.")] = 137,
    repeats: int = 5,
    with_server: Annotated[bool, typer.Option("--server", help="Calls of a server instead.")] = False,
) -> None:
    """Print the table."""
    if with_server:
        print(f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print("\n| median (least), ms | call to handshake | handshake to the first frame |\n|---|---|---|")
        with server() as url:
            for name, times in asyncio.run(measure_calls(url, repeats)).items():
                cells = [f"{statistics.median(column):.0f} ({min(column):.0f})" for column in zip(*times)]
                print(f"| {name} | {' | '.join(cells)} |")
        return
    print(f"{size}, {frames} frames, load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    found = measure(size, frames, repeats)
    print("\n| | least, ms | median, ms |\n|---|---|---|")
    for name, times in found.items():
        print(f"| {name} | {min(times):.1f} | {statistics.median(times):.1f} |")
    forced, prefilled = (min(found[name]) for name in ("frames forced one by one", "prefill"))
    print(f"\nThe prefill is {forced / prefilled:.1f} times as quick.")


if __name__ == "__main__":
    typer.run(main)
