"""Which implementation of an operation a program gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def for_cpu(definition: Callable[..., Any], twin: Callable[..., Any], *arrays: Any) -> Any:
    """``twin(*arrays)`` in programs for CPUs, ``definition(*arrays)`` in all others.

    It is decided when a program is lowered, not when it is traced, so that what is exported for another platform is
    right. Nothing of the other one is left in the program.
    """
    return lax.platform_dependent(*arrays, cpu=twin, default=definition)


def steps_in_several_programs() -> bool:
    """Whether a step of a dialogue is better called as several programs than as one.

    On CPUs it is: calling a program takes time by the number of its arrays, and while the first, which has few, runs,
    the others can be called. An accelerator wants all of a step in one program.
    """
    return jax.default_backend() == "cpu"
