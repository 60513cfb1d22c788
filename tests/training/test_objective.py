"""Loss, gradients and metrics of a batch against PyTorch constructions, in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import MoshiForConditionalGeneration

from tests.models.moshi.next_frames import next_labels, upstream_logits
from tests.torch_oracle import Pair, assert_close, block_params, double_oracle, make_pair
from tests.training.examples import draw_batch, make_module, small_config
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.training.losses import audio_weights, divided, text_weights, token_losses, weighted_sum
from transformers_moshi_flax.training.objective import (
    ObjectiveConfig,
    check_padding_ids,
    metrics_of,
    objective_loss,
    weight_totals,
)

PARTS = ("embed_tokens", "decoder", "depth_decoder")
FRAMES = 6


def kyutai_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    mode: str,
    first_codebook_weight_multiplier: float = 1.0,
    text_padding_weight: float = 1.0,
    text_padding_ids: tuple[int, ...] = (),
) -> torch.Tensor:
    """The weighting of Kyutai's fine-tuning: ``(batch, streams, frames, vocabulary)`` against -100-masked targets."""
    mask = target != -100
    weights = mask.to(logits.dtype)
    if mode == "audio":
        weights[:, 0] *= first_codebook_weight_multiplier
    else:
        for token in text_padding_ids:
            weights[target == token] *= text_padding_weight
    target = torch.where(mask, target, 0)
    losses = functional.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view_as(weights)
    return torch.where(weights > 0, losses * weights, 0).sum() / weights.sum()


def upstream_loss(model: Any, batch: dict[str, np.ndarray], objective: ObjectiveConfig) -> torch.Tensor:
    """The whole objective on upstream's modules, with gradients."""
    text_logits, audio_logits = upstream_logits(model, batch)
    text, audio = next_labels(batch, model.config.audio_vocab_size)
    text_loss = kyutai_loss(
        text_logits[None, None],
        text[None, None],
        "text",
        text_padding_weight=objective.text_padding_weight,
        text_padding_ids=objective.text_padding_ids,
    )
    audio_loss = kyutai_loss(
        audio_logits.transpose(0, 1)[None], audio.T[None], "audio", objective.first_codebook_weight
    )
    return objective.text_weight * text_loss + objective.audio_weight * audio_loss


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with jax.enable_x64(True):
        yield make_pair(
            MoshiForConditionalGeneration,
            FlaxMoshiForConditionalGeneration,
            small_config(),
            tmp_path_factory.mktemp("objective"),
            dtype="float64",
            seed=4,
        )


@functools.cache
def loss_and_gradients(pair: Pair, objective: ObjectiveConfig) -> Callable[..., Any]:
    """Compiled, of parameters and batch; Mimi is not needed."""

    def loss(params: dict[str, Any], batch: dict[str, Any]) -> jax.Array:
        return objective_loss(pair.ours.module, params, batch, objective)[0]

    return jax.jit(jax.value_and_grad(loss))


CASES = {
    "defaults": (ObjectiveConfig(), False),
    "weights": (ObjectiveConfig(0.7, 1.6, 0.3, 100.0, (3, 0, 7)), True),
    "padding text and first codebook left out": (ObjectiveConfig(1.0, 0.5, 0.0, 0.0), True),
}


