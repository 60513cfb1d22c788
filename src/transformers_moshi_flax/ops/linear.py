"""Products with matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax

from . import cpu
from .dispatch import for_cpu


def dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **kwargs: Any,
) -> jax.Array:
    """``lax.dot_general``, for linear layers; also for ``flax.linen.Dense(dot_general=...)``."""
    definition: Callable[..., jax.Array] = partial(
        lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **kwargs,
    )
    if dimension_numbers != (((lhs.ndim - 1,), (0,)), ((), ())):
        return definition(lhs, rhs)
    twin = cpu.few_rows_dot(lhs, rhs, definition, preferred_element_type)
    return definition(lhs, rhs) if twin is None else for_cpu(definition, twin, lhs, rhs)
