"""``moshi-flax converse``: a recording is heard live, frame by frame, and Moshi speaks meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from transformers_moshi_flax.cli.audio import AUDIO_OUT, read_audio
from transformers_moshi_flax.cli.checkpoints import EMBEDDED_USER, source_of, with_notice
from transformers_moshi_flax.cli.errors import UserMistake
from transformers_moshi_flax.cli.generate import check_moshi
from transformers_moshi_flax.cli.live import Partner, both_channels, check_file, hold, write_sound, write_transcript
from transformers_moshi_flax.cli.options import (
    DepthTemperature,
    DepthTopK,
    DtypeOption,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    UserAudio,
    sampling_options,
)
from transformers_moshi_flax.cli.pacing import Pace
from transformers_moshi_flax.cli.picture import check_picture, write_picture
from transformers_moshi_flax.cli.transcript import joined

DAY = 86_400.0
TEXT_OUT = (".srt", ".json")


def converse(
    model: Model = None,
    user_audio: UserAudio = None,
    output: Annotated[Path, typer.Option(help="Moshi's reply, as long as the recording.")] = Path("moshi.wav"),
    stereo: Annotated[bool, typer.Option("--stereo", help="Moshi on the left, the user on the right.")] = False,
    text: Annotated[Path | None, typer.Option(help="What Moshi says, with times: .srt or .json.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Both sides' sound and Moshi's words, as .png; needs matplotlib.")
    ] = None,
    realtime: Annotated[bool, typer.Option("--realtime", help="Hear no frame before its time.")] = False,
    extra_seconds: Annotated[float, typer.Option(min=0, help="Silence after the recording, for an answer.")] = 0.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    depth_temperature: DepthTemperature = None,
    depth_top_k: DepthTopK = None,
    seed: Seed = 0,
    dtype: DtypeOption = None,
) -> None:
    """Talk with a recording: Moshi hears it from its first frame on, and its reply has the same timeline."""
    sampling = sampling_options(temperature, top_k, top_p, depth_temperature, depth_top_k)
    if not extra_seconds <= DAY:
        raise UserMistake(f"--extra-seconds: {extra_seconds} is not in [0, {DAY:.0f}]; give at most a day")
    user_audio = user_audio or EMBEDDED_USER
    check_file("--output", output, AUDIO_OUT, user_audio, overwrite)
    if text is not None:
        check_file("--text", text, TEXT_OUT, user_audio, overwrite)
    check_picture(picture, user_audio, overwrite)
    source = source_of(model)
    rate = check_moshi(source)
    samples = read_audio(user_audio, rate)
    length = len(samples) + round(extra_seconds * rate)

    notes = Console(stderr=True, highlight=False)
    partner = Partner.load(source, dtype, sampling, notes)
    pace = Pace(1 / partner.frame_rate, realtime)
    moshi, text_ids = hold(partner, samples, length, seed, pace, notes)
    words = partner.words(text_ids)
    typer.echo(joined(words))

    seconds = len(moshi) / rate
    if text is not None:
        write_transcript(text, partner, text_ids, seconds, seed=seed, interrupted=len(moshi) < length)
    channels = both_channels(moshi, samples)
    write_sound(output, channels if stereo else moshi, rate)
    if picture is not None:
        write_picture(picture, channels, rate, {"Moshi": words})
    written = ", ".join(str(path) for path in (output, text, picture) if path is not None)
    told = f"{written}: {seconds:.2f} s, {len(text_ids)} frames after {partner.compile_seconds:.0f} s of compilation"
    notes.print(with_notice(source, told), soft_wrap=True)
    notes.print(pace.report(), soft_wrap=True)
