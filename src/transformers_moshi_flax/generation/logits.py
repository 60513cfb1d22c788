"""Pure functions from scores to scores: what the logits processors and warpers compute.

Scores are ``(rows, vocab)`` floats, higher is likelier, ``-inf`` is impossible. A history is ``(rows, capacity)`` ids
of which ``cur_len`` columns are in use; what lies behind them does not matter. Ids outside ``[0, vocab)``, such as the
start token, are ignored in a history. Semantics are those of ``transformers`` 5.23, ``generation/logits_process.py``.

Every filter looks at a row's scores alone and gives filtered tokens no probability, so a filter that follows another
may as well be applied to the tokens that are left, in any order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Scores = Float[Array, "rows vocab"]
History = Int[Array, "rows capacity"]
Length = int | Int[Array, ""]
Scalar = float | Float[Array, ""] | Float[Array, "rows 1"]

NEGATIVE_INFINITY = float("-inf")


def token_mask(ids: Int[Array, "ids"], vocab_size: int) -> Bool[Array, "vocab"]:
    """Which tokens are among ``ids``; ids past the vocabulary are left out."""
    return jnp.zeros((vocab_size,), dtype=bool).at[ids].set(True, mode="drop")


def suppress(scores: Scores, ids: Int[Array, "ids"]) -> Scores:
    """Makes the tokens ``ids`` impossible."""
    return jnp.where(token_mask(ids, scores.shape[-1]), NEGATIVE_INFINITY, scores)


def force(scores: Scores, ids: Int[Array, "ids"]) -> Scores:
    """Scores 0 for the tokens ``ids``, everything else is impossible."""
    forced = jnp.where(token_mask(ids, scores.shape[-1]), 0.0, NEGATIVE_INFINITY)
    return jnp.broadcast_to(forced.astype(scores.dtype), scores.shape)


# ------------------------------------------------------------------------------------------- with the history


def in_use(input_ids: History, cur_len: Length) -> Bool[Array, "capacity"]:
    """Which columns of the history are in use."""
    return jnp.arange(input_ids.shape[-1], dtype=jnp.int32) < cur_len


def mark_tokens(
    ids: Int[Array, "rows ids"], marked: Bool[Array, "rows ids"], vocab_size: int
) -> Bool[Array, "rows v"]:
    """Which tokens of the vocabulary occur among those of a row's ``ids`` that are ``marked``."""
    ids = jnp.where(marked & (ids >= 0), ids, vocab_size)
    rows = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((ids.shape[0], vocab_size), dtype=bool).at[rows, ids].set(True, mode="drop")


