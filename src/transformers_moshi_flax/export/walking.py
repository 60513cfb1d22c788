"""The walk over a jaxpr: programs within it are taken apart, what is known is computed, the rest becomes nodes.

Of operations with a form for CPUs of their own (``ops/dispatch.py``) the definition is taken. Keys are not computed
with: what is drawn from them becomes an input of the graph, and :class:`Draw` says which numbers it wants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from .graph import Graph, Value, constant
from .primitives import ELU, TABLE, NotExportable, fold

SUBPROGRAMS = {
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
"""Primitives that are a program, and the name of it among their parameters."""


STEP = "step"
"""Stands for the number of the step, which is not known."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """Uniform numbers in [0, 1) that a graph wants as an input.

    Attributes:
        name: of the input.
        stream: what is folded into a row's key, after the step.
        part: of a key that is split in two after that, which of them; None if it is not.
        count: numbers for each row.
    """

    name: str
    stream: int
    part: int | None
    count: int


@dataclasses.dataclass(frozen=True)
class Key:
    """How a key comes about: a row's, what is folded into it, and which of two it is split into."""

    row: int
    folds: tuple[Any, ...] = ()
    part: int | None = None


@dataclasses.dataclass(frozen=True)
class Bits:
    """Random bits, and what has been made of them so far on the way to a uniform number."""

    draw: str
    row: int
    column: int
    stage: int = 0


class Walk:
    """A walk that adds to a graph.

    Args:
        graph: what is added to.
        rows: of the batch.

    Attributes:
        draws: the random numbers that the graph wants.
    """

    def __init__(self, graph: Graph, rows: int):
        self.graph = graph
        self.rows = rows
        self.draws: list[Draw] = []

    def program(self, program: ClosedJaxpr, values: Sequence[Value]) -> list[Value]:
        """What a program makes of values.

        Raises:
            NotExportable: it has something that has no counterpart; the primitive, the line of the source and the part
                of the model are named.
        """
        return self._run(program.jaxpr, [constant(np.asarray(const)) for const in program.consts], values)

    def _run(self, jaxpr: Jaxpr, consts: Sequence[Value], values: Sequence[Value]) -> list[Value]:
        known: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))

        def read(atom: Any) -> Value:
            if isinstance(atom, Literal):
                aval: Any = atom.aval
                return constant(np.asarray(atom.val, aval.dtype))
            return known[atom]

        for equation in needed(jaxpr):
            made = self._equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, made, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, values: list[Value]) -> list[Value]:
        name = equation.primitive.name
        params = {key: whole_numbers(value) for key, value in equation.params.items()}
        if name in SUBPROGRAMS:
            inner = params[SUBPROGRAMS[name]]
            if is_elu(equation, values):
                return self._node(equation, ELU, params, values)
            if isinstance(inner, ClosedJaxpr):
                return self.program(inner, values)
            return self._run(inner, [], values)
        if name == "platform_index":
            return [constant(np.array(params["platforms"].index(None), np.int32))]
        if name == "cond" and values[0].known:
            return self.program(params["branches"][int(values[0].array)], values[1:])
        try:
            return self._node(equation, name, params, values)
        except NotExportable as error:
            raise NotExportable(f"{name!r} {error}, which has no counterpart in ONNX ({place(equation)})") from error

    def _node(self, equation: Any, name: str, params: dict[str, Any], values: list[Value]) -> list[Value]:
        shapes = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in equation.outvars]
        if any(value.dtype == object for value in values):
            made: Any = self._random(name, params, values, shapes[0])
        elif all(value.known for value in values) and (folded := self._folded(equation, values, shapes)) is not None:
            made = folded
        elif name in TABLE:
            self.graph.scope = scope_of(equation)
            made = TABLE[name](self.graph, params, shapes[0] if len(shapes) == 1 else shapes, *values)
        else:
            raise NotExportable(f"of {', '.join(f'{value.dtype}{list(value.shape)}' for value in values)}")
        made = made if isinstance(made, list) else [made]
        for value, shape in zip(made, shapes, strict=True):
            assert value.shape == shape.shape, (name, value.shape, shape.shape)
        return made

    def _folded(self, equation: Any, values: list[Value], shapes: list[Any]) -> Any:
        """What an equation makes of known values; None for what rearranges them, whose entries do that."""
        name = equation.primitive.name
        made = fold(name, equation.params, values, shapes[0].shape, shapes[0].dtype)
        if made is not None or name in REARRANGING:
            return made
        results = equation.primitive.bind(*(value.array for value in values), **equation.params)
        results = results if equation.primitive.multiple_results else [results]
        return [constant(np.asarray(result)) for result in results]

    # --------------------------------------------------------------------------------------------- random numbers

    def _random(self, name: str, params: dict[str, Any], values: list[Value], out: Any) -> Any:
        array = values[0].array
        if name == "random_fold_in":
            data = values[1].array
            pairs = np.broadcast(array, data)
            folded = [dataclasses.replace(key, folds=(*key.folds, plain(number))) for key, number in pairs]
            return constant(objects(folded, pairs.shape))
        if name == "random_split" and params["shape"] == (2,) and all(key.part is None for key in array.flat):
            halves = [dataclasses.replace(key, part=part) for key in array.flat for part in range(2)]
            return constant(objects(halves, out.shape))
        if name == "random_bits" and params["bit_width"] == 32:
            return self._bits(array.reshape(-1), out.shape)
        # on the way from bits to a number in [1, 2), whose fraction they are
        step = {"shift_right_logical": (0, 9), "or": (1, 0x3F800000), "bitcast_convert_type": (2, None)}.get(name)
        if step is not None and isinstance(array.flat[0], Bits) and array.flat[0].stage == step[0]:
            operand = None if len(values) == 1 else int(values[1].core.flat[0])
            if operand == step[1] and name != "bitcast_convert_type":
                onward = [dataclasses.replace(bits, stage=step[0] + 1) for bits in array.flat]
                return constant(objects(onward, array.shape))
            if operand == step[1] and out.dtype == np.float32:
                return self._uniform(array)
        if name in REARRANGING:
            return TABLE[name](self.graph, params, out, *values)
        raise NotExportable("of random keys or bits")

    def _bits(self, keys: np.ndarray, shape: tuple[int, ...]) -> Value:
        first = keys[0]
        if [key.row for key in keys] != list(range(self.rows)):
            raise NotExportable("of other keys than one for every row")
        if any((key.folds, key.part) != (first.folds, first.part) for key in keys):
            raise NotExportable("of keys that differ in more than their rows")
        if len(first.folds) != 2 or first.folds[0] != STEP:
            raise NotExportable("of keys that are not folded with the step and the draw")
        draw = Draw(f"uniforms.{len(self.draws)}", first.folds[1], first.part, int(np.prod(shape[1:])))
        self.draws.append(draw)
        bits = [Bits(draw.name, row, column) for row in range(self.rows) for column in range(draw.count)]
        return constant(objects(bits, shape))

    def _uniform(self, bits: np.ndarray) -> Value:
        """The input, and 1 added to it, which the program is about to take away again: both are exact."""
        draw = next(draw for draw in self.draws if draw.name == bits.flat[0].draw)
        drawn = self.graph.input(draw.name, (self.rows, draw.count), np.float32)
        one = constant(np.array(1, np.float32))
        return self.graph.reshape(self.graph.elementwise("Add", [drawn, one], np.float32), bits.shape)


