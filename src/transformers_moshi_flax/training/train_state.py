"""What a run carries from step to step, and which parameters are trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from ..ops.precision import at_least_float32
from ..quantization.tree import is_quantized
from .optimizer import path_rules, warn_of_narrow

NEVER_TRAINED = "audio_encoder/"
"""Mimi has no part in the objective, so that weight decay would be all that it learned."""


class LossScale(flax.struct.PyTreeNode):
    """Dynamic loss scaling, with which the gradients of float16 neither vanish nor overflow.

    Attributes:
        scale: by which the loss is multiplied before it is differentiated, float32.
        good_steps: with this scale, int32; the scale grows after ``GROWTH_INTERVAL`` of them.
    """

    scale: Any
    good_steps: Any

    INITIAL = 2.0**16
    LEAST = 1.0
    GROWTH_INTERVAL = 2000

    @classmethod
    def create(cls) -> LossScale:
        return cls(scale=jnp.full((), cls.INITIAL, jnp.float32), good_steps=jnp.zeros((), jnp.int32))

    def adjusted(self, finite: jax.Array) -> LossScale:
        """Halved after an overflow, doubled after many steps without one."""
        grown = finite & (self.good_steps + 1 >= self.GROWTH_INTERVAL)
        factor = jnp.where(grown, 2.0, jnp.where(finite, 1.0, 0.5)).astype(jnp.float32)
        good_steps = jnp.where(finite & ~grown, self.good_steps + 1, 0)
        return LossScale(scale=jnp.maximum(self.scale * factor, self.LEAST), good_steps=good_steps)


class TrainState(flax.struct.PyTreeNode):
    """Arrays alone, so that it can be saved, sharded and donated as it is.

    Attributes:
        step: steps so far, those without an update included, int32.
        params: the trainable parameters in at least float32, a nested dict without the frozen ones.
        frozen_params: the others.
        opt_state: of the optimizer, for ``params`` alone.
        rng: the data of a PRNG key, uint32; every step folds its number into it.
        bad_steps: steps without an update, because loss or gradients were not finite, int32.
        bad_steps_in_a_row: how many the last steps were, int32; those that only lower a loss scale do not count.
        loss_scale: a :class:`LossScale` for float16, else None.
    """

    step: Any
    params: Any
    frozen_params: Any
    opt_state: Any
    rng: Any
    bad_steps: Any
    bad_steps_in_a_row: Any
    loss_scale: Any = None

    @property
    def all_params(self) -> dict[str, Any]:
        """The trainable parameters and the frozen ones in one tree."""
        return merge_params(self.params, self.frozen_params)


def split_params(params: Mapping[str, Any], freeze: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trainable parameters and the frozen ones. Mimi is always frozen, as the objective does not run it.

    Args:
        params: a parameter tree, or its shapes.
        freeze: regular expressions on whole "/"-joined paths.

    Returns:
        Two nested dicts without common paths.

    Raises:
        ValueError: an expression is wrong or matches no path, all that can be trained is frozen, or weights are
            quantized.
    """
    if is_quantized(params):
        raise ValueError("params hold quantized weights, which are not trained: call dequantize() of the model first")
    flat = flatten_dict(params, sep="/")
    rules = path_rules("freeze", freeze, flat)
    trainable: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for path, leaf in flat.items():
        is_frozen = path.startswith(NEVER_TRAINED) or any(rule.fullmatch(path) for rule in rules)
        (frozen if is_frozen else trainable)[path] = leaf
    if not trainable:
        raise ValueError(f"`freeze` is {list(freeze)}, which leaves no parameter to train; freeze less.")
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def split_paths(
    params: Mapping[str, Any], patterns: Sequence[str], matching: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two nested dicts: the parameters whose whole "/"-joined paths match no pattern, and those that match one.

    ``matching`` puts those that match first.
    """
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for path, leaf in flatten_dict(dict(params), sep="/").items():
        parts[any(re.fullmatch(pattern, path) for pattern in patterns) != matching][path] = leaf
    return unflatten_dict(parts[0], sep="/"), unflatten_dict(parts[1], sep="/")


def merge_params(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`split_params`."""
    return unflatten_dict({**flatten_dict(trainable), **flatten_dict(frozen)})


def create_train_state(
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> TrainState:
    """The state before the first step.

    The arrays are taken over as far as they are float32 already, and the step consumes its state: ``params`` of the
    model that they come from are gone after it.

    Args:
        trainable, frozen: see :func:`split_params`. Trainable ones of less than float32 warn, and become float32.
        optimizer: see ``make_optimizer``.
        seed: of dropout.
        dtype: of the computation; float16 gets a loss scale.
    """
    warn_of_narrow(trainable)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, at_least_float32(leaf.dtype)), dict(trainable))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen_params=jax.tree.map(jnp.asarray, dict(frozen)),
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(jax.random.key(seed)),
        bad_steps=jnp.zeros((), jnp.int32),
        bad_steps_in_a_row=jnp.zeros((), jnp.int32),
        loss_scale=LossScale.create() if jnp.dtype(dtype) == jnp.float16 else None,
    )
