"""Products of few rows with quantized matrices, by ``cpu_native.cc``, which is compiled when the package is built.

Where it was not, for want of a compiler, or is not taken by XLA, what is computed is the same, more slowly.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from .scales import QuantizedScales, Scales

logger = logging.getLogger(__name__)

MOST_ROWS = 8
"""Of ``x``: more are multiplied faster as floats, which cost less by the row."""

LANES = 16
"""Outputs that are computed side by side."""

_FUNCTIONS = {"int8": "QuantizedDotInt8", "int4": "QuantizedDotInt4", "nf4": "QuantizedDotNf4"}
_WITH_QUANTIZED_SCALES = {kind: f"{function}Double" for kind, function in _FUNCTIONS.items()}


@functools.cache
def is_built() -> bool:
    """Whether the library is there, and known to XLA."""
    paths = [Path(__file__).with_name(f"_cpu_native{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return False
    try:
        library = ctypes.CDLL(str(path))
        for function in (*_FUNCTIONS.values(), *_WITH_QUANTIZED_SCALES.values()):
            jax.ffi.register_ffi_target(_target(function), jax.ffi.pycapsule(library[function]), platform="cpu")
    except (AttributeError, OSError, RuntimeError) as error:
        logger.warning("%s is not used, so that quantized weights are slower: %s", path.name, error)
        return False
    return True


def takes(x: Float[Array, "*shape inputs"], outputs: int) -> bool:
    """Whether there is a compiled product of so many rows, dtype and outputs."""
    rows = x.size // max(x.shape[-1], 1)
    return 0 < rows <= MOST_ROWS and x.dtype != jnp.float64 and outputs % LANES == 0 and is_built()


def quantized_dot(
    x: Float[Array, "*shape inputs"],
    codes: Int8[Array, "inputs outputs"] | UInt8[Array, "bytes outputs"],
    scales: Scales,
    kind: str,
) -> Float[Array, "*shape outputs"]:
    """``x @ dequantize(codes, scales, kind)`` of ``ops.quantization``, summed in float32, in the dtype of ``x``."""
    left = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    found = jax.ShapeDtypeStruct((left.shape[0], codes.shape[1]), jnp.float32)
    parts: tuple[Any, ...] = scales if isinstance(scales, QuantizedScales) else (scales,)
    function = (_FUNCTIONS if len(parts) == 1 else _WITH_QUANTIZED_SCALES)[kind]
    product = jax.ffi.ffi_call(_target(function), found, vmap_method="sequential")(left, codes, *parts)
    return product.reshape(*x.shape[:-1], codes.shape[1]).astype(x.dtype)


def _target(function: str) -> str:
    """Its name among all that programs of a process call."""
    return f"transformers_moshi_flax_{function}"
