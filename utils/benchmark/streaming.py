"""Milliseconds a step of dialogues in real time, and whether they keep pace: this library and its peers, in one run.

Sides: this library, Kyutai's ``moshi`` (``LMGen.step`` and ``MimiModel.streaming``) and ``rustymimi`` (Mimi alone), as
far as they are installed. For every model one random checkpoint (``--seed``) is written, which all of them load; they
run in float32 on the CPU with ``--threads`` threads: torch by ``set_num_threads``, XLA by the affinity of the process,
``rustymimi`` by ``RAYON_NUM_THREADS``. The audio is noise, and every choice the most probable.

* Mimi, full size, for the codebooks that Moshi uses: ``encode_step`` and ``decode_step`` of each side, from NumPy to
  NumPy.
* The dialogue, from the user's audio to Moshi's. Of this library the whole step is timed, and in turns with it the
  step in parts: each of its programs until its results are there, which takes a little longer in all. Of the host's
  time, that of the calling thread's processor counts from the call of ``step`` to its return: Python, and handing the
  programs to XLA. XLA computes in other threads, and begins when the first program is handed over.
* The same paced at 80 ms, batch 1 (``--paced`` steps): latency from a frame's arrival, and answers later than the next
  frame.
* ``--endurance`` steps of the first model: memory, compilations, collections of garbage, the longest steps.

Sides take turns ``--rounds`` times, up to ``--steps`` steps or their part of ``--seconds`` at a time; the first steps
of a turn, whose weights the other side has driven out of the processor's cache, do not count. Where caches need more
than a gigabyte, one side is done before the next begins.

Run it on an idle machine: percentiles are the first that suffer from any other work. ::

    python utils/benchmark/streaming.py --threads 2 --paced 1000 --output streaming.md
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from utils.benchmark.generate import LARGE_CACHES, checked, report_to
from utils.benchmark.settings import BATCHES, SIZES, Setting

if TYPE_CHECKING:
    from utils.benchmark.checkpoints import Checkpoint
    from utils.benchmark.steadiness import Paced
    from utils.benchmark.streaming_report import StreamingReport, Times
    from utils.benchmark.streams import Runner, StreamSide

SIDES = ("ours", "kyutai", "rustymimi")
QUICK, FULL_MIMI = ("0.7M", "68M"), "68M"
UNCOUNTED, LEAST = 2, 2
"""Steps at the beginning of a turn, and those that count at least."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ends the program with a message for values that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the two large models as well")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="models to measure, instead of those of --full")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="implementations to measure")
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=list(BATCHES), help="only these")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=40, help="counted steps of a turn at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="of all turns of a side in a setting, roughly")
    parser.add_argument("--paced", type=int, default=200, help="steps at 80 ms; 0 for none")
    parser.add_argument("--endurance", type=int, default=10_000, help="steps of the first model; 0 for none")
    parser.add_argument("--threads", type=int, default=2, help="threads of all sides")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    options = parser.parse_args(arguments)
    options.sizes = options.sizes or (list(SIZES) if options.full else list(QUICK))
    return checked(parser, options, rounds=1, steps=LEAST, paced=0, endurance=0, threads=1)


def take_turns(runners: dict[str, Runner], times: dict[str, Times], batch: int, options: argparse.Namespace) -> None:
    """Lets every runner have its turns; seconds go to ``times``, by runner and part."""
    from utils.benchmark.streams import frames_of_noise

    audio = frames_of_noise(batch)
    for turn in range(options.rounds + 1):
        for name, run in runners.items():
            parts = times.setdefault(name, {})
            counted, begin = 0, time.monotonic()
            for k in range(UNCOUNTED + options.steps):
                seconds = run(audio[k % len(audio)])
                if turn and k >= UNCOUNTED:  # the turn 0 is for warming up
                    counted += 1
                    for part, value in seconds.items():
                        parts.setdefault(part, []).append(value)
                enough = counted >= LEAST if turn else k >= UNCOUNTED
                if enough and (not turn or time.monotonic() - begin > options.seconds / options.rounds):
                    break


