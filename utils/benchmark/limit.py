"""The bandwidth of memory reads, which sets the limit of generation."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import torch


class Bandwidth(NamedTuple):
    """Bytes per second, and the way of reading that reached them."""

    bytes_per_second: float
    way: str


def read_bandwidth(threads: int, gigabytes: float = 1.0, repeats: int = 5) -> Bandwidth:
    """Reads an array of ``gigabytes``, which no processor's cache holds, in several ways; the best of them."""
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
    way = max(best, key=best.__getitem__)
    return Bandwidth(best[way], way)


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
