"""The state of a stream, and what is done to it beside a step: slots that begin anew, change, leave and come."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, Key, UInt

from ...generation.decoding import UNFORCED
from ...generation.programs import Program
from ...nn.cache import PinnedRingCache, RingCache
from ..mimi.streaming_flax_mimi import FlaxMimiDecoderState, FlaxMimiEncoderState
from .generation_flax_moshi import FrameDecoder


class DialogueState(flax.struct.PyTreeNode):
    """Where Moshi is in each dialogue; all leaves have the slots as their first axis.

    Attributes:
        cache: of the backbone.
        text_ids: the text token of the next step, ``(batch,)`` int32.
        audio_codes: Moshi's codes of the next step, delayed, ``(batch, codebooks)`` int32.
        user_codes: the user's last frame, whose delayed codes are heard in the next step, ``(batch, codebooks)``.
        forced_codes: what was forced of the last chosen frame and belongs into the step after the next, ``(batch,
            codebooks)``, ``UNFORCED`` where nothing was.
        steps: how many there were, modulo 2**32, ``(batch,)`` uint32.
        keys: a key per slot.
        numbers: of sampling, by the names of :meth:`FlaxMoshiStream.configure`, each ``(batch, 1)``.
    """

    # Any: under jax.eval_shape the leaves are shapes
    cache: RingCache
    text_ids: Any
    audio_codes: Any
    user_codes: Any
    forced_codes: Any
    steps: Any
    keys: Any
    numbers: dict[str, Any]


class StreamState(flax.struct.PyTreeNode):
    """Everything that a stream knows, a pytree; all leaves have the slots as their first axis.

    Attributes:
        dialogue: of Moshi.
        encoder, decoder: of Mimi, None where the model or the stream is without that half.
        origin: tells the configuration that the state belongs to.
    """

    dialogue: DialogueState
    encoder: FlaxMimiEncoderState | None
    decoder: FlaxMimiDecoderState | None
    origin: str = flax.struct.field(pytree_node=False)

    @property
    def batch_size(self) -> int:
        return self.dialogue.text_ids.shape[0]


def fold_rows(keys: Key[Array, "batch"], data: UInt[Array, "batch"]) -> Key[Array, "batch"]:
    """Every row's key folded with its number; of step k, what ``generate`` draws with in step k."""
    return jax.vmap(jax.random.fold_in)(keys, data)


def empty_state(
    decoder: FrameDecoder,
    keys: Key[Array, "batch"],
    numbers: dict[str, Any],
    *,
    with_encoder: bool,
    with_decoder: bool,
    dtype: Any,
    pinned: bool,
    origin: str,
    mesh: Mesh | None,
) -> StreamState:
    """All slots before their start frame, with a key each and the same numbers."""
    config, batch_size = decoder.module.config, keys.shape[0]
    codec = config.audio_encoder_config
    codes = jnp.full((batch_size, config.num_codebooks), config.audio_vocab_size, dtype=jnp.int32)
    dialogue = DialogueState(
        cache=(PinnedRingCache if pinned else RingCache).create(config, batch_size, dtype),
        text_ids=jnp.full((batch_size,), config.vocab_size, dtype=jnp.int32),
        audio_codes=codes,
        user_codes=codes,
        forced_codes=jnp.full_like(codes, UNFORCED),
        steps=jnp.zeros((batch_size,), dtype=jnp.uint32),
        keys=keys,
        numbers={name: jnp.full((batch_size, 1), number) for name, number in numbers.items()},
    )
    state = StreamState(
        dialogue=dialogue,
        encoder=FlaxMimiEncoderState.create(codec, batch_size, dtype) if with_encoder else None,
        decoder=FlaxMimiDecoderState.create(codec, batch_size, dtype) if with_decoder else None,
        origin=origin,
    )
    if mesh is None:
        return state
    return jax.lax.with_sharding_constraint(state, NamedSharding(mesh, PartitionSpec("data")))


def restart(
    state: StreamState, rows: Bool[Array, "batch"], start_id: Int[Array, ""], start_code: Int[Array, ""]
) -> StreamState:
    """With ``rows`` before their start frame."""
    dialogue = state.dialogue
    return state.replace(
        dialogue=dialogue.replace(
            cache=dialogue.cache.reset(rows),
            text_ids=jnp.where(rows, start_id, dialogue.text_ids),
            audio_codes=jnp.where(rows[:, None], start_code, dialogue.audio_codes),
            steps=jnp.where(rows, jnp.uint32(0), dialogue.steps),
            keys=jnp.where(rows, fold_rows(dialogue.keys, dialogue.steps), dialogue.keys),
        ),
        encoder=None if state.encoder is None else state.encoder.reset(rows),
        decoder=None if state.decoder is None else state.decoder.reset(rows),
    )


def rekey(dialogue: DialogueState, rows: Bool[Array, "batch"], keys: jax.Array) -> DialogueState:
    """With new keys in ``rows``."""
    return dialogue.replace(keys=jnp.where(rows, keys, dialogue.keys))


def configure(
    dialogue: DialogueState, rows: Bool[Array, "batch"], numbers: dict[str, tuple[Array, Array]]
) -> DialogueState:
    """With other numbers in ``rows``: all of them, each with whether it changes."""
    before = dialogue.numbers
    changed = {name: jnp.where(rows[:, None] & given, value, before[name]) for name, (given, value) in numbers.items()}
    return dialogue.replace(numbers=changed)


def take_slot(state: StreamState, slot: Int[Array, ""]) -> StreamState:
    """A state of one slot."""

    def take(leaf: Array) -> Array:
        count = leaf.shape[0] // state.batch_size
        return jax.lax.dynamic_slice_in_dim(leaf, slot * count, count)

    return jax.tree.map(take, state)


def put_slot(state: StreamState, slot: Int[Array, ""], row: StreamState) -> StreamState:
    """With another dialogue in a slot."""

    def put(leaf: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, new, slot * new.shape[0], axis=0)

    return jax.tree.map(put, state, row)


RESTART = Program(restart, donated=(0,))
REKEY = Program(rekey, donated=(0,))
CONFIGURE = Program(configure, donated=(0,))
TAKE = Program(take_slot)
PUT = Program(put_slot, donated=(0,))
