"""An ONNX graph in the making: values as JAX has them, tensors as the graph has them.

JAX's programs spell out what ONNX's operators do by themselves: arrays are given axes of one and broadcast before they
meet, and a batch of one frame is reshaped and transposed where nothing moves. So a :class:`Value` says how its tensor
is to be read, as another shape and broadcast, and nodes for that are made only where an operator needs them. Equal
nodes are made once; those that nothing needs are left out in the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET = 21
IR_VERSION = 10

Shape = tuple[int, ...]

STORED = {np.dtype(np.uint32): np.dtype(np.int64)}
"""Arithmetic of unsigned numbers is not among what runtimes have, so they are held in what is wide enough."""

SMALL = 4096
"""Bytes up to which constants are compared, and kept within the graph instead of the file of weights."""


def stored_dtype(dtype: Any) -> np.dtype:
    """In what tensors hold numbers of a dtype."""
    return STORED.get(np.dtype(dtype), np.dtype(dtype))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the graph."""

    name: str
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Value:
    """An array of JAX's program: known, or a tensor that is reshaped to ``base`` and broadcast to ``shape``.

    Attributes:
        shape, dtype: as JAX has them.
        array: the numbers, where they are known; of keys and what is folded into them, how they come about (dtype
            object).
        tensor: else the tensor.
        base: as many axes as ``shape``, each as long or of one.
        label: what the weights file calls it.
        parts: the values that it is made of, and the axis along which they lie, if it is a concatenation.
    """

    shape: Shape
    dtype: np.dtype
    # Any: one of them is there
    array: Any = None
    tensor: Any = None
    base: Shape = ()
    label: str = ""
    parts: tuple[int, tuple[Value, ...]] | None = None

    @property
    def known(self) -> bool:
        return self.array is not None

    @property
    def core(self) -> np.ndarray:
        """A known array without what is only broadcast."""
        index = tuple(
            slice(0, 1) if stride == 0 and size > 1 else slice(None)
            for stride, size in zip(self.array.strides, self.array.shape)
        )
        return self.array[(*index, ...)]


def constant(array: Any, label: str = "") -> Value:
    """A known value."""
    array = np.asarray(array)
    return Value(array.shape, array.dtype, array, label=label)


