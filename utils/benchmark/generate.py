"""Frames per second of nested generation: this library, upstream PyTorch and the limit that memory sets, in one run.

What is measured, for every size of ``--sizes``:

* One random checkpoint (``--seed``), written by upstream's ``save_pretrained``; both sides run these weights in
  float32 on the CPU with ``--threads`` threads: torch by ``set_num_threads``, XLA by the affinity of the process.
* One call of ``MoshiForConditionalGeneration.generate`` (``torch.inference_mode``, upstream's defaults) against one of
  ``FlaxMoshiForConditionalGeneration.generate``: greedy, from nothing (the start frame is the prompt), without
  waveforms. Mimi only encodes one silent frame of 1920 samples a call, on both sides; that is part of the time.
* frames/s = batch × frames / seconds of the whole call, until the tokens are on the host. The first call of each side
  (compilation, warm-up) is reported apart and never counted. Then the sides take turns ``--repeats`` times, so that
  noise hits both. Upstream makes fewer frames, for time's sake: its cost per frame grows with the length, so this
  favours it slightly, while the silent frame weighs a little more.
* The text tokens of both sides are compared over the common frames. Greedy choice among the near-equal logits of
  random weights may part after a while without an error on either side: the count is information, not a test.
* The memory limit: bandwidth / bytes of weights read per frame. The bytes are those of the backbone's layers, norm and
  head and of the depth decoder's layers, norms, projections and heads of all codebooks, each once; embedding rows and
  caches are left out. The bandwidth is the best of several ways to read a large array, with the same threads, before
  and after the models ran. Where the weights fit in the processor's cache this is no limit, and none is given.

Run it on an idle machine: under load, upstream suffers more than this library, and the ratio means nothing. ::

    python utils/benchmark/generate.py --threads 2 --output benchmark.md
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SMALL_MIMI = {
    "hidden_size": 32,
    "num_filters": 2,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "upsample_groups": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Size:
    """A configuration to measure.

    Attributes:
        config: fields of ``MoshiConfig``; Mimi is full-size where ``audio_encoder_config`` only names its type.
        frames, upstream_frames: frames of one call by default.
        memory_bound: whether the weights are too large for the processor's cache.
    """

    config: dict[str, Any]
    frames: int
    upstream_frames: int
    memory_bound: bool


SIZES = {
    "0.7M": Size(
        config={
            "vocab_size": 1024,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 256,
            "num_codebooks": 4,
            "audio_encoder_config": {"model_type": "mimi", "codebook_size": 512, **SMALL_MIMI},
            "depth_decoder_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"ffn_dim": 128, "max_position_embeddings": 5, "sliding_window": 5},
        },
        frames=1000,
        upstream_frames=100,
        memory_bound=False,
    ),
    "523M": Size(
        config={
            "vocab_size": 32_000,
            "hidden_size": 1024,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "ffn_dim": 5632,
            "num_codebooks": 8,
            "audio_encoder_config": {"model_type": "mimi"},
            "depth_decoder_config": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
            | {"ffn_dim": 2816, "max_position_embeddings": 9, "sliding_window": 9},
        },
        frames=64,
        upstream_frames=20,
        memory_bound=True,
    ),
}


@dataclass
class Timing:
    """Seconds of one side: the first call, and the calls that count."""

    frames: int
    batch: int
    first: float
    seconds: list[float]

    @property
    def best(self) -> float:
        """Frames per second of the fastest call."""
        return self.batch * self.frames / min(self.seconds)

    @property
    def median(self) -> float:
        """Frames per second of the median call."""
        return self.batch * self.frames / statistics.median(self.seconds)


@dataclass
class Result:
    """What was measured of one size; the bytes are those that a frame reads."""

    name: str
    parameters: int
    with_mimi: int
    bytes_per_frame: int
    ours: Timing
    upstream: Timing
    agreeing: int
    memory_bound: bool


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ends the program with a message for values that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models to measure")
    parser.add_argument("--frames", type=int, help="frames of one call of ours; None means 1000 for 0.7M, 64 for 523M")
    parser.add_argument(
        "--upstream-frames", type=int, help="frames of one call of upstream; None means 100 and 20, at most --frames"
    )
    parser.add_argument("--repeats", type=int, default=5, help="calls that count, of each side")
    parser.add_argument("--threads", type=int, default=2, help="threads of both sides")
    parser.add_argument("--batch", type=int, default=1, help="rows generated at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_argument("--output", type=Path, help="markdown file to write")
    options = parser.parse_args(arguments)
    for name in ("frames", "upstream_frames", "repeats", "threads", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, but is {value}")
    cores = len(os.sched_getaffinity(0))
    if options.threads > cores:
        parser.error(f"--threads must be at most the {cores} core(s) of this process, but is {options.threads}")
    return options


def limit_threads(threads: int) -> None:
    """Both libraries to ``threads`` threads; call it before JAX is imported, as XLA counts the cores only once."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    import torch

    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------- memory


