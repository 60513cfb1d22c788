"""Keys and values of past steps, and one protocol for how attention uses them.

Before its layers run, a decoder asks its cache for the next :class:`Steps`: where their keys go, which keys each of
them may attend, and at which positions they are. Each layer writes into its own :data:`LayerCache`. What kinds of
caches there are is known in this file alone:

- :class:`LinearCache`: as many slots as steps, for generation of a known length;
- :class:`StaticCache`: the same with a length known at trace time, for decoders with weights for every step;
- :class:`RingCache`: the last steps of streams that never end, each row with an age of its own;
- :class:`PinnedRingCache`: the same, which never forgets what it has adopted;
- :class:`NoCache`: this call's steps alone;
- :class:`PackedTexts`: the same, of rows that hold several texts behind one another.

One pair of arrays a layer, stored as ``ops/attention.py`` says; :func:`layer_keys` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..ops.attention import Stored, restored, stored, write_steps
from ..ops.selection import take_group_rows

LayerCache = tuple[Stored, Stored]
"""Stored keys and values of one layer."""

BLOCK = 64
"""Slots of a cache that are reordered at once."""

Self = TypeVar("Self", bound="_Layers")
Ring = TypeVar("Ring", bound="RingCache")
Linear = TypeVar("Linear", bound="_Linear")


class Steps(flax.struct.PyTreeNode):
    """The next steps of every row.

    Attributes:
        index: the slot that the first of them is written to, a scalar, or one for each row.
        mask: which slots each may attend once they are written, ``(batch or 1, steps, slots)``.
        positions: of the rotary embedding, ``(batch or 1, steps)``.
    """

    index: Any
    mask: Any
    positions: Any


@runtime_checkable
class Cache(Protocol):
    """What a decoder asks of its cache."""

    @property
    def length(self) -> Any:
        """Steps so far."""

    def next_steps(
        self, steps: int, window: Any, batch_size: int, attention_mask: Array | None = None
    ) -> tuple[Steps, Cache]:
        """The next ``steps``, and the cache after them, their keys and values not yet written.

        Args:
            steps: how many.
            window: how many steps, its own included, a step may attend; None for all (but of a ring).
            batch_size: rows.
            attention_mask: True for steps that count, ``(batch, steps)``, or ``(batch, slots)`` for all of the cache.
        """

    def layer(self, index: int) -> LayerCache | None:
        """The cache of one layer."""

    def with_layers(self, layers: Sequence[Any]) -> Cache:
        """With these layers, as :meth:`layer` returns them."""


def written(
    layer_cache: LayerCache,
    key: Float[Array, "batch steps kv_heads head_dim"],
    value: Float[Array, "batch steps kv_heads head_dim"],
    index: Any,
    slots: int,
) -> tuple[
    LayerCache, Float[Array, "batch {slots} kv_heads head_dim"], Float[Array, "batch {slots} kv_heads head_dim"]
]:
    """The cache of a layer with the keys and values of the next steps, and what its first ``slots`` hold."""
    keys, values = (write_steps(old, stored(new), index) for old, new in zip(layer_cache, (key, value)))
    batch_size = key.shape[0]
    return (keys, values), restored(keys[:, :slots], batch_size), restored(values[:, :slots], batch_size)


def layer_keys(cache: _Layers, index: int, batch_size: int) -> tuple[Array, Array]:
    """Keys and values of a layer, each ``(batch, slots, kv_heads, head_dim)``."""
    keys, values = cache.layer(index)
    return restored(keys, batch_size), restored(values, batch_size)


def visible(
    queries: Int[Array, "steps"], key_mask: Bool[Array, "#batch slots"], window: int | None
) -> Bool[Array, "#batch steps slots"]:
    """Which slots each query may attend: unmasked, not later, and fewer than ``window`` back if that is not None."""
    slots = jnp.arange(key_mask.shape[-1], dtype=jnp.int32)[None, :]
    distance = queries[:, None] - slots
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return seen[None] & key_mask[:, None, :]


class _Layers(flax.struct.PyTreeNode):
    """Of caches that hold keys and values."""

    keys: tuple[Any, ...]
    values: tuple[Any, ...]

    def layer(self, index: int) -> LayerCache:
        return self.keys[index], self.values[index]

    def with_layers(self: Self, layers: Sequence[LayerCache]) -> Self:
        keys, values = zip(*layers)
        return self.replace(keys=tuple(keys), values=tuple(values))


def _empty_layers(config: Any, batch_size: int, slots: int, dtype: Any) -> dict[str, tuple[Array, ...]]:
    shape = (batch_size * config.num_key_value_heads, slots, config.head_dim)
    return {
        name: tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers)) for name in ("keys", "values")
    }


# ------------------------------------------------------------------------------------------------------------ linear


class _Linear(_Layers):
    """What the two linear caches share."""

    mask: Any
    length: Any

    _no_steps: ClassVar[Callable[[], Any]]
    """The length of an empty cache."""

    @property
    def max_length(self) -> int:
        return self.mask.shape[-1]

    @classmethod
    def create(cls: type[Linear], config: Any, batch_size: int, max_length: int, dtype: Any = jnp.float32) -> Linear:
        """An empty cache.

        Args:
            config: has ``num_hidden_layers``, ``num_key_value_heads`` and ``head_dim``.
            batch_size: rows.
            max_length: slots.
            dtype: of keys and values.
        """
        mask = jnp.zeros((batch_size, max_length), dtype=bool)
        return cls(**_empty_layers(config, batch_size, max_length, dtype), mask=mask, length=cls._no_steps())

    def _next(self: Linear, steps: int, batch_size: int, attention_mask: Array | None) -> tuple[Array, Linear]:
        """Which keys count, and the cache after the steps."""
        if attention_mask is None:
            attention_mask = jnp.ones((batch_size, steps), dtype=bool)
        mask = jnp.asarray(attention_mask).astype(bool)
        if mask.shape[-1] != self.max_length or steps == self.max_length:
            mask = lax.dynamic_update_slice_in_dim(self.mask, mask, self.length, axis=1)
        return mask, self.replace(mask=mask, length=self.length + steps)


class LinearCache(_Linear):
    """A cache with a slot for every step; made by ``init_cache``, and returned updated by every call.

    Attributes:
        keys, values: one stored array a layer.
        mask: ``(batch, max_length)``, which of the steps so far may be attended.
        length: steps so far, a scalar.
    """

    # Any: under jax.eval_shape the leaves are shapes
    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    mask: Any
    length: Any

    @staticmethod
    def _no_steps() -> Array:
        return jnp.zeros((), dtype=jnp.int32)

    def next_steps(
        self, steps: int, window: int | None, batch_size: int, attention_mask: Array | None = None
    ) -> tuple[Steps, LinearCache]:
        key_mask, after = self._next(steps, batch_size, attention_mask)
        slots = self.length + jnp.arange(steps, dtype=jnp.int32)
        return Steps(self.length, visible(slots, key_mask, window), slots[None]), after

    def reorder(self, parents: Int[Array, "batch beams"], begin: Int[Array, ""], end: Int[Array, ""]) -> LinearCache:
        """Gives each beam the cache of the beam that it continues.

        In place and in blocks, so that it costs what has been generated, not the capacity, and nothing where every
        beam continues itself. The prompt's slots are those of all beams of a row anyhow.

        Args:
            parents: which beam of its row each beam continues; the rows of the cache are ``row * beams + beam``.
            begin, end: the slots to be reordered.
        """
        batch_size, num_beams = parents.shape
        same = jnp.all(parents == jnp.arange(num_beams, dtype=parents.dtype)[None])
        end = jnp.where(same, begin, end)

        def reorder_block(carry: tuple) -> tuple:
            slot, cache = carry

            def reorder(array: Array) -> Array:
                size = min(BLOCK, array.shape[1])
                start = jnp.minimum(slot, array.shape[1] - size)
                block = lax.dynamic_slice_in_dim(array, start, size, axis=1)
                beams = block.reshape(batch_size, num_beams, -1, *block.shape[1:])
                taken = take_group_rows(beams, parents).reshape(block.shape)
                # the last block of the array may reach back to slots that are in order by now
                ahead = (start + jnp.arange(size, dtype=jnp.int32) >= slot).reshape(1, size, *(1,) * (block.ndim - 2))
                block = jnp.where(ahead, taken, block)
                return lax.dynamic_update_slice_in_dim(array, block, start, axis=1)

            return slot + BLOCK, jax.tree.map(reorder, cache)

        arrays = {"keys": self.keys, "values": self.values, "mask": self.mask}
        _, arrays = lax.while_loop(lambda carry: carry[0] < end, reorder_block, (begin, arrays))
        return self.replace(**arrays)


class StaticCache(_Linear):
    """A :class:`LinearCache` whose ``length`` is a Python integer, since it selects the weights of each step."""

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    mask: Any
    length: int = flax.struct.field(pytree_node=False, default=0)

    @staticmethod
    def _no_steps() -> int:
        return 0

    def next_steps(
        self, steps: int, window: int | None, batch_size: int, attention_mask: Array | None = None
    ) -> tuple[Steps, StaticCache]:
        key_mask, after = self._next(steps, batch_size, attention_mask)
        slots = jnp.arange(self.length, after.length, dtype=jnp.int32)
        # only slots in use are looked at
        return Steps(self.length, visible(slots, key_mask[:, : after.length], window), slots[None]), after


# -------------------------------------------------------------------------------------------------------------- ring


class RingCache(_Layers):
    """What attention over a sliding window needs of the past. The steps of one call never wrap around, as their
    number is always the same and divides the number of slots.

    Every row has its own age: it may have begun later than its neighbours, or have rested while they went on.

    Attributes:
        keys, values: one stored array a layer.
        position: steps so far modulo 2**32, ``(batch,)`` uint32, for the rotary embedding.
        slot: the ring index that the next step is written to, ``(batch,)`` int32.
        filled: slots that hold a step of the stream, ``(batch,)`` int32.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    position: Any
    slot: Any
    filled: Any

    @property
    def slots(self) -> int:
        return self.keys[0].shape[1]

    @property
    def length(self) -> Any:
        return self.filled

    @classmethod
    def create(cls, config: Any, batch_size: int, dtype: Any = jnp.float32, steps: int = 1) -> RingCache:
        """An empty cache for the window of ``config``.

        Args:
            config: has ``num_hidden_layers``, ``num_key_value_heads``, ``head_dim`` and ``sliding_window``.
            batch_size: rows.
            dtype: of keys and values.
            steps: how many are written at once. The oldest query among them still sees its whole window.
        """
        slots = -(-(config.sliding_window + steps - 1) // steps) * steps
        return cls(
            **_empty_layers(config, batch_size, slots, dtype),
            position=jnp.zeros((batch_size,), dtype=jnp.uint32),
            slot=jnp.zeros((batch_size,), dtype=jnp.int32),
            filled=jnp.zeros((batch_size,), dtype=jnp.int32),
        )

    def next_steps(
        self: Ring, steps: int, window: int, batch_size: int, attention_mask: Array | None = None
    ) -> tuple[Steps, Ring]:
        """As :meth:`Cache.next_steps`; rows that ``attention_mask`` hides, all steps of them, rest.

        What they write is overwritten by their next step, or has no weight after a :meth:`reset`; so it must be
        finite. Positions are counted modulo 2**32: pass them to the rotary embedding as they are.
        """
        newest = self.slot + (steps - 1)
        age = (newest[:, None] - jnp.arange(self.slots, dtype=jnp.int32)[None]) % self.slots
        distance = age[:, None] - jnp.arange(steps - 1, -1, -1, dtype=jnp.int32)[None, :, None]
        mask = (distance >= 0) & (distance < window) & (age < self.filled[:, None] + steps)[:, None]
        positions = self.position[:, None] + jnp.arange(steps, dtype=jnp.uint32)[None]
        active = jnp.ones((batch_size,), dtype=bool) if attention_mask is None else attention_mask[:, 0].astype(bool)
        after = self.replace(
            position=jnp.where(active, self.position + jnp.uint32(steps), self.position),
            slot=jnp.where(active, (self.slot + steps) % self.slots, self.slot),
            filled=jnp.where(active, jnp.minimum(self.filled + steps, self.slots), self.filled),
        )
        return Steps(self.slot, mask, positions), after

    def adopt(self: Ring, rows: Bool[Array, "batch"], past: LinearCache) -> Ring:
        """With the steps of ``past``, a cache of one row, as those of each of ``rows``.

        Of more steps than there are slots the last ones stay. The first steps have positions from 0 on.
        """
        count = past.length
        slot = jnp.arange(min(self.slots, past.max_length), dtype=jnp.int32)
        # the last of the steps that share a ring index
        step = slot + self.slots * (jnp.maximum(count - 1 - slot, 0) // self.slots)
        heads = past.keys[0].shape[0]
        chosen = jnp.repeat(rows, heads)[:, None, None]

        def put(old: Array, new: Array) -> Array:
            new = jnp.take(new, step, axis=1, mode="clip").astype(old.dtype)
            new = jnp.tile(new, (rows.shape[0], 1, 1))
            return lax.dynamic_update_slice_in_dim(old, jnp.where(chosen, new, old[:, : slot.size]), 0, axis=1)

        return self.replace(
            keys=tuple(map(put, self.keys, past.keys)),
            values=tuple(map(put, self.values, past.values)),
            position=jnp.where(rows, count.astype(jnp.uint32), self.position),
            slot=jnp.where(rows, count % self.slots, self.slot),
            filled=jnp.where(rows, jnp.minimum(count, self.slots), self.filled),
        )

    def reset(self: Ring, rows: Bool[Array, "batch"]) -> Ring:
        """With ``rows`` empty; no array of keys or values is touched."""
        return self.replace(
            position=jnp.where(rows, jnp.uint32(0), self.position),
            slot=jnp.where(rows, 0, self.slot),
            filled=jnp.where(rows, 0, self.filled),
        )


class PinnedRingCache(RingCache):
    """A :class:`RingCache` of which each row keeps the steps that it has adopted, and the one after them, for ever:
    later steps share the slots behind. There is one step a call.

    Attributes:
        pinned: slots that are kept, ``(batch,)`` int32, less than there are.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    position: Any
    slot: Any
    filled: Any
    pinned: Any

    @classmethod
    def create(cls, config: Any, batch_size: int, dtype: Any = jnp.float32, steps: int = 1) -> PinnedRingCache:
        ring = RingCache.create(config, batch_size, dtype, steps)
        return cls(**vars(ring), pinned=jnp.zeros((batch_size,), dtype=jnp.int32))

    def next_steps(
        self, steps: int, window: int, batch_size: int, attention_mask: Array | None = None
    ) -> tuple[Steps, PinnedRingCache]:
        """As :meth:`RingCache.next_steps`; the slots are as many as ``window``, those that are kept included."""
        if steps != 1:
            raise ValueError(f"a pinned ring takes one step a call, not {steps}.")
        found, after = super().next_steps(steps, window, batch_size, attention_mask)
        slots = jnp.arange(self.slots, dtype=jnp.int32)[None]
        mask = (slots < self.filled[:, None]) | (slots == self.slot[:, None])
        # behind the last slot comes the first one that is shared
        slot = jnp.where((after.slot == 0) & (self.slot > 0), self.pinned, after.slot)
        return found.replace(mask=mask[:, None]), after.replace(slot=slot)

    def adopt(self, rows: Bool[Array, "batch"], past: LinearCache) -> PinnedRingCache:
        after = super().adopt(rows, past)
        return after.replace(pinned=jnp.where(rows, past.length + 1, self.pinned))

    def reset(self, rows: Bool[Array, "batch"]) -> PinnedRingCache:
        after = super().reset(rows)
        return after.replace(pinned=jnp.where(rows, 0, self.pinned))


# --------------------------------------------------------------------------------------------------------- no cache


class NoCache:
    """The past of a call that has none."""

    length = 0

    def next_steps(
        self, steps: int, window: int | None, batch_size: int, attention_mask: Array | None = None
    ) -> tuple[Steps, NoCache]:
        slots = jnp.arange(steps, dtype=jnp.int32)
        if attention_mask is None:
            attention_mask = jnp.ones((1, steps), dtype=bool)
        return Steps(0, visible(slots, jnp.asarray(attention_mask).astype(bool), window), slots[None]), self

    def layer(self, index: int) -> None:
        return None

    def with_layers(self, layers: Sequence[LayerCache | None]) -> NoCache:
        return self


class PackedTexts(NoCache):
    """The past of a call whose rows hold several texts behind one another, none of which sees another.

    Every text gives what it gives alone, at positions counted from its own beginning.

    Args:
        segment_ids: which text a step belongs to, ``(batch, steps)``; 0 for padding, which attends nothing and is
            attended by nothing. The steps of a text are neighbours.
    """

    def __init__(self, segment_ids: Int[Array, "batch steps"]):
        self.segment_ids = segment_ids

    def next_steps(
        self, steps: int, window: int | None, batch_size: int, attention_mask: Array | None = None
    ) -> tuple[Steps, PackedTexts]:
        found, _ = super().next_steps(steps, window, batch_size, attention_mask)
        ids = self.segment_ids
        same = (ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, :, None]
        slots = found.positions
        begins = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        positions = slots - lax.cummax(jnp.where(begins, slots, 0), axis=1)
        return Steps(found.index, found.mask & same, positions), self
