"""Loss and gradients of packed rows against upstream's model, which reads every text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from torch.nn import functional

from tests.configs import tiny_llama_config, tiny_moshi_config
from tests.models.llama.pairs import tiny_pair
from tests.torch_oracle import Pair, assert_close, double_oracle
from transformers_moshi_flax import FlaxLlamaForCausalLM, FlaxMoshiForCausalLM
from transformers_moshi_flax.training.scanned_layers import stack_layers, unstack_layers
from transformers_moshi_flax.training.text.objective import TextObjective
from transformers_moshi_flax.training.text.packing import PackingPlan, RowMaker
from transformers_moshi_flax.training.text.texts import Texts, joined

OBJECTIVE = TextObjective()
LENGTHS = (9, 4, 13, 2, 6)


@pytest.fixture(scope="module")
def texts() -> Texts:
    draw = np.random.default_rng(0)
    return joined([draw.integers(1, 40, length).astype(np.int32) for length in LENGTHS])


@pytest.fixture(scope="module")
def batch(texts: Texts) -> dict[str, np.ndarray]:
    """Four rows, one of them of padding alone; no text is cut."""
    plan = PackingPlan(texts, batch_size=4, max_length=12, shuffle=False)
    assert plan.rows == 3
    return RowMaker(texts, plan, (0, 4))(0)


def upstream_loss(model: Any, texts: Texts) -> torch.Tensor:
    total = torch.zeros((), dtype=model.dtype)
    for begin, end in zip(texts.begins, texts.ends):
        ids = torch.tensor(texts.tokens[None, begin:end]).long()
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    return total / (len(texts.tokens) - len(texts))


def assert_upstreams(pair: Pair, texts: Texts, batch: dict[str, np.ndarray], tol: float) -> None:
    def loss(params: dict[str, Any]) -> jax.Array:
        return OBJECTIVE.loss(pair.ours.module, params, batch)[0]

    found, gradients = jax.jit(jax.value_and_grad(loss))(pair.ours.params)
    theirs = upstream_loss(pair.theirs, texts)
    theirs.backward()
    assert_close(found, theirs, tol / 100 if tol < 1e-6 else tol, "loss")
    expected = {name: weight.grad.numpy() for name, weight in pair.theirs.named_parameters()}
    for path, gradient in flatten_dict(gradients).items():
        name = ".".join((*path[:-1], "bias" if path[-1] == "bias" else "weight"))
        assert_close(gradient.T if path[-1] == "kernel" else gradient, expected.pop(name), tol, name)
    assert not expected


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_loss_and_gradients_are_upstreams(
    x64: None, texts: Texts, batch: dict[str, np.ndarray], tmp_path: Path, model_type: str
) -> None:
    """Gemma has windows that are shorter than the texts, and a tied head."""
    pair = tiny_pair(model_type, tmp_path, "float64")
    with double_oracle():
        assert_upstreams(pair, texts, batch, 1e-8)


def test_loss_and_gradients_in_float32(texts: Texts, batch: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert_upstreams(tiny_pair("qwen2", tmp_path, num_hidden_layers=2), texts, batch, 1e-5)


def test_layers_in_a_loop(texts: Texts, batch: dict[str, np.ndarray]) -> None:
    """Loss and gradients are those of layers one after another, recomputed or not."""
    model = FlaxLlamaForCausalLM(tiny_llama_config("llama"), seed=1)

    def run(params: dict[str, Any], **fields: bool) -> tuple[Any, Any]:
        module = model.module.clone(**fields)
        return jax.jit(jax.value_and_grad(lambda params: OBJECTIVE.loss(module, params, batch)[0]))(params)

    loss, gradients = run(model.params)
    stacked = stack_layers(model.params)
    assert set(stacked["model"]["layers"]) == {"stacked"}
    looped, of_loop = run(stacked, scan_layers=True, gradient_checkpointing=True)
    np.testing.assert_allclose(looped, loss, rtol=1e-6)
    jax.tree.map(lambda one, other: assert_close(one, other, 1e-5), unstack_layers(of_loop), gradients)
    module = FlaxLlamaForCausalLM(tiny_llama_config("gemma2"), _do_init=False).module.clone(scan_layers=True)
    with pytest.raises(ValueError, match="`layer_types` has several kinds"):
        module.init(jax.random.key(0), jnp.asarray(batch["input_ids"]))
    with pytest.raises(ValueError, match="`cache` cannot be used with `scan_layers`"):
        model.module.clone(scan_layers=True).apply(
            {"params": stacked}, jnp.asarray(batch["input_ids"]), cache=model.init_cache(4, 12)
        )


@pytest.fixture(scope="module")
def moshi() -> FlaxMoshiForCausalLM:
    return FlaxMoshiForCausalLM(tiny_moshi_config(num_hidden_layers=1), seed=1)


def test_moshis_backbone_reads_every_text_alone(
    moshi: FlaxMoshiForCausalLM, texts: Texts, batch: dict[str, np.ndarray]
) -> None:
    alone = jax.jit(lambda ids: moshi(ids).logits)
    totals, right = 0.0, 0
    for begin, end in zip(texts.begins, texts.ends):
        ids = np.pad(texts.tokens[begin:end], (0, max(LENGTHS) - (end - begin)))
        logits = np.asarray(alone(ids[None]))[0, : end - begin - 1]
        labels = texts.tokens[begin + 1 : end]
        totals -= np.asarray(jax.nn.log_softmax(logits))[np.arange(len(labels)), labels].sum()
        right += int((logits.argmax(-1) == labels).sum())
    predicted = len(texts.tokens) - len(texts)
    loss, sums = jax.jit(lambda batch: OBJECTIVE.loss(moshi.module, moshi.params, batch))(batch)
    metrics = OBJECTIVE.metrics(sums)
    for value in (loss, metrics["loss"], np.log(metrics["perplexity"])):
        np.testing.assert_allclose(value, totals / predicted, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], right / predicted, rtol=1e-6)
    assert metrics["tokens"] == predicted


def test_parts_of_a_batch_add_up(moshi: FlaxMoshiForCausalLM, batch: dict[str, np.ndarray]) -> None:
    """Each has a share of the loss of the whole, however many of its tokens it has."""
    totals = OBJECTIVE.totals(moshi.module, batch)
    run = jax.jit(lambda batch: OBJECTIVE.loss(moshi.module, moshi.params, batch, totals))
    halves = [run({name: array[rows] for name, array in batch.items()}) for rows in ([0, 3], [1, 2])]
    whole = jax.jit(lambda batch: OBJECTIVE.loss(moshi.module, moshi.params, batch))(batch)
    np.testing.assert_allclose(sum(loss for loss, _ in halves), whole[0], rtol=1e-6)
    added = jax.tree.map(jnp.add, halves[0][1], halves[1][1])
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), added, whole[1])


def test_what_is_missing_is_named(batch: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="lacks segment_ids, labels; it has input_ids"):
        OBJECTIVE.arrays({"input_ids": batch["input_ids"]})
