"""The compiled step: accumulation, precision, skipping, dropout, donation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.moshi.drawn import draw_config
from tests.training.examples import draw_batch, make_module, small_config
from transformers_moshi_flax.training.objective import ObjectiveConfig, metrics_of
from transformers_moshi_flax.training.optimizer import OptimizerConfig, make_optimizer
from transformers_moshi_flax.training.train_state import LossScale, TrainState, create_train_state, split_params
from transformers_moshi_flax.training.train_step import make_eval_step, make_train_step

CONFIG = small_config()
OBJECTIVE = ObjectiveConfig(first_codebook_weight=3.0)
OPTIMIZER = OptimizerConfig(learning_rate=0.01, schedule="constant")
LENGTHS = (6, 3, 0, 5)


class Run:
    """A module with its step and its first state, made anew at every call."""

    def __init__(self, config: Any = CONFIG, dtype: Any = jnp.float32, freeze: tuple[str, ...] = (), **kwargs: Any):
        self.module, params = make_module(config, dtype)
        self.dtype = dtype
        self.trainable, self.frozen = split_params(params, freeze)
        self.optimizer, schedule = make_optimizer(OPTIMIZER, 100, self.trainable)
        self.step = make_train_step(self.module, OBJECTIVE, self.optimizer, schedule, **kwargs)

    def state(self, seed: int = 0) -> TrainState:
        return create_train_state(self.trainable, self.frozen, self.optimizer, seed=seed, dtype=self.dtype)


@functools.cache
def run_of(dtype: Any = jnp.float32, accumulation_steps: int = 1) -> Run:
    """Shared by the tests, as every step compiles for seconds."""
    return Run(dtype=dtype, accumulation_steps=accumulation_steps)


@pytest.fixture(scope="module")
def plain() -> Run:
    return run_of()


def assert_same(ours: Any, theirs: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def gradients_of(state: TrainState) -> Any:
    """Of the first step, but for a factor: Adam's first moment after it."""
    return state.opt_state[1].mu


def test_accumulation_is_the_large_batch(plain: Run) -> None:
    """Rows of different lengths, so that the mean of the micro-batches' means would be another loss."""
    batch = draw_batch(CONFIG, LENGTHS, 6, seed=1)
    whole, metrics = plain.step(plain.state(), batch)
    parts, metrics_of_parts = run_of(accumulation_steps=2).step(plain.state(), batch)
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_of_parts[name], value, rtol=1e-6, err_msg=name)
    ours, theirs = flatten_dict(gradients_of(parts)), flatten_dict(gradients_of(whole))
    for path, gradient in theirs.items():
        np.testing.assert_allclose(ours[path], gradient, rtol=0, atol=1e-6 * np.abs(gradient).max(), err_msg=str(path))


def test_steps_learn_and_compile_once(plain: Run, count_compilations: Callable[[], int]) -> None:
    batch = draw_batch(CONFIG, LENGTHS, 6, seed=1)
    state, first = plain.step(plain.state(), batch)
    count_compilations()
    for _ in range(5):
        state, metrics = plain.step(state, batch)
    assert count_compilations() == 0
    assert metrics["loss"] < first["loss"]
    assert int(state.step) == 6
    assert {np.shape(value) for value in metrics.values()} == {()}
    np.testing.assert_allclose(metrics["learning_rate"], 0.01, rtol=1e-6)


def test_evaluation_has_the_figures_of_the_step(plain: Run) -> None:
    batch = draw_batch(CONFIG, LENGTHS, 6, seed=1)
    evaluated = metrics_of(make_eval_step(plain.module, OBJECTIVE)(plain.state(), batch), OBJECTIVE)
    _, metrics = plain.step(plain.state(), batch)
    for name, value in evaluated.items():
        np.testing.assert_allclose(value, metrics[name], rtol=1e-6, err_msg=name)


def test_the_state_is_donated(plain: Run) -> None:
    state = plain.state()
    plain.step(state, draw_batch(CONFIG, LENGTHS, 6))
    alive = [path for path, leaf in jax.tree_util.tree_leaves_with_path(state) if not leaf.is_deleted()]
    assert not alive


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_step_changes_nothing(plain: Run, value: float) -> None:
    """A parameter that is not finite makes loss and gradients so; repaired, the run goes on as if it had not been."""
    batch = draw_batch(CONFIG, LENGTHS, 6, seed=1)
    good, _ = plain.step(plain.state(), batch)
    before = jax.device_get(good)
    kernel = before.params["decoder"]["lm_head"]["kernel"].copy()
    kernel[0, 0] = value
    params = {**before.params, "decoder": {**before.params["decoder"], "lm_head": {"kernel": kernel}}}
    bad, metrics = plain.step(jax.device_put(before.replace(params=params)), batch)
    bad, metrics = plain.step(bad, batch)
    assert (int(metrics["skipped"]), int(metrics["bad_steps"]), int(metrics["bad_steps_in_a_row"])) == (1, 2, 2)
    assert_same(bad.params, params)
    assert_same(bad.opt_state, before.opt_state)
    assert int(bad.step) == 3

    repaired, metrics = plain.step(bad.replace(params=jax.device_put(before.params)), batch)
    unharmed, _ = plain.step(jax.device_put(before), batch)
    assert (int(metrics["skipped"]), int(metrics["bad_steps"]), int(metrics["bad_steps_in_a_row"])) == (0, 2, 0)
    assert_same(repaired.params, unharmed.params)
    assert_same(repaired.opt_state, unharmed.opt_state)


