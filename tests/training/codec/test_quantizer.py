"""Codebooks that follow latents: next to plain NumPy, to Kyutai's own class, and to the codec that uses them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from moshi.quantization import core_vq

from tests.configs import tiny_mimi_config
from transformers_moshi_flax import FlaxMimiModel
from transformers_moshi_flax.training.codec.evaluation import decoded_latents
from transformers_moshi_flax.training.codec.quantizer import (
    BRANCHES,
    QuantizerConfig,
    Statistics,
    code_figures,
    is_started,
    quantize,
    quantized_codes,
    started,
    unquantized,
    unstarted,
    updated,
)

CONFIG = tiny_mimi_config(num_quantizers=4, codebook_size=8, codebook_dim=6, vector_quantization_hidden_dimension=6)
PLAIN = QuantizerConfig(dropout=0.0, bypass=0.0)
ENTRIES, DIM = 8, 6


def draw_quantizer(seed: int = 0) -> dict[str, Any]:
    """Parameters of the quantizer, with codebooks of drawn entries."""
    shapes = FlaxMimiModel(CONFIG, _do_init=False).params_shape_tree["quantizer"]
    rng = np.random.default_rng(seed)
    flat = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in flatten_dict(shapes).items()}
    flat = {path: np.abs(leaf) + 0.5 if path[-1] == "cluster_usage" else leaf for path, leaf in flat.items()}
    flat = {path: np.ones_like(leaf) if path[-1] == "initialized" else leaf for path, leaf in flat.items()}
    return unflatten_dict(flat)


def draw_latents(rows: int = 3, frames: int = 5, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, frames, CONFIG.hidden_size), np.float32)


def codebook(quantizer: Any, branch: int, name: str) -> dict[str, Any]:
    return quantizer[BRANCHES[branch]]["layers"][name]["codebook"]


def test_codes_and_latents_are_those_of_mimi() -> None:
    quantizer, latents = jax.tree.map(jnp.asarray, draw_quantizer()), jnp.asarray(draw_latents())
    module = FlaxMimiModel(CONFIG, _do_init=False).module

    def of_mimi(module: Any, method: str, *args: Any) -> Any:
        return getattr(module.quantizer, method)(*args)

    variables = {"params": {"quantizer": quantizer}}
    expected = module.apply(variables, "encode", latents, method=of_mimi)
    codes = quantized_codes(quantizer, latents, CONFIG)
    np.testing.assert_array_equal(codes, expected)
    decoded = module.apply(variables, "decode", expected, method=of_mimi)
    np.testing.assert_allclose(decoded_latents(quantizer, codes), decoded, rtol=1e-5, atol=1e-5)
    found = quantize(quantizer, latents, CONFIG, PLAIN, jax.random.key(0))
    np.testing.assert_allclose(found.latents, decoded, rtol=1e-4, atol=1e-5)


def test_gradients_go_straight_through() -> None:
    quantizer, latents = draw_quantizer(), jnp.asarray(draw_latents())
    weights = jnp.asarray(draw_latents(seed=2))

    def through(latents: jax.Array) -> jax.Array:
        return jnp.sum(quantize(quantizer, latents, CONFIG, PLAIN, jax.random.key(0)).latents * weights)

    def linear(latents: jax.Array) -> jax.Array:
        products = [
            latents @ quantizer[branch]["input_proj"]["kernel"][0] @ quantizer[branch]["output_proj"]["kernel"][0]
            for branch in BRANCHES
        ]
        return jnp.sum(sum(products) * weights)

    np.testing.assert_allclose(jax.grad(through)(latents), jax.grad(linear)(latents), rtol=1e-4, atol=1e-4)


def books(branch: dict[str, Any]) -> list[dict[str, Any]]:
    return [layer["codebook"] for layer in branch["layers"].values()]


def test_statistics_and_commitment_equal_numpy() -> None:
    quantizer, latents = draw_quantizer(), draw_latents()
    found = quantize(quantizer, jnp.asarray(latents), CONFIG, PLAIN, jax.random.key(0))
    codes = np.asarray(quantized_codes(quantizer, jnp.asarray(latents), CONFIG))
    counts, sums, commitment, number = [], [], 0.0, 0
    for branch in BRANCHES:
        residual = latents @ quantizer[branch]["input_proj"]["kernel"][0]
        entries = [book["embed_sum"] / book["cluster_usage"][:, None] for book in books(quantizer[branch])]
        shares = [book["cluster_usage"] / book["cluster_usage"].sum() for book in books(quantizer[branch])]
        width = sum(np.cov(each.T, aweights=share, ddof=0).trace() for each, share in zip(entries, shares))
        for layer in quantizer[branch]["layers"].values():
            book = layer["codebook"]
            hits = codes[:, number].ravel()
            counts.append(np.bincount(hits, minlength=ENTRIES))
            total = np.zeros((ENTRIES, DIM), np.float32)
            np.add.at(total, hits, residual.reshape(-1, DIM))
            sums.append(total)
            residual = residual - (book["embed_sum"] / book["cluster_usage"][:, None])[codes[:, number]]
            commitment = commitment + np.square(residual).sum(axis=-1).mean(axis=1) / width / 4
            number += 1
    np.testing.assert_array_equal(found.statistics.counts, counts)
    np.testing.assert_allclose(found.statistics.sums, sums, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.commitment, commitment, rtol=1e-4)


def test_rows_of_fewer_codebooks_do_not_count_in_the_others() -> None:
    quantizer, latents = draw_quantizer(), jnp.asarray(draw_latents(rows=64))
    settings = QuantizerConfig(dropout=1.0, bypass=0.0)
    found = quantize(quantizer, latents, CONFIG, settings, jax.random.key(3))
    vectors = np.asarray(found.statistics.counts.sum(axis=1))
    # the semantic codebook and the first acoustic one are always used, the others by fewer and fewer rows
    assert vectors[0] == vectors[1] == 64 * 5 and 64 * 5 > vectors[2] > vectors[3] > 0
    assert not vectors[2] % 5


def test_rows_that_bypass_are_projected_alone() -> None:
    quantizer, latents = draw_quantizer(), jnp.asarray(draw_latents())
    settings = QuantizerConfig(dropout=0.0, bypass=1.0)
    found = quantize(quantizer, latents, CONFIG, settings, jax.random.key(0))
    kernels = [
        quantizer[branch]["input_proj"]["kernel"][0] @ quantizer[branch]["output_proj"]["kernel"][0]
        for branch in BRANCHES
    ]
    np.testing.assert_allclose(found.latents, latents @ sum(kernels), rtol=1e-4, atol=1e-4)
    # the codebooks learn from them all the same
    assert found.statistics.counts.sum() == 4 * 15


def test_moving_averages_equal_numpy() -> None:
    quantizer = draw_quantizer()
    rng = np.random.default_rng(5)
    statistics = Statistics(
        *(jnp.asarray(rng.random(shape, np.float32)) for shape in ((4, ENTRIES), (4, ENTRIES, DIM), (4, ENTRIES, DIM)))
    )
    for name, usage in (("0", 0.01), ("2", 0.02)):
        codebook(quantizer, 1, name)["cluster_usage"][3] = usage
    settings = QuantizerConfig(decay=0.9, dead_share=0.1)
    for replaces in (False, True):
        moved = updated(quantizer, statistics, CONFIG, settings, jnp.asarray(replaces))
        for number, (branch, name) in enumerate([(0, "0"), (1, "0"), (1, "1"), (1, "2")]):
            before = codebook(quantizer, branch, name)
            usage, total = before["cluster_usage"].copy(), before["embed_sum"].copy()
            if replaces:
                mean = usage.mean()
                dead = usage < 0.1 * mean
                assert dead.sum() == (name in ("0", "2") and branch == 1)
                usage[dead] = mean
                total[dead] = mean * np.asarray(statistics.candidates)[number][dead]
            usage = 0.9 * usage + 0.1 * np.asarray(statistics.counts)[number]
            total = 0.9 * total + 0.1 * np.asarray(statistics.sums)[number]
            after = codebook(moved, branch, name)
            np.testing.assert_allclose(after["cluster_usage"], usage, rtol=1e-6)
            np.testing.assert_allclose(after["embed_sum"], total, rtol=1e-5, atol=1e-6)


def test_steps_equal_those_of_kyutai(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps of one codebook, dead entries replaced by the same latents."""
    quantizer = draw_quantizer()
    ours = codebook(quantizer, 0, "0")
    ours["cluster_usage"][:2] = 0.001
    theirs = core_vq.EuclideanCodebook(DIM, ENTRIES, decay=0.8, threshold_usage_ratio=0.1, check_unused_every=2)
    theirs._initialized.fill_(1)
    theirs.cluster_usage.copy_(torch.from_numpy(ours["cluster_usage"].copy()))
    theirs.embedding_sum.copy_(torch.from_numpy(ours["embed_sum"].copy()))
    monkeypatch.setattr(core_vq, "_sample_vectors", lambda samples, number: samples[:number])
    settings = QuantizerConfig(decay=0.8, replace_every=2)
    replaced = 0
    for step in range(1, 6):
        latents = np.random.default_rng(step).standard_normal((20, DIM)).astype(np.float32)
        theirs(torch.from_numpy(latents))
        entries = ours["embed_sum"] / ours["cluster_usage"][:, None]
        codes = np.square(latents[:, None] - entries).sum(axis=-1).argmin(axis=1)
        counts, sums = np.bincount(codes, minlength=ENTRIES), np.zeros((ENTRIES, DIM), np.float32)
        np.add.at(sums, codes, latents)
        dead = ours["cluster_usage"] < 0.1 * ours["cluster_usage"].mean()
        replaced += int(dead.sum()) * (step % 2 == 0)
        statistics = Statistics(*(jnp.asarray(part)[None] for part in (counts, sums, latents[:ENTRIES])))
        one = {BRANCHES[0]: {"layers": {"0": {"codebook": ours}}}}
        moved = updated(one, statistics, CONFIG, settings, jnp.asarray(step % 2 == 0))
        ours = jax.tree.map(np.asarray, codebook(moved, 0, "0"))
        np.testing.assert_allclose(ours["cluster_usage"], theirs.cluster_usage, rtol=1e-5)
        np.testing.assert_allclose(ours["embed_sum"], theirs.embedding_sum, rtol=1e-4, atol=1e-5)
    assert replaced >= 2


