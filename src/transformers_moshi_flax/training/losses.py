"""Weighted cross-entropies of text and codes as sums, which add up over micro-batches and devices.

The weights are those of Kyutai's ``moshi-finetune``. They depend on labels alone, so that what the losses of a whole
batch are divided by is known before any part of it is run.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from ..nn.embedding import IGNORE_INDEX
from ..ops.precision import at_least_float32
from ..ops.selection import argmax


def text_weights(
    labels: Int[Array, "*shape"], padding_weight: float, padding_ids: Sequence[int]
) -> Float[Array, "*shape"]:
    """``padding_weight`` for the labels in ``padding_ids``, 0 for those to ignore, 1 for all others."""
    weights = jnp.where(is_one_of(labels, padding_ids), padding_weight, 1.0)
    return jnp.where(labels == IGNORE_INDEX, 0.0, weights)


def audio_weights(
    labels: Int[Array, "*shape codebooks"], first_codebook_weight: float
) -> Float[Array, "*shape codebooks"]:
    """``first_codebook_weight`` for the labels of codebook 0, 0 for those to ignore, 1 for all others."""
    weights = jnp.ones(labels.shape[-1:]).at[0].set(first_codebook_weight)
    return jnp.where(labels == IGNORE_INDEX, 0.0, weights)


def is_one_of(labels: Int[Array, "*shape"], ids: Sequence[int]) -> Bool[Array, "*shape"]:
    """Where a label is one of a few ids."""
    return jnp.isin(labels, jnp.asarray(tuple(ids), dtype=labels.dtype))


def token_losses(
    logits: Float[Array, "*shape vocab"], labels: Int[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Bool[Array, "*shape"]]:
    """Cross-entropy of every label in at least float32, and whether it has the largest logit.

    Where the label is ``IGNORE_INDEX``, the former means nothing and the latter is False.
    """
    logits = logits.astype(at_least_float32(logits.dtype))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return losses, argmax(jax.lax.stop_gradient(logits)) == labels


def weighted_sum(losses: Float[Array, "*shape"], weights: Float[Array, "*shape"]) -> Float[Array, ""]:
    """The sum of the products; what has no weight adds nothing, even if it is not finite."""
    return jnp.sum(jnp.where(weights > 0, losses * weights.astype(losses.dtype), 0))


def divided(total: Float[Array, "*shape"], weight: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The mean that a sum and its sum of weights make; 0 where there is no weight."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)
