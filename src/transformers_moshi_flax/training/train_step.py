"""One step of training as one program: gradients of all micro-batches, the update, and what is reported.

A step whose loss or gradients are not finite changes no parameter and nothing of the optimizer; it is counted, and the
next step gets other data and other dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ..ops.compiler_options import cpu_options
from .objective import Batch, Objective
from .train_state import LossScale, TrainState, merge_params

State = TypeVar("State", bound=TrainState)


def make_train_step(
    module: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Callable[[Any], Array],
    *,
    accumulation_steps: int = 1,
    state_shardings: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Compiles (at the first call with a batch shape) the step of training.

    Args:
        module: such as a ``FlaxMoshiForConditionalGenerationModule``; its ``dtype`` is that of the computation.
        objective: the loss, such as an ``ObjectiveConfig``.
        optimizer, schedule: from ``make_optimizer``.
        accumulation_steps: into how many micro-batches, run one after another, the rows of a batch are dealt. The
            update is that of the whole batch.
        state_shardings: a ``TrainState`` of the shardings that the state has and keeps; by default, XLA chooses.

    Returns:
        A function ``(state, batch) -> (state, metrics)``. It consumes the state that it is given. The metrics, scalars
        on the device, are those of the objective before the update, with ``grad_norm`` (before clipping),
        ``learning_rate``, ``skipped`` (1 if no update was made), ``bad_steps``, ``bad_steps_in_a_row`` and, for
        float16, ``loss_scale``.

    Raises:
        ValueError: ``accumulation_steps`` is below 1; when called: a batch lacks arrays, or its rows cannot be dealt.
    """
    if accumulation_steps < 1:
        raise ValueError(f"`accumulation_steps` must be at least 1, but is {accumulation_steps}.")

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        batch = _checked(batch, accumulation_steps, objective)
        totals = objective.totals(module, batch)
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale
        step_rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def scaled_loss(params: Any, part: Batch, index: Any) -> tuple[Array, tuple[Array, dict[str, Array]]]:
            everything = merge_params(params, state.frozen_params)
            dropout_rng = jax.random.fold_in(step_rng, index)
            loss, sums = objective.loss(module, everything, part, totals, dropout_rng, train=True)
            return loss * jnp.asarray(scale, loss.dtype), (loss, sums)

        def gradients_of(part: Batch, index: Any) -> Any:
            gradients, (loss, sums) = jax.grad(scaled_loss, has_aux=True)(state.params, part, index)
            if state_shardings is not None:  # each device adds up the gradients of its own parameters alone
                gradients = jax.lax.with_sharding_constraint(gradients, state_shardings.params)
            return gradients, loss, sums

        if accumulation_steps == 1:
            gradients, loss, sums = gradients_of(batch, 0)
        else:
            parts = jax.tree.map(lambda array: in_micro_batches(array, accumulation_steps), batch)
            first = jax.tree.map(lambda array: array[0], parts)
            zeros = jax.tree.map(
                lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(gradients_of, first, 0)
            )

            def add(added: Any, part_and_index: tuple[Batch, Any]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, added, gradients_of(*part_and_index)), None

            indices = jnp.arange(accumulation_steps, dtype=jnp.int32)
            (gradients, loss, sums), _ = jax.lax.scan(add, zeros, (parts, indices))

        if state.loss_scale is not None:
            gradients = jax.tree.map(lambda leaf: leaf / jnp.asarray(scale, leaf.dtype), gradients)
        grad_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        learning_rate = schedule(state.step - state.bad_steps)

        def update(round: Any, values: tuple[Any, Any]) -> tuple[Any, Any]:
            params, opt_state = values
            # products of gradients alone would be taken out of the loop, and kept, two for each parameter
            own_gradients, _ = jax.lax.optimization_barrier((gradients, round))
            with jax.numpy_dtype_promotion("standard"):  # optax mixes floats and counts
                updates, opt_state = optimizer.update(own_gradients, opt_state, params, grad_norm=grad_norm)
            return optax.apply_updates(params, updates), opt_state

        # a loop of one round or none changes its values in place; a choice afterwards would need both
        rounds = finite.astype(jnp.int32)
        params, opt_state = jax.lax.fori_loop(0, rounds, update, (state.params, state.opt_state))
        state, counts = counted(state, finite, jnp.isfinite(loss))
        state = state.replace(params=params, opt_state=opt_state)
        metrics = {**objective.metrics(sums), "grad_norm": grad_norm, "learning_rate": learning_rate, **counts}
        return state, metrics

    outputs: dict[str, Any] = {} if state_shardings is None else {"out_shardings": (state_shardings, None)}
    return jax.jit(on_mesh(step, state_shardings), donate_argnums=0, compiler_options=compiler_options(), **outputs)


