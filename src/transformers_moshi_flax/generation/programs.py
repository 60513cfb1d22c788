"""Compiled programs of generation: with the compiler options of the platform, or as a part of a caller's program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..input_checks import is_traced


class Program:
    """``jax.jit`` of a function of arrays with the compiler options that suit generation.

    JAX takes such options for whole programs only: called inside of another ``jax.jit``, the function becomes a part
    of that program, with that one's options.
    """

    def __init__(self, function: Callable[..., Any]):
        self._inlined = jax.jit(function)
        self._function = function

    @functools.cached_property
    def _whole(self) -> Callable[..., Any]:
        return jax.jit(self._function, compiler_options=compiler_options())

    def __call__(self, *args: Any) -> Any:
        # inside of jit every new array is a tracer, whatever the arguments are
        nested = is_traced(*jax.tree.leaves(args), jnp.zeros(()))
        return (self._inlined if nested else self._whole)(*args)

    def lower(self, *args: Any) -> Any:
        """As the method of ``jax.jit``."""
        return self._whole.lower(*args)


@functools.cache
def compiler_options() -> dict[str, str]:
    """Options for the programs of generation on the default platform.

    On CPUs the library YNNPACK is left out: its reductions cost 25 µs each however small they are (two for every
    attention), and its products of a few rows are slower than Eigen's; see ``docs/benchmarks.md``.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # another jaxlib may not have the option
        return {}
    return options