REARRANGING = frozenset(
    (
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "dynamic_slice",
        "dynamic_update_slice",
        "expand_dims",
        "iota",
        "pad",
        "reshape",
        "rev",
        "slice",
        "split",
        "squeeze",
        "stack",
        "stop_gradient",
        "transpose",
    )
)
"""Entries of the table that also take what is known."""


def needed(jaxpr: Jaxpr) -> Iterator[Any]:
    """The equations that the outputs depend on, in order."""
    wanted = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if wanted.intersection(equation.outvars):
            kept.append(equation)
            wanted.update(atom for atom in equation.invars if not isinstance(atom, Literal))
    return reversed(kept)


def is_elu(equation: Any, values: Sequence[Value]) -> bool:
    """Whether a program is ``jax.nn.elu`` of an array that is not known, which is an operator of ONNX."""
    if equation.params.get("name") != ELU or len(values) != 1 or values[0].known:
        return False
    inner = equation.params["jaxpr"].jaxpr.eqns
    factors = [atom.val for atom in inner[4].invars if isinstance(atom, Literal)] if len(inner) == 6 else []
    return factors == [1] and [each.primitive.name for each in inner] == ["gt", "gt", "jit", "expm1", "mul", "jit"]


def objects(items: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """An array of things that are no numbers."""
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


def whole_numbers(value: Any) -> Any:
    """Sizes and axes as Python has them; JAX has NumPy's here and there."""
    if type(value) is tuple:
        return tuple(map(whole_numbers, value))
    return int(value) if isinstance(value, np.integer) else value


def plain(number: Any) -> int | str:
    return number if isinstance(number, str) else int(number)


def scope_of(equation: Any) -> str:
    """The part of the model that an equation is of."""
    return str(equation.source_info.name_stack)


def place(equation: Any) -> str:
    """The line of this package that an equation comes from, and its part of the model."""
    frames = []
    traceback = equation.source_info.traceback
    trace = traceback.as_python_traceback() if traceback is not None else None
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    ours = [f"{file}:{line}" for file, line in frames if "/jax/" not in file and "/flax/" not in file]
    where = [ours[-1]] if ours else []
    return " in ".join([*where, scope_of(equation) or "no module"])
