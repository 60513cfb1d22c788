"""AdamW with clipping, a schedule, and learning rates by parameter path, from a few numbers.

The arithmetic is that of ``torch.optim.AdamW`` after ``torch.nn.utils.clip_grad_norm_``; the schedules are those of
``transformers`` and ``torch.optim.lr_scheduler.OneCycleLR``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from ..generation.configuration import callers_level
from .scanned_layers import layer_paths

SCHEDULES = ("constant", "linear", "cosine", "one_cycle")

DIV_FACTOR, FINAL_DIV_FACTOR = 25.0, 1e4
"""Of one cycle, as in PyTorch: it begins at the peak / 25 and ends at a ten thousandth of where it began."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its clipping and its schedule.

    Attributes:
        learning_rate: the largest of the schedule.
        b1, b2, eps: of Adam.
        weight_decay: of linear layers; norms, biases and embeddings have none.
        max_grad_norm: the gradient of all parameters together is scaled down to this norm; 0 leaves it alone.
        schedule: ``"constant"``, ``"linear"`` or ``"cosine"``, from the peak to ``final_learning_rate``, or
            ``"one_cycle"``, up and down in cosines.
        warmup_steps: steps in which the learning rate grows from 0; not with ``"one_cycle"``.
        final_learning_rate: where ``"linear"`` and ``"cosine"`` end.
        pct_start: the share of the steps in which ``"one_cycle"`` goes up.
        learning_rate_multipliers: regular expression on the whole "/"-joined path -> factor; the first that matches
            counts.

    Raises:
        ValueError: a number is out of its range, an option does not go with the schedule.
    """

    learning_rate: float = 2e-6
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    schedule: str = "one_cycle"
    warmup_steps: int = 0
    final_learning_rate: float = 0.0
    pct_start: float = 0.05
    learning_rate_multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("learning_rate", "eps", "weight_decay", "max_grad_norm", "warmup_steps", "final_learning_rate"):
            _check_range(name, getattr(self, name))
        for name in ("b1", "b2"):
            _check_range(name, getattr(self, name), below=1.0)
        if not 0 <= self.pct_start <= 1:
            raise ValueError(f"`pct_start` must be from 0 to 1, but is {self.pct_start}.")
        for pattern, factor in self.learning_rate_multipliers.items():
            _check_range(f"learning_rate_multipliers[{pattern!r}]", factor)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {', '.join(SCHEDULES)}, but is {self.schedule!r}.")
        if self.schedule == "one_cycle" and self.warmup_steps:
            raise ValueError(
                f"`warmup_steps` is {self.warmup_steps}, but one_cycle warms up by `pct_start`; leave it 0."
            )
        if self.schedule in ("constant", "one_cycle") and self.final_learning_rate:
            raise ValueError(
                f"`final_learning_rate` is {self.final_learning_rate}, but {self.schedule} ends elsewhere; leave it "
                "0, or use linear or cosine."
            )


def _check_range(name: str, value: float | int, below: float = math.inf) -> None:
    if not 0 <= value < below:
        wanted = "a finite number, at least 0" if below == math.inf else f"at least 0 and below {below}"
        raise ValueError(f"`{name}` must be {wanted}, but is {value}.")


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], Float[Array, ""]]:
    """The learning rate of each of ``steps`` updates, by how many were made before it.

    Raises:
        ValueError: ``steps`` is below 1 or not above ``warmup_steps``.
    """
    if steps < 1 or steps <= config.warmup_steps:
        raise ValueError(
            f"`steps` must be at least 1 and above `warmup_steps` ({config.warmup_steps}), but is {steps}."
        )
    peak, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps

    def cosine(start: float, end: float, share: Array) -> Array:
        return end + (start - end) * (1 + jnp.cos(jnp.pi * share)) / 2

    def one_cycle(count: Array) -> Array:
        first, top = peak / DIV_FACTOR, config.pct_start * steps - 1
        up = cosine(first, peak, count / max(top, 1e-9))
        down = cosine(peak, first / FINAL_DIV_FACTOR, (count - top) / max(steps - 1 - top, 1e-9))
        return jnp.where(count <= top, up, down)

    def schedule(count: Any) -> Array:
        count = jnp.minimum(jnp.asarray(count, dtype=float), steps)
        if config.schedule == "one_cycle":
            return one_cycle(count)
        share = jnp.maximum(count - warmup, 0) / (steps - warmup)
        rate = {
            "constant": lambda: jnp.full_like(share, peak),
            "linear": lambda: peak + (final - peak) * share,
            "cosine": lambda: cosine(peak, final, share),
        }[config.schedule]()
        return jnp.where(count < warmup, peak * count / max(warmup, 1), rate)

    return schedule


def make_optimizer(
    config: OptimizerConfig, steps: int, params: Mapping[str, Any]
) -> tuple[optax.GradientTransformationExtraArgs, Callable[[Any], Float[Array, ""]]]:
    """The optimizer of a run of ``steps`` updates, and its schedule.

    Args:
        config: of the optimizer.
        steps: how many updates the schedule is laid out for.
        params: the trainable parameters, or their shapes; layers may be stacked. Multipliers have the paths of files.

    Returns:
        The transformation and :func:`make_schedule`. Parameters of less than float32 warn. ``update`` takes the norm
        of the gradients as ``grad_norm`` where it is known.

    Raises:
        ValueError: see :func:`make_schedule`; a multiplier's expression is wrong, matches no path, or only paths that
            those before it match.
    """
    schedule = make_schedule(config, steps)
    warn_of_narrow(params)
    paths = [path for stored, leaf in flatten_dict(params, sep="/").items() for path in layer_paths(stored, leaf)]
    rules = path_rules("learning_rate_multipliers", config.learning_rate_multipliers, paths)
    _refuse_shadowed("learning_rate_multipliers", rules, paths)
    parts = [
        clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        scale_by_path([(rule, config.learning_rate_multipliers[rule.pattern]) for rule in rules]),
        optax.scale_by_learning_rate(schedule),
    ]
    return optax.chain(*parts), schedule


def warn_of_narrow(params: Mapping[str, Any]) -> None:
    """Warns where parameters that are to be trained have less than float32, in which small updates are lost."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    narrow = sorted(str(dtype) for dtype in dtypes if jnp.finfo(dtype).bits < 32)
    if narrow:
        warnings.warn(
            f"the parameters to train are {' and '.join(narrow)}, in which small updates are lost, and to which "
            "weights of a float32 checkpoint have been rounded: load them with `param_dtype=jnp.float32`, as the "
            "`dtype` of `from_pretrained` is that of the parameters, too, unless that is given",
            stacklevel=callers_level(),
        )


