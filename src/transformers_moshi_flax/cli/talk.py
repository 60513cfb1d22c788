"""``moshi-flax talk``: a dialogue with a server, by microphone and speakers or with a recording."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Float
from rich.console import Console

from transformers_moshi_flax.cli.audio import AUDIO_OUT, read_audio
from transformers_moshi_flax.cli.errors import FailedRun, UserMistake, as_mistake
from transformers_moshi_flax.cli.live import both_channels, check_file, write_sound
from transformers_moshi_flax.cli.options import DepthTemperature, DepthTopK, Temperature, TopK
from transformers_moshi_flax.cli.serve import check_extra, read_tokens

FORMATS = ("opus", "pcm16")
HOUR = 3600.0


def talk(
    url: Annotated[str, typer.Argument(help="Of the server.")] = "http://localhost:8998",
    user_audio: Annotated[
        Path | None, typer.Option(help="What is said, WAV or FLAC, any rate. Default: the microphone.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the dialogue: Moshi on the left, the user on the right.")
    ] = None,
    extra_seconds: Annotated[float, typer.Option(min=0, help="Silence after the recording, for an answer.")] = 5.0,
    format: Annotated[str, typer.Option(help="Of the audio on its way: opus or pcm16.")] = "opus",
    voice: Annotated[str | None, typer.Option(help="Whose voice Moshi has, by the server's name for it.")] = None,
    text_prompt: Annotated[str | None, typer.Option(help="Who Moshi is, where the server has personas.")] = None,
    auth_token_file: Annotated[Path | None, typer.Option(help="A token for the server, in the first line.")] = None,
    ssl_ca: Annotated[Path | None, typer.Option(help="Whom to trust for HTTPS, PEM. Default: the system's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    depth_temperature: DepthTemperature = None,
    depth_top_k: DepthTopK = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Of the sampling. Default: any.")] = None,
) -> None:
    """Talk with a server: by microphone and speakers, or with a recording that it hears as fast as one speaks."""
    if format not in FORMATS:
        raise UserMistake(f"--format: {format!r} is none of {', '.join(FORMATS)}")
    if not extra_seconds <= HOUR:
        raise UserMistake(f"--extra-seconds: {extra_seconds} is not in [0, {HOUR:.0f}]; give at most an hour")
    if output is not None:
        check_file("--output", output, AUDIO_OUT, user_audio, overwrite)
    check_extra()
    token = next(iter(read_tokens(auth_token_file)), None)
    tls = read_authority(ssl_ca)

    from transformers_moshi_flax.serving.client import NoDialogue, chat_address
    from transformers_moshi_flax.serving.protocol import RATE

    with as_mistake("URL", ValueError):
        chat_address(url)
    samples = None if user_audio is None else read_audio(user_audio, RATE)
    if samples is None and importlib.util.find_spec("sounddevice") is None:
        raise UserMistake("talk: sounddevice is not installed; pip install sounddevice, or give --user-audio")

    values = {
        "text_temperature": temperature,
        "text_topk": top_k,
        "audio_temperature": depth_temperature,
        "audio_topk": depth_top_k,
        "audio_seed": seed,
        "text_seed": seed,
        "voice_prompt": voice,
        "text_prompt": text_prompt,
    }
    query = {name: str(value) for name, value in values.items() if value is not None}
    notes = Console(stderr=True, highlight=False)
    dialogue = Dialogue(notes)
    how = {"format": format, "query": query, "token": token, "tls": tls}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(hold(url, dialogue, samples, extra_seconds, how))
    except NoDialogue as problem:
        raise FailedRun(f"talk: {problem}") from problem
    finally:
        dialogue.end()
        if output is not None and dialogue.heard:
            moshi, user = dialogue.channels()
            write_sound(output, both_channels(moshi, user), RATE)
            notes.print(f"{output}: {len(moshi) / RATE:.2f} s", soft_wrap=True)


class Dialogue:
    """What both have said so far, and what is shown of it.

    Args:
        notes: for what is no word of Moshi's.

    Attributes:
        heard: pieces of Moshi's sound.
        said: pieces of the user's.
        speakers: that play Moshi, if there are some.
    """

    def __init__(self, notes: Console):
        self._notes = notes
        self._printed = False
        self.heard: list[Float[np.ndarray, "samples"]] = []
        self.said: list[Float[np.ndarray, "samples"]] = []
        self.speakers: Any = None

    def sound(self, samples: Float[np.ndarray, "samples"]) -> None:
        """As :class:`.client.Listener`."""
        self.heard.append(samples)
        if self.speakers is not None:
            self.speakers.play(samples)

    def words(self, text: str) -> None:
        """As :class:`.client.Listener`: printed at once."""
        typer.echo(text if self._printed else text.lstrip(), nl=False)
        self._printed = True

    def queued(self, position: int) -> None:
        """As :class:`.client.Listener`."""
        self._notes.print(f"all places are taken; number {position} in the queue", soft_wrap=True)

    def begun(self, about: dict[str, Any]) -> None:
        """As :class:`.client.Listener`."""
        told = [str(about[name]) for name in ("model", "notice") if about.get(name)]
        told += ["the server keeps what is said"] * bool(about.get("recorded"))
        self._notes.print(f"{'; '.join(told)}; Ctrl-C ends the dialogue", soft_wrap=True)

    def end(self) -> None:
        """No more words come."""
        if self._printed:
            typer.echo()

    def length(self) -> int:
        """Of Moshi's sound, in samples."""
        return sum(map(len, self.heard))

    def channels(self) -> tuple[Float[np.ndarray, "samples"], Float[np.ndarray, "recorded"]]:
        """Moshi's and the user's sound."""
        return np.concatenate(self.heard), np.concatenate([np.zeros(0, np.float32), *self.said])


