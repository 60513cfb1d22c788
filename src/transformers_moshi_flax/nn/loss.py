"""Losses that models compute themselves."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from ..ops.precision import at_least_float32


def cross_entropy(
    logits: Float[Array, "*shape vocab"], labels: Int[Array, "*shape"], ignored: Bool[Array, "*shape"]
) -> Float[Array, ""]:
    """Mean cross-entropy in at least float32 over the labels that are not ignored (NaN if all are, as in PyTorch)."""
    logits = logits.astype(at_least_float32(logits.dtype))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(ignored, 0, labels))
    kept = ~ignored
    return jnp.sum(jnp.where(kept, losses, 0)) / jnp.sum(kept).astype(losses.dtype)
