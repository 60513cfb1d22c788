"""``moshi-flax ask``: a question is spoken, Moshi hears it live, and answers."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import soxr
import typer
from jaxtyping import Float
from rich.console import Console

from transformers_moshi_flax.cli.audio import AUDIO_OUT, read_audio
from transformers_moshi_flax.cli.checkpoints import source_of, with_notice
from transformers_moshi_flax.cli.errors import UserMistake, as_mistake
from transformers_moshi_flax.cli.generate import check_moshi
from transformers_moshi_flax.cli.live import Partner, Printed, both_channels, check_file, hold, write_sound
from transformers_moshi_flax.cli.options import DtypeOption, Model, Seed
from transformers_moshi_flax.cli.pacing import Pace
from transformers_moshi_flax.cli.transcript import LiveWords

BEFORE = 0.5
"""Seconds of silence before the question."""

HOUR = 3600.0


def ask(
    question: Annotated[str | None, typer.Argument(help="What espeak-ng is to say.", show_default=False)] = None,
    wav: Annotated[Path | None, typer.Option("--wav", help="A recording of the question instead.")] = None,
    model: Model = None,
    output: Annotated[Path, typer.Option(help="Moshi on the left, the question on the right.")] = Path("answer.wav"),
    seconds: Annotated[float, typer.Option(min=0, help="How long Moshi may answer.")] = 6.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    seed: Seed = 0,
    dtype: DtypeOption = None,
) -> None:
    """Ask Moshi a question aloud: words are printed as they come, and both sides are written as a stereo file."""
    if (question is None) == (wav is None):
        raise UserMistake("QUESTION, --wav: give one of them, the words to speak or a recording of them")
    if not seconds <= HOUR:
        raise UserMistake(f"--seconds: {seconds} is not in [0, {HOUR:.0f}]; give at most an hour")
    check_file("--output", output, AUDIO_OUT, wav, overwrite)
    source = source_of(model)
    rate = check_moshi(source)
    samples = speech(question or "", rate) if wav is None else read_audio(wav, rate, "--wav")
    samples = np.pad(samples, (round(BEFORE * rate), 0))

    notes = Console(stderr=True, highlight=False)
    partner = Partner.load(source, dtype, {}, notes)
    typer.echo(f"{BEFORE:6.1f} s  you    {question or wav}")
    printed = Printed()
    words = LiveWords(partner.speaker.tokenizer, partner.frame_rate)
    pace = Pace(1 / partner.frame_rate, realtime=False)
    length = len(samples) + round(seconds * rate)

    def listen(text_id: int) -> None:
        printed.add("Moshi", words.put(text_id))

    moshi, _ = hold(partner, samples, length, seed, pace, notes, listen)
    printed.add("Moshi", words.end())
    printed.end()
    write_sound(output, both_channels(moshi, samples), rate)
    notes.print(with_notice(source, f"{output}: {len(moshi) / rate:.2f} s"), soft_wrap=True)
    notes.print(pace.report(), soft_wrap=True)


def speech(text: str, rate: int) -> Float[np.ndarray, "samples"]:
    """``text`` as espeak-ng says it.

    Raises:
        UserMistake: there is nothing to say, or no espeak-ng.
    """
    if not text.strip():
        raise UserMistake("QUESTION: there are no words in it; say something, or give --wav")
    program = shutil.which("espeak-ng")
    if program is None:
        raise UserMistake(
            "QUESTION: espeak-ng is not installed, which speaks it; install it (apt-get install espeak-ng), or give "
            "a recording by --wav"
        )
    with as_mistake(f"QUESTION: espeak-ng cannot say {text!r}", OSError, subprocess.CalledProcessError, ValueError):
        # one of the voices that examples/converse is trained with
        command = [program, "-v", "en-us+m3", "-s", "165", "--stdin", "--stdout"]
        spoken = subprocess.run(command, input=text.encode(), check=True, capture_output=True).stdout
        samples, spoken_rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
    return soxr.resample(samples, spoken_rate, rate).astype(np.float32)