@pytest.mark.parametrize(("objective", "unknown"), CASES.values(), ids=CASES)
def test_loss_and_gradients_are_upstreams(pair: Pair, objective: ObjectiveConfig, unknown: bool) -> None:
    """With rows of different lengths and one of padding alone, which upstream does not see."""
    batch = draw_batch(pair.ours.config, (6, 4, 0, 2), FRAMES, seed=1, unknown=unknown)
    loss, gradients = loss_and_gradients(pair, objective)({part: pair.ours.params[part] for part in PARTS}, batch)
    with double_oracle():
        pair.theirs.zero_grad()
        theirs = upstream_loss(pair.theirs, {name: array[[0, 1, 3]] for name, array in batch.items()}, objective)
        theirs.backward()
    assert_close(loss, theirs, 1e-10, "loss")
    expected = block_params(
        pair.theirs, lambda weight: torch.zeros_like(weight) if weight.grad is None else weight.grad
    )
    largest = max(float(jnp.abs(leaf).max()) for part in PARTS for leaf in jax.tree.leaves(expected[part]))
    for part in PARTS:
        leaves = dict(jax.tree_util.tree_leaves_with_path(gradients[part]))
        for path, gradient in jax.tree_util.tree_leaves_with_path(expected[part]):
            if np.abs(gradient).max() < 1e-12 * largest:
                assert np.abs(leaves.pop(path)).max() < 1e-12 * largest, path
            else:
                assert_close(leaves.pop(path), gradient, 1e-8, part + jax.tree_util.keystr(path))
        assert not leaves