def read_bandwidth(threads: int, gigabytes: float = 1.0, repeats: int = 5) -> tuple[float, str]:
    """Bytes per second read from memory, by the fastest of several ways, and the name of that way."""
    import jax
    import torch

    columns = 4096
    matrix = np.ones((int(gigabytes * 1e9) // (4 * columns), columns), dtype=np.float32)
    in_torch, in_jax = torch.from_numpy(matrix), jax.numpy.asarray(matrix)
    torch_vector, jax_vector = torch.ones(columns), jax.numpy.ones(columns)
    matvec, total = jax.jit(lambda a, b: a @ b), jax.jit(lambda a: a.sum())
    chunks = np.array_split(matrix.reshape(-1), threads)
    with ThreadPoolExecutor(threads) as pool:
        readers: dict[str, Callable[[], Any]] = {
            "torch sum": in_torch.sum,
            "torch matrix-vector product": lambda: torch.mv(in_torch, torch_vector),
            "XLA sum": lambda: total(in_jax).block_until_ready(),
            "XLA matrix-vector product": lambda: matvec(in_jax, jax_vector).block_until_ready(),
            "NumPy maximum": lambda: list(pool.map(np.max, chunks)),
        }
        best = {name: matrix.nbytes / min(seconds_of(read) for _ in range(repeats)) for name, read in readers.items()}
    name = max(best, key=best.__getitem__)
    return best[name], name


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------------- models


def build_upstream(size: Size, seed: int):
    """Upstream's model with random weights, float32, without dropout."""
    import torch
    from transformers import MoshiConfig, MoshiForConditionalGeneration

    torch.manual_seed(seed)
    # the constructor fills in the sub-configurations in place
    config = MoshiConfig(**{k: dict(v) if isinstance(v, dict) else v for k, v in size.config.items()})
    if config.audio_encoder_config.frame_size != 1920:
        raise ValueError(f"Mimi must have 1920 samples a frame, but has {config.audio_encoder_config.frame_size}.")
    return MoshiForConditionalGeneration(config).float().eval()


def count_parameters(model) -> tuple[int, int, int]:
    """Parameters without Mimi and with it, and the bytes of weights that a frame reads.

    Mimi's codebooks don't count: upstream holds them as buffers.
    """
    without_mimi = total = read = 0
    for name, weight in model.named_parameters():
        total += weight.numel()
        if name.startswith("audio_encoder."):
            continue
        without_mimi += weight.numel()
        if "embed_tokens" not in name:
            read += weight.numel() * weight.element_size()
    return without_mimi, total, read


def start_frames(model, batch: int) -> dict[str, Any]:
    """Arguments of ``generate``, of either side: none for one row, for more the start frame of each."""
    if batch == 1:
        return {}
    start = model.get_unconditional_inputs(num_samples=batch)
    return {
        "input_ids": start.input_ids,
        "user_audio_codes": start.user_audio_codes,
        "moshi_audio_codes": start.moshi_audio_codes,
        "attention_mask": start.attention_mask,
        "concat_unconditional_inputs": False,
    }


def upstream_call(model, batch: int, frames: int) -> Callable[[], np.ndarray]:
    """A call that generates with upstream and returns the new text tokens, ``(batch, frames)``."""
    import torch

    inputs = start_frames(model, batch)

    def call() -> np.ndarray:
        with torch.inference_mode():
            outputs = model.generate(
                **inputs,
                max_new_tokens=frames,
                do_sample=False,
                depth_decoder_do_sample=False,
                return_audio_waveforms=False,
                return_audio_codes=True,
            )
        return check_length(outputs.sequences.numpy(), frames)

    return call


def our_call(model, batch: int, frames: int) -> Callable[[], np.ndarray]:
    """The same with this library."""
    inputs = start_frames(model, batch)

    def call() -> np.ndarray:
        outputs = model.generate(
            **inputs,
            max_new_tokens=frames,
            do_sample=False,
            depth_decoder_do_sample=False,
            return_audio_waveforms=False,
            return_audio_codes=True,
        )
        np.asarray(outputs.audio_codes)
        return check_length(np.asarray(outputs.sequences), frames)

    return call


def check_length(sequences: np.ndarray, frames: int) -> np.ndarray:
    """The new tokens; a call that ended early, or a prompt that was not one frame, would falsify the figure."""
    if sequences.shape[1] != frames + 1:
        raise RuntimeError(f"expected the start frame and {frames} new ones, but got {sequences.shape[1]} in all")
    return sequences[:, 1:]


def measure(name: str, options: argparse.Namespace) -> Result:
    """Builds one size on both sides and times it."""
    from transformers_moshi_flax import FlaxMoshiForConditionalGeneration

    size = SIZES[name]
    frames = options.frames or size.frames
    upstream_frames = options.upstream_frames or min(size.upstream_frames, frames)
    upstream = build_upstream(size, options.seed)
    with tempfile.TemporaryDirectory(prefix="moshi-benchmark-") as folder:
        upstream.save_pretrained(folder)
        ours = FlaxMoshiForConditionalGeneration.from_pretrained(folder)
        parameters, with_mimi, read = count_parameters(upstream)
        print(f"{name}: {parameters:,} parameters, {with_mimi:,} with Mimi; a frame reads {read / 1e9:.4g} GB")
        calls = {
            "upstream": upstream_call(upstream, options.batch, upstream_frames),
            "ours": our_call(ours, options.batch, frames),
        }
        tokens, timings = {}, {}
        for side, call in calls.items():
            start = time.perf_counter()
            tokens[side] = call()
            first = time.perf_counter() - start
            timings[side] = Timing(upstream_frames if side == "upstream" else frames, options.batch, first, [])
            print(f"{name}: {side}, first call {first:.2f} s")
        for repeat in range(options.repeats):
            for side, call in calls.items():
                timings[side].seconds.append(seconds_of(call))
                print(f"{name}: {side}, call {repeat + 1} of {options.repeats}: {timings[side].seconds[-1]:.3f} s")

    common = min(frames, upstream_frames)
    equal = (tokens["ours"][:, :common] == tokens["upstream"][:, :common]).all(axis=0)
    agreeing = common if equal.all() else int(equal.argmin())
    return Result(name, parameters, with_mimi, read, timings["ours"], timings["upstream"], agreeing, size.memory_bound)


# ------------------------------------------------------------------------------------------------------- report


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(
    results: list[Result], bandwidth: tuple[float, str], options: argparse.Namespace, load: tuple[float, float]
) -> str:
    """The figures as markdown."""
    import flax
    import jax
    import torch
    import transformers

    speed, way = bandwidth
    lines = [
        f"float32, greedy, no input, no waveforms, batch {options.batch}, {options.threads} thread(s) on both sides, "
        f"{options.repeats} counted call(s) each in turns; {processor()}; "
        f"memory reads {speed / 1e9:.1f} GB/s ({way}); "
        f"load average {load[0]:.2f} before, {load[1]:.2f} after; jax {jax.__version__}, flax {flax.__version__}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}.",
        "",
        "| model | side | frames a call | first call, s | frames/s, median | frames/s, best | of the memory limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        limit = options.batch * speed / result.bytes_per_frame
        for side, timing in (("upstream", result.upstream), ("this library", result.ours)):
            share = f"{timing.best / limit:.0%} (best)" if result.memory_bound else "-"
            lines.append(
                f"| {result.name} | {side} | {timing.frames} | {timing.first:.1f} | {timing.median:,.1f} "
                f"| {timing.best:,.1f} | {share} |"
            )
        medians, bests = result.ours.median / result.upstream.median, result.ours.best / result.upstream.best
        lines.append(f"| {result.name} | **ratio** | | | **{medians:.2f}** | **{bests:.2f}** | |")
    lines.append("")
    for result in results:
        limit = options.batch * speed / result.bytes_per_frame
        common = min(result.ours.frames, result.upstream.frames)
        lines.append(
            f"- {result.name}: {result.parameters / 1e6:,.2f} M parameters, {result.with_mimi / 1e6:,.2f} M with "
            f"Mimi; a frame reads {result.bytes_per_frame / 1e6:,.2f} MB of weights"
            + (f", so memory allows {limit:,.1f} frames/s" if result.memory_bound else ", which fit in the cache")
            + f"; the text agrees over {result.agreeing} of {common} common frames."
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    limit_threads(options.threads)
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the load average is {load:.2f}: the machine isn't idle, so the ratio will mean little")
    bandwidths, results = [read_bandwidth(options.threads)], []
    for name in options.sizes:
        results.append(measure(name, options))
        gc.collect()  # models have reference cycles: the next one needs the memory
    bandwidths.append(read_bandwidth(options.threads))
    text = report(results, max(bandwidths), options, (load, os.getloadavg()[0]))
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
