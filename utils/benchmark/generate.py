"""Frames per second of nested generation: this library and its peers beside the limit that memory sets, in one run.

Sides: this library, upstream PyTorch (``transformers``), Kyutai's ``moshi`` and ``moshi_mlx`` as far as they are
installed and have a way. For every model one random checkpoint (``--seed``) is written, which all of them load; they
run in float32 on the CPU with ``--threads`` threads: torch by ``set_num_threads``, the others by the affinity of the
process.

Every setting is a model, a batch, a context, and greedy choice or sampling with the defaults (temperature 1, the best
50, text and codes). All sides get the same random prompt of as many frames as the context; then the frames after it
are timed, without waveforms:

* this library: the program of the loop that ``generate`` runs, in one call, until its state is there;
* upstream: a whole ``generate``, timed by a stopping criterion from the first new token on, so without the prompt;
* Kyutai's: that many calls of ``LMGen.step``, eager. The prompt is run in chunks through the streaming backbone, and
  the offsets of its state are set back for the next run.

Each side runs once for nothing, then they take turns ``--repeats`` times, so that noise hits all of them; a side that
has used ``--seconds`` is done after two runs. Where the caches of a setting need more than a gigabyte, one side is
done before the next begins. A run gives milliseconds a frame; the table has the least and the median of the runs.

The limit: bytes that a frame must read over the bandwidth of memory reads, which is measured before and after with
the same threads. The bytes are those of the weights (both decoders' layers, norms, projections and heads, each once,
without embeddings) and of the keys and values of the frames in use. Where the weights fit in the processor's cache
this is no limit, and none is given.

Beside it: seconds of compilation, memory of the compiled loop, and the first frame of fresh processes.

Run it on an idle machine: under load, torch suffers more than XLA, and the ratios mean nothing. ::

    python utils/benchmark/generate.py --threads 2 --output benchmark.md
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from utils.benchmark.settings import BATCHES, CONTEXTS, DECODINGS, SIZES, Setting, settings_of

if TYPE_CHECKING:
    from utils.benchmark.checkpoints import Checkpoint
    from utils.benchmark.report import Measurement
    from utils.benchmark.sides import Run, Side

SIDES = ("ours", "upstream", "kyutai", "mlx")
FIRST_CALL_SIZE = "523M"
LEAST_RUNS = 2
LARGE_CACHES = 1e9


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ends the program with a message for values that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the whole grid: hours instead of a quarter of an hour")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models to measure")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="implementations to measure")
    parser.add_argument("--batches", nargs="+", type=int, choices=BATCHES, default=list(BATCHES), help="only these")
    parser.add_argument("--contexts", nargs="+", type=int, choices=CONTEXTS, default=list(CONTEXTS), help="only these")
    parser.add_argument("--decodings", nargs="+", choices=DECODINGS, default=list(DECODINGS), help="only these")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side that count")
    parser.add_argument("--seconds", type=float, default=6.0, help="after which a side of a setting has two runs only")
    parser.add_argument("--first-calls", type=int, default=1, help="fresh processes of each kind; 0 for none")
    parser.add_argument("--threads", type=int, default=2, help="threads of all sides")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    return checked(parser, parser.parse_args(arguments), repeats=1, threads=1, first_calls=0)


def checked(parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int) -> argparse.Namespace:
    """``options``, unless one is less than its ``least`` or there are not so many cores: that ends the program."""
    for name, bound in least.items():
        value = getattr(options, name)
        if value < bound:
            parser.error(f"--{name.replace('_', '-')} must be at least {bound}, but is {value}")
    cores = len(os.sched_getaffinity(0))
    if options.threads > cores:
        parser.error(f"--threads must be at most the {cores} core(s) of this process, but is {options.threads}")
    return options


def limit_threads(threads: int) -> None:
    """All sides to ``threads`` threads; call it before JAX is imported, as XLA counts the cores only once."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    import torch

    torch.set_num_threads(threads)


