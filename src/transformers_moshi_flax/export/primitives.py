"""What each primitive of JAX is in ONNX: one entry a primitive, on values of :mod:`.graph`.

An entry is called with the graph, the equation's parameters, what it is to make (shape and dtype) and its operands, of
which one at least is not known; it returns a value, or a list of them. What is known altogether is computed in NumPy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

from .graph import Graph, Tensor, Value, constant
from .quantizing import product, takes


class NotExportable(ValueError):
    """Something of the model has no counterpart."""


Params = dict[str, Any]
Entry = Callable[..., Any]

TABLE: dict[str, Entry] = {}
"""By the name of the primitive."""


def entry(*names: str) -> Callable[[Entry], Entry]:
    """Puts a function into the table."""

    def put(function: Entry) -> Entry:
        TABLE.update(dict.fromkeys(names, function))
        return function

    return put


# ------------------------------------------------------------------------------------------------------ elementwise

UNARY = {
    "abs": "Abs",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "log": "Log",
    "logistic": "Sigmoid",
    "neg": "Neg",
    "not": "Not",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
}
BINARY = {"add": "Add", "max": "Max", "min": "Min", "sub": "Sub"}
COMPARISONS = {"eq": "Equal", "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less"}
FOLDED: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "cos": np.cos,
    "eq": np.equal,
    "exp": np.exp,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "log": np.log,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "rem": np.fmod,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": lambda which, *cases: np.choose(which, cases) if len(cases) > 2 else np.where(which, *cases[::-1]),
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
    "tanh": np.tanh,
}
"""Of known operands. Integers are not divided here, as NumPy rounds another way."""


def fold(name: str, params: Params, values: Sequence[Value], shape: tuple[int, ...], dtype: Any) -> Value | None:
    """An elementwise primitive of known operands; None if it is none."""
    function = FOLDED.get(name, np.divide if name == "div" and np.issubdtype(dtype, np.floating) else None)
    if function is None:
        return None
    with np.errstate(all="ignore"):
        made = np.asarray(function(*(value.core for value in values)), dtype)
    return constant(np.broadcast_to(made, shape))


def _simple(op: str) -> Entry:
    def make(graph: Graph, params: Params, out: Any, *values: Value) -> Value:
        made = graph.elementwise(op, values, out.dtype)
        return graph.wrapped(made) if out.dtype == np.uint32 else made

    return make


TABLE.update({name: _simple(op) for name, op in (UNARY | BINARY | COMPARISONS).items()})


def _scalar(number: int | float, dtype: Any) -> Value:
    return constant(np.array(number, dtype))


@entry("ne")
def _ne(graph: Graph, params: Params, out: Any, x: Value, y: Value) -> Value:
    return graph.elementwise("Not", [graph.elementwise("Equal", [x, y], np.bool_)], np.bool_)


@entry("rem")
def _rem(graph: Graph, params: Params, out: Any, x: Value, y: Value) -> Value:
    return graph.elementwise("Mod", [x, y], out.dtype, fmod=1)


def _logical(op: str, neutral: bool) -> Entry:
    def make(graph: Graph, params: Params, out: Any, x: Value, y: Value) -> Value:
        if out.dtype != np.bool_:
            return graph.elementwise(f"Bitwise{op}", [x, y], out.dtype)
        for one, other in ((x, y), (y, x)):
            if one.known and np.all(one.array == neutral) and other.shape == out.shape:
                return other
        return graph.elementwise(op, [x, y], np.bool_)

    return make


TABLE |= {"and": _logical("And", neutral=True), "or": _logical("Or", neutral=False)}


@entry("square")
def _square(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    return graph.elementwise("Pow", [x, _scalar(2, out.dtype)], out.dtype)


@entry("integer_pow")
def _integer_pow(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    return graph.elementwise("Pow", [x, _scalar(params["y"], out.dtype)], out.dtype)


@entry("rsqrt")
def _rsqrt(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    return graph.elementwise("Reciprocal", [graph.elementwise("Sqrt", [x], out.dtype)], out.dtype)


@entry("div")
def _div(graph: Graph, params: Params, out: Any, x: Value, y: Value) -> Value:
    maker = graph.maker(x)
    if maker is not None and y.known and np.all(y.array == graph.summed.get(x.tensor.name)):
        mean = graph.node("ReduceMean", list(maker.input), x.tensor.shape, keepdims=1)
        return dataclasses.replace(x, tensor=mean)
    return graph.elementwise("Div", [x, y], out.dtype)


@entry("mul")
def _mul(graph: Graph, params: Params, out: Any, x: Value, y: Value) -> Value:
    for one, other in ((x, y), (y, x)):
        maker = graph.maker(other)
        if maker is not None and maker.op_type == "Reciprocal":  # of a norm: as runtimes know it
            divisor = dataclasses.replace(other, tensor=Tensor(maker.input[0], other.tensor.shape))
            return graph.elementwise("Div", [one, divisor], out.dtype)
    made = graph.elementwise("Mul", [x, y], out.dtype)
    return graph.wrapped(made) if out.dtype == np.uint32 else made


@entry("erfc")
def _erfc(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    # as exact as 1 is, which is what it is multiplied and added to in a GELU
    return graph.elementwise("Sub", [_scalar(1, out.dtype), graph.elementwise("Erf", [x], out.dtype)], out.dtype)


@entry("expm1")
def _expm1(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    return graph.elementwise("Sub", [graph.elementwise("Exp", [x], out.dtype), _scalar(1, out.dtype)], out.dtype)


@entry("is_finite")
def _is_finite(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    wrong = [graph.elementwise(op, [x], np.bool_) for op in ("IsNaN", "IsInf")]
    return graph.elementwise("Not", [graph.elementwise("Or", wrong, np.bool_)], np.bool_)


@entry("select_n")
def _select_n(graph: Graph, params: Params, out: Any, which: Value, *cases: Value) -> Value:
    if len(cases) != 2:
        raise NotExportable(f"of {len(cases)} cases")
    if which.known and np.all(which.array == which.core.flat[0]):
        return cases[int(which.core.flat[0])]
    return graph.elementwise("Where", [which, cases[1], cases[0]], out.dtype)


@entry("convert_element_type")
def _convert(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    if x.dtype == np.uint32 and out.dtype == np.int32:
        return _signed(graph, x)
    return graph.cast(x, out.dtype)


@entry("bitcast_convert_type")
def _bitcast(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    if (x.dtype, out.dtype) != (np.uint32, np.int32):
        raise NotExportable(f"from {x.dtype} to {out.dtype}")
    return _signed(graph, x)


def _signed(graph: Graph, x: Value) -> Value:
    """The signed number of the same bits."""
    upper = graph.elementwise("GreaterOrEqual", [x, _scalar(2**31, np.int64)], np.bool_)
    below = graph.elementwise("Sub", [x, _scalar(2**32, np.int64)], np.int64)
    return graph.cast(graph.elementwise("Where", [upper, below, x], np.int64), np.int32)


@entry("copy", "stop_gradient", "optimization_barrier")
def _same(graph: Graph, params: Params, out: Any, *values: Value) -> Any:
    return values[0] if len(values) == 1 else list(values)


ELU = "elu"
"""The name of JAX's own program of it."""


