"""The loop of generation for any decoder: prefill in chunks, then one token after another until every row has ended.

Two programs share the work: :func:`start` runs the prompt and returns a :class:`State`, :func:`advance` takes it on up
to a step. All lengths, limits and token ids are operands, so requests of one capacity share both programs, and the
caller may come back between calls of :func:`advance` (a streamer, a time limit). What the models differ in is a
:class:`Decoder`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..modeling_flax_outputs import FlaxCausalLMOutputWithPast
from ..nn.cache import LinearCache
from .recording import Recording, empty_records, record_frames, record_step
from .sampling import Sampling, process_logits, select_token

UNFORCED = -1
"""Marks the places of forced tokens that the model is to choose, as upstream's delay pattern mask does."""


class Request(flax.struct.PyTreeNode):
    """What is to be generated; nothing in it is static.

    Attributes:
        input_ids: the prompt and room behind it, ``(batch, capacity)`` int32; what stands in the room is returned in
            steps that no row reaches.
        attention_mask: ``(batch, capacity)`` bool, true behind the prompt.
        prompt_length: steps of the prompt, a scalar.
        limits: steps at which each row ends at the latest, ``(batch,)``.
        keys: a key per row.
        sampling: how tokens are chosen.
        eos_token_ids: the tokens that end a row, ``(any number,)``.
        pad_token_id: what follows the end of a row, a scalar.
        forced_ids: tokens that are not chosen, ``(batch, capacity)``, ``UNFORCED`` where they are; or None.
        streams: further inputs of the decoder, a pytree of arrays ``(batch, ...)``.
        depth_sampling: how the codes of a frame are chosen, for decoders that have any.
    """

    # Any: under jax.eval_shape the leaves are shapes
    input_ids: Any
    attention_mask: Any
    prompt_length: Any
    limits: Any
    keys: Any
    sampling: Sampling
    eos_token_ids: Any
    pad_token_id: Any
    forced_ids: Any = None
    streams: Any = None
    depth_sampling: Any = None


class State(flax.struct.PyTreeNode):
    """Where generation is. ``lengths`` and ``finished`` are those of the rows, ``position`` the steps in use.

    Attributes:
        position: scalar int32.
        cache: keys and values of the steps before the last.
        sequences: ``(batch, capacity)`` int32.
        lengths: ``(batch,)`` int32, up to and with the end.
        finished: ``(batch,)`` bool.
        streams: what the decoder generates beside the text, a pytree of arrays ``(batch, ...)``.
        records: what was asked to be recorded, by name; arrays ``(batch, ...)``.
    """

    position: Any
    cache: Any
    sequences: Any
    lengths: Any
    finished: Any
    streams: Any
    records: dict[str, Any]


class Chosen(flax.struct.PyTreeNode):
    """The tokens of the next step.

    Attributes:
        tokens: one for each row, ``(batch,)``; or several sets of them, ``(sets, batch)``, which continue ``parents``.
        keys: a key for each token, for what the decoder chooses beside it.
        parents: the row that each token continues, ``(sets, batch)``; None where every row continues itself.
        sets: how many of the sets are needed; the others mean nothing.
        search: what a search keeps of its choice.
    """

    tokens: Any
    keys: Any
    parents: Any = None
    sets: Any = None
    search: Any = None


@runtime_checkable
class Decoder(Protocol):
    """What a model supplies; hashable, as programs are kept by it."""

    def init_cache(self, batch_size: int, max_length: int) -> LinearCache:
        """An empty cache."""

    def init_streams(self, request: Request) -> Any:
        """The initial ``State.streams``."""

    def prefill(
        self,
        params: Any,
        request: Request,
        state: State,
        start: Int[Array, ""],
        length: int,
        output_attentions: bool = False,
    ) -> FlaxCausalLMOutputWithPast:
        """Runs ``length`` steps from ``start`` on with ``state.cache``; logits of the last one only."""

    def step(
        self,
        params: Any,
        request: Request,
        state: State,
        choose: Callable[[FlaxCausalLMOutputWithPast], Chosen],
        output_attentions: bool = False,
    ) -> tuple[FlaxCausalLMOutputWithPast, Chosen, Any]:
        """Runs the last step in use and makes the step ``state.position``.

        Returns:
            The outputs, what ``choose`` made of them, and ``State.streams`` with that step, one for each set.
        """


def take_steps(array: Array, start: Int[Array, ""], length: int) -> Array:
    """``length`` entries of the last axis."""
    return lax.dynamic_slice_in_dim(array, start, length, axis=-1)


def write_step(array: Array, values: Array, position: Int[Array, ""]) -> Array:
    """Puts ``values``, which lacks the last axis, at ``position`` of it."""
    return lax.dynamic_update_slice_in_dim(array, values[..., None], position, axis=array.ndim - 1)


def take_rows(tree: Any, rows: Int[Array, "*taken"]) -> Any:
    """The given rows of all arrays."""
    return jax.tree.map(lambda array: array.at[rows].get(mode="promise_in_bounds"), tree)


def is_in(tokens: Int[Array, "batch"], ids: Int[Array, "ids"]) -> Bool[Array, "batch"]:
    """Which tokens are among ``ids``."""
    return jnp.any(tokens[:, None] == ids[None], axis=-1)


