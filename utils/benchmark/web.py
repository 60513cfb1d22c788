"""The page of ``moshi-flax export web`` in Chromium, loading it and frames of a dialogue: ``utils/benchmark/web.py``.

The embedded model, noise for a user, frame after frame without a pause; WebAssembly on one thread. Beside it the same
export in Python's runtime on one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

FRAMES = """
(async () => {
  const site = JSON.parse(document.getElementById("site").textContent);
  const worker = new Worker("worker.js", { type: "module" });
  const next = (kind) => new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => (data.failed ? reject(Error(data.failed)) : kind in data && resolve(data));
  });
  const ask = (message, kind) => (worker.postMessage(message), next(kind));
  await ask({ load: site.runtime }, "ready");
  await ask({ begin: 1, options: { seed: 0, numbers: {} } }, "begun");
  const times = [];
  for (let at = 0; at < COUNT; at++) {
    const frame = Int16Array.from({ length: 1920 }, () => 6000 * (Math.random() - 0.5));
    times.push((await ask({ hear: 1, frame }, "frame")).milliseconds);
  }
  return JSON.stringify(times);
})().then((times) => (globalThis.measured = times), (error) => (globalThis.measured = JSON.stringify(error.message)));
"""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quantization", choices=["none", "int8"], default="none", help="of what is exported")
    parser.add_argument("--frames", type=int, default=500, help="of either side")
    parser.add_argument("--loads", type=int, default=5, help="of the page, each by a browser that has nothing of it")
    parser.add_argument("--onnxruntime-web", type=Path, help="an installed package (default: npm is asked)")
    return parser.parse_args()


async def in_chromium(url: str, folder: Path, frames: int) -> tuple[float, list[float]]:
    """Seconds until the page is ready, and ms of each frame."""
    import aiohttp
    from tests.serving.browser import browser, tab

    with browser(folder / "profile", folder / "no microphone.wav") as address:
        async with aiohttp.ClientSession() as session, tab(session, address) as page:
            begin = time.perf_counter()
            await page.open(url)
            while await page.evaluate("document.querySelector('#status').textContent") != "Ready.":
                await asyncio.sleep(0.01)
            seconds = time.perf_counter() - begin
            if not frames:
                return seconds, []
            await page.evaluate(FRAMES.replace("COUNT", str(frames)))
            await page.until("globalThis.measured")
            return seconds, json.loads(await page.evaluate("globalThis.measured"))


def in_python(folder: Path, frames: int) -> list[float]:
    """Ms of each frame."""
    import numpy as np

    from transformers_moshi_flax.runtime import OnnxMoshi

    model = OnnxMoshi(folder, threads=1)
    stream, random, times = model.streaming(), np.random.default_rng(0), []
    for _ in range(frames):
        frame = random.uniform(-0.1, 0.1, (1, 1, model.frame_size)).astype(np.float32)
        begin = time.perf_counter()
        stream.step(frame)
        times.append(1000 * (time.perf_counter() - begin))
    return times


def told(name: str, times: list[float]) -> None:
    import numpy as np

    least, median, late = np.min(times), np.median(times), np.percentile(times, 99)
    print(f"{name:20} {least:6.1f} ms least, {median:6.1f} ms median, {late:6.1f} ms p99 of {len(times)} frames")


def main() -> None:
    args = parsed()
    import jax.numpy as jnp
    from tests.web.site import served

    from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
    from transformers_moshi_flax.cli.checkpoints import EMBEDDED_MODEL
    from transformers_moshi_flax.export import export_web

    model: Any = FlaxMoshiForConditionalGeneration.from_pretrained(EMBEDDED_MODEL, dtype=jnp.float32)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "page"
        export_web(model, folder, EMBEDDED_MODEL, args.onnxruntime_web, quantization=args.quantization)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        loads = []
        with served(folder) as url:
            for number in range(args.loads):
                frames = args.frames if number == args.loads - 1 else 0
                (place := Path(scratch) / f"browser {number}").mkdir()
                seconds, times = asyncio.run(in_chromium(url, place, frames))
                loads.append(seconds)
        python = in_python(folder / "model", args.frames)
    print(
        f"embedded model, quantization {args.quantization}, {size / 1e6:.1f} MB; load average {os.getloadavg()[0]:.1f}"
    )
    print(f"loading, s: {', '.join(f'{seconds:.2f}' for seconds in sorted(loads))}")
    told("Chromium", times)
    told("Python, one thread", python)


if __name__ == "__main__":
    main()
