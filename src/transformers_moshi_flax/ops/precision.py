"""In which precision things are computed."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    """float32 for what is narrower, else ``dtype``: where upstream insists on float32, double stays double.

    Spelled out, because ``jnp.promote_types`` refuses bfloat16 under strict promotion.
    """
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)
