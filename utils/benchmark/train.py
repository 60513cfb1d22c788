"""Frames per second and peak memory of the training step, beside upstream PyTorch, in processes of their own.

One random checkpoint is written, which all sides load; they take the same batch of random frames, all of them real,
in float32 on the CPU with ``--threads`` threads. A step is forward, backward and AdamW (no clipping, a constant rate),
for all parameters but Mimi's, which every side frees.

* This library: the compiled step of training; the same with scanned and recomputed layers; with the rows dealt into
  two micro-batches; and with twice the rows, of which each half is a micro-batch (time for one half).
* Upstream: ``model(..., text_labels=..., audio_labels=...).loss.backward()``, ``torch.optim.AdamW``, no mask (it
  crashes). Its loss pairs a hidden state with the codes of the same frame: that is no less work. The text losses of
  the first step must be equal.
* Upstream mended: its per-codebook products copy the weights for every row of the batch (tens of GB for 4 x 128
  frames), so that it may have no figures of its own. This is upstream with ``torch.bmm`` there: faster than what users
  have, and so the stricter measure. Without and with gradient checkpointing.

* LoRA of rank 16 on all linear layers, here beside float32 and beside nf4, and PEFT's on upstream mended.

The sides take turns, ``--rounds`` processes each, of ``--steps`` counted steps after one that compiles. Processor
seconds, of all threads, suffer less from other work on the machine than the clock. Memory is the largest resident size
of the counted steps, and of the whole process, less what the imports left. ::

    python utils/benchmark/train.py --threads 2 --output training.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from utils.benchmark.generate import checked, report_to
from utils.benchmark.settings import SIZES
from utils.benchmark.training_sides import QUANTIZED, SIDES, Result

ROOT = Path(__file__).parents[2]
SIZE = "68M"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ends the program with a message for values that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default=SIZE, help="the model")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="implementations to measure")
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--frames", type=int, default=128, help="frames of a row")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--threads", type=int, default=2, help="threads of all sides")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    return checked(parser, parser.parse_args(arguments), batch=2, frames=2, steps=1, rounds=1, threads=1)


def write_weights(size: str, seed: int, folder: Path) -> None:
    """A checkpoint of upstream with random weights; per-codebook ones so small that the losses are finite."""
    import torch
    from transformers import MoshiConfig, MoshiForConditionalGeneration
    from transformers.models.moshi.modeling_moshi import MoshiFlexibleLinear

    torch.manual_seed(seed)
    fields = SIZES[size].config
    config = MoshiConfig(**{name: dict(value) if isinstance(value, dict) else value for name, value in fields.items()})
    model = MoshiForConditionalGeneration(config).float()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MoshiFlexibleLinear):
                module.weight.mul_(module.weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)


def run(side: str, folder: Path, options: argparse.Namespace) -> Result:
    """One process of a side."""
    paths = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    sizes = map(str, (options.threads, options.batch, options.frames, options.steps))
    command = [sys.executable, "-m", "utils.benchmark.training_sides", side, str(folder), *sizes]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return Result(**json.loads(result.stdout.splitlines()[-1]))


def measure(options: argparse.Namespace) -> str:
    """Measures what the options ask for; returns the report as markdown."""
    from utils.benchmark.report import installed, processor

    results: dict[str, list[Result]] = {side: [] for side in options.sides}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="moshi-benchmark-") as folder:
        write_weights(options.size, options.seed, Path(folder))
        for _ in range(options.rounds):
            for side, done in results.items():
                if not (done and done[-1].missing):
                    done.append(run(side, Path(folder), options))
                    print(f"{SIDES[side]}: {done[-1]}", flush=True)
    exact = [done for side, done in results.items() if side not in QUANTIZED]
    losses = [result.text_loss for done in exact for result in done if not result.missing]
    if losses and not all(math.isclose(loss, losses[0], rel_tol=1e-4) for loss in losses):
        raise RuntimeError(f"the sides do not compute the same: the text losses of the first step are {losses}")
    versions = ", ".join(f"{name} {version}" for name, version in installed(("jax", "flax", "torch", "transformers")))
    header = (
        f"Training step, {options.size}, batch {options.batch} x {options.frames} frames, float32, {options.threads} "
        f"thread(s) on all sides, {options.rounds} process(es) of {options.steps} steps each in turns; {processor()}; "
        f"load average {load:.2f} before, {os.getloadavg()[0]:.2f} after; {versions}."
    )
    return f"{header}\n\n{speeds(results, options.batch * options.frames)}\n"


def speeds(results: dict[str, list[Result]], frames: int) -> str:
    """One row a side; ratios are to the first row."""
    from utils.benchmark.report import table

    names = ["side", "steps", "s a step, min", "median", "processor s, min", "frames/s, best"]
    names += ["MB of the steps", "MB of the process", "time over the first row's, min", "median", "memory over it"]
    rows, first = [], None
    for side, done in results.items():
        if done[-1].missing:
            rows.append([SIDES[side], done[-1].missing, *[""] * 9])
            continue
        seconds = [value for result in done for value in result.seconds]
        processor = min(value for result in done for value in result.processor_seconds)
        figures = min(seconds), statistics.median(seconds), max(result.step_bytes for result in done)
        first = first or figures
        cells = [f"{figures[0]:.3f}", f"{figures[1]:.3f}", f"{processor:.3f}", f"{frames / figures[0]:.1f}"]
        cells += [f"{value / 1e6:,.0f}" for value in (figures[2], max(result.process_bytes for result in done))]
        rows.append([SIDES[side], len(seconds), *cells, *(f"{a / b:.2f}" for a, b in zip(figures, first))])
    return table(names, rows)


def main(arguments: list[str] | None = None) -> None:
    report_to(parse_arguments(arguments), measure)


if __name__ == "__main__":
    main()
