"""Tables of embeddings."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ..partitioning import gathered_table, split_rows
from .initializers import normal

IGNORE_INDEX = -100
"""The id of what is left out: labels, and places without a token."""


def embedding_table(
    num_embeddings: int, features: int, initializer_range: float, dtype: DTypeLike, name: str | None = None
) -> nn.Embed:
    """Of ``num_embeddings`` rows, looked up by :func:`embed`."""
    return nn.Embed(num_embeddings, features, dtype=dtype, embedding_init=normal(initializer_range), name=name)


def embed(table: nn.Embed, ids: Int[Array, "*shape"]) -> Float[Array, "*shape features"]:
    """Looks ids up; ``IGNORE_INDEX`` gives a zero embedding, as the original's token id -1."""
    gathered, known = gathered_table(table.embedding), jnp.maximum(ids, 0)
    if gathered is None:
        embedded = table(known)
    else:
        embedded = split_rows(jnp.take(gathered.astype(table.dtype), known, axis=0))
    return jnp.where((ids == IGNORE_INDEX)[..., None], jnp.zeros((), embedded.dtype), embedded)
