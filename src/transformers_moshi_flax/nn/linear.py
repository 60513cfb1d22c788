"""The linear layer, of which every model's are made."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jax.typing import DTypeLike

from ..ops.linear import dot_general


def dense(
    features: int, kernel_init: Any, dtype: DTypeLike, use_bias: bool = False, name: str | None = None
) -> nn.Dense:
    """``x @ kernel (+ bias)``, ``(..., inputs)`` to ``(..., features)``, computed in ``dtype``."""
    return nn.Dense(features, use_bias, dtype, kernel_init=kernel_init, dot_general=dot_general, name=name)
