"""Keys and values of the last steps of an endless stream, in a ring per row.

Every row of the batch has its own age: it may have begun later than its neighbours, or have rested while they went on.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

RingArray = Float[Array, "batch_heads slots head_dim"]


@flax.struct.dataclass
class RingCache:
    """What attention over a sliding window needs of the past. The steps of one call never wrap around, as their
    number is always the same and divides the number of slots.

    Attributes:
        keys, values: one array per layer, ``(batch * kv_heads, slots, head_dim)``.
        position: steps so far modulo 2**32, ``(batch,)`` uint32, for the rotary embedding.
        slot: where the next step is written, ``(batch,)`` int32.
        filled: slots that hold a step of the stream, ``(batch,)`` int32.
    """

    # Any: under jax.eval_shape the leaves are shapes
    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    position: Any
    slot: Any
    filled: Any

    @property
    def slots(self) -> int:
        return self.keys[0].shape[1]

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
        shape = (batch_size * config.num_key_value_heads, slots, config.head_dim)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers)),
            values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers)),
            position=jnp.zeros((batch_size,), dtype=jnp.uint32),
            slot=jnp.zeros((batch_size,), dtype=jnp.int32),
            filled=jnp.zeros((batch_size,), dtype=jnp.int32),
        )

    def positions(self, steps: int) -> UInt[Array, "batch {steps}"]:
        """Of the next steps, modulo 2**32: pass them to the rotary embedding as they are."""
        return self.position[:, None] + jnp.arange(steps, dtype=jnp.uint32)

    def mask(self, steps: int, window: int) -> Bool[Array, "batch {steps} slots"]:
        """Which slots each of the next steps may attend, once they all are written."""
        newest = self.slot + (steps - 1)
        age = (newest[:, None] - jnp.arange(self.slots, dtype=jnp.int32)) % self.slots
        distance = age[:, None] - jnp.arange(steps - 1, -1, -1, dtype=jnp.int32)[:, None]
        return (distance >= 0) & (distance < window) & (age < self.filled[:, None] + steps)[:, None]

    def advance(self, steps: int, active: Bool[Array, "batch"]) -> RingCache:
        """After the next steps. What rows that are not active have written is overwritten by their next step, or has
        no weight after a :meth:`reset`; so it must be finite."""
        return self.replace(
            position=jnp.where(active, self.position + jnp.uint32(steps), self.position),
            slot=jnp.where(active, (self.slot + steps) % self.slots, self.slot),
            filled=jnp.where(active, jnp.minimum(self.filled + steps, self.slots), self.filled),
        )

    def reset(self, rows: Bool[Array, "batch"]) -> RingCache:
        """With ``rows`` empty; no array of keys or values is touched."""
        return self.replace(
            position=jnp.where(rows, jnp.uint32(0), self.position),
            slot=jnp.where(rows, 0, self.slot),
            filled=jnp.where(rows, 0, self.filled),
        )


def write_steps(
    array: RingArray, new: Float[Array, "batch_heads steps head_dim"], slot: Int[Array, "batch"]
) -> RingArray:
    """Puts ``new`` at the slots of each row; in place where XLA may."""
    batch_size = slot.shape[0]
    heads = array.shape[0] // batch_size
    new = new.astype(array.dtype)

    def row_by_row(array: Array, new: Array, slot: Array) -> Array:
        # a scatter becomes a loop on CPUs
        for row in range(batch_size):
            block = lax.slice_in_dim(new, row * heads, (row + 1) * heads)
            array = lax.dynamic_update_slice(array, block, (jnp.int32(row * heads), slot[row], jnp.int32(0)))
        return array

    def at_once(array: Array, new: Array, slot: Array) -> Array:
        rows = (batch_size, heads)
        update = jax.vmap(lambda old, block, index: lax.dynamic_update_slice_in_dim(old, block, index, axis=1))
        written = update(array.reshape(*rows, *array.shape[1:]), new.reshape(*rows, *new.shape[1:]), slot)
        return written.reshape(array.shape)

    return lax.platform_dependent(array, new, slot, cpu=row_by_row, default=at_once)