def measure_codec(
    sides: dict[str, StreamSide], batch: int, options: argparse.Namespace, report: StreamingReport
) -> None:
    """Mimi alone, all sides in turns."""
    with ExitStack() as stack:
        runners = {side.name: stack.enter_context(side.codec(batch)) for side in sides.values()}
        take_turns(runners, report.codecs.setdefault(batch, {}), batch, options)


def measure_dialogue(
    checkpoint: Checkpoint,
    sides: dict[str, StreamSide],
    setting: Setting,
    options: argparse.Namespace,
    report: StreamingReport,
) -> None:
    """The dialogues of a setting, in turns unless memory forbids it; paced as well where there is one row."""
    times = report.dialogues.setdefault(setting, {})
    window = Setting(setting.size, setting.batch, context=checkpoint.config.sliding_window)
    together = checkpoint.cache_bytes(window) < LARGE_CACHES
    for group in [sides] if together else [{key: side} for key, side in sides.items()]:
        with ExitStack() as stack:
            runners: dict[str, Runner] = {}
            for side in group.values():
                found = stack.enter_context(side.dialogue(setting.batch))
                runners |= {", ".join(filter(None, (side.name, what))): run for what, run in found.items()}
            take_turns(runners, times, setting.batch, options)
            if options.paced and setting.batch == 1:
                report.paced.setdefault(setting.size, {}).update(measure_pace(group, runners, options))
        runners.clear()
        gc.collect()


def measure_pace(
    sides: dict[str, StreamSide], runners: dict[str, Runner], options: argparse.Namespace
) -> dict[str, Paced]:
    """The whole steps of each side, paced, one side after the other."""
    from utils.benchmark.steadiness import pace
    from utils.benchmark.streams import frames_of_noise

    audio = frames_of_noise(1)[0]
    return {
        side.name: pace(lambda run=runners[side.name]: run(audio), options.paced)
        for side in sides.values()
        if side.name in runners
    }


def measure(options: argparse.Namespace) -> str:
    """Measures what the options ask for; returns the report as markdown."""
    from utils.benchmark import streams
    from utils.benchmark.checkpoints import write_checkpoint
    from utils.benchmark.steadiness import endure
    from utils.benchmark.streaming_report import StreamingReport

    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the load average is {load:.2f}: the machine isn't idle, so percentiles will mean little")
    report = StreamingReport(options, time.monotonic(), [load])
    codec_size = FULL_MIMI if FULL_MIMI in options.sizes else options.sizes[-1]
    for size in options.sizes:
        with tempfile.TemporaryDirectory(prefix="moshi-benchmark-") as folder:
            checkpoint = write_checkpoint(size, options.seed, Path(folder))
            gc.collect()
            sides: dict[str, StreamSide] = {}
            for key in options.sides:
                try:
                    sides[key] = streams.STREAM_SIDES[key](checkpoint)
                except streams.Unsupported as reason:
                    report.missing[streams.STREAM_SIDES[key].name, size] = str(reason)
            for batch in options.batches:
                setting = Setting(size, batch)
                begin = time.monotonic()
                if size == codec_size:
                    measure_codec(sides, batch, options, report)
                measure_dialogue(checkpoint, sides, setting, options, report)
                print(f"{report.summary(setting)}; {time.monotonic() - begin:.0f} s", flush=True)
            if size == options.sizes[0] and options.endurance and "ours" in sides:
                report.endurance = size, endure(sides["ours"].stream(1), options.endurance)
            sides.clear()
        gc.collect()  # models have reference cycles: the next one needs the memory
    report.loads.append(os.getloadavg()[0])
    return report.markdown()


def main(arguments: list[str] | None = None) -> None:
    report_to(parse_arguments(arguments), measure)


if __name__ == "__main__":
    main()
