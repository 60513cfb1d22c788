"""Every primitive that has a counterpart in ONNX computes there what it does in JAX."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from transformers_moshi_flax.export.graph import Graph, constant
from transformers_moshi_flax.export.primitives import NotExportable
from transformers_moshi_flax.export.saving import save_graph
from transformers_moshi_flax.export.walking import Walk
from transformers_moshi_flax.ops.attention import write_steps
from transformers_moshi_flax.ops.convolution import conv1d, conv_transpose1d
from transformers_moshi_flax.ops.rotary import wrapped_angles

RANDOM = np.random.default_rng(0)


def drawn(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    if np.dtype(dtype).kind == "f":
        return RANDOM.standard_normal(shape).astype(dtype)
    return RANDOM.integers(0, 5, shape).astype(dtype)


def in_onnx(function: Callable[..., Any], arrays: list[np.ndarray], known: set[int], folder: Path) -> list[np.ndarray]:
    """What onnxruntime makes of the function; arguments whose places are in ``known`` are constants of the graph."""
    graph = Graph("graph")
    program = jax.make_jaxpr(function)(*arrays)
    values = [
        constant(array) if place in known else graph.input(f"in.{place}", array.shape, array.dtype)
        for place, array in enumerate(arrays)
    ]
    for place, value in enumerate(Walk(graph, 1).program(program, values)):
        graph.output(f"out.{place}", value)
    graph.finish()
    save_graph(graph, folder, "0")
    session = onnxruntime.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"])
    feeds = {f"in.{place}": array for place, array in enumerate(arrays) if place not in known}
    return session.run(None, {name: feed.astype(graph.inputs[name][1]) for name, feed in feeds.items()})


def check(function: Callable[..., Any], arrays: list[np.ndarray], folder: Path, known: set[int] = frozenset()) -> None:
    expected = jax.tree.leaves(jax.jit(function)(*arrays))
    actual = in_onnx(function, arrays, set(known), folder)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        other = np.asarray(other)
        assert one.shape == other.shape
        if other.dtype.kind == "f":
            scale = np.abs(other[np.isfinite(other)]).max(initial=1)
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * scale)
        else:
            np.testing.assert_array_equal(one, other.astype(one.dtype))


UNARY = (jnp.abs, jnp.cos, lax.erf, lax.erfc, jnp.exp, jnp.expm1, jax.nn.sigmoid, jnp.negative, jnp.sin, jnp.square)
BINARY = (jnp.add, jnp.divide, jnp.equal, jnp.greater, jnp.less_equal, jnp.maximum, jnp.minimum, jnp.not_equal)


@settings(max_examples=3, deadline=None)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_elementwise(tmp_path_factory: pytest.TempPathFactory, shape: list[int]) -> None:
    def function(x: Any, y: Any, positive: Any) -> Any:
        made = [f(x) for f in UNARY] + [f(x, y) for f in BINARY] + [f(x, x[:1]) for f in BINARY]
        norm = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        made += [jax.nn.elu(x), jax.nn.elu(x, 0.5), jax.nn.gelu(x, approximate=False), jax.nn.softmax(x), norm]
        return [*made, lax.rsqrt(positive), jnp.log(positive), jnp.sqrt(positive), positive**3, jnp.isfinite(y / y)]

    x, y = drawn(*shape), drawn(*shape)
    check(function, [x, y, np.abs(x) + np.float32(0.1)], tmp_path_factory.mktemp("graph"))


def test_whole_numbers(tmp_path: Path) -> None:
    def function(x: Any, y: Any, mask: Any) -> Any:
        wide = x.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(7)
        turned = lax.bitcast_convert_type(wide, jnp.int32)
        return x % y, lax.rem(-x, y), x * y - x, jnp.where(mask & (x > 1), x, y), ~mask | (x == y), turned, wide

    check(function, [drawn(3, 4, dtype=np.int32), 1 + drawn(3, 4, dtype=np.int32), drawn(3, 4, dtype=bool)], tmp_path)


@settings(max_examples=3, deadline=None)
@given(a=st.integers(1, 4), b=st.integers(2, 4), c=st.integers(1, 3))
def test_rearranged(tmp_path_factory: pytest.TempPathFactory, a: int, b: int, c: int) -> None:
    def function(x: Any, y: Any) -> Any:
        turned = x.transpose(2, 0, 1)
        first, second = jnp.split(jnp.concatenate([x, x], axis=1), 2, axis=1)
        return [
            turned + turned[:1],
            turned.transpose(1, 2, 0) * x,
            x.reshape(a * b, c)[None] + y[None],
            jnp.flip(x, 1) + jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :b],
            jnp.stack([x, x + 1], axis=2)[:, 1:, :, ::2],
            first - second,
            jnp.broadcast_to(y[:, :, None], (*y.shape, b)).sum(axis=1),
            x.max(axis=(0, 2)) + jnp.arange(b, dtype=jnp.float32),
            lax.dynamic_update_slice(x, x[:, :1] * 2, (0, 1, 0)),
            jnp.cumsum(x, axis=1),
        ]

    check(function, [drawn(a, b, c), drawn(1, c)], tmp_path_factory.mktemp("graph"))


@settings(max_examples=3, deadline=None)
@given(a=st.integers(1, 3), b=st.integers(1, 3), c=st.integers(1, 4))
def test_products(tmp_path_factory: pytest.TempPathFactory, a: int, b: int, c: int) -> None:
    def function(x: Any, y: Any, matrix: Any) -> Any:
        scores = jnp.einsum("bqghd,bsgd->bghqs", x, y)
        return scores, jnp.einsum("bghqs,bsgd->bqghd", scores, y), x @ matrix, jnp.einsum("bsgd,dn->nbsg", y, matrix)

    arrays = [drawn(a, b, 2, c, 5), drawn(a, 3, 2, 5), drawn(5, 4)]
    check(function, arrays, tmp_path_factory.mktemp("graph"), known={2})


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 2), (1, 3, 1)])
def test_convolutions(tmp_path: Path, stride: int, dilation: int, groups: int) -> None:
    def function(x: Any, kernel: Any, back: Any) -> Any:
        return conv1d(x, kernel, stride, dilation, groups), conv_transpose1d(x, back, stride, groups)

    arrays = [drawn(2, 13, 4), drawn(4, 4 // groups, 6), drawn(2 * stride, 6 // groups, 4)]
    check(function, arrays, tmp_path, known={1, 2})


def test_places(tmp_path: Path) -> None:
    def function(x: Any, table: Any, ids: Any, rows: Any, cache: Any, steps: Any) -> Any:
        best, places = lax.top_k(x, 3)
        negated, order = lax.sort((-x, lax.broadcasted_iota(jnp.int32, x.shape, 1)), num_keys=1)
        taken = [table[ids], jnp.take(table, ids, axis=0), jnp.take_along_axis(x, rows[:, None], axis=1)]
        blocks = jnp.take_along_axis(x.reshape(2, 2, 3), rows[:, None, None] % 2, axis=1)
        chosen = [lax.argmax(x, 1, jnp.int32), lax.argmin(x, 1, jnp.int32), best, places, negated, order]
        return [*taken, blocks, *chosen, write_steps(cache, steps, rows)]

    x = drawn(2, 6)
    x[0, 2] = x[0, 4]  # the first of equal ones
    ids, rows = drawn(2, 3, dtype=np.int32), np.array([1, 3], np.int32)
    check(function, [x, drawn(5, 4), ids, rows, drawn(4, 6, 3), drawn(4, 2, 3)], tmp_path)


def test_angles_of_an_endless_stream(tmp_path: Path) -> None:
    positions = np.array([[3, 2**31, 2**32 - 1]], np.uint32)
    check(lambda p: wrapped_angles(p, np.array([1.0, 0.01], np.float32)), [positions], tmp_path)


def test_what_is_known_makes_no_nodes(tmp_path: Path) -> None:
    graph = Graph("graph")
    program = jax.make_jaxpr(lambda x, w: x + jnp.exp(w.T).reshape(-1)[::2].sum() * 2)(drawn(3), drawn(2, 4))
    (value,) = Walk(graph, 1).program(program, [graph.input("x", (3,), np.float32), constant(drawn(2, 4))])
    graph.output("y", value)
    graph.finish()
    assert [node.op_type for node in graph.nodes] == ["Add"]


def test_what_has_no_counterpart_is_named(tmp_path: Path) -> None:
    def function(x: Any) -> Any:
        with jax.named_scope("some_layer"):
            return jax.lax.lgamma(x)

    with pytest.raises(NotExportable, match=r"'lgamma' of float32\[3\].*test_primitives\.py:\d+ in some_layer"):
        in_onnx(function, [drawn(3)], set(), tmp_path)
