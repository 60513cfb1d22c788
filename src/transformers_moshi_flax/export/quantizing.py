"""Weights in eight bits while a model is exported: as ONNX Runtime's ``MatMulNBits`` wants them.

Every block of inputs of an output has a scale; codes are symmetric around 128. Products are computed of weights and
activations in eight bits, with sums of 32.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

from .graph import Graph, Value

BITS, BLOCK = 8, 32
MIDDLE = 128
DOMAIN = "com.microsoft"
SMALLEST = 4096
"""Numbers of a matrix from which on it is quantized."""
INT8_ACTIVATIONS = 4
"""As ``accuracy_level`` has it."""


def takes(graph: Graph, x: Value, matrix: Value) -> bool:
    """Whether a product is one with weights that are to be quantized."""
    return graph.quantization == "int8" and not x.known and matrix.known and matrix.array.size >= SMALLEST


def quantize(
    matrix: Float[np.ndarray, "inputs outputs"],
) -> tuple[UInt8[np.ndarray, "outputs blocks block"], Float[np.ndarray, "outputs blocks"]]:
    """Codes and scales: a weight is ``(code - 128) * scale``; the last block is filled up with zeros."""
    inputs, outputs = matrix.shape
    padded = np.pad(matrix.T, ((0, 0), (0, -inputs % BLOCK))).reshape(outputs, -1, BLOCK)
    scales = np.abs(padded).max(axis=-1) / np.float32(MIDDLE - 1)
    divisors = np.where(scales == 0, np.float32(1), scales)[..., None]
    codes = np.rint(padded / divisors) + MIDDLE
    return codes.astype(np.uint8), scales.astype(np.float32)


def product(graph: Graph, x: Value, matrix: Value) -> Value:
    """``x @ matrix``, of ``(rows, inputs)`` and ``(inputs, outputs)``, the matrix known."""
    inputs, outputs = matrix.shape
    codes, scales = quantize(matrix.array)
    names = [graph.literal(codes, f"{matrix.label}.codes"), graph.literal(scales, f"{matrix.label}.scales")]
    return graph.apply(
        "MatMulNBits",
        [graph.full(x), *names],
        (x.shape[0], outputs),
        x.dtype,
        domain=DOMAIN,
        K=inputs,
        N=outputs,
        bits=BITS,
        block_size=BLOCK,
        accuracy_level=INT8_ACTIVATIONS,
    )