def test_frozen_parts_stay_and_cost_nothing(plain: Run) -> None:
    freeze = ("embed_tokens/.*", "decoder/model/.*")
    run = Run(freeze=freeze)
    batch = draw_batch(CONFIG, LENGTHS, 6, seed=1)
    state, _ = run.step(run.state(), batch)
    assert_same(state.frozen_params, run.frozen)
    assert set(flatten_dict(state.opt_state[1].mu)) == set(flatten_dict(run.trainable))
    # the gradient of the others is that of the whole
    whole, _ = plain.step(plain.state(), batch)
    some = flatten_dict(gradients_of(state), sep="/")
    everything = flatten_dict(gradients_of(whole), sep="/")
    factor = some["decoder/lm_head/kernel"] / everything["decoder/lm_head/kernel"]
    for path, gradient in some.items():
        limit = 1e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(gradient, everything[path] * np.median(factor), rtol=0, atol=limit, err_msg=path)
    programs = [each.step.lower(each.state(), batch).cost_analysis()["flops"] for each in (run, plain)]
    assert programs[0] < 0.8 * programs[1]


def test_dropout_depends_on_seed_step_and_micro_batch() -> None:
    run = Run(small_config(attention_dropout=0.5), accumulation_steps=2)
    row = draw_batch(CONFIG, (6,), 6)
    batch = {name: np.repeat(array, 2, axis=0) for name, array in row.items()}

    def loss(seed: int, step: int) -> float:
        _, metrics = run.step(run.state(seed).replace(step=jnp.int32(step)), batch)
        return float(metrics["loss"])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(plain: Run, dtype: Any) -> None:
    """Computation in half precision: float32 masters, gradients and figures, near those of float32."""
    batch = draw_batch(CONFIG, LENGTHS, 6, seed=1)
    run = run_of(dtype, accumulation_steps=2)
    with jax.numpy_dtype_promotion("strict"):
        state, metrics = run.step(run.state(), batch)
    assert int(metrics["skipped"]) == 0
    whole, expected = plain.step(plain.state(), batch)
    for name in ("loss", "text_loss", "audio_loss", "grad_norm"):
        assert metrics[name].dtype == jnp.float32
        np.testing.assert_allclose(metrics[name], expected[name], rtol=3e-2, err_msg=name)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    ours, theirs = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradients_of(s))]) for s in (state, whole))
    assert ours @ theirs > 0.99 * np.linalg.norm(ours) * np.linalg.norm(theirs)


def test_the_loss_scale_falls_until_gradients_fit() -> None:
    """Overflow halves the scale without counting as a bad step in a row; a loss that is not finite does count."""
    run = run_of(jnp.float16, accumulation_steps=2)
    batch = draw_batch(CONFIG, LENGTHS, 6, seed=1)
    start = run.state().replace(loss_scale=LossScale(scale=jnp.float32(2.0**40), good_steps=jnp.int32(0)))
    before = jax.device_get(start.params)
    state, metrics = run.step(start, batch)
    assert (int(metrics["skipped"]), int(metrics["bad_steps"]), int(metrics["bad_steps_in_a_row"])) == (1, 1, 0)
    assert metrics["loss_scale"] == 2.0**39 and np.isfinite(metrics["loss"])
    assert_same(state.params, before)
    while int(metrics["skipped"]):
        state, metrics = run.step(state, batch)
    assert 1 < metrics["loss_scale"] < 2.0**39 and int(state.loss_scale.good_steps) == 1
    assert np.any(state.params["decoder"]["lm_head"]["kernel"] != before["decoder"]["lm_head"]["kernel"])

    least = LossScale(scale=jnp.float32(LossScale.LEAST), good_steps=jnp.int32(0))
    nan = jax.tree.map(lambda leaf: leaf * np.nan, before)
    for scale in (state.loss_scale, least):
        _, metrics = run.step(run.state().replace(params=nan, loss_scale=scale), batch)
        assert int(metrics["bad_steps_in_a_row"]) == 1
        nan = jax.tree.map(lambda leaf: leaf * np.nan, before)


@settings(max_examples=2, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), frames=st.integers(2, 4), short=st.booleans())
def test_drawn_configurations(seed: int, frames: int, short: bool) -> None:
    """Finite gradients, and with accumulation the loss that evaluation without it has."""
    config = draw_config(seed)
    config.num_hidden_layers = config.depth_decoder_config.num_hidden_layers = 1
    batch = draw_batch(config, (frames, frames - short, frames, 1), frames, seed)
    run = Run(config, accumulation_steps=2)
    expected = metrics_of(make_eval_step(run.module, OBJECTIVE)(run.state(), batch), OBJECTIVE)
    _, metrics = run.step(run.state(), batch)
    assert int(metrics["skipped"]) == 0 and metrics["grad_norm"] > 0
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)


def test_wrong_batches(plain: Run) -> None:
    batch = draw_batch(CONFIG, LENGTHS, 6)
    with pytest.raises(ValueError, match="`accumulation_steps` must be at least 1, but is 0"):
        Run(accumulation_steps=0)
    with pytest.raises(ValueError, match="`batch` has 4 rows, which cannot be dealt into `accumulation_steps` = 3"):
        Run(accumulation_steps=3).step(plain.state(), batch)
    with pytest.raises(ValueError, match="`batch` has 1 frames a row"):
        plain.step(plain.state(), {name: array[..., :1] for name, array in batch.items()})
    del batch["text_labels"]
    with pytest.raises(ValueError, match="`batch` lacks text_labels; it has attention_mask"):
        plain.step(plain.state(), batch)
