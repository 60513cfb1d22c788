"""The first frame of a fresh process, from the interpreter's start: imports, loading, compilation, the frame itself.

Run as a program, it is that process: ``python -m utils.benchmark.first_call SIDE FOLDER THREADS`` generates one frame
and then 32, and prints what it measured as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
FRAMES = 32
KINDS = {
    "upstream": "upstream PyTorch",
    "cold": "this library, nothing compiled",
    "warm": "this library, persistent cache warm",
}


def measure_first_calls(folder: Path, threads: int, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """What fresh processes print, in turns: ``seconds`` until the first frame and of parts of it, and
    ``peak_bytes`` after 32 more."""
    results: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="moshi-programs-") as cache:
        run("warm", folder, threads, cache)
        for _ in range(repeats):
            for kind in KINDS:
                results[kind].append(run(kind, folder, threads, cache))
                print(f"first call, {KINDS[kind]}: {results[kind][-1]}", flush=True)
    return results


def run(kind: str, folder: Path, threads: int, cache: str) -> dict[str, Any]:
    """One process; ``cache`` is the persistent cache of the kind that has one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    paths = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    if kind == "warm":
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
    side = "upstream" if kind == "upstream" else "ours"
    command = [sys.executable, "-m", "utils.benchmark.first_call", side, str(folder), str(threads), repr(time.time())]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def main(side: str, folder: str, threads: int, started: float) -> None:
    """Generates in this process, whose start was at ``started`` (seconds since the epoch).

    The first frame is a call of ``generate`` for one new token, its codes included and waveforms not.
    """
    compilation: dict[str, Any] = {}
    if side == "ours":
        from transformers_moshi_flax import FlaxMoshiForConditionalGeneration

        from .compilation import longest, stage_seconds, summed

        with stage_seconds() as stages:
            model = FlaxMoshiForConditionalGeneration.from_pretrained(folder)
            loaded = time.time()
            generate(model, 1)
            first = time.time()
            generate(model, FRAMES)
        compilation = {**summed(stages), "programs": longest(stages)}
    else:
        import torch
        from transformers import MoshiForConditionalGeneration

        torch.set_num_threads(threads)
        model = MoshiForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        loaded = time.time()
        with torch.inference_mode():
            generate(model, 1)
            first = time.time()
            generate(model, FRAMES)
    report = {
        "seconds": first - started,
        "until loaded": loaded - started,
        **compilation,
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(report))


def peak_bytes() -> int:
    """The largest resident size of this process so far (``getrusage`` would begin with that of the parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def generate(model: Any, frames: int) -> None:
    """A greedy call from nothing, until the codes are on the host."""
    greedy = {"do_sample": False, "depth_decoder_do_sample": False}
    outputs = model.generate(max_new_tokens=frames, return_audio_waveforms=False, return_audio_codes=True, **greedy)
    np.asarray(outputs.audio_codes)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