def test_weights_are_kyutais(x64: None) -> None:
    """The formulas on the same logits: text with three kinds of padding ids, codes with a weighted codebook."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 9, 3, 11)), rng.integers(0, 11, (2, 9, 3)).astype(np.int32)
    labels[rng.random(labels.shape) < 0.3] = -100

    def ours(logits: np.ndarray, labels: np.ndarray, weights: jax.Array) -> jax.Array:
        losses, _ = token_losses(jnp.asarray(logits), jnp.asarray(labels))
        return divided(weighted_sum(losses, weights), weights.sum())

    for weight in (0.0, 0.25, 1.0, 100.0):
        audio = kyutai_loss(
            torch.from_numpy(logits).transpose(1, 2), torch.from_numpy(labels).long().transpose(1, 2), "audio", weight
        )
        assert_close(ours(logits, labels, audio_weights(jnp.asarray(labels), weight)), audio, 1e-12)
        text = kyutai_loss(
            torch.from_numpy(logits[:, None, :, 0]),
            torch.from_numpy(labels[:, None, :, 0]).long(),
            "text",
            text_padding_weight=weight,
            text_padding_ids=(3, 0, 5),
        )
        weights = text_weights(jnp.asarray(labels[..., 0]), weight, (3, 0, 5))
        assert_close(ours(logits[:, :, 0], labels[..., 0], weights), text, 1e-12)


def test_what_has_no_weight_may_be_infinite() -> None:
    losses, weights = jnp.array([1.0, jnp.inf, jnp.nan]), jnp.array([2.0, 0.0, 0.0])
    assert weighted_sum(losses, weights) == 2.0


def test_metrics() -> None:
    """Against counts on the logits of the model's own forward."""
    config = small_config()
    module, params = make_module(config)
    batch = draw_batch(config, (5, 3), 5, seed=2, unknown=True)
    objective = ObjectiveConfig(text_weight=2.0, text_padding_weight=0.25, first_codebook_weight=3.0)
    outputs = jax.jit(lambda batch: module.apply({"params": params}, **batch))(batch)
    # labels that are often right
    text, codes = (np.asarray(logits).argmax(-1) for logits in (outputs.logits[:, :-1], outputs.audio_logits))
    batch["text_labels"][0, 1:4] = text[0, 0:3]
    batch["text_labels"][1, 2] = 3
    outputs = jax.jit(lambda batch: module.apply({"params": params}, **batch))(batch)
    text, codes = (np.asarray(logits).argmax(-1) for logits in (outputs.logits[:, :-1], outputs.audio_logits))

    _, sums = jax.jit(lambda batch: objective_loss(module, params, batch, objective))(batch)
    metrics = {name: float(value) for name, value in metrics_of(sums, objective).items()}

    labels = batch["audio_labels"]
    targets = np.concatenate([labels[:, :1, 1:], labels[:, 1:, :-1]], axis=1).transpose(0, 2, 1)
    counts = (batch["attention_mask"][:, 1:] == 1)[..., None] & (targets != -100) & (targets != 32)
    for k in range(3):
        expected = (codes == targets)[..., k][counts[..., k]].mean()
        np.testing.assert_allclose(metrics[f"audio_accuracy_codebook_{k}"], expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["audio_accuracy"], (codes == targets)[counts].mean(), rtol=1e-6)
    words = batch["text_labels"][:, 1:]
    right = text == words
    np.testing.assert_allclose(metrics["text_accuracy"], right[words != -100].mean(), rtol=1e-6)
    spoken = (words != -100) & (words != 3) & (words != 0)
    np.testing.assert_allclose(metrics["text_accuracy_without_padding"], right[spoken].mean(), rtol=1e-6)
    assert 0 < metrics["text_accuracy"] < 1
    assert metrics["frames"] == 4 + 2
    np.testing.assert_allclose(metrics["loss"], 2 * metrics["text_loss"] + metrics["audio_loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["text_perplexity"], np.exp(metrics["text_loss"]), rtol=1e-5)
    np.testing.assert_allclose(metrics["audio_perplexity"], np.exp(metrics["audio_loss"]), rtol=1e-5)


def test_sums_add_up_over_batches_with_other_rows() -> None:
    """The metrics of a split are those of all its rows in one batch."""
    config = small_config()
    module, params = make_module(config)
    whole = draw_batch(config, (5, 3, 4, 0), 5, seed=3)
    objective = ObjectiveConfig()
    evaluate = jax.jit(lambda batch: objective_loss(module, params, batch, objective)[1])
    parts = [evaluate({name: array[rows] for name, array in whole.items()}) for rows in ([0, 1], [2, 3])]
    together = metrics_of(jax.tree.map(jnp.add, *parts), objective)
    for name, value in metrics_of(evaluate(whole), objective).items():
        np.testing.assert_allclose(together[name], value, rtol=1e-6, err_msg=name)


def test_what_has_no_weight_has_no_gradients() -> None:
    """The depth decoder costs its forward pass alone, for the metrics."""
    config = small_config()
    module, params = make_module(config)
    batch = draw_batch(config, (5, 3), 5)

    def compiled(audio_weight: float) -> Any:
        objective = ObjectiveConfig(audio_weight=audio_weight)
        gradients = jax.grad(lambda params: objective_loss(module, params, batch, objective), has_aux=True)
        return jax.jit(gradients).lower(params).compile()

    text, both = compiled(0.0), compiled(1.0)
    gradients, sums = text(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients["depth_decoder"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients["decoder"]))
    assert sums["audio_loss"] > 0
    # of three passes through the depth decoder one is left, beside three through the backbone
    assert text.cost_analysis()["flops"] < 0.75 * both.cost_analysis()["flops"]


def test_nothing_to_predict_is_no_loss(pair: Pair) -> None:
    batch = draw_batch(pair.ours.config, (0, 1, 0, 1), FRAMES)
    params = {part: pair.ours.params[part] for part in PARTS}
    loss, gradients = loss_and_gradients(pair, ObjectiveConfig())(params, batch)
    assert loss == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))
    totals = weight_totals(pair.ours.module, batch, ObjectiveConfig())
    assert totals["text"] == totals["audio"] == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"text_weight": -1.0}, "`text_weight` must be a finite number, at least 0, but is -1.0"),
        ({"first_codebook_weight": float("nan")}, "`first_codebook_weight`"),
        ({"text_weight": 0.0, "audio_weight": 0.0}, "both 0"),
    ],
)
def test_wrong_weights(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ObjectiveConfig(), **wrong)


@pytest.mark.parametrize("token", [-1, 60, 70_000])
def test_padding_ids_are_text_tokens(token: int) -> None:
    check_padding_ids(ObjectiveConfig(text_padding_ids=(3, 59)), 60)
    with pytest.raises(ValueError, match=rf"`text_padding_ids` has \[{token}\], but the text tokens .* 0 to 59"):
        check_padding_ids(ObjectiveConfig(text_padding_ids=(3, token)), 60)
