"""Graphs as ONNX files, their weights in a file beside each."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper

from .graph import IR_VERSION, OPSET, SMALL, Graph, onnx_type

ALIGNMENT = 4096
"""Of large weights in their file, so that they may be mapped into memory."""


def save_graph(graph: Graph, folder: Path, producer_version: str) -> list[str]:
    """Writes ``<name>.onnx`` and ``<name>.onnx.data``, and has ONNX check them; returns their names."""
    path = folder / f"{graph.name}.onnx"
    weights = path.with_name(f"{path.name}.data")
    with weights.open("wb") as file:
        initializers = [_initializer(name, array, file, weights.name) for name, array in graph.constants.items()]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, onnx_type(dtype), shape) for name, (shape, dtype) in tensors.items()]
        for tensors in (graph.inputs, graph.outputs)
    )
    domains = sorted({"", *(node.domain for node in graph.nodes)})
    model = helper.make_model(
        helper.make_graph(graph.nodes, graph.name, inputs, outputs, initializers),
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid(domain, 1 if domain else OPSET) for domain in domains],
        producer_name="transformers-moshi-flax",
        producer_version=producer_version,
    )
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path)
    return [path.name, weights.name]


def _initializer(name: str, array: np.ndarray, file: BinaryIO, location: str) -> TensorProto:
    """A constant, whose numbers are written to the file unless there are few of them."""
    tensor = TensorProto(name=name, dims=array.shape, data_type=onnx_type(array.dtype))
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array.nbytes <= SMALL:
        tensor.raw_data = little.tobytes()
        return tensor
    offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
    file.write(b"\0" * (offset - file.tell()))
    file.write(little.data.cast("B"))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