class Graph:
    """Nodes, constants, inputs and outputs.

    Args:
        name: of the graph.
        quantization: of the weights of products, ``"none"`` or ``"int8"``.

    Attributes:
        nodes: in order.
        constants: arrays by name.
        summed: how many numbers each sum over an axis is of, by the names of the tensors.
        scope: of the nodes that are made next, the part of the model that they are of.
    """

    def __init__(self, name: str, quantization: str = "none"):
        self.name = name
        self.quantization = quantization
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: dict[str, tuple[Shape, np.dtype]] = {}
        self.outputs: dict[str, tuple[Shape, np.dtype]] = {}
        self.summed: dict[str, int] = {}
        self.scope = ""
        self._renamed: dict[str, str] = {}
        self._made: dict[Any, list[Tensor]] = {}
        self._names: dict[Any, str] = {}
        self._kept: list[np.ndarray] = []
        self._makers: dict[str, onnx.NodeProto] = {}
        self._transposed: dict[str, tuple[Value, tuple[int, ...]]] = {}

    # --------------------------------------------------------------------------------------------------- building

    def input(self, name: str, shape: Shape, dtype: Any) -> Value:
        self.inputs[name] = (shape, stored_dtype(dtype))
        return Value(shape, np.dtype(dtype), tensor=Tensor(name, shape), base=shape)

    def output(self, name: str, value: Value) -> None:
        """Gives a value a name among the outputs."""
        source = self.full(value)
        taken = source in self.inputs or source in self.constants or source in self._renamed
        if taken:
            source = self.node("Identity", [source], value.shape, output=name).name
        self._renamed[source] = name
        self.outputs[name] = (value.shape, stored_dtype(value.dtype))

    def node(self, op: str, inputs: Sequence[str], shape: Shape, output: str = "", **attributes: Any) -> Tensor:
        """The first output of an operator, as it was made before if it was."""
        return self.nodes_of(op, inputs, [shape], output, **attributes)[0]

    def nodes_of(
        self, op: str, inputs: Sequence[str], shapes: Sequence[Shape], output: str = "", **attributes: Any
    ) -> list[Tensor]:
        """The outputs of an operator."""
        key = (op, tuple(inputs), output, repr(sorted(attributes.items())))
        if key not in self._made:
            scope = f"{self.scope}/" if self.scope else ""
            name = f"{scope}{op}_{len(self.nodes)}"
            names = [name if index == 0 else f"{name}.{index}" for index in range(len(shapes))]
            self.nodes.append(helper.make_node(op, list(inputs), names, name=name, **attributes))
            self._makers.update(dict.fromkeys(names, self.nodes[-1]))
            self._made[key] = [Tensor(name, shape) for name, shape in zip(names, shapes)]
        return self._made[key]

    def apply(self, op: str, inputs: Sequence[str], shape: Shape, dtype: Any, **attributes: Any) -> Value:
        """The output of an operator as a value."""
        tensor = self.node(op, inputs, shape, **attributes)
        return Value(shape, np.dtype(dtype), tensor=tensor, base=shape)

    def maker(self, value: Value) -> onnx.NodeProto | None:
        """The node whose output the tensor of a value is, if it is one's."""
        return None if value.known else self._makers.get(value.tensor.name)

    def literal(self, array: np.ndarray, label: str = "") -> str:
        """The name of a constant."""
        small = array.size * array.itemsize <= SMALL
        place = array.__array_interface__["data"][0], array.strides
        key = (array.dtype, array.shape, array.tobytes() if small else place)
        if key not in self._names:
            label = label if label and label not in self.constants else f"{label or 'constant'}_{len(self.constants)}"
            self._names[key] = label
            self._kept.append(array)  # so that nothing else comes to lie at its place
            dense = np.ascontiguousarray(array, stored_dtype(array.dtype))
            self.constants[label] = dense.reshape(array.shape)
        return self._names[key]

    def integers(self, numbers: Sequence[int]) -> str:
        """Such as shapes and axes."""
        return self.literal(np.array(numbers, np.int64))

    # ------------------------------------------------------------------------------------------------ how it is read

    def narrow(self, value: Value) -> str:
        """What broadcasts to the value."""
        if value.known:
            core = value.core
            return self.literal(core.reshape(()) if core.size == 1 else core, value.label)
        return self.reshaped(value.tensor, value.base)

    def full(self, value: Value) -> str:
        """The whole of the value."""
        if value.known:
            return self.literal(value.array, value.label)
        name = self.reshaped(value.tensor, value.base)
        if value.base == value.shape:
            return name
        return self.node("Expand", [name, self.integers(value.shape)], value.shape).name

    def reshaped(self, tensor: Tensor, shape: Shape) -> str:
        if tensor.shape == shape:
            return tensor.name
        return self.node("Reshape", [tensor.name, self.integers(shape)], shape).name

    # ------------------------------------------------------------------------------------------------- rearranging

    def reshape(self, value: Value, shape: Shape) -> Value:
        if shape == value.shape:
            return value
        if value.known:
            return constant(value.array.reshape(shape), value.label)
        if value.base != value.shape and math.prod(value.base) == 1:
            return dataclasses.replace(value, shape=shape, base=(1,) * len(shape), parts=None)
        if value.base != value.shape:
            value = self.apply_full(value)
        return dataclasses.replace(value, shape=shape, base=shape, parts=None)

    def apply_full(self, value: Value) -> Value:
        """The value as a tensor of its shape."""
        return Value(value.shape, value.dtype, tensor=Tensor(self.full(value), value.shape), base=value.shape)

    def broadcast(self, value: Value, shape: Shape, axes: Sequence[int]) -> Value:
        """With its axes at these places, and repeated along the others (``lax.broadcast_in_dim``)."""
        base = [1] * len(shape)
        for axis, size in zip(axes, value.shape if value.known else value.base):
            base[axis] = size
        if value.known:
            return constant(np.broadcast_to(value.array.reshape(base), shape), value.label)
        return dataclasses.replace(value, shape=shape, base=tuple(base), parts=None)

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        order = tuple(order)
        if order == tuple(range(len(order))):
            return value
        if value.known:
            return constant(value.array.transpose(order), value.label)
        shape = tuple(value.shape[axis] for axis in order)
        base = tuple(value.base[axis] for axis in order)
        if is_reshape(value.base, order):
            return dataclasses.replace(value, shape=shape, base=base, parts=None)
        if value.tensor.shape == value.base and value.tensor.name in self._transposed:
            source, before = self._transposed[value.tensor.name]
            whole = tuple(before[axis] for axis in order)
            return self.transpose(dataclasses.replace(source, shape=_unpermuted(shape, whole)), whole)
        narrow = dataclasses.replace(value, shape=value.base, parts=None)
        tensor = self.node("Transpose", [self.narrow(value)], base, perm=list(order))
        self._transposed[tensor.name] = (narrow, order)
        return Value(shape, value.dtype, tensor=tensor, base=base)

    def is_free(self, value: Value, order: Sequence[int]) -> bool:
        """Whether :meth:`transpose` makes no node."""
        if value.known or is_reshape(value.base, order):
            return True
        if value.tensor.shape != value.base or value.tensor.name not in self._transposed:
            return False
        _, before = self._transposed[value.tensor.name]
        return [before[axis] for axis in order] == list(range(len(before)))

    def slice(self, value: Value, starts: Sequence[int], stops: Sequence[int], steps: Sequence[int]) -> Value:
        shape = tuple(len(range(*bounds)) for bounds in zip(starts, stops, steps))
        if shape == value.shape:
            return value
        if value.known:
            return constant(value.array[tuple(map(slice, starts, stops, steps))])
        if (
            value.parts is not None
            and 0 not in shape
            and (fewer := self._whole_parts(value, shape, starts, steps)) is not None
        ):
            return fewer
        # where it is only repeated, there is less of it
        axes = [axis for axis, size in enumerate(value.base) if size == value.shape[axis] != shape[axis]]
        base = tuple(shape[axis] if axis in axes else size for axis, size in enumerate(value.base))
        if not axes:
            return dataclasses.replace(value, shape=shape, parts=None)
        source, lies, places = self.narrow(value), base, axes
        tensor = value.tensor
        if axes == [len(shape) - 1] and tensor.shape[-1:] == value.base[-1:]:  # however the other axes lie
            source, lies, places = tensor.name, (*tensor.shape[:-1], base[-1]), [len(tensor.shape) - 1]
        numbers = [self.integers([each[axis] for axis in axes]) for each in (starts, stops, steps)]
        inputs = [source, numbers[0], numbers[1], self.integers(places), numbers[2]]
        return Value(shape, value.dtype, tensor=self.node("Slice", inputs, lies), base=base)

    def _whole_parts(self, value: Value, shape: Shape, starts: Sequence[int], steps: Sequence[int]) -> Value | None:
        """The slice of a concatenation, where it takes whole parts."""
        assert value.parts is not None
        axis, parts = value.parts
        others = [index for index in range(len(shape)) if index != axis]
        if steps[axis] != 1 or any(shape[index] != value.shape[index] for index in others):
            return None
        ends = np.cumsum([part.shape[axis] for part in parts]).tolist()
        begins = [0, *ends]
        stop = starts[axis] + shape[axis]
        if starts[axis] not in begins or stop not in ends:
            return None
        return self.concatenate(parts[begins.index(starts[axis]) : ends.index(stop) + 1], axis)

    def concatenate(self, values: Sequence[Value], axis: int) -> Value:
        if len(values) == 1:
            return values[0]
        if all(value.known for value in values):
            return constant(np.concatenate([value.array for value in values], axis))
        sizes = [value.shape[axis] for value in values]
        shape = (*values[0].shape[:axis], sum(sizes), *values[0].shape[axis + 1 :])
        made = self.apply("Concat", [self.full(value) for value in values], shape, values[0].dtype, axis=axis)
        return dataclasses.replace(made, parts=(axis, tuple(values)))

    def cast(self, value: Value, dtype: Any) -> Value:
        """As another type of numbers; what is unsigned wraps around."""
        dtype = np.dtype(dtype)
        if value.dtype == dtype:
            return value
        if value.known:
            return constant(np.broadcast_to(value.core.astype(dtype), value.shape), value.label)
        before, after = stored_dtype(value.dtype), stored_dtype(dtype)
        made = value if before == after else self.elementwise("Cast", [value], dtype, to=onnx_type(after))
        if dtype == np.uint32 and value.dtype != np.bool_:
            made = self.wrapped(made)
        return dataclasses.replace(made, dtype=dtype)

    def wrapped(self, value: Value) -> Value:
        """An unsigned number modulo 2**32."""
        return self.elementwise("BitwiseAnd", [value, constant(np.array(2**32 - 1, np.int64))], np.uint32)

    def elementwise(self, op: str, values: Sequence[Value], dtype: Any, **attributes: Any) -> Value:
        """An operator on arrays that broadcast; on the tensors as they lie, where they lie alike."""
        shape = np.broadcast_shapes(*(value.shape for value in values))
        lying = [value for value in values if not value.known]
        first = lying[0]
        alike = all(
            (value.base, value.shape) == (first.base, first.shape) and value.tensor.shape == first.tensor.shape
            for value in lying
        )
        if alike and first.shape == shape and all(value.core.size == 1 for value in values if value.known):
            names = [self.narrow(value) if value.known else value.tensor.name for value in values]
            tensor = self.node(op, names, first.tensor.shape, **attributes)
            return Value(shape, np.dtype(dtype), tensor=tensor, base=first.base)
        base = np.broadcast_shapes(*(value.core.shape if value.known else value.base for value in values))
        if all(without_ones(value.tensor.shape) == without_ones(value.base) for value in lying):
            # they are broadcast from the right, so axes of one in front do not matter
            cores = [value.core.reshape(without_ones(value.core.shape)) if value.known else None for value in values]
            names = [
                value.tensor.name if core is None else self.literal(core, value.label)
                for value, core in zip(values, cores)
            ]
            sizes = [value.tensor.shape if core is None else core.shape for value, core in zip(values, cores)]
            lies = np.broadcast_shapes(*sizes)
        else:
            names, lies = [self.narrow(value) for value in values], base
        tensor = self.node(op, names, lies, **attributes)
        return Value(shape, np.dtype(dtype), tensor=tensor, base=(1,) * (len(shape) - len(base)) + base)

    # ----------------------------------------------------------------------------------------------------- the end

    def finish(self) -> None:
        """Leaves out what nothing needs, and gives the outputs their names."""
        needed = set(self._renamed)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        self.nodes = kept[::-1]
        for node in self.nodes:
            node.input[:] = [self._renamed.get(name, name) for name in node.input]
            node.output[:] = [self._renamed.get(name, name) for name in node.output]
        self.constants = {name: array for name, array in self.constants.items() if name in needed}

    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """The nodes that read each tensor."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    def written_in_place(self) -> Iterator[str]:
        """Inputs that are only written to: an output may have their memory."""
        for name, nodes in self.consumers().items():
            if name in self.inputs and [node.op_type for node in nodes] == ["ScatterND"]:
                if nodes[0].input[0] == name and nodes[0].output[0] in self.outputs:
                    yield name


def without_ones(shape: Shape) -> Shape:
    """Without the axes of one in front."""
    return shape[next((axis for axis, size in enumerate(shape) if size != 1), len(shape)) :]


def is_reshape(shape: Sequence[int], order: Sequence[int]) -> bool:
    """Whether a transposition of this shape moves axes of one only."""
    moved = [axis for axis in order if shape[axis] != 1]
    return moved == sorted(moved)


def _unpermuted(shape: Sequence[int], order: Sequence[int]) -> Shape:
    """The shape that becomes this one by a transposition."""
    return tuple(shape[order.index(axis)] for axis in range(len(order)))


def onnx_type(dtype: Any) -> int:
    """The number by which ONNX knows a dtype."""
    return {
        "bool": TensorProto.BOOL,
        "uint8": TensorProto.UINT8,
        "int32": TensorProto.INT32,
        "int64": TensorProto.INT64,
        "float32": TensorProto.FLOAT,
    }[np.dtype(dtype).name]