async def hold(
    url: str,
    dialogue: Dialogue,
    samples: Float[np.ndarray, "recorded"] | None,
    extra_seconds: float,
    how: dict[str, Any],
) -> None:
    """Hold the dialogue: with a recording, or by the computer's devices until Ctrl-C.

    Raises:
        UserMistake: there is no microphone.
        NoDialogue: as :func:`.client.talk`.
    """
    from transformers_moshi_flax.serving import devices
    from transformers_moshi_flax.serving.client import talk as talk_to

    if samples is not None:
        await talk_to(url, paced(samples, extra_seconds, dialogue), dialogue, **how)
        return
    with as_mistake("talk: give --user-audio", OSError), devices.opened() as (microphone, speakers):
        dialogue.speakers = speakers
        await talk_to(url, kept(microphone, dialogue), dialogue, **how)


async def kept(
    microphone: AsyncIterator[Float[np.ndarray, "samples"]], dialogue: Dialogue
) -> AsyncIterator[Float[np.ndarray, "samples"]]:
    """What the microphone hears, which the dialogue keeps."""
    async for samples in microphone:
        dialogue.said.append(samples)
        yield samples


async def paced(
    samples: Float[np.ndarray, "recorded"], extra_seconds: float, dialogue: Dialogue
) -> AsyncIterator[Float[np.ndarray, "samples"]]:
    """The recording and silence after it, a frame every 80 ms, until Moshi's sound is as long as both."""
    from transformers_moshi_flax.serving.protocol import FRAME, RATE

    length = len(samples) + round(extra_seconds * RATE)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for number, frame in enumerate(frames_of(samples, FRAME)):
        if dialogue.length() >= length and number * FRAME >= length:
            return
        await asyncio.sleep(begin + number * FRAME / RATE - loop.time())
        dialogue.said.append(frame)
        yield frame


def frames_of(samples: Float[np.ndarray, "recorded"], size: int) -> Iterator[Float[np.ndarray, "samples"]]:
    """Whole frames, and silence for ever after."""
    for start in range(0, len(samples), size):
        frame = samples[start : start + size]
        yield np.pad(frame, (0, size - len(frame)))
    while True:
        yield np.zeros(size, np.float32)


def read_authority(path: Path | None) -> ssl.SSLContext | None:
    """What a server's certificate is checked with; None without a file.

    Raises:
        UserMistake: the file is of no use.
    """
    if path is None:
        return None
    with as_mistake(f"--ssl-ca: cannot use {str(path)!r}", OSError):
        return ssl.create_default_context(cafile=path)
