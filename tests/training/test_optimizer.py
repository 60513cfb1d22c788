"""Updates against PyTorch's AdamW and clipping in float64; learning rates against PyTorch's and transformers'."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from transformers import get_linear_schedule_with_warmup as get_linear_schedule

from tests.torch_oracle import assert_close
from transformers_moshi_flax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

SHAPES = {
    "decoder": {
        "lm_head": {"kernel": (5, 7)},
        "model": {"embed_tokens": {"embedding": (7, 5)}, "norm": {"scale": (5,)}},
        "layers": {"0": {"kernel": (4, 3), "bias": (3,)}},
    }
}


def draw(seed: int, size: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda shape: size * rng.normal(size=shape), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def torch_run(config: OptimizerConfig, params: Any, gradients: list[Any], multipliers: dict[str, float]) -> Any:
    """The same run with PyTorch: a group for every leaf, with its learning rate and weight decay."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = ["/".join(key.key for key in path) for path, _ in leaves]
    tensors = [torch.nn.Parameter(torch.from_numpy(leaf.copy())) for _, leaf in leaves]
    groups = [
        {
            "params": [tensor],
            "lr": config.learning_rate * multipliers.get(name, 1.0),
            "weight_decay": config.weight_decay if name.endswith("kernel") else 0.0,
        }
        for name, tensor in zip(names, tensors)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.b1, config.b2), eps=config.eps)
    for tree in gradients:
        for tensor, gradient in zip(tensors, jax.tree.leaves(tree)):
            tensor.grad = torch.from_numpy(gradient.copy())
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(tensors, config.max_grad_norm)
        optimizer.step()
    return jax.tree.unflatten(jax.tree.structure(params), [tensor.detach() for tensor in tensors])


@pytest.mark.parametrize("max_grad_norm", [0.0, 3.0])
def test_updates_are_those_of_pytorch(x64: None, max_grad_norm: float) -> None:
    """Seven steps with gradients above and below the norm, learning rates by path, decay of kernels alone."""
    config = OptimizerConfig(
        learning_rate=0.03,
        weight_decay=0.2,
        max_grad_norm=max_grad_norm,
        schedule="constant",
        learning_rate_multipliers={r"decoder/lm_head/.*": 0.25, r".*/embedding": 3.0, r".*/(embedding|scale)": 0.5},
    )
    multipliers = {
        "decoder/lm_head/kernel": 0.25,
        "decoder/model/embed_tokens/embedding": 3.0,
        "decoder/model/norm/scale": 0.5,
    }
    params, gradients = draw(0), [draw(step, size) for step, size in enumerate((1, 0.1, 2, 0.01, 5, 1, 0.3), 1)]
    optimizer, _ = make_optimizer(config, 10, params)
    ours, state = jax.tree.map(jnp.asarray, params), optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
    theirs = torch_run(config, params, gradients, multipliers)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), ours, theirs)


def test_weight_decay_leaves_norms_biases_and_embeddings_alone() -> None:
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant")
    params = draw(0)
    optimizer, _ = make_optimizer(config, 10, params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    decoder = updates["decoder"]
    assert np.any(decoder["lm_head"]["kernel"]) and np.any(decoder["layers"]["0"]["kernel"])
    assert not np.any(decoder["layers"]["0"]["bias"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(decoder["model"]))


def rates(scheduler: Any, steps: int) -> list[float]:
    """The learning rate of every step of a PyTorch scheduler."""
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_schedules_are_those_of_transformers(x64: None, schedule: str, warmup: int) -> None:
    steps = 25
    make = {
        "constant": lambda optimizer: get_constant_schedule_with_warmup(optimizer, warmup),
        "linear": lambda optimizer: get_linear_schedule(optimizer, warmup, steps),
        "cosine": lambda optimizer: get_cosine_schedule_with_warmup(optimizer, warmup, steps),
    }[schedule]
    theirs = rates(make(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)), steps)
    ours = make_schedule(OptimizerConfig(learning_rate=0.3, schedule=schedule, warmup_steps=warmup), steps)
    np.testing.assert_allclose(ours(jnp.arange(steps)), theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("steps", "pct_start"), [(100, 0.05), (40, 0.3), (10, 0.05), (7, 0.5), (20, 0.9)])
def test_one_cycle_is_that_of_pytorch(x64: None, steps: int, pct_start: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = rates(torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=steps, pct_start=pct_start), steps)
    ours = make_schedule(OptimizerConfig(learning_rate=0.3, pct_start=pct_start), steps)
    np.testing.assert_allclose(ours(jnp.arange(steps)), theirs, rtol=1e-12)


def test_schedules_end_and_are_finite() -> None:
    for schedule in ("linear", "cosine"):
        rate = make_schedule(OptimizerConfig(learning_rate=0.3, schedule=schedule, final_learning_rate=0.1), 20)
        np.testing.assert_allclose([rate(0), rate(20), rate(10**6)], [0.3, 0.1, 0.1], rtol=1e-6)
    for steps in (1, 2, 20):
        for pct_start in (0.0, 0.05, 0.5, 1.0):
            rate = make_schedule(OptimizerConfig(learning_rate=0.3, pct_start=pct_start), steps)
            found = np.asarray(rate(np.arange(steps + 5)))
            assert np.isfinite(found).all() and (found > 0).all() and (found <= 0.3 + 1e-7).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": -1e-5}, "`learning_rate` must be a finite number, at least 0, but is -1e-05"),
        ({"weight_decay": math.inf}, "`weight_decay`"),
        ({"b2": 1.0}, "`b2` must be at least 0 and below 1.0, but is 1.0"),
        ({"pct_start": 1.5}, "`pct_start` must be from 0 to 1, but is 1.5"),
        ({"schedule": "cosin"}, "`schedule` must be one of constant, linear, cosine, one_cycle, but is 'cosin'"),
        ({"warmup_steps": 3}, "`warmup_steps` is 3, but one_cycle warms up by `pct_start`"),
        ({"schedule": "constant", "final_learning_rate": 0.1}, "`final_learning_rate` is 0.1, but constant"),
        ({"learning_rate_multipliers": {"a": -1.0}}, "learning_rate_multipliers.'a'.` must be"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(OptimizerConfig(), **wrong)


def test_warmup_must_fit_the_steps() -> None:
    with pytest.raises(ValueError, match=r"`steps` must be at least 1 and above `warmup_steps` \(5\), but is 5"):
        make_schedule(OptimizerConfig(schedule="linear", warmup_steps=5), 5)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "decoder/lm_haed/.*",
            "'decoder/lm_haed/.*', which matches no .*; near are decoder/lm_head/kernel",
        ),
        ("decoder/lm_head", "decoder/lm_head/kernel.*End it in '.\\*'"),
        ("decoder/(", "which is no regular expression"),
    ],
)
def test_wrong_paths(pattern: str, message: str) -> None:
    config = OptimizerConfig(learning_rate_multipliers={pattern: 2.0})
    with pytest.raises(ValueError, match=message):
        make_optimizer(config, 10, draw(0))


def test_multipliers_that_never_count_are_refused() -> None:
    later = {"decoder/lm_head/.*": 2.0, "decoder/.*": 0.5}
    make_optimizer(OptimizerConfig(learning_rate_multipliers=later), 10, draw(0))
    earlier = dict(reversed(later.items()))
    with pytest.raises(ValueError, match=r"has 'decoder/lm_head/\.\*', which never counts.*Put it first"):
        make_optimizer(OptimizerConfig(learning_rate_multipliers=earlier), 10, draw(0))