def penalize_repetition(
    scores: Scores, input_ids: History, cur_len: Length, penalty: Scalar, ignored: Int[Array, "..."] | None = None
) -> Scores:
    """Divides the positive scores of tokens that occurred by ``penalty`` and multiplies the negative ones.

    Args:
        scores, input_ids, cur_len: see the module.
        penalty: above 1 discourages, below 1 encourages repetition.
        ignored: leading columns of the history that do not count, a scalar or one number per row; or per every
            ``rows / len(ignored)`` rows, such as the beams of one prompt.
    """
    counted = jnp.broadcast_to(in_use(input_ids, cur_len), input_ids.shape)
    if ignored is not None:
        rows = input_ids.shape[0]
        if ignored.ndim and ignored.shape[0] != rows:
            ignored = jnp.repeat(ignored, rows // ignored.shape[0], total_repeat_length=rows)
        first = jnp.broadcast_to(ignored, (rows,))
        counted &= jnp.arange(input_ids.shape[-1], dtype=jnp.int32)[None] >= first[:, None]
    occurred = mark_tokens(input_ids, counted, scores.shape[-1])
    penalty = jnp.asarray(penalty, dtype=scores.dtype)
    return jnp.where(occurred, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def forbid_repeated_ngrams(scores: Scores, input_ids: History, cur_len: Length, size: int) -> Scores:
    """Makes tokens impossible that would complete an n-gram of ``size`` tokens which a row's history already has."""
    rows, capacity = input_ids.shape
    if capacity < size:
        return scores
    windows = capacity - size + 1
    # the last tokens, which the next one would complete; clamped where there are fewer, when no window is complete
    prefix = lax.dynamic_slice_in_dim(input_ids, cur_len - (size - 1), size - 1, axis=1)
    repeated = jnp.broadcast_to(jnp.arange(windows, dtype=jnp.int32) + size - 1 < cur_len, (rows, windows))
    for offset in range(size - 1):
        repeated &= input_ids[:, offset : offset + windows] == prefix[:, offset : offset + 1]
    forbidden = mark_tokens(input_ids[:, size - 1 :], repeated, scores.shape[-1])
    return jnp.where(forbidden, NEGATIVE_INFINITY, scores)


def bias_sequences(
    scores: Scores,
    input_ids: History,
    cur_len: Length,
    sequences: Int[Array, "sequences length"],
    bias: Float[Array, "sequences"],
) -> Scores:
    """Adds a bias to the tokens that would complete one of ``sequences``, which all have the same length."""
    preceding = sequences.shape[-1] - 1
    if preceding > input_ids.shape[-1]:
        return scores
    suffix = lax.dynamic_slice_in_dim(input_ids, cur_len - preceding, preceding, axis=1)
    begun = jnp.all(suffix[:, None] == sequences[None, :, :-1], axis=-1) & (cur_len >= preceding)
    added = jnp.where(begun, bias.astype(scores.dtype), 0)
    return scores + jnp.zeros_like(scores).at[:, sequences[:, -1]].add(added, mode="drop")


def encourage_tokens(scores: Scores, ids: Int[Array, "ids"], factor: Scalar, steps: Length) -> Scores:
    """Adds ``abs(score) * (factor ** steps - 1)`` to the finite scores of the tokens ``ids`` if ``steps`` > 0."""
    growth = jnp.power(jnp.asarray(factor, dtype=scores.dtype), jnp.asarray(steps).astype(scores.dtype)) - 1
    added = jnp.where(jnp.isfinite(scores), jnp.abs(scores) * growth, 0)
    return jnp.where(token_mask(ids, scores.shape[-1]) & (steps > 0), scores + added, scores)


# ------------------------------------------------------------------------------------------------- filters


def keep_largest(removed: Bool[Array, "rows vocab"], scores: Scores, number: int) -> Bool[Array, "rows vocab"]:
    """``removed`` without the ``number`` largest scores of each row."""
    if number == 1:
        smallest_kept = jnp.max(scores, axis=-1, keepdims=True)
    else:
        smallest_kept = lax.top_k(scores, min(number, scores.shape[-1]))[0][:, -1:]
    return removed & (scores < smallest_kept)


def filter_top_k(scores: Scores, top_k: Length, bound: int, filter_value: Scalar = NEGATIVE_INFINITY) -> Scores:
    """Keeps the ``top_k`` largest scores, and what equals the smallest of them.

    Args:
        scores: see the module.
        top_k: at least 1; may be traced.
        bound: the largest possible ``top_k``; what is static.
        filter_value: of what is not kept.
    """
    largest, _ = lax.top_k(scores, min(bound, scores.shape[-1]))
    return jnp.where(scores < kth_largest(largest, top_k), filter_value, scores)


def kth_largest(descending: Float[Array, "rows bound"], k: Length | Int[Array, "rows 1"]) -> Float[Array, "rows 1"]:
    """The k-th of each row; the last one if there are fewer."""
    column = jnp.minimum(k, descending.shape[-1]) - 1
    if column.ndim:
        return jnp.take_along_axis(descending, column, axis=1)
    return lax.dynamic_slice_in_dim(descending, column, 1, axis=1)


def keep_top_p(
    probabilities: Scores, top_p: Scalar, min_tokens_to_keep: int = 1, missing: Float[Array, "..."] | float = 0.0
) -> Bool[Array, "rows vocab"]:
    """Which are the fewest tokens that have the probability ``top_p`` together.

    Args:
        probabilities: from the largest.
        top_p: in [0, 1].
        min_tokens_to_keep: so many are kept in any case.
        missing: the probability of smaller ones that are not among them, a scalar or ``(rows, 1)``.
    """
    # summed from the smallest as upstream does, so that the same tokens fall at the edge
    cumulative = jnp.flip(jnp.cumsum(jnp.flip(probabilities, axis=-1), axis=-1), axis=-1) + missing
    kept = cumulative > 1 - jnp.asarray(top_p, dtype=probabilities.dtype)
    return kept | (jnp.arange(probabilities.shape[-1], dtype=jnp.int32)[None] < min_tokens_to_keep)


def filter_top_p(
    scores: Scores, top_p: Scalar, min_tokens_to_keep: int = 1, filter_value: Scalar = NEGATIVE_INFINITY
) -> Scores:
    """Keeps the fewest largest scores that have the probability ``top_p`` together."""
    descending, ids = sort_descending(scores)
    kept = keep_top_p(jax.nn.softmax(descending, axis=-1), top_p, min_tokens_to_keep)
    return jnp.where(jnp.put_along_axis(kept, ids, kept, axis=-1, inplace=False), scores, filter_value)


def sort_descending(scores: Scores) -> tuple[Scores, Int[Array, "rows vocab"]]:
    """The scores from the largest, and their tokens."""
    ids = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    negated, ids = lax.sort((-scores, ids), num_keys=1)
    return -negated, ids


def filter_min_p(
    scores: Scores, min_p: Scalar, min_tokens_to_keep: int = 1, filter_value: Scalar = NEGATIVE_INFINITY
) -> Scores:
    """Keeps the tokens that have at least ``min_p`` times the probability of the likeliest."""
    probabilities = jax.nn.softmax(scores, axis=-1)
    least = jnp.asarray(min_p, dtype=scores.dtype) * jnp.max(probabilities, axis=-1, keepdims=True)
    removed = keep_largest(probabilities < least, scores, min_tokens_to_keep)
    return jnp.where(removed, filter_value, scores)


def entropy(log_probabilities: Scores) -> Float[Array, "rows 1"]:
    """In nats; impossible tokens count nothing."""
    terms = jnp.where(log_probabilities == -jnp.inf, 0, log_probabilities * jnp.exp(log_probabilities))
    return -jnp.sum(terms, axis=-1, keepdims=True)


def filter_typical(
    scores: Scores, mass: Scalar, min_tokens_to_keep: int = 1, filter_value: Scalar = NEGATIVE_INFINITY
) -> Scores:
    """Keeps the tokens whose surprise is nearest to the entropy until they have the probability ``mass`` together.

    Locally typical sampling, https://arxiv.org/abs/2202.00666.
    """
    log_probabilities = jax.nn.log_softmax(scores, axis=-1)
    distance = jnp.abs(-log_probabilities - entropy(log_probabilities))
    nearest, probabilities = lax.sort((distance, jnp.exp(log_probabilities)), num_keys=1)
    below = jnp.cumsum(probabilities, axis=-1) < jnp.asarray(mass, dtype=scores.dtype)
    last = jnp.sum(below, axis=-1, keepdims=True, dtype=jnp.int32)
    last = jnp.clip(last, min(min_tokens_to_keep, scores.shape[-1]) - 1, scores.shape[-1] - 1)
    return jnp.where(distance > jnp.take_along_axis(nearest, last, axis=-1), filter_value, scores)


def filter_epsilon(
    scores: Scores, epsilon: Scalar, min_tokens_to_keep: int = 1, filter_value: Scalar = NEGATIVE_INFINITY
) -> Scores:
    """Keeps the tokens that have at least the probability ``epsilon``; https://arxiv.org/abs/2210.15191."""
    unlikely = jax.nn.softmax(scores, axis=-1) < jnp.asarray(epsilon, dtype=scores.dtype)
    return jnp.where(keep_largest(unlikely, scores, min_tokens_to_keep), filter_value, scores)


def filter_eta(
    scores: Scores, epsilon: Scalar, min_tokens_to_keep: int = 1, filter_value: Scalar = NEGATIVE_INFINITY
) -> Scores:
    """Keeps the tokens that have at least the probability ``min(epsilon, sqrt(epsilon) * exp(-entropy))``.

    Eta sampling, https://arxiv.org/abs/2210.15191.
    """
    log_probabilities = jax.nn.log_softmax(scores, axis=-1)
    epsilon = jnp.asarray(epsilon, dtype=scores.dtype)
    eta = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-entropy(log_probabilities)))
    removed = keep_largest(jnp.exp(log_probabilities) < eta, scores, min_tokens_to_keep)
    return jnp.where(removed, filter_value, scores)