def chosen_settings(size: str, options: argparse.Namespace) -> list[Setting]:
    """The settings of a model that the options leave."""
    return [
        setting
        for setting in settings_of(size, options.full)
        if setting.batch in options.batches
        and setting.context in options.contexts
        and setting.decoding in options.decodings
    ]


def take_turns(runs: dict[str, Callable[[], Run]], measurement: Measurement, options: argparse.Namespace) -> None:
    """Runs every side up to ``options.repeats`` times, or two times if that took ``options.seconds``."""
    for _ in range(options.repeats):
        for key, run in runs.items():
            done = measurement.runs.setdefault(key, [])
            if len(done) < LEAST_RUNS or sum(result.seconds for result in done) < options.seconds:
                done.append(run())


def measure_setting(
    setting: Setting, sides: dict[str, Side], checkpoint: Checkpoint, options: argparse.Namespace
) -> Measurement:
    """Runs the sides of a setting, in turns unless memory forbids it."""
    from utils.benchmark.checkpoints import draw_prompt
    from utils.benchmark.report import Measurement
    from utils.benchmark.sides import Unsupported

    begin = time.monotonic()
    measurement = Measurement(setting, checkpoint.weight_bytes, checkpoint.cache_bytes(setting))
    prompt = draw_prompt(checkpoint, setting)
    if setting.capacity is not None:  # only this library has a choice
        sides = {key: side for key, side in sides.items() if key == "ours"}
    together = measurement.cache_bytes < LARGE_CACHES
    for group in [sides] if together else [{key: side} for key, side in sides.items()]:
        with ExitStack() as stack:
            runs = {}
            for key, side in group.items():
                try:
                    runs[key] = stack.enter_context(side.prepared(setting, prompt))
                except Unsupported as reason:
                    measurement.missing[key] = str(reason)
            take_turns(runs, measurement, options)
        runs.clear()
        gc.collect()
    print(f"{setting}: {measurement.summary()}; {time.monotonic() - begin:.0f} s", flush=True)
    return measurement


def measure(options: argparse.Namespace) -> str:
    """Measures what the options ask for; returns the report as markdown."""
    from utils.benchmark import sides as implementations
    from utils.benchmark.checkpoints import write_checkpoint
    from utils.benchmark.first_call import measure_first_calls
    from utils.benchmark.limit import read_bandwidth
    from utils.benchmark.report import Report

    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the load average is {load:.2f}: the machine isn't idle, so the ratios will mean little")
    report = Report(options, time.monotonic(), [load], [read_bandwidth(options.threads)])
    for size in options.sizes:
        settings = chosen_settings(size, options)
        if not settings:
            continue
        with tempfile.TemporaryDirectory(prefix="moshi-benchmark-") as folder:
            checkpoint = report.checkpoints[size] = write_checkpoint(size, options.seed, Path(folder))
            gc.collect()
            if size == FIRST_CALL_SIZE and options.first_calls:
                report.first_calls = measure_first_calls(Path(folder), options.threads, options.first_calls)
            sides: dict[str, Side] = {}
            missing: dict[str, str] = {}
            for key in options.sides:
                try:
                    sides[key] = implementations.SIDES[key](checkpoint)
                except implementations.Unsupported as reason:
                    missing[key] = str(reason)
            for setting in settings:
                measurement = measure_setting(setting, sides, checkpoint, options)
                if setting.capacity is None:
                    measurement.missing |= missing
                report.measurements.append(measurement)
            if "ours" in sides:
                report.costs |= sides["ours"].costs
            sides.clear()
        gc.collect()  # models have reference cycles: the next one needs the memory
    report.bandwidths.append(read_bandwidth(options.threads))
    report.loads.append(os.getloadavg()[0])
    return report.markdown()


def report_to(options: argparse.Namespace, measure: Callable[[argparse.Namespace], str]) -> None:
    """Measures with the threads that are asked for; prints the report and writes it to ``options.output``, if any."""
    limit_threads(options.threads)
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    text = measure(options)
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    report_to(parse_arguments(arguments), measure)


if __name__ == "__main__":
    main()