def decay_mask(params: Mapping[str, Any]) -> dict[str, Any]:
    """True for the kernels of layers; norms, biases and embeddings are not drawn to zero."""
    return unflatten_dict({path: path[-1] == "kernel" for path in flatten_dict(params)})


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """As ``torch.nn.utils.clip_grad_norm_``; 0 leaves gradients alone."""

    def update(updates, state, params=None, *, grad_norm=None, **extra):
        if max_norm:
            norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
            factor = jnp.minimum(max_norm / (norm + 1e-6), 1)
            updates = jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), updates)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_by_path(factors: Iterable[tuple[re.Pattern[str], float]]) -> optax.GradientTransformation:
    """Multiplies the updates of every path that a pattern matches as a whole; the first that does counts.

    Paths are those of files: each of several layers that are stacked has its own factor.
    """
    factors = list(factors)

    def factor_of(path: str) -> float:
        return next((factor for pattern, factor in factors if pattern.fullmatch(path)), 1.0)

    def scaled(path: str, update: Array) -> Array:
        found = [factor_of(each) for each in layer_paths(path, update)]
        if len(set(found)) == 1:
            return update * found[0]
        return update * jnp.asarray(found, update.dtype).reshape(-1, *(1,) * (update.ndim - 1))

    def update(updates: Any, params: Any = None) -> Any:
        flat = flatten_dict(updates, sep="/")
        return unflatten_dict({path: scaled(path, leaf) for path, leaf in flat.items()}, sep="/")

    return optax.stateless(update)


def _refuse_shadowed(name: str, rules: Iterable[re.Pattern[str]], paths: Iterable[str]) -> None:
    """ValueError for an expression that never counts, as the first that matches a path does."""
    left = set(paths)
    for rule in rules:
        counts = {path for path in left if rule.fullmatch(path)}
        if not counts:
            raise ValueError(
                f"`{name}` has {rule.pattern!r}, which never counts: all that it matches is matched by one before it. "
                "Put it first, or leave it out."
            )
        left -= counts


def path_rules(name: str, patterns: Iterable[str], paths: Iterable[str]) -> list[re.Pattern[str]]:
    """Regular expressions that are matched with whole "/"-joined paths.

    Args:
        name: of the option that they come from, for the messages.
        patterns: the expressions.
        paths: of the parameters that they are for.

    Raises:
        ValueError: one is no regular expression, or matches no path; those that are nearest to it are named.
    """
    paths = list(paths)
    rules = []
    for pattern in patterns:
        try:
            rules.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"`{name}` has {pattern!r}, which is no regular expression: {error}.") from error
        if not any(rules[-1].fullmatch(path) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0)
            raise ValueError(
                f"`{name}` has {pattern!r}, which matches no parameter as a whole; near are {', '.join(near)}. "
                "End it in '.*' for all below a name."
            )
    return rules
