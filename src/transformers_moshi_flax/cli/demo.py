"""``moshi-flax demo``: the embedded model hears a user who asks three questions, and both sides are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from transformers_moshi_flax.cli.audio import AUDIO_OUT, read_audio
from transformers_moshi_flax.cli.checkpoints import EMBEDDED_USER, source_of, with_notice
from transformers_moshi_flax.cli.generate import check_moshi
from transformers_moshi_flax.cli.live import Partner, Printed, both_channels, check_file, hold, write_sound
from transformers_moshi_flax.cli.options import DtypeOption, Model, Seed
from transformers_moshi_flax.cli.pacing import Pace
from transformers_moshi_flax.cli.picture import check_picture, write_picture
from transformers_moshi_flax.cli.transcript import LiveWords, Timed


def demo(
    model: Model = None,
    output: Annotated[Path, typer.Option(help="Moshi on the left, the user on the right.")] = Path("demo.wav"),
    picture: Annotated[
        Path | None, typer.Option(help="Both sides' sound and words, as .png; needs matplotlib.")
    ] = None,
    realtime: Annotated[bool, typer.Option("--realtime", help="Hear no frame before its time.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    seed: Seed = 0,
    dtype: DtypeOption = None,
) -> None:
    """Let Moshi hear the embedded recording of three questions: both sides' words are printed as they come."""
    check_file("--output", output, AUDIO_OUT, EMBEDDED_USER, overwrite)
    check_picture(picture, EMBEDDED_USER, overwrite)
    source = source_of(model)
    rate = check_moshi(source)
    samples = read_audio(EMBEDDED_USER, rate)
    asked = words_of(EMBEDDED_USER)

    notes = Console(stderr=True, highlight=False)
    partner = Partner.load(source, dtype, {}, notes)
    live, printed = LiveWords(partner.speaker.tokenizer, partner.frame_rate), Printed()
    frames = 0

    def listen(text_id: int) -> None:
        nonlocal frames
        begin, end = frames / partner.frame_rate, (frames + 1) / partner.frame_rate
        printed.add("you", (word for word in asked if begin <= word.end < end))
        printed.add("Moshi", live.put(text_id))
        frames += 1

    pace = Pace(1 / partner.frame_rate, realtime)
    moshi, text_ids = hold(partner, samples, len(samples), seed, pace, notes, listen)
    printed.add("Moshi", live.end())
    printed.end()

    channels = both_channels(moshi, samples)
    write_sound(output, channels, rate)
    if picture is not None:
        write_picture(picture, channels, rate, {"Moshi": partner.words(text_ids), "user": asked})
    written = ", ".join(str(path) for path in (output, picture) if path is not None)
    notes.print(with_notice(source, f"{written}: {len(moshi) / rate:.2f} s"), soft_wrap=True)
    notes.print(pace.report(), soft_wrap=True)


def words_of(recording: Path) -> list[Timed]:
    """What is said in a recording, by the file beside it, which is laid out as ``moshi-flax prepare`` reads it."""
    alignments = json.loads(recording.with_suffix(".json").read_text("utf-8"))["alignments"]
    return [Timed(word, begin, end) for word, (begin, end), _ in alignments]
