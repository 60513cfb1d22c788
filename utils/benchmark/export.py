"""A frame of a dialogue in JAX and as exported graphs on onnxruntime: ``python utils/benchmark/export.py``.

One dialogue, greedy, noise for a user; blocks of frames on either side in turn, on the same cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

EMBEDDED = "embedded"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=[EMBEDDED, "0.7M", "68M", "331M"], default=EMBEDDED, help="the model")
    parser.add_argument("--context", type=int, default=None, help="frames that it looks back")
    parser.add_argument("--quantization", choices=["none", "int8"], default="none", help="of what is exported")
    parser.add_argument("--threads", type=int, default=1, help="cores of either side")
    parser.add_argument("--frames", type=int, default=20, help="of a block")
    parser.add_argument("--blocks", type=int, default=5, help="of either side")
    return parser.parse_args()


def model_of(size: str) -> Any:
    import jax.numpy as jnp
    from transformers import MoshiConfig
    from utils.benchmark.settings import SIZES

    from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
    from transformers_moshi_flax.cli.checkpoints import EMBEDDED_MODEL

    if size == EMBEDDED:
        return FlaxMoshiForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=jnp.float32)
    return FlaxMoshiForConditionalGeneration(MoshiConfig(**SIZES[size].config))


def main() -> None:
    args = parsed()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    import jax
    import numpy as np

    from transformers_moshi_flax.export import export_onnx
    from transformers_moshi_flax.export.folder import with_context
    from transformers_moshi_flax.runtime import OnnxMoshi

    model, greedy = model_of(args.size), {"do_sample": False, "depth_decoder_do_sample": False}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        begin = time.perf_counter()
        manifest = export_onnx(model, folder, context=args.context, quantization=args.quantization, **greedy)
        export_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        exported = OnnxMoshi(folder, threads=args.threads)
        load_seconds = time.perf_counter() - begin
    size = sum(file["bytes"] for file in manifest["files"].values())
    shorter, params = with_context(model, args.context)
    stream, onnx = shorter.streaming(1, params=params, **greedy), exported.streaming()
    begin = time.perf_counter()
    stream.warmup()
    compile_seconds = time.perf_counter() - begin
    random = np.random.default_rng(0)
    noise = random.uniform(-0.1, 0.1, (args.frames, 1, 1, stream.frame_size)).astype(np.float32)
    state, times = stream.init(), {"JAX": [], "onnxruntime": []}
    for _ in range(args.blocks):
        for frame in noise:
            begin = time.perf_counter()
            state, made = stream.step(state, frame)
            jax.block_until_ready((state, made))
            times["JAX"].append(1000 * (time.perf_counter() - begin))
        for frame in noise:
            begin = time.perf_counter()
            onnx.step(frame)
            times["onnxruntime"].append(1000 * (time.perf_counter() - begin))
    print(f"{args.size}, quantization {args.quantization}, context {manifest['context']}, {args.threads} thread(s)")
    print(f"{args.blocks * args.frames} frames of either side")
    print(f"export {export_seconds:.1f} s, {size / 1e6:.1f} MB; loading {load_seconds:.2f} s")
    print(f"compilation in JAX {compile_seconds:.1f} s")
    for side, found in times.items():
        print(f"{side:12} {np.min(found):7.2f} ms least, {np.median(found):7.2f} ms median")


if __name__ == "__main__":
    main()
