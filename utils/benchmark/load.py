"""Seconds and memory of ``from_pretrained``: this library beside upstream PyTorch, each load in a fresh process.

The 523 M model of the benchmark of generation (full-size Mimi, 8 codebooks, some 800 leaves, most of them small), or
with ``--gigabytes`` a text model of few large tensors, is written once in PyTorch layout and once in this library's,
random, in float32. Then processes take turns: upstream to float32, this library to float32 from its own files, and
from upstream's to float32 and to bfloat16. Each prints the seconds of ``from_pretrained`` until every parameter is
there, by the clock and summed over all cores (upstream's parameters are read once, since torch would otherwise leave
them in the mapped file), and the peak of its anonymous memory (RssAnon) above what the imports took. The files lie in
the page cache for all. ::

    python -m utils.benchmark.load --repeats 5 --output load.md
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from .checkpoints import write_checkpoint
from .settings import SIZES

ROOT = Path(__file__).parents[2]
UPSTREAM = """
import json, sys, time
import torch, transformers
from tests.checkpoints.measure_loading import Peak, anonymous_bytes
getattr(transformers, sys.argv[2])  # imports it
baseline, peak = anonymous_bytes(), Peak()
peak.start()
start, worked = time.perf_counter(), time.process_time()
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
for parameter in model.parameters():
    parameter.data = parameter.data.clone()
seconds, worked = time.perf_counter() - start, time.process_time() - worked
peak.going = False
peak.join()
size = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"seconds": seconds, "cpu": worked, "peak": peak.bytes - baseline, "parameters": size}))
"""


def write_large_tensors(folder: Path, gigabytes: float) -> None:
    import torch
    from transformers import MoshiConfig, MoshiForCausalLM

    layers = max(1, round(gigabytes * 1e9 / 4 / 50e6 - 1.3))
    config = MoshiConfig(hidden_size=2048, num_hidden_layers=layers, num_attention_heads=16, ffn_dim=11264)
    with torch.device("meta"):
        model = MoshiForCausalLM(config)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


def convert(source: Path, target: Path, architecture: str) -> None:
    import transformers_moshi_flax

    getattr(transformers_moshi_flax, f"Flax{architecture}").from_pretrained(source).save_pretrained(target)


def run(command: list[str]) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="523M", choices=SIZES, help="which model of the benchmark of generation")
    parser.add_argument("--gigabytes", type=float, help="instead, a text model of few large tensors of so much")
    parser.add_argument("--repeats", type=int, default=5, help="loads of each kind")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moshi-load-") as scratch:
        theirs, ours = Path(scratch) / "pytorch", Path(scratch) / "flax"
        if options.gigabytes is None:
            architecture = "MoshiForConditionalGeneration"
            write_checkpoint(options.size, 0, theirs)
            shutil.rmtree(theirs / "kyutai")
        else:
            architecture = "MoshiForCausalLM"
            write_large_tensors(theirs, options.gigabytes)
        convert(theirs, ours, architecture)
        size = sum(path.stat().st_size for path in theirs.glob("*.safetensors"))
        load = [sys.executable, "-m", "tests.checkpoints.measure_loading"]
        commands = {
            "upstream": [sys.executable, "-c", UPSTREAM, str(theirs), architecture],
            "this library, its own files": [*load, str(ours), "float32"],
            "this library, PyTorch's files": [*load, str(theirs), "float32"],
            "this library, PyTorch's files to bfloat16": [*load, str(theirs), "bfloat16"],
        }
        results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(options.repeats):
            for name, command in commands.items():
                results[name].append(run(command))
                print(name, results[name][-1], flush=True)
    lines = [
        f"Checkpoint of {size / 1e9:.2f} GB, float32, {options.repeats} loads of each kind in turns.",
        "",
        "| | seconds, median | least | of all cores, median | least | peak of anonymous memory / parameters |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        times = [[entry[key] for entry in runs] for key in ("seconds", "cpu")]
        peak = max(entry["peak"] / entry["parameters"] for entry in runs)
        figures = [figure for values in times for figure in (statistics.median(values), min(values))]
        lines.append(f"| {name} | {' | '.join(f'{figure:.2f}' for figure in (*figures, peak))} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
