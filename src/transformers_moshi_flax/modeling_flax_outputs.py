"""Output dataclasses shared by the models.

``transformers`` 5 still has ``ModelOutput``, but under ``flax.struct`` it raises ``FrozenInstanceError``. These
outputs are plain frozen pytrees with the access that users know: ``out.logits``, ``out["logits"]``, ``out[0]``,
``out.to_tuple()``; fields that are None do not count. What ``transformers`` called ``past_key_values`` up to 5.23 is
``cache``, and is found by both names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.struct
import jax

from .former_names import FORMER_NAMES


class FlaxModelOutput:
    """Base of the outputs: attribute, key and position access over the fields that are not None."""

    def _present(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to_tuple(self) -> tuple[Any, ...]:
        """The present values, in field order: what ``return_dict=False`` returns."""
        return tuple(self._present().values())

    def __getattr__(self, name: str) -> Any:
        if FORMER_NAMES.get(name) in {field.name for field in dataclasses.fields(self)}:
            return getattr(self, FORMER_NAMES[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def keys(self):
        return self._present().keys()

    def values(self):
        return self._present().values()

    def items(self):
        return self._present().items()

    def get(self, name: str, default: Any = None) -> Any:
        return self._present().get(FORMER_NAMES.get(name, name), default)

    def __getitem__(self, key: str | int | slice) -> Any:
        return self._present()[FORMER_NAMES.get(key, key)] if isinstance(key, str) else self.to_tuple()[key]

    def __contains__(self, name: str) -> bool:
        return FORMER_NAMES.get(name, name) in self._present()

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __len__(self) -> int:
        return len(self._present())


@flax.struct.dataclass
class FlaxBaseModelOutputWithPast(FlaxModelOutput):
    """Output of a decoder without a head.

    Attributes:
        last_hidden_state: ``(batch, frames, hidden_size)``, after the last layer (and the final norm, if any).
        cache: the updated cache, if one was passed.
        hidden_states: input of every layer and the last hidden state, each ``(batch, frames, hidden_size)``.
        attentions: weights of every layer, each ``(batch, heads, frames, keys)``.
    """

    last_hidden_state: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class FlaxCausalLMOutputWithPast(FlaxModelOutput):
    """Output of a decoder with a head; ``loss`` is there when labels were passed, ``logits`` are
    ``(batch, frames, vocab_size)``, the rest as in :class:`FlaxBaseModelOutputWithPast`."""

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    last_hidden_state: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