def test_k_means_finds_the_clusters_of_the_first_stage_and_of_its_residuals() -> None:
    rng = np.random.default_rng(7)
    quantizer = draw_quantizer()
    kernel = quantizer[BRANCHES[1]]["input_proj"]["kernel"][0]
    # latents whose projections are 8 centres, and around each of them 8 smaller steps
    centres, steps = rng.standard_normal((ENTRIES, DIM)) * 10, rng.standard_normal((ENTRIES, DIM)) * 0.5
    parts = rng.integers(0, ENTRIES, (2, 3000))
    latents = ((centres[parts[0]] + steps[parts[1]]) @ np.linalg.pinv(kernel)).astype(np.float32)
    made = started(quantizer, latents, latents_a_step=30, iterations=100, seed=0)
    assert is_started(made)
    semantic, acoustic = (made[branch] for branch in BRANCHES)
    np.testing.assert_array_equal(semantic["input_proj"]["kernel"], acoustic["input_proj"]["kernel"])
    assert not np.any(semantic["output_proj"]["kernel"])
    np.testing.assert_array_equal(acoustic["output_proj"]["kernel"], quantizer[BRANCHES[1]]["output_proj"]["kernel"])
    left = latents @ kernel
    errors = []
    for name in ("0", "1", "2"):
        book = codebook(made, 1, name)
        assert book["cluster_usage"].sum() == pytest.approx(30, rel=1e-3)
        entries = book["embed_sum"] / book["cluster_usage"][:, None]
        distances = np.square(left[:, None] - entries).sum(axis=-1)
        left = left - entries[distances.argmin(axis=1)]
        errors.append(np.square(left).mean())
    assert errors[0] < 1 and errors[2] < 0.3 * errors[0] < 0.3
    # and the decoder gets what it had before, but for what is lost
    given = jnp.asarray(latents[:40])[None]
    found = quantize(made, given, CONFIG, PLAIN, jax.random.key(0)).latents
    before = unquantized(quantizer, given)
    assert jnp.mean((found - before) ** 2) < 0.05 * jnp.mean(before**2)