def compiler_options() -> dict[str, str]:
    """Options for the step on the default platform.

    On CPUs operations are to be ordered by the memory that they need; the default, which lets as many as possible run
    side by side, keeps a fifth more and is no faster (``docs/notes/performance.md``).
    """
    return cpu_options("xla_cpu_enable_concurrency_optimized_scheduler", "false")


def make_eval_step(
    module: nn.Module, objective: Objective, *, state_shardings: Any = None
) -> Callable[[TrainState, Batch], dict[str, Array]]:
    """Compiles the evaluation of a batch, ``(state, batch) -> sums``; arguments as of :func:`make_train_step`.

    The sums of all batches are to be added, then the objective's ``metrics`` makes the figures of the whole split.
    Rows that are padding add nothing.
    """

    def step(state: TrainState, batch: Batch) -> dict[str, Array]:
        return objective.loss(module, state.all_params, _checked(batch, 1, objective))[1]

    return jax.jit(on_mesh(step, state_shardings))


def on_mesh(step: Callable[..., Any], state_shardings: Any) -> Callable[..., Any]:
    """``step`` traced with the mesh of the state set, so that layers say how their rows are split."""
    if state_shardings is None:
        return step
    mesh = jax.tree.leaves(state_shardings)[0].mesh.abstract_mesh

    def step_on_mesh(state: TrainState, batch: Batch) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return step(state, batch)

    return step_on_mesh


def _checked(batch: Batch, accumulation_steps: int, objective: Objective) -> dict[str, Array]:
    """The arrays that the objective reads, if they are there and can be dealt."""
    batch = objective.arrays(batch)
    rows, frames = batch["input_ids"].shape
    if rows % accumulation_steps:
        raise ValueError(
            f"`batch` has {rows} rows, which cannot be dealt into `accumulation_steps` = {accumulation_steps} "
            "micro-batches; use a multiple of it."
        )
    if frames < 2:
        raise ValueError(f"`batch` has {frames} frames a row, of which none is predicted; give at least 2.")
    return batch


def in_micro_batches(array: Array, parts: int) -> Array:
    """Rows dealt like cards, ``(parts, rows / parts, ...)``: each device keeps its own."""
    return jnp.moveaxis(array.reshape(-1, parts, *array.shape[1:]), 1, 0)


def counted(state: State, finite: Array, loss_finite: Array) -> tuple[State, Mapping[str, Array]]:
    """The state with its counters and loss scale moved on, and these as metrics."""
    bad = ~finite
    loss_scale = state.loss_scale
    if loss_scale is not None:
        # gradients that overflow are how the scale is found, as long as it can still fall
        bad &= ~loss_finite | (loss_scale.scale <= LossScale.LEAST)
        loss_scale = loss_scale.adjusted(finite)
    in_a_row = jnp.where(bad, state.bad_steps_in_a_row + 1, jnp.where(finite, 0, state.bad_steps_in_a_row))
    state = state.replace(
        step=state.step + 1,
        bad_steps=state.bad_steps + (~finite).astype(jnp.int32),
        bad_steps_in_a_row=in_a_row,
        loss_scale=loss_scale,
    )
    counts = {
        "skipped": (~finite).astype(jnp.int32),
        "bad_steps": state.bad_steps,
        "bad_steps_in_a_row": state.bad_steps_in_a_row,
    }
    return state, counts if loss_scale is None else {**counts, "loss_scale": loss_scale.scale}