def last_logits(outputs: FlaxCausalLMOutputWithPast) -> Float[Array, "batch vocab"]:
    """Those of the last step that was run."""
    assert outputs.logits is not None  # only models without a head have none
    return outputs.logits[:, -1]


def fold_step(keys: jax.Array, step: Any) -> jax.Array:
    """The keys of one step. Steps count from the first generated token, so that padding does not change them."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, step)


def start(decoder: Decoder, params: Any, request: Request, *, chunk: int, recording: Recording) -> State:
    """The program of the prompt: fills the cache with all its steps but the last, which begins the loop.

    Args:
        decoder: the model.
        params: its parameters.
        request: what is to be generated.
        chunk: steps that are run at once; 0 if the prompt is a single step. The last chunk is moved to the left
            if it would not fit: what was there is written again, and what lies behind the prompt is overwritten
            before anything can attend to it.
        recording: what to record.
    """
    batch_size, capacity = request.input_ids.shape
    state = State(
        position=request.prompt_length,
        cache=decoder.init_cache(batch_size, capacity),
        sequences=request.input_ids,
        lengths=jnp.broadcast_to(request.prompt_length, (batch_size,)),
        finished=jnp.zeros((batch_size,), dtype=bool),
        streams=decoder.init_streams(request),
        records={},
    )

    def prefill(state: State, start: Int[Array, ""], length: int) -> FlaxCausalLMOutputWithPast:
        state = state.replace(cache=state.cache.replace(length=start))
        return decoder.prefill(params, request, state, start, length, recording.has_attentions)

    if recording.names:
        outputs = jax.eval_shape(lambda: dict(prefill(state, jnp.int32(0), 1).items()))
        state = state.replace(records=empty_records(recording, outputs, capacity))
    if not chunk:
        return state
    last = request.prompt_length - 1

    def run_chunk(carry):
        begin, state = carry
        fitting = jnp.minimum(begin, capacity - chunk)
        outputs = prefill(state, fitting, chunk)
        records = record_frames(recording, state.records, outputs, fitting)
        return begin + chunk, state.replace(cache=outputs.cache, records=records)

    _, state = lax.while_loop(lambda carry: carry[0] < last, run_chunk, (jnp.int32(0), state))
    return state.replace(cache=state.cache.replace(length=last))


def advance(
    decoder: Decoder,
    params: Any,
    request: Request,
    state: State,
    until: Int[Array, ""],
    *,
    recording: Recording,
) -> State:
    """The program of the loop: generates until ``until`` steps are in use or all rows have ended.

    Args:
        decoder, params, request, recording: as of :func:`start`.
        state: the state so far.
        until: at most the capacity.
    """

    def unfinished(state: State) -> Bool[Array, ""]:
        return (state.position < until) & ~jnp.all(state.finished)

    def step(state: State) -> State:
        position = state.position
        number = position - request.prompt_length
        keys = fold_step(request.keys, number)

        def choose(outputs: FlaxCausalLMOutputWithPast) -> Chosen:
            tokens = select_token(last_logits(outputs), state.sequences, position, keys, 0, request.sampling)
            if request.forced_ids is not None:
                forced = take_steps(request.forced_ids, position, 1)[:, 0]
                tokens = jnp.where(forced == UNFORCED, tokens, forced)
            return Chosen(jnp.where(state.finished, request.pad_token_id, tokens), keys)

        outputs, chosen, streams = decoder.step(params, request, state, choose, recording.has_attentions)
        logits = last_logits(outputs)
        records = record_frames(recording, state.records, outputs, position - 1)
        records = record_step(recording, records, "logits", logits, number)
        if "scores" in recording.names:
            scores = process_logits(logits, state.sequences, position, request.sampling)
            records = record_step(recording, records, "scores", scores, number)
        length = position + 1
        return State(
            position=length,
            cache=outputs.cache,
            sequences=write_step(state.sequences, chosen.tokens, position),
            lengths=jnp.where(state.finished, state.lengths, length),
            finished=state.finished | is_in(chosen.tokens, request.eos_token_ids) | (length >= request.limits),
            streams=streams,
            records=records,
        )

    return lax.while_loop(unfinished, step, state)


def repeat_rows(tree: Any, batch_size: int, copies: int) -> Any:
    """Every row ``copies`` times, neighbours; leaves are ``(batch, ...)`` or ``(batch * heads, ...)``, or scalars."""

    def repeat(leaf: Array) -> Array:
        if leaf.ndim == 0:
            return leaf
        rows = leaf.reshape(batch_size, leaf.shape[0] // batch_size, *leaf.shape[1:])
        return jnp.repeat(rows, copies, axis=0).reshape(copies * leaf.shape[0], *leaf.shape[1:])

    return jax.tree.map(repeat, tree)


def repeat(decoder: Decoder, request: Request, state: State, *, copies: int) -> tuple[Request, State]:
    """The program of ``num_return_sequences``: after the prompt, every row goes on several times.

    The copies of a row have keys of their own, made of the row's key. It is the same for all decoders.
    """
    batch_size = request.input_ids.shape[0]
    keys = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(copies)))(request.keys)
    rows = repeat_rows(
        {name: getattr(request, name) for name in ("input_ids", "attention_mask", "limits", "forced_ids", "streams")},
        batch_size,
        copies,
    )
    return request.replace(**rows, keys=keys.reshape(-1)), repeat_rows(state, batch_size, copies)
