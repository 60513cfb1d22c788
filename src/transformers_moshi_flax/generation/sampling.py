"""From logits to a token: greedy, or drawn after temperature, top-k and top-p.

A draw depends on its row's key, the step and the stream alone, so a row's result does not change with its neighbours
in the batch. Temperature and top-p are operands of the compiled program; top-k is a shape and therefore static.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from ..precision import at_least_float32


@flax.struct.dataclass
class Sampling:
    """How to choose a token.

    Attributes:
        temperature: divides the logits, a scalar.
        top_p: keeps the most probable tokens whose probabilities before them add up to less, a scalar or None.
        do_sample: False takes the largest logit.
        top_k: keeps that many largest logits, None keeps all.
    """

    temperature: jax.Array | None = None
    top_p: jax.Array | None = None
    do_sample: bool = flax.struct.field(pytree_node=False, default=False)
    top_k: int | None = flax.struct.field(pytree_node=False, default=None)


def row_keys(prng_key: jax.Array, batch_size: int) -> Key[Array, "batch"]:
    """One key per row: those that are given, or one key folded with the row's number.

    Args:
        prng_key: a key (of ``jax.random.key`` or ``jax.random.PRNGKey``), or one for every row.
        batch_size: number of rows.

    Raises:
        ValueError: if there is neither one key nor one per row.
    """
    key = jnp.asarray(prng_key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim == 0:
            raise ValueError(
                f"`prng_key` must be a key of `jax.random.key(seed)`, but is an array of {key.dtype} with the shape "
                f"{key.shape}."
            )
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))
    if key.shape != (batch_size,):
        raise ValueError(f"`prng_key` must be one key or one per row ({batch_size}), but has the shape {key.shape}.")
    return key


def select_token(
    logits: Float[Array, "batch vocab"], keys: Key[Array, "batch"], stream: int | Int[Array, ""], sampling: Sampling
) -> Int[Array, "batch"]:
    """The next token of every row.

    Args:
        logits: unnormalised log-probabilities.
        keys: a key per row, already folded with the step.
        stream: which of the step's draws this is (0: text, 1 + k: codebook k).
        sampling: the options.
    """
    if not sampling.do_sample:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(at_least_float32(logits.dtype))
    logits = logits / sampling.temperature.astype(logits.dtype)
    ids = None
    vocab_size = logits.shape[-1]
    if sampling.top_k is not None or sampling.top_p is not None:
        logits, ids = lax.top_k(logits, min(sampling.top_k or vocab_size, vocab_size))
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        keep = (before < sampling.top_p.astype(logits.dtype)).at[:, 0].set(True)
        logits = jnp.where(keep, logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, stream)
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    if ids is not None:
        drawn = jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
    return drawn.astype(jnp.int32)
