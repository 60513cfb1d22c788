"""Compiled programs of generation: with the compiler options of the platform, or as a part of a caller's program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from ..input_checks import is_tracing
from ..ops.compiler_options import cpu_options


class Program:
    """``jax.jit`` of a function of arrays with the compiler options that suit generation.

    JAX takes such options for whole programs only: called inside of another ``jax.jit``, the function becomes a part
    of that program, with that one's options.

    Args:
        function: of arrays.
        donated: positions of arguments whose memory the results may take; they are gone after the call.
        unoptimized: to be compiled in less time on CPUs, for what takes longer to compile than to run.
    """

    def __init__(self, function: Callable[..., Any], donated: tuple[int, ...] = (), unoptimized: bool = False):
        self._inlined = jax.jit(function)
        self._function = function
        self._donated = donated
        self._unoptimized = unoptimized

    @functools.cached_property
    def _whole(self) -> Any:
        options = compiler_options()
        if self._unoptimized:
            options = options | cpu_options("xla_backend_optimization_level", "0")
        return jax.jit(self._function, compiler_options=options, donate_argnums=self._donated)

    def __call__(self, *args: Any) -> Any:
        return self.call(is_tracing(args), *args)

    def call(self, traced: bool, *args: Any) -> Any:
        """The same for callers who know whether they are inside of ``jax.jit``, and are in a hurry."""
        return (self._inlined if traced else self._whole)(*args)

    def lower(self, *args: Any) -> Any:
        """As the method of ``jax.jit``."""
        return self._whole.lower(*args)


def compiler_options() -> dict[str, str]:
    """Options for the programs of generation on the default platform.

    On CPUs the library YNNPACK is left out: its reductions cost 25 µs each however small they are (two for every
    attention), and its products of a few rows are slower than Eigen's; see ``docs/notes/performance.md``.
    """
    return cpu_options("xla_cpu_experimental_ynn_fusion_type", "")