@entry(ELU)
def _elu(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    return graph.elementwise("Elu", [x], out.dtype)


# ------------------------------------------------------------------------------------------------------ rearranging


@entry("iota")
def _iota(graph: Graph, params: Params, out: Any) -> Value:
    shape, axis = params["shape"], params["dimension"]
    numbers = np.arange(shape[axis], dtype=out.dtype).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return constant(np.broadcast_to(numbers, shape))


@entry("reshape")
def _reshape(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    return graph.reshape(x, out.shape)


@entry("squeeze", "expand_dims")
def _squeeze(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    if x.known:
        return graph.reshape(x, out.shape)
    kept = [axis for axis in range(len(x.shape)) if axis not in params["dimensions"]]
    # through a broadcast, which keeps what is only repeated so
    return _dropped(x, kept)


def _dropped(x: Value, kept: Sequence[int]) -> Value:
    shape, base = (tuple(sizes[axis] for axis in kept) for sizes in (x.shape, x.base))
    return Value(shape, x.dtype, tensor=x.tensor, base=base)


@entry("broadcast_in_dim")
def _broadcast_in_dim(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    return graph.broadcast(x, out.shape, params["broadcast_dimensions"])


@entry("transpose")
def _transpose(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    return graph.transpose(x, params["permutation"])


@entry("concatenate")
def _concatenate(graph: Graph, params: Params, out: Any, *values: Value) -> Value:
    return graph.concatenate(values, params["dimension"])


@entry("stack")
def _stack(graph: Graph, params: Params, out: Any, *values: Value) -> Value:
    axis = params["axis"]
    shape = (*out.shape[:axis], 1, *out.shape[axis + 1 :])
    return graph.concatenate([graph.reshape(value, shape) for value in values], axis)


@entry("split")
def _split(graph: Graph, params: Params, out: Any, x: Value) -> list[Value]:
    axis, ends = params["axis"], np.cumsum(params["sizes"]).tolist()
    starts, stops, pieces = [0] * len(x.shape), list(x.shape), []
    for starts[axis], stops[axis] in zip([0, *ends], ends):
        pieces.append(graph.slice(x, starts, stops, [1] * len(x.shape)))
    return pieces


@entry("slice")
def _slice(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    return graph.slice(x, params["start_indices"], params["limit_indices"], params["strides"] or [1] * len(x.shape))


@entry("dynamic_slice")
def _dynamic_slice(graph: Graph, params: Params, out: Any, x: Value, *starts: Value) -> Value:
    first = _known_starts(starts, x.shape, params["slice_sizes"])
    stops = [start + size for start, size in zip(first, params["slice_sizes"])]
    return graph.slice(x, first, stops, [1] * len(x.shape))


@entry("dynamic_update_slice")
def _dynamic_update_slice(graph: Graph, params: Params, out: Any, x: Value, update: Value, *starts: Value) -> Value:
    first = _known_starts(starts, x.shape, update.shape)
    axes = [axis for axis, size in enumerate(x.shape) if update.shape[axis] != size]
    if not axes:
        return update
    if len(axes) > 1:
        raise NotExportable("along several axes")
    (axis,) = axes
    begin, end = first[axis], first[axis] + update.shape[axis]
    before, after = _between(graph, x, axis, 0, begin), _between(graph, x, axis, end, x.shape[axis])
    return graph.concatenate([*before, update, *after], axis)


def _between(graph: Graph, x: Value, axis: int, begin: int, end: int) -> list[Value]:
    """What a part of a value along an axis is a concatenation of."""
    if begin == end:
        return []
    starts, stops = [0] * len(x.shape), list(x.shape)
    starts[axis], stops[axis] = begin, end
    part = graph.slice(x, starts, stops, [1] * len(x.shape))
    return list(part.parts[1]) if part.parts is not None and part.parts[0] == axis else [part]


def _known_starts(starts: Sequence[Value], shape: Sequence[int], sizes: Sequence[int]) -> list[int]:
    if not all(start.known for start in starts):
        raise NotExportable("from a place that the step computes")
    numbers = [int(start.array) for start in starts]
    return [min(max(start, 0), whole - size) for start, whole, size in zip(numbers, shape, sizes)]


@entry("pad")
def _pad(graph: Graph, params: Params, out: Any, x: Value, padding: Value) -> Value:
    config = [tuple(map(int, numbers)) for numbers in params["padding_config"]]
    if any(between for _, _, between in config):
        raise NotExportable("between the elements")
    rank = len(x.shape)
    starts = [max(0, -low) for low, _, _ in config]
    stops = [size - max(0, -high) for size, (_, high, _) in zip(x.shape, config)]
    x = graph.slice(x, starts, stops, [1] * rank)
    added = [max(0, low) for low, _, _ in config] + [max(0, high) for _, high, _ in config]
    if not any(added):
        return x
    if x.known and padding.known:
        width = list(zip(added[:rank], added[rank:]))
        return constant(np.pad(x.array, width, constant_values=padding.array), x.label)
    return graph.apply("Pad", [graph.full(x), graph.integers(added), graph.full(padding)], out.shape, out.dtype)


@entry("rev")
def _rev(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    if x.known:
        return constant(np.flip(x.array, params["dimensions"]), x.label)
    axes = params["dimensions"]
    lowest = np.iinfo(np.int64).min
    bounds = [graph.integers([number] * len(axes)) for number in (-1, lowest)]
    return graph.apply(
        "Slice", [graph.full(x), *bounds, graph.integers(axes), graph.integers([-1] * len(axes))], out.shape, out.dtype
    )


# ------------------------------------------------------------------------------------------------------- reductions


def _reduction(op: str) -> Entry:
    def make(graph: Graph, params: Params, out: Any, x: Value) -> Value:
        axes = [int(axis) for axis in params["axes"]]
        kept = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
        if axes == [len(x.shape) - 1] and x.base == x.shape and x.tensor.shape[-1:] == x.shape[-1:]:
            # however the other axes lie
            lies = (*x.tensor.shape[:-1], 1)
            tensor = graph.node(op, [x.tensor.name, graph.integers([len(lies) - 1])], lies, keepdims=1)
        else:
            tensor = graph.node(op, [graph.full(x), graph.integers(axes)], kept, keepdims=1)
        if op == "ReduceSum":
            graph.summed[tensor.name] = math.prod(x.shape[axis] for axis in axes)
        return graph.reshape(Value(kept, out.dtype, tensor=tensor, base=kept), out.shape)

    return make


TABLE |= {"reduce_sum": _reduction("ReduceSum"), "reduce_max": _reduction("ReduceMax")}


def _arg(op: str) -> Entry:
    def make(graph: Graph, params: Params, out: Any, x: Value) -> Value:
        (axis,) = params["axes"]
        kept = tuple(1 if index == axis else size for index, size in enumerate(x.shape))
        found = graph.apply(op, [graph.full(x)], kept, np.int64, axis=int(axis), keepdims=1)
        return graph.reshape(graph.cast(found, out.dtype), out.shape)

    return make


TABLE |= {"argmax": _arg("ArgMax"), "argmin": _arg("ArgMin")}


@entry("top_k")
def _top_k(graph: Graph, params: Params, out: Any, x: Value) -> list[Value]:
    number, axis = params["k"], params["axis"]
    shape = (*x.shape[:axis], number, *x.shape[axis + 1 :])
    values, places = graph.nodes_of("TopK", [graph.full(x), graph.integers([number])], [shape] * 2, axis=axis)
    columns = Value(shape, np.dtype(np.int64), tensor=places, base=shape)
    return [Value(shape, x.dtype, tensor=values, base=shape), graph.cast(columns, np.int32)]


@entry("sort")
def _sort(graph: Graph, params: Params, out: Any, *values: Value) -> list[Value]:
    """By the first operand, the others along with it; of equal ones the first comes first."""
    axis, shape = params["dimension"], values[0].shape
    if params["num_keys"] != 1:
        raise NotExportable("by more than one key")
    inputs = [graph.full(values[0]), graph.integers([shape[axis]])]
    first, places = graph.nodes_of("TopK", inputs, [shape] * 2, axis=axis, largest=0)
    others = [
        graph.apply("GatherElements", [graph.full(value), places.name], shape, value.dtype, axis=axis)
        for value in values[1:]
    ]
    return [Value(shape, values[0].dtype, tensor=first, base=shape), *others]


@entry("cumsum")
def _cumsum(graph: Graph, params: Params, out: Any, x: Value) -> Value:
    axis = graph.literal(np.array(params["axis"], np.int64))
    return graph.apply("CumSum", [graph.full(x), axis], out.shape, out.dtype, reverse=int(params["reverse"]))


# --------------------------------------------------------------------------------------------------------- products


@entry("dot_general")
def _dot_general(graph: Graph, params: Params, out: Any, left: Value, right: Value) -> Value:
    (contracted, batch) = params["dimension_numbers"]
    sides = []
    for value, summed, batched in zip((left, right), contracted, batch):
        summed, batched = map(list, (summed, batched))
        free = [axis for axis in range(len(value.shape)) if axis not in summed + batched]
        sides.append((value, batched, free, summed))
    # (rows, inner) times (inner, columns), or both turned around, as more of it lies already
    (x, x_batch, x_free, x_summed), (y, y_batch, y_free, y_summed) = sides
    orders = [
        (x_batch + x_free + x_summed, y_batch + y_summed + y_free),
        (x_batch + x_summed + x_free, y_batch + y_free + y_summed),
    ]
    moves = [sum(not graph.is_free(value, order) for value, order in zip((x, y), both)) for both in orders]
    turned = moves[1] < moves[0]
    size = [math.prod(value.shape[axis] for axis in axes) for value, axes in ((x, x_free), (x, x_summed), (y, y_free))]
    rows, inner, columns = size
    outer = tuple(x.shape[axis] for axis in x_batch)
    x, y = (graph.transpose(value, order) for value, order in zip((x, y), orders[turned]))
    x = graph.reshape(x, (*outer, inner, rows) if turned else (*outer, rows, inner))
    y = graph.reshape(y, (*outer, columns, inner) if turned else (*outer, inner, columns))
    if turned:
        x, y, rows, columns = y, x, columns, rows
    if not outer and takes(graph, x, y):
        made = product(graph, x, y)
    else:
        made = graph.apply("MatMul", [graph.full(x), graph.full(y)], (*outer, rows, columns), out.dtype)
    if turned:
        made = graph.transpose(made, [*range(len(outer)), len(outer) + 1, len(outer)])
    return graph.reshape(made, out.shape)


@entry("conv_general_dilated")
def _convolution(graph: Graph, params: Params, out: Any, x: Value, kernel: Value) -> Value:
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    if params["batch_group_count"] != 1 or len(x.shape) != 3:
        raise NotExportable("of more than one axis, or in groups of rows")
    x = graph.transpose(x, numbers.lhs_spec)
    kernel = graph.transpose(kernel, numbers.rhs_spec)  # (out, in, width)
    stride, written, dilation = (int(params[name][0]) for name in ("window_strides", "lhs_dilation", "rhs_dilation"))
    low, high = map(int, params["padding"][0])
    order = [numbers.out_spec.index(axis) for axis in range(3)]
    shape = tuple(out.shape[axis] for axis in numbers.out_spec)
    if written == 1:
        op, attributes = "Conv", {"pads": [low, high], "strides": [stride], "dilations": [dilation]}
    else:
        if stride != 1 or dilation != 1:
            raise NotExportable("with a stride both of input and of output")
        kernel = _turned(graph, kernel, groups)
        reach = kernel.shape[2] - 1
        op, attributes = "ConvTranspose", {"pads": [reach - low, reach - high], "strides": [written]}
    made = graph.apply(
        op,
        [graph.full(x), graph.full(kernel)],
        shape,
        out.dtype,
        group=groups,
        kernel_shape=[kernel.shape[2]],
        **attributes,
    )
    return graph.transpose(made, order)


def _turned(graph: Graph, kernel: Value, groups: int) -> Value:
    """The kernel of a convolution of inputs with zeros between them as that of a transposed convolution: ``(out, in,
    width)`` of each group to ``(in, out, width)``, and from the last to the first."""
    channels, inner, width = kernel.shape
    kernel = graph.reshape(kernel, (groups, channels // groups, inner, width))
    kernel = graph.reshape(graph.transpose(kernel, (0, 2, 1, 3)), (groups * inner, channels // groups, width))
    return _rev(graph, {"dimensions": (2,)}, kernel, kernel)


# ----------------------------------------------------------------------------------------------- by computed places


@entry("gather")
def _gather(graph: Graph, params: Params, out: Any, x: Value, places: Value) -> Value:
    """Of places out of range, which are a caller's mistake, JAX makes NaN or what is nearest, ONNX an error."""
    numbers = params["dimension_numbers"]
    batched = len(numbers.operand_batching_dims)
    (axis,) = numbers.start_index_map if len(numbers.start_index_map) == 1 else (-1,)
    whole = all(params["slice_sizes"][i] == size for i, size in enumerate(x.shape) if i != axis and i >= batched)
    if (
        tuple(numbers.collapsed_slice_dims) != (axis,)
        or tuple(numbers.operand_batching_dims) != tuple(range(batched))
        or tuple(numbers.start_indices_batching_dims) != tuple(range(batched))
        or (batched and axis != batched)
        or not whole
    ):
        raise NotExportable(f"with {numbers}")
    if params["mode"] == GatherScatterMode.CLIP:
        bounds = [_scalar(number, places.dtype) for number in (0, x.shape[axis] - 1)]
        places = graph.elementwise(
            "Min", [graph.elementwise("Max", [places, bounds[0]], places.dtype), bounds[1]], places.dtype
        )
    taken = places.shape[:-1]
    rest = [size for i, size in enumerate(x.shape) if i != axis and i >= batched]
    if batched:
        shape = (*taken, *rest)
        names = [graph.full(x), graph.full(graph.cast(places, np.int64))]
        made = graph.apply("GatherND", names, shape, out.dtype, batch_dims=batched)
        lying = [*range(len(taken)), *[-1] * len(rest)]
    else:
        shape = (*x.shape[:axis], *taken, *x.shape[axis + 1 :])
        names = [graph.full(x), graph.full(graph.reshape(places, taken))]
        made = graph.apply("Gather", names, shape, out.dtype, axis=axis)
        lying = [*[-1] * axis, *range(len(taken)), *[-1] * (len(x.shape) - axis - 1)]
    # where JAX has the axes of what is taken, and between them those of the places
    offsets = iter([i for i, kind in enumerate(lying) if kind < 0])
    others = iter([i for i, kind in enumerate(lying) if kind >= 0])
    order = [next(offsets if i in numbers.offset_dims else others) for i in range(len(shape))]
    return graph.transpose(made, order)


@entry("scatter")
def _scatter(graph: Graph, params: Params, out: Any, x: Value, places: Value, update: Value) -> Value:
    """A window for each row that is as large as it but along one axis, from a place on that is in range (what
    ``jax.vmap`` of ``dynamic_update_slice`` is)."""
    numbers = params["dimension_numbers"]
    rank = len(x.shape)
    axes = [axis for axis in range(1, rank) if update.shape[axis] != x.shape[axis]]
    if (
        tuple(numbers.operand_batching_dims) != (0,)
        or tuple(numbers.update_window_dims) != tuple(range(1, rank))
        or tuple(numbers.scatter_dims_to_operand_dims) != tuple(range(1, rank))
        or len(axes) > 1
        or places.parts is None
    ):
        raise NotExportable(f"with {numbers}")
    if not axes:
        return update
    (axis,) = axes
    outer, steps, inner = math.prod(x.shape[:axis]), update.shape[axis], x.shape[axis + 1 :]
    shape = (*x.shape[:axis], steps)
    start = graph.broadcast(graph.reshape(places.parts[1][axis - 1], x.shape[:1]), shape, [0])
    steps_on = constant(np.broadcast_to(np.arange(steps, dtype=start.dtype), shape))
    slots = graph.elementwise("Add", [start, steps_on], start.dtype)
    slots = graph.reshape(graph.cast(slots, np.int64), (outer, steps, 1))
    rows = constant(np.broadcast_to(np.arange(outer)[:, None, None], (outer, steps, 1)))
    index = graph.concatenate([rows, slots], 2)
    flat = [graph.full(graph.reshape(value, (outer, value.shape[axis], *inner))) for value in (x, update)]
    made = graph.apply("ScatterND", [flat[0], graph.full(index), flat[1]], (outer, x.shape[axis], *inner), out.dtype)
    return graph.reshape(made, out.shape)
