"""Loads a checkpoint and prints what it took, as JSON; run as a fresh process by the memory test and the benchmark.

``python measure_loading.py FOLDER [DTYPE] [QUANTIZATION]``
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path


def anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Samples the anonymous memory every two milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.going = True

    def run(self) -> None:
        while self.going:
            self.bytes = max(self.bytes, anonymous_bytes())
            time.sleep(0.002)


def main(folder: str, dtype: str | None = None, quantization: str | None = None) -> None:
    import jax
    import jax.numpy as jnp

    import transformers_moshi_flax

    architecture = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    model_class = getattr(transformers_moshi_flax, f"Flax{architecture}")
    jnp.zeros(1).block_until_ready()
    baseline, peak = anonymous_bytes(), Peak()
    peak.start()
    start, worked = time.perf_counter(), time.process_time()
    model = model_class.from_pretrained(folder, dtype=dtype and jnp.dtype(dtype), quantization=quantization)
    jax.block_until_ready(model.params)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    peak.going = False
    peak.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    print(json.dumps({"seconds": seconds, "cpu": worked, "peak": peak.bytes - baseline, "parameters": size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
