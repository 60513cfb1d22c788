"""Tokens per second of a language model beside upstream's PyTorch ``generate``, in one run.

One random checkpoint (``--seed``) of Qwen 2's form is written, which both sides load; they run in float32 on the CPU
with ``--threads`` threads. For every batch of ``--batches``, from the same random prompts, greedy:

* generation: a whole ``generate`` of ``--new-tokens`` tokens after ``--prompt`` ones, the prompt included;
* prefill: a ``generate`` of one token after ``--prefill`` ones.

Each side runs once for nothing, then they take turns ``--repeats`` times, so that noise hits both. The table has the
least and the median of the runs, and for how many tokens both sides' texts are the same in all rows.

Run it on an idle machine: under load, torch suffers more than XLA, and the ratios mean nothing. ::

    python utils/benchmark/llama.py --threads 2 --output llama.md
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run by its path
    sys.path.insert(0, str(Path(__file__).parents[2]))

from utils.benchmark.generate import checked, report_to

if TYPE_CHECKING:
    import numpy as np

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "0.1B": {
        "vocab_size": 32_000,
        "hidden_size": 640,
        "intermediate_size": 1920,
        "num_hidden_layers": 14,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
    },
    "0.5B": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}
"""Fields of ``Qwen2Config``; the largest are those of Qwen 2 0.5B."""

NAMES = {"ours": "this library", "upstream": "upstream PyTorch"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ends the program with a message for values that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="0.5B", help="the model")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="rows of the prompts")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompts of generation")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens that are generated")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompts of prefill")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side that count")
    parser.add_argument("--threads", type=int, default=2, help="threads of both sides")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and prompts")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    return checked(parser, parser.parse_args(arguments), repeats=1, threads=1, prompt=1, prefill=1, new_tokens=1)


def write_model(size: str, seed: int, folder: Path) -> Any:
    """Upstream's model with random weights, which it has written to ``folder``."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(**SIZES[size], tie_word_embeddings=True, pad_token_id=0)
    model = Qwen2ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def take_turns(
    sides: dict[str, Callable[[], np.ndarray]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Seconds of the runs of each side, and what it returned."""
    results = {name: run() for name, run in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return seconds, results


def measure(options: argparse.Namespace) -> str:
    """Measures what the options ask for; returns the report as markdown."""
    import numpy as np
    import torch
    from utils.benchmark.report import installed, processor, table

    from transformers_moshi_flax import FlaxLlamaForCausalLM

    load, random, rows = os.getloadavg()[0], np.random.default_rng(options.seed), []
    with tempfile.TemporaryDirectory(prefix="llama-benchmark-") as folder:
        theirs = write_model(options.size, options.seed, Path(folder))
        ours = FlaxLlamaForCausalLM.from_pretrained(folder)

        def run_ours(ids: np.ndarray, new_tokens: int) -> np.ndarray:
            return np.asarray(ours.generate(ids, max_new_tokens=new_tokens).sequences)

        def run_theirs(ids: np.ndarray, new_tokens: int) -> np.ndarray:
            tensors = torch.tensor(ids).long()
            mask = torch.ones_like(tensors)
            return theirs.generate(
                tensors, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            ).numpy()

        for batch in options.batches:
            for what, length, new in (
                ("generation", options.prompt, options.new_tokens),
                ("prefill", options.prefill, 1),
            ):
                ids = random.integers(1, ours.config.vocab_size, (batch, length), dtype=np.int32)
                sides = {
                    "ours": lambda ids=ids, new=new: run_ours(ids, new),
                    "upstream": lambda ids=ids, new=new: run_theirs(ids, new),
                }
                seconds, results = take_turns(sides, options.repeats)
                equal = (results["ours"] == results["upstream"])[:, length:].all(axis=0)
                same = len(equal) if equal.all() else int(equal.argmin())
                done = batch * (new if what == "generation" else length)
                for name, runs in seconds.items():
                    least, median = min(runs), statistics.median(runs)
                    ratios = (least / min(seconds["ours"]), median / statistics.median(seconds["ours"]))
                    rows.append(
                        [
                            *(what, batch, NAMES[name], len(runs), f"{1e3 * least:.1f}", f"{1e3 * median:.1f}"),
                            *(f"{done / least:.1f}", *(f"{ratio:.2f}" for ratio in ratios), f"{same} of {len(equal)}"),
                        ]
                    )
    names = ["what", "batch", "side", "runs", "ms, min", "median", "tokens/s, best", "time over ours, min", "median"]
    versions = ", ".join(f"{package} {found}" for package, found in installed(("jax", "torch", "transformers")))
    conditions = (
        f"{options.size} ({ours.num_parameters():,} parameters), float32, {options.threads} thread(s); {processor()}; "
        f"load average {load:.2f} before, {os.getloadavg()[0]:.2f} after; {versions}"
    )
    return f"{conditions}\n\n{table([*names, 'same tokens'], rows)}\n"


def main(arguments: list[str] | None = None) -> None:
    report_to(parse_arguments(arguments), measure)


if __name__ == "__main__":
    main()