def test_k_means_of_too_little() -> None:
    with pytest.raises(ValueError, match=r"5 latents are too few for 8 entries; raise quantizer.kmeans_batches to 4"):
        started(draw_quantizer(), draw_latents(1, 5)[0], 2, 5, 0)
    with pytest.raises(ValueError, match="the latents are not finite"):
        started(draw_quantizer(), np.full((20, CONFIG.hidden_size), np.nan, np.float32), 2, 5, 0)


def test_projections_that_are_frozen_stay() -> None:
    quantizer = draw_quantizer()
    made = started(quantizer, draw_latents(8, 8).reshape(-1, 32), 8, 5, 0, ties=False)
    for branch in BRANCHES:
        np.testing.assert_array_equal(made[branch]["input_proj"]["kernel"], quantizer[branch]["input_proj"]["kernel"])


def test_random_weights_have_no_codebooks_yet() -> None:
    quantizer = draw_quantizer()
    assert is_started(quantizer) and not is_started(unstarted(quantizer))
    codebook(quantizer, 1, "1")["embed_sum"][:] = 0  # as upstream draws them, marked as initialized
    assert not is_started(quantizer)


def test_code_figures() -> None:
    figures = code_figures(np.array([[1.0, 1, 1, 1], [8, 0, 0, 0]]))
    assert figures["usage"] == [1, 0.25]
    np.testing.assert_allclose(figures["perplexity"], [4, 1])


@pytest.mark.parametrize(
    "values, key",
    [
        ({"dropout": 1.5}, "dropout"),
        ({"bypass": -0.1}, "bypass"),
        ({"decay": 1.0}, "decay"),
        ({"start_step": -1}, "start_step"),
        ({"kmeans_batches": 0}, "kmeans_batches"),
        ({"patience": 0}, "patience"),
    ],
)
def test_bad_settings(values: dict, key: str) -> None:
    (problem,) = dataclasses.replace(QuantizerConfig(), **values).problems()
    assert problem.startswith(f"`{key}`: ")
