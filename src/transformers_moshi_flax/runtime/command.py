"""``moshi-onnx``: dialogues with an export from the command line, in a process without JAX."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

NUMBERS = {
    "temperature": (float, "of the text"),
    "top_k": (int, "of the text"),
    "depth_decoder_temperature": (float, "of the audio"),
    "depth_decoder_top_k": (int, "of the audio"),
}
"""Numbers of sampling that are options."""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    root = argparse.ArgumentParser(prog="moshi-onnx", description="Dialogues with an exported Moshi, without JAX.")
    commands = root.add_subparsers(dest="command", required=True)
    converse = commands.add_parser(
        "converse", help="talk with a recording", description="Let Moshi hear a recording; its words are printed."
    )
    converse.add_argument("export", type=Path, help="directory of `moshi-flax export onnx`")
    converse.add_argument("recording", type=Path, help="what the user says: WAV or FLAC, mono, at the model's rate")
    converse.add_argument("-o", "--output", type=Path, help="Moshi's reply, WAV or FLAC, as long as the recording")
    converse.add_argument("--extra-seconds", type=float, default=0.0, help="silence after the recording")
    converse.add_argument("--seed", type=int, default=0, help="of the sampling")
    converse.add_argument("--threads", type=int, help="of every operator (default: one a core)")
    converse.add_argument("--overwrite", action="store_true", help="replace the output")
    for name, (kind, text) in NUMBERS.items():
        flag = name.replace("depth_decoder", "depth").replace("_", "-")
        converse.add_argument(f"--{flag}", dest=name, type=kind, help=f"{text}, where the export samples")
    return root


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake is one line on stderr and exit code 2.

    Args:
        args: the arguments without the program's name; None reads ``sys.argv``.

    Raises:
        SystemExit: always.
    """
    given = parser().parse_args(args)
    try:
        converse(given)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"moshi-onnx: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def converse(given: argparse.Namespace) -> None:
    """Lets Moshi hear a recording; what it says is printed as it comes, and written as a sound file."""
    import soundfile

    from .onnx_moshi import OnnxMoshi

    output = given.output
    if output is not None and output.suffix.lower() not in (".wav", ".flac"):
        raise ValueError(f"--output: {str(output)!r} does not end in .wav or .flac")
    if output is not None and output.exists() and not given.overwrite:
        raise ValueError(f"--output: {str(output)!r} is there already; give another name, or --overwrite")
    if not 0 <= given.extra_seconds <= 86_400:
        raise ValueError(f"--extra-seconds: {given.extra_seconds} is not in [0, 86400]")
    if given.threads is not None and given.threads < 1:
        raise ValueError(f"--threads: {given.threads} is less than 1")
    audio, rate = soundfile.read(given.recording, dtype="float32", always_2d=True)
    numbers = {name: getattr(given, name) for name in NUMBERS if getattr(given, name) is not None}
    model = OnnxMoshi(given.export, threads=given.threads)
    if rate != model.sampling_rate:
        raise ValueError(f"{str(given.recording)!r} is at {rate} Hz, but the model hears {model.sampling_rate} Hz")
    if audio.shape[1] != 1 or (model.batch_size, model.channels) != (1, 1):
        raise ValueError(f"{str(given.recording)!r} has {audio.shape[1]} channels: one is heard, in one dialogue")
    length = len(audio) + round(given.extra_seconds * rate)
    frames = -(-length // model.frame_size)
    heard = np.pad(audio[:, 0], (0, frames * model.frame_size - len(audio)))
    stream = model.streaming(given.seed, **numbers)
    spoken = []
    for frame in heard.reshape(-1, 1, 1, model.frame_size):
        said = stream.step(frame)
        print(model.piece(int(said.text_ids[0])), end="", flush=True)
        spoken.append(said.audio[0, 0])
    print()
    if output is not None:
        soundfile.write(output, np.concatenate(spoken)[:length], rate)
