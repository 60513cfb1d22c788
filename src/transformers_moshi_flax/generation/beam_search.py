"""Beam search and beam sampling for any decoder: the loop of ``decoding.py`` with several hypotheses per row.

The semantics are those of upstream's ``GenerationMixin._beam_search``. Each row of the batch keeps ``num_beams``
running hypotheses and the ``num_beams`` best ended ones. A step scores all continuations of the running ones and keeps
the best ``max(2, 1 + number of end tokens) * num_beams`` of them, which leaves enough to run on with if some end. What
ends among the best ``num_beams`` is compared with the ended ones by ``score / length ** length_penalty``.

The score is that of the text. What a decoder generates beside it (codes) is made for every hypothesis from its own
text and follows it from then on.

A row's result does not depend on its neighbours: it stands still from where it is finished, and draws from its key.

Three programs share the work, after :func:`~.decoding.start` has run the prompt: :func:`start_beams`,
:func:`advance_beams`, :func:`finish_beams`.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from ..modeling_flax_outputs import FlaxCausalLMOutputWithPast
from ..ops.precision import at_least_float32
from .decoding import (
    UNFORCED,
    Chosen,
    Decoder,
    Request,
    State,
    fold_step,
    is_in,
    last_logits,
    repeat_rows,
    take_rows,
    take_steps,
    write_step,
)
from .recording import Recording, record_frames, record_step
from .sampling import process_logits

NO_SCORE = -1e9
"""The score of what is no hypothesis (yet): below all real ones, and still finite, so that sums stay ordered."""


class Hypotheses(flax.struct.PyTreeNode):
    """Ended hypotheses, best first; all arrays are ``(batch, num_beams, ...)``.

    Attributes:
        sequences: prompt, tokens and padding, ``(..., capacity)`` int32.
        streams: what the decoder generated beside the text, or None.
        beam_indices: as of :class:`BeamState`.
        lengths: up to and with the end.
        scores: sums of log-probabilities over ``generated tokens ** length_penalty``.
        exist: False for places that are still free; nothing else counts there.
    """

    sequences: Any
    streams: Any
    beam_indices: Any
    lengths: Any
    scores: Any
    exist: Any


class BeamState(flax.struct.PyTreeNode):
    """Where beam search is. "Beams" are rows ``row * num_beams + beam``.

    Attributes:
        running: the hypotheses that go on, one a beam.
        scores: their sums of log-probabilities, ``(batch, num_beams)``, falling.
        beam_indices: for each generated token the beam that it continued, at the token's step; -1 elsewhere,
            ``(beams, capacity)`` int32.
        ended: the best hypotheses that have ended.
        finished: rows whose ended hypotheses are final, ``(batch,)``.
    """

    running: State
    scores: Any
    beam_indices: Any
    ended: Hypotheses
    finished: Any

    @property
    def position(self) -> Any:
        return self.running.position


class Continuations(flax.struct.PyTreeNode):
    """What a step chose; all arrays but the last are ``(batch, num_beams)``.

    Attributes:
        parents, tokens, scores: of the hypotheses that go on: which beam of the row they continue, with which token,
            and the sum of log-probabilities.
        top_parents, top_tokens, top_scores: of the best continuations, whether they have ended or not.
        ended: which of those have ended and count.
        exhausted: rows of which all that was kept has ended or is impossible, ``(batch,)``.
    """

    parents: Any
    tokens: Any
    scores: Any
    top_parents: Any
    top_tokens: Any
    top_scores: Any
    ended: Any
    exhausted: Any


@functools.partial(jax.jit, static_argnames="num_beams")
def start_beams(request: Request, state: State, *, num_beams: int) -> tuple[Request, BeamState]:
    """The program between prompt and loop: gives every row its beams.

    Args:
        request: what is to be generated.
        state: as :func:`~.decoding.start` left it; the prompt is run once a row.
        num_beams: hypotheses per row.

    Returns:
        The request for the beams (its ``keys``, ``limits`` and ``forced_ids`` stay those of the rows), and the state.
    """
    batch_size, capacity = request.input_ids.shape
    running = repeat_rows(state, batch_size, num_beams)
    no_index = jnp.full((batch_size * num_beams, capacity), -1, dtype=jnp.int32)
    # float32, as upstream; the sums decide, and bfloat16 has too few digits for them
    no_score = jnp.full((batch_size, num_beams), NO_SCORE, dtype=jnp.float32)
    histories = (running.sequences, running.streams, no_index, running.lengths)
    beams = BeamState(
        running=running,
        # the beams are still equal: only the first may be continued, or all would go the same way
        scores=no_score.at[:, 0].set(0),
        beam_indices=no_index,
        ended=hypotheses(histories, no_score, jnp.zeros_like(no_score, dtype=bool)),
        finished=jnp.zeros((batch_size,), dtype=bool),
    )
    mask, streams = repeat_rows((request.attention_mask, request.streams), batch_size, num_beams)
    return request.replace(input_ids=running.sequences, attention_mask=mask, streams=streams), beams


def advance_beams(
    decoder: Decoder,
    params: Any,
    request: Request,
    length_penalty: Float[Array, ""],
    state: BeamState,
    until: Int[Array, ""],
    *,
    early_stopping: bool | str,
    recording: Recording,
) -> BeamState:
    """The program of the loop: searches until ``until`` steps are in use or all rows are finished.

    Args:
        decoder, params, recording: as of :func:`~.decoding.advance`.
        request: of :func:`start_beams`. A forced token is the only continuation there, with its log-probability.
        length_penalty: above 0 it favours long hypotheses; 0 ignores the length.
        state: the state so far.
        until: at most the capacity.
        early_stopping: when a row with ``num_beams`` ended hypotheses is finished. True: at once; False: when no
            running one scores better than the worst of them as it is now; "never": when none could by its limit.

    Returns:
        The state. Records have a row a beam, as the beams were at that step.
    """

    def unfinished(state: BeamState) -> Bool[Array, ""]:
        return (state.position < until) & ~jnp.all(state.finished)

    def step(state: BeamState) -> BeamState:
        running, position = state.running, state.position
        number = position - request.prompt_length
        keys = fold_step(request.keys, number)

        def choose(outputs: FlaxCausalLMOutputWithPast) -> Chosen:
            processed, scores = beam_scores(state, last_logits(outputs), request)
            continuations = choose_continuations(state, scores, fold_step(keys, 0), request)
            return both_sets(continuations, keys, (continuations, processed))

        outputs, chosen, both = decoder.step(params, request, running, choose, recording.has_attentions)
        continuations, scores = chosen.search
        logits = last_logits(outputs)
        records = record_frames(recording, running.records, outputs, position - 1)
        records = record_step(recording, records, "logits", logits, number)
        records = record_step(recording, records, "scores", scores, number)

        streams, top_streams = jax.tree.map(lambda array: array[0], both), jax.tree.map(lambda array: array[1], both)
        top_scores = penalized(continuations.top_scores, number + 1, length_penalty)
        state = keep_top(state, continuations, top_streams, top_scores)
        sequences, beam_indices = continued(state, continuations.parents, continuations.tokens)
        state = state.replace(
            running=running.replace(
                position=position + 1,
                cache=outputs.cache.reorder(continuations.parents, request.prompt_length, position),
                sequences=sequences,
                lengths=running.lengths + 1,
                streams=streams,
                records=records,
            ),
            scores=continuations.scores,
            beam_indices=beam_indices,
        )
        done = is_done(state, request, length_penalty, early_stopping)
        return state.replace(finished=state.finished | done | continuations.exhausted)

    return lax.while_loop(unfinished, step, state)


@functools.partial(jax.jit, static_argnames="num_return_sequences")
def finish_beams(
    request: Request, length_penalty: Float[Array, ""], state: BeamState, *, num_return_sequences: int
) -> tuple[State, Float[Array, "returned"], Int[Array, "returned capacity"]]:
    """The program after the loop: the best hypotheses of each row. Where the search was cut short, the running ones
    count as ended.

    Args:
        request, length_penalty, state: as of :func:`advance_beams`.
        num_return_sequences: hypotheses per row, at most ``num_beams``.

    Returns:
        A state of ``batch * num_return_sequences`` rows (without the cache, and with the records of the beams), their
        scores, falling within each row, and for each generated token, from the first on, the beam that it continued,
        -1 behind the end.
    """
    running = state.running
    scores = penalized(state.scores, state.position - request.prompt_length, length_penalty)
    histories = (running.sequences, running.streams, state.beam_indices, running.lengths)
    going_on = jnp.broadcast_to(~state.finished[:, None], scores.shape)
    ended = best_of(state.ended, hypotheses(histories, scores, going_on))

    best = jax.tree.map(lambda array: flat(array[:, :num_return_sequences]), ended)
    returned = running.replace(
        cache=None,
        sequences=best.sequences,
        lengths=best.lengths,
        finished=jnp.ones_like(best.exist),
        streams=best.streams,
    )
    return returned, best.scores, jnp.roll(best.beam_indices, -request.prompt_length, axis=1)


# ------------------------------------------------------------------------------------------------- parts of a step


def choose_continuations(
    state: BeamState,
    scores: Float[Array, "batch beams vocab"],
    keys: Key[Array, "batch"],
    request: Request,
) -> Continuations:
    """Scores all continuations of the running hypotheses and chooses those that go on and those that end.

    Args:
        state: the state so far; the tokens chosen stand at ``state.position``.
        scores: processed log-probabilities of the next tokens.
        keys: a key per row, of this step; for sampling only.
        request: its sampling, end tokens and limits.
    """
    batch_size, num_beams, vocab_size = scores.shape
    totals = scores.astype(state.scores.dtype) + state.scores[..., None]
    totals = totals.reshape(batch_size, num_beams * vocab_size)
    # places of `eos_token_ids` may be empty: then fewer count than there is room for
    room = min(max(2, 1 + request.eos_token_ids.shape[0]), vocab_size) * num_beams
    kept = jnp.maximum(2, 1 + jnp.sum(request.eos_token_ids >= 0)) * num_beams
    if request.sampling.do_sample:
        # the largest sums with Gumbel noise are a draw without replacement (Kool et al., 2019)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, totals.shape[1:], totals.dtype))(keys)
        _, chosen = lax.top_k(totals + noise, room)
        sums = jnp.take_along_axis(totals, chosen, axis=1)
    else:
        sums, chosen = lax.top_k(totals, room)
    sums = jnp.where(jnp.arange(room) < kept, sums, -jnp.inf)
    parents, tokens = chosen // vocab_size, chosen % vocab_size

    ends = is_in(tokens.reshape(-1), request.eos_token_ids).reshape(tokens.shape)
    ends |= (state.position + 1 >= request.limits)[:, None]
    running_scores, best = lax.top_k(sums + jnp.where(ends, NO_SCORE, 0.0).astype(sums.dtype), num_beams)
    return Continuations(
        parents=jnp.take_along_axis(parents, best, axis=1),
        tokens=jnp.take_along_axis(tokens, best, axis=1),
        scores=running_scores,
        top_parents=parents[:, :num_beams],
        top_tokens=tokens[:, :num_beams],
        top_scores=sums[:, :num_beams],
        ended=ends[:, :num_beams] & ~state.finished[:, None],
        exhausted=jnp.all(ends | (sums == -jnp.inf), axis=1),
    )


def beam_scores(
    state: BeamState, logits: Float[Array, "rows vocab"], request: Request
) -> tuple[Float[Array, "rows vocab"], Float[Array, "batch beams vocab"]]:
    """Processed log-probabilities of the next tokens, by rows; and by beams, with only what is forced left."""
    log_probs = jax.nn.log_softmax(logits.astype(at_least_float32(logits.dtype)), axis=-1)
    processed = process_logits(log_probs, state.running.sequences, state.position, request.sampling)
    scores, log_probs = (by_beam(array, state.scores.shape[1]) for array in (processed, log_probs))
    if request.forced_ids is not None:
        forced = take_steps(request.forced_ids, state.position, 1)[..., None]
        only = jnp.where(jnp.arange(scores.shape[-1], dtype=jnp.int32) == forced, log_probs, -jnp.inf)
        scores = jnp.where(forced == UNFORCED, scores, only)
    return processed, scores


def both_sets(chosen: Continuations, keys: Key[Array, "batch"], search: Any) -> Chosen:
    """Two sets of tokens: of the hypotheses that go on, and of the best continuations, of which those that have ended
    count, if there are any.

    Args:
        chosen: the continuations.
        keys: a key per row, of this step; each beam of each set gets its own.
        search: what is kept of the choice.
    """
    batch_size, num_beams = chosen.parents.shape
    numbers = jnp.arange(2 * num_beams, dtype=jnp.int32)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(fold_step(keys, 1), numbers)
    return Chosen(
        tokens=jnp.stack([flat(chosen.tokens), flat(chosen.top_tokens)]),
        keys=keys.reshape(batch_size, 2, num_beams).swapaxes(0, 1).reshape(2, -1),
        parents=jnp.stack([flat_parents(chosen.parents), flat_parents(chosen.top_parents)]),
        sets=1 + jnp.any(chosen.ended).astype(jnp.int32),
        search=search,
    )


def keep_top(
    state: BeamState, chosen: Continuations, top_streams: Any, scores: Float[Array, "batch beams"]
) -> BeamState:
    """Keeps what has ended among the best continuations, if it is better than what has ended before.

    Args:
        state: the state so far.
        chosen: the continuations.
        top_streams: of the best continuations.
        scores: of the best continuations, with the length penalty.
    """

    def keep(ended: Hypotheses) -> Hypotheses:
        sequences, beam_indices = continued(state, chosen.top_parents, chosen.top_tokens)
        histories = (sequences, top_streams, beam_indices, state.running.lengths + 1)
        return best_of(ended, hypotheses(histories, scores, chosen.ended))

    # most steps end nothing: then nothing need be copied
    return state.replace(ended=lax.cond(jnp.any(chosen.ended), keep, lambda ended: ended, state.ended))


def hypotheses(
    histories: tuple[Array, Any, Array, Array], scores: Float[Array, "batch beams"], exist: Bool[Array, "batch beams"]
) -> Hypotheses:
    """Hypotheses with these sequences, streams, beam indices and lengths, which have a row a beam."""
    sequences, streams, beam_indices, lengths = by_beam(histories, scores.shape[1])
    return Hypotheses(sequences, streams, beam_indices, lengths, scores, exist)


def best_of(ended: Hypotheses, others: Hypotheses) -> Hypotheses:
    """The best of both; at equal scores the older."""
    others = others.replace(scores=jnp.where(others.exist, others.scores, NO_SCORE).astype(ended.scores.dtype))
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), ended, others)
    _, best = lax.top_k(both.scores, ended.scores.shape[1])
    return jax.tree.map(lambda array: jax.vmap(lambda row, index: row[index])(array, best), both)


def is_done(
    state: BeamState, request: Request, length_penalty: Float[Array, ""], early_stopping: bool | str
) -> Bool[Array, "batch"]:
    """Rows that have all ended hypotheses they need, as ``early_stopping`` says."""
    full = jnp.all(state.ended.exist, axis=1)
    if early_stopping is True:
        return full
    generated = jnp.broadcast_to(state.position, full.shape) - request.prompt_length
    if early_stopping == "never":
        # with a positive penalty the best is yet to come
        generated = jnp.where(length_penalty > 0, request.limits - request.prompt_length, generated)
    best_possible = penalized(state.scores[:, :1], generated[:, None], length_penalty)[:, 0]
    return full & (best_possible <= state.ended.scores[:, -1])


def penalized(
    scores: Float[Array, "batch beams"], generated: Int[Array, "..."], length_penalty: Float[Array, ""]
) -> Float[Array, "batch beams"]:
    """Sums of log-probabilities of so many tokens, divided by ``generated ** length_penalty``."""
    return scores / generated.astype(scores.dtype) ** length_penalty.astype(scores.dtype)


def continued(
    state: BeamState, parents: Int[Array, "batch beams"], tokens: Int[Array, "batch beams"]
) -> tuple[Int[Array, "rows capacity"], Int[Array, "rows capacity"]]:
    """Sequences and beam indices of the parents, with the tokens."""
    rows = flat_parents(parents)
    sequences, beam_indices = take_rows((state.running.sequences, state.beam_indices), rows)
    return write_step(sequences, flat(tokens), state.position), write_step(beam_indices, rows, state.position)


def flat_parents(parents: Int[Array, "batch beams"]) -> Int[Array, "rows"]:
    """Beams of a row as rows ``row * num_beams + beam``."""
    batch_size, num_beams = parents.shape
    return flat(parents + num_beams * jnp.arange(batch_size, dtype=parents.dtype)[:, None])


def flat(array: Array) -> Array:
    """``(batch, beams, ...)`` as ``(batch * beams, ...)``."""
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


def by_beam(tree: Any, num_beams: int) -> Any:
    """``(batch * beams, ...)`` as ``(batch, beams, ...)``."""
    return jax.tree.map(lambda array: array.reshape(array.shape[0] // num_beams, num_beams, *array.shape[1:]), tree)
