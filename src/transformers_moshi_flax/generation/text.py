"""The decoder of models that generate text alone, for the loop of generation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..nn.cache import LinearCache
from .decoding import Request, State, take_steps


def prompt_embeds(
    given: Float[Array, "batch capacity hidden"], request: Request, start: Int[Array, ""], length: int
) -> tuple[Float[Array, "batch length hidden"], Bool[Array, "1 length 1"]]:
    """The given embeddings of the steps from ``start`` on, and which of these are in the prompt."""
    in_prompt = start + jnp.arange(length, dtype=jnp.int32) < request.prompt_length
    return lax.dynamic_slice_in_dim(given, start, length, axis=1), in_prompt[None, :, None]


@dataclasses.dataclass(frozen=True)
class TextDecoder:
    """A module with a head for text as a :class:`~transformers_moshi_flax.generation.decoding.Decoder`.

    The request's ``streams`` are the prompt's embeddings, ``(batch, capacity, hidden_size)``, or None.

    Attributes:
        module: takes ``input_ids`` or ``inputs_embeds``, and has ``embed``.
        sizes: of its cache, as :meth:`LinearCache.create` wants them.
    """

    module: Any
    sizes: Any = dataclasses.field(compare=False)

    def init_cache(self, batch_size: int, max_length: int) -> LinearCache:
        return LinearCache.create(self.sizes, batch_size, max_length, self.module.dtype)

    def init_streams(self, request: Request) -> None:
        return None

    def places(self, request: Request, start: Any, length: int) -> dict[str, Array]:
        """What the module is told of the places of steps; nothing where it counts the slots of the cache."""
        return {}

    def prefill(
        self, params: Any, request: Request, state: State, start: Any, length: int, output_attentions: bool = False
    ) -> Any:
        input_ids, inputs = take_steps(state.sequences, start, length), self.places(request, start, length)
        if request.streams is None:
            inputs["input_ids"] = input_ids
        else:
            embedded = self.module.apply({"params": params}, input_ids, method=self.module.embed)
            given, where = prompt_embeds(request.streams, request, start, length)
            inputs["inputs_embeds"] = jnp.where(where, given.astype(embedded.dtype), embedded)
        return self.module.apply(
            {"params": params},
            **inputs,
            attention_mask=take_steps(request.attention_mask, start, length),
            cache=state.cache,
            logits_to_keep=1,
            output_attentions=output_attentions,
        )

    def step(
        self, params: Any, request: Request, state: State, choose: Any, output_attentions: bool = False
    ) -> tuple[Any, Any, None]:
        outputs = self.prefill(params, request, state, state.position - 1, 1, output_attentions)
        return outputs, choose(outputs), None
