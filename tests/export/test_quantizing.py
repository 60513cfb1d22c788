"""Weights in eight bits: what their codes stand for, and products with them in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from transformers_moshi_flax.export.graph import Graph, constant
from transformers_moshi_flax.export.quantizing import BLOCK, MIDDLE, quantize
from transformers_moshi_flax.export.saving import save_graph
from transformers_moshi_flax.export.walking import Walk


def test_codes_stand_for_weights() -> None:
    matrix = np.random.default_rng(0).standard_normal((BLOCK + 5, 3)).astype(np.float32)
    matrix[:BLOCK, 1] = 0
    codes, scales = quantize(matrix)
    weights = ((codes.astype(np.float32) - MIDDLE) * scales[..., None]).reshape(3, -1)[:, : len(matrix)].T
    assert codes.min() >= 1 and np.abs(weights - matrix).max() <= scales.max() / 2 + 1e-7
    np.testing.assert_array_equal(weights[:BLOCK, 1], 0)


@pytest.mark.parametrize(("inputs", "outputs"), [(96, 64), (80, 70)])
def test_products(tmp_path: Path, inputs: int, outputs: int) -> None:
    import jax

    random = np.random.default_rng(0)
    x, matrix = random.standard_normal((1, 2, inputs)), random.standard_normal((inputs, outputs))
    x, matrix = x.astype(np.float32), matrix.astype(np.float32)
    graph = Graph("graph", "int8")
    program = jax.make_jaxpr(lambda x, y: x @ y)(x, matrix)
    (value,) = Walk(graph, 1).program(program, [graph.input("x", x.shape, x.dtype), constant(matrix)])
    graph.output("y", value)
    graph.finish()
    save_graph(graph, tmp_path, "0")
    assert [node.op_type for node in graph.nodes if node.domain] == ["MatMulNBits"]
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"x": x})
    assert 0 < np.abs(made - x @ matrix).max() < 0.02 * np.abs(x @ matrix).max()
