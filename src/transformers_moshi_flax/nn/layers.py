"""A stack of layers, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..input_checks import is_tracing
from ..partitioning import split_rows
from .cache import Cache, LayerCache
from .linear import DROPOUT


def run_layers(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    hidden_states: Float[Array, "batch seq hidden"],
    cache: Cache,
    arrays_of: Callable[[int], tuple[Any, ...]],
    flags: tuple[Any, ...],
) -> tuple[Float[Array, "batch seq hidden"], Cache, tuple[Array, ...], tuple[Array | None, ...]]:
    """Runs the layers of a decoder, each writing the next steps into its part of the cache, or those of an encoder,
    with ``NoCache``.

    Args:
        module: that they belong to.
        blocks: the layers, ``(hidden_states, *arrays, *flags)`` -> hidden states, attention weights and the updated
            cache of the layer.
        hidden_states: inputs.
        cache: of ``cache.next_steps``.
        arrays_of: the other arrays of a layer, by its number.
        flags: Python values that all layers get.

    Returns:
        The last hidden state, the updated cache, the input of every layer and all attention weights.
    """
    inputs, attentions, layer_caches = [], [], []

    def layer(block: nn.Module, *arrays: Any) -> tuple[Array, Array | None, LayerCache | None]:
        return block(*arrays, *flags)

    if cache.layer(0) is not None and may_share_traces(module):
        layer = nn.jit(layer)
    for number, block in enumerate(blocks):
        hidden_states = split_rows(hidden_states)
        inputs.append(hidden_states)
        hidden_states, weights, layer_cache = layer(block, hidden_states, *arrays_of(number))
        attentions.append(weights)
        layer_caches.append(layer_cache)
    return split_rows(hidden_states), cache.with_layers(layer_caches), tuple(inputs), tuple(attentions)


def scan_layers(
    block: nn.Module,
    hidden_states: Float[Array, "batch seq hidden"],
    arrays: tuple[Any, ...],
    flags: tuple[Any, ...],
    length: int,
) -> tuple[Float[Array, "batch seq hidden"], tuple[Array, ...], tuple[Array | None, ...]]:
    """As :func:`run_layers` without a cache, for layers that are all alike, as a loop over one.

    Its parameters have a leading axis of layers: compilation does not grow with their number, and layers that are
    recomputed are so one after another.

    Args:
        block: the layer.
        hidden_states: inputs.
        arrays: the others of all layers.
        flags: Python values that all layers get.
        length: how many layers there are.

    Returns:
        The last hidden state, the input of every layer and all attention weights.
    """

    def layer(block: nn.Module, hidden_states: Array, _: None) -> tuple[Array, tuple[Array, Array | None]]:
        inputs = split_rows(hidden_states)
        outputs, weights, _ = block(inputs, *arrays, *flags)
        return split_rows(outputs), (inputs, weights)

    layers = nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True, DROPOUT: True},
        length=length,
    )
    # around the loop too: what it carries, and its gradient, would else be split as what comes before it
    hidden_states, (inputs, weights) = layers(block, split_rows(hidden_states), None)
    attentions = (None,) * length if weights is None else tuple(weights)
    return split_rows(hidden_states), tuple(inputs), attentions


def may_share_traces(module: nn.Module) -> bool:
    """Whether submodules that are called in the same way may share a trace, which spares two thirds of the tracing.

    Not outside of ``jax.jit``, where it would compile them; nor if they may draw numbers or methods are intercepted,
    as both can depend on a module's path.
    """
    scope = module.scope
    return is_tracing() and scope is not None and not scope.rngs and not nn.module._global_interceptor_stack


def with_layer_drop(
    module: nn.Module,
    before: Float[Array, "*shape"],
    after: Float[Array, "*shape"],
    rate: float,
    deterministic: bool,
) -> Float[Array, "*shape"]:
    """What a layer gives if it may be left out in training, of all rows at once (LayerDrop, Fan et al., 2019).

    Args:
        module: the layer, for its random numbers.
        before, after: hidden states.
        rate: how often it is left out.
        deterministic: never.
    """
    if deterministic or not rate:
        return after
    return jnp.where(jax.random.bernoulli(module.make_rng("dropout"), rate), before, after)
