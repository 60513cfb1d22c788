"""From logits to a token: processors, then greedy, or drawn after temperature, top-k, top-p and the other filters.

A draw depends on its row's key, the step and the stream alone, so a row's result does not change with its neighbours
in the batch. All numbers are operands of the compiled program; which filters there are, and the bound of top-k, is
part of it.

After top-k or top-p few tokens are left. Only these candidates are filtered further and drawn from: sorting a
vocabulary of 32,000 takes hundreds of times as long as finding the largest 64 of it. Where the candidates do not hold
all that is kept, because the probability is spread widely, the vocabulary is sorted after all. The one exception are
draws with top-k where more than ``top_k_bound`` tokens would be left because they equal the k-th: the last ones of
these never come. Sorting for them too would double what sampling takes to compile, and a frame of Moshi has nine
draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from ..ops.precision import at_least_float32
from ..ops.selection import argmax, top_k
from . import logits as filters
from .arrays import on_device
from .logits import NEGATIVE_INFINITY, History, Length, Scores
from .logits_process import FlaxLogitsProcessorList

THREEFRY = "threefry2x32"
# of top-p without top-k
TOP_P_CANDIDATES = 1024
# drawn from in two steps, a block of columns and then one of them
MANY_COLUMNS = 256
BLOCK_SIZE = 16

Candidates = Float[Array, "rows candidates"]
CandidateIds = Int[Array, "rows candidates"]


class Sampling(flax.struct.PyTreeNode):
    """What turns logits into a token. Numbers are scalars, or one per row as ``(rows, 1)``, operands of the program;
    None leaves the step out.

    Attributes:
        processors: what comes before sampling, and for greedy search too.
        temperature: divides the scores.
        top_k: int32, keeps that many largest scores, at most ``top_k_bound``.
        top_p: keeps the fewest tokens that have this probability together.
        min_p: keeps tokens of at least this times the largest probability.
        typical_p: keeps the tokens nearest to the entropy that have this probability together.
        epsilon_cutoff: keeps tokens of at least this probability.
        eta_cutoff: as ``epsilon_cutoff``, lower where the entropy is large.
        do_sample: False takes the largest score.
        top_k_bound: the largest ``top_k`` of the program, a power of two of at least 64.
        min_tokens_to_keep: of every filter; beam search needs more than one.
        renormalize: scores become log-probabilities in the end.
    """

    # Any: JAX also fills trees with placeholders
    processors: Any = flax.struct.field(default_factory=FlaxLogitsProcessorList)
    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    typical_p: Any = None
    epsilon_cutoff: Any = None
    eta_cutoff: Any = None
    do_sample: bool = flax.struct.field(pytree_node=False, default=False)
    top_k_bound: int = flax.struct.field(pytree_node=False, default=64)
    min_tokens_to_keep: int = flax.struct.field(pytree_node=False, default=1)
    renormalize: bool = flax.struct.field(pytree_node=False, default=False)


def default_key() -> Key[Array, ""]:
    """``jax.random.key(0)``."""
    return jax.random.key(on_device(0, np.int32))


def row_keys(prng_key: jax.Array, batch_size: int) -> Key[Array, "batch"]:
    """One threefry key per row: those that are given, or one key folded with the row's number.

    Args:
        prng_key: a key (of ``jax.random.key`` or ``jax.random.PRNGKey``), or one for every row.
        batch_size: number of rows.

    Raises:
        ValueError: if there is neither one key nor one per row.
    """
    try:
        key = jnp.asarray(prng_key)
        if key.dtype == jnp.uint32 and key.ndim > 0:
            key = jax.random.wrap_key_data(key)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`prng_key` must be a key of `jax.random.key(seed)`, but is {prng_key!r}.") from error
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"`prng_key` must be a key of `jax.random.key(seed)`, but is an array of {key.dtype} with the shape "
            f"{key.shape}."
        )
    key = as_threefry(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))
    if key.shape != (batch_size,):
        raise ValueError(f"`prng_key` must be one key or one per row ({batch_size}), but has the shape {key.shape}.")
    return key


def as_threefry(keys: Key[Array, "*shape"]) -> Key[Array, "*shape"]:
    """Keys of the generator whose numbers do not depend on the other keys that numbers are drawn for.

    Those of ``rbg``, which people choose for TPUs, do under ``jax.vmap``.
    """
    if jax.random.key_impl(keys) == THREEFRY:
        return keys
    words = jax.random.key_data(keys)
    fold = jax.random.fold_in if keys.ndim == 0 else jax.vmap(jax.random.fold_in)
    keys = jax.random.wrap_key_data(words[..., :2], impl=THREEFRY)
    for word in range(2, words.shape[-1]):
        keys = fold(keys, words[..., word])
    return keys


def process_logits(logits: Scores, input_ids: History, cur_len: Length, sampling: Sampling) -> Scores:
    """The scores of the next token, as the list of upstream's ``_get_logits_processor`` gives them.

    Args:
        logits: unnormalised log-probabilities, ``(rows, vocab)``.
        input_ids: the history, ``(rows, capacity)``; what lies behind ``cur_len`` does not matter.
        cur_len: columns of the history in use.
        sampling: the options.

    Returns:
        Scores of at least float32, ``-inf`` for tokens that cannot come.
    """
    scores = before_filters(logits, input_ids, cur_len, sampling)
    if sampling.do_sample:

        def scatter(candidates: Candidates, ids: CandidateIds) -> Scores:
            nothing = jnp.full(scores.shape, NEGATIVE_INFINITY, dtype=scores.dtype)
            rows = jnp.arange(scores.shape[0], dtype=jnp.int32)[:, None]
            return nothing.at[rows, ids].set(candidates, mode="drop")

        scores = after_filters(scores, sampling, scatter, lambda filtered: filtered, all_ties=True)
    return jax.nn.log_softmax(scores, axis=-1) if sampling.renormalize else scores


def select_token(
    logits: Scores,
    input_ids: History,
    cur_len: Length,
    keys: Key[Array, "rows"],
    stream: int | Int[Array, ""],
    sampling: Sampling,
) -> Int[Array, "rows"]:
    """The next token of every row: the likeliest one, or drawn with the probabilities of :func:`process_logits`.

    Args:
        logits, input_ids, cur_len, sampling: as in :func:`process_logits`.
        keys: a key per row, already folded with the step.
        stream: which of the step's draws this is (0: text, 1 + k: codebook k).
    """
    if not sampling.do_sample:
        return argmax(process_logits(logits, input_ids, cur_len, sampling))
    scores = before_filters(logits, input_ids, cur_len, sampling)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, stream)

    def draw_candidate(candidates: Candidates, ids: CandidateIds) -> Int[Array, "rows"]:
        return jnp.take_along_axis(ids, draw(keys, candidates)[:, None], axis=-1)[:, 0]

    return after_filters(scores, sampling, draw_candidate, lambda filtered: draw(keys, filtered), all_ties=False)


def draw(keys: Key[Array, "rows"], scores: Scores) -> Int[Array, "rows"]:
    """A column of each row, drawn with the probabilities ``softmax(scores)``.

    Random bits are the costly part. So in long rows a block of columns is drawn first, and then
    a column of the block.
    """
    if scores.shape[-1] <= MANY_COLUMNS:
        return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)
    blocks = in_blocks(scores)
    first, second = jax.vmap(jax.random.split, out_axes=1)(keys)
    block = draw(first, jax.nn.logsumexp(blocks, axis=-1))
    inside = draw(second, jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0])
    return block * BLOCK_SIZE + inside


def in_blocks(scores: Scores) -> Float[Array, "rows blocks block"]:
    """The columns in blocks of ``BLOCK_SIZE``, the last one filled up with ``-inf``."""
    padding = ((0, 0), (0, -scores.shape[-1] % BLOCK_SIZE))
    return jnp.pad(scores, padding, constant_values=NEGATIVE_INFINITY).reshape(scores.shape[0], -1, BLOCK_SIZE)


def before_filters(logits: Scores, input_ids: History, cur_len: Length, sampling: Sampling) -> Scores:
    """Processors and temperature."""
    scores = sampling.processors(input_ids, logits.astype(at_least_float32(logits.dtype)), cur_len)
    if sampling.do_sample and sampling.temperature is not None:
        scores = scores / sampling.temperature.astype(scores.dtype)
    return scores


def after_filters(
    scores: Scores,
    sampling: Sampling,
    of_candidates: Callable[[Candidates, CandidateIds], Array],
    of_vocabulary: Callable[[Scores], Array],
    all_ties: bool,
) -> Array:
    """What one of two functions makes of the scores after all filters.

    Args:
        scores: before the filters, ``(rows, vocab)``.
        sampling: the filters.
        of_candidates: called with the scores of those tokens, from the largest, that hold all that is kept, and with
            their ids; both ``(rows, candidates)``. Gives an array with one entry per row.
        of_vocabulary: called with all scores, where there is neither top-k nor top-p.
        all_ties: whether the candidates hold all tokens that equal the k-th, be they more than the bound.
    """
    if sampling.top_k is None and sampling.top_p is None:
        return of_vocabulary(filter_further(scores, sampling))
    vocab_size = scores.shape[-1]

    def sort_all() -> Array:
        descending, ids = filters.sort_descending(scores)
        return of_candidates(filter_candidates(scores, descending, sampling)[0], ids)

    bound = min(TOP_P_CANDIDATES if sampling.top_k is None else sampling.top_k_bound, vocab_size)
    if bound == vocab_size:
        return sort_all()
    largest, ids = top_k(scores, bound)
    candidates, complete = filter_candidates(scores, largest, sampling)
    result = of_candidates(candidates, ids)
    if sampling.top_k is not None and not all_ties:
        return result

    def sort_where_needed() -> Array:
        # rows that are complete keep what they have: neighbours in the batch must not change it
        return jnp.where(jnp.expand_dims(complete, tuple(range(1, result.ndim))), result, sort_all())

    return lax.cond(jnp.all(complete), lambda: result, sort_where_needed)


def filter_candidates(
    scores: Scores, largest: Candidates, sampling: Sampling
) -> tuple[Candidates, Bool[Array, "rows"]]:
    """All filters, on the largest scores of each row; and whether these hold all that is kept.

    Args:
        scores: of the whole vocabulary.
        largest: the largest of them, descending.
        sampling: the filters; at least one of top-k and top-p.
    """
    complete = jnp.ones(scores.shape[:1], dtype=bool)
    everything = largest.shape == scores.shape
    if sampling.top_k is not None:
        smallest_kept = filters.kth_largest(largest, sampling.top_k)
        if not everything:
            kept = jnp.sum((scores >= smallest_kept) & (scores > NEGATIVE_INFINITY), axis=-1, dtype=jnp.int32)
            complete = kept <= largest.shape[-1]
        largest = jnp.where(largest < smallest_kept, NEGATIVE_INFINITY, largest)
    if sampling.top_p is not None:
        probabilities, missing = jax.nn.softmax(largest, axis=-1), jnp.zeros((), dtype=scores.dtype)
        if sampling.top_k is None and not everything:
            probabilities = jnp.exp(largest - jax.nn.logsumexp(scores, axis=-1, keepdims=True))
            missing = 1 - jnp.sum(probabilities, axis=-1, keepdims=True)
            complete = (missing <= 1 - sampling.top_p.astype(scores.dtype))[:, 0]
        kept = filters.keep_top_p(probabilities, sampling.top_p, sampling.min_tokens_to_keep, missing)
        largest = jnp.where(kept, largest, NEGATIVE_INFINITY)
    return filter_further(largest, sampling), complete


def filter_further(scores: Scores, sampling: Sampling) -> Scores:
    """The filters after top-k and top-p, on the whole vocabulary or on what is left of it."""
    keep = sampling.min_tokens_to_keep
    if sampling.min_p is not None:
        scores = filters.filter_min_p(scores, sampling.min_p, keep)
    if sampling.typical_p is not None:
        scores = filters.filter_typical(scores, sampling.typical_p, keep)
    if sampling.epsilon_cutoff is not None:
        scores = filters.filter_epsilon(scores, sampling.epsilon_cutoff, keep)
    if sampling.eta_cutoff is not None:
        scores = filters.filter_eta(scores, sampling.eta_cutoff, keep)
    return scores
