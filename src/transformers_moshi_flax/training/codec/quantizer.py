"""The split residual quantizer in training: codebooks that follow what they are given, k-means for their start.

Mimi's own buffers hold the codebooks (``cluster_usage``, ``embed_sum``; an entry is ``embed_sum / cluster_usage``),
and follow the latents by exponential moving averages. The rules are those of Kyutai's ``EuclideanCodebook``.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from transformers import MimiConfig

from ...ops.precision import at_least_float32

CODEBOOKS = r"quantizer/.*/codebook/.*"
"""Paths of the buffers, which are no parameters of the optimizer."""

BEFORE_THE_CODEBOOKS = r"(?:encoder|encoder_transformer|downsample)/.*|quantizer/.*/input_proj/.*"

BRANCHES = ("semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer")

EPSILON = 1e-5
"""Of :class:`FlaxMimiEuclideanCodebook`: the least usage that an entry is divided by."""


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """How the codebooks are found and used in training.

    Attributes:
        start_step: the step before which codebooks that have not been started are started by k-means. Until then the
            codec is an autoencoder: latents pass the projections of the acoustic codebooks and no codebook.
        train_encoder: whether what lies before the codebooks is trained on from ``start_step``. Without it, the
            decoder alone is fine-tuned on quantized latents.
        kmeans_batches: batches whose latents k-means is made of.
        kmeans_iterations: of each codebook's k-means.
        decay: of the moving averages.
        dead_share: an entry that is used less than this share of the mean usage is replaced by a latent of the batch.
        replace_every: steps between two looks for such entries.
        dropout: the probability that a row uses a random number of codebooks, the semantic ones always.
        bypass: the probability that a row is not quantized.
        least_usage: a codebook of which a smaller share of entries is used has collapsed; so the log says after
            ``patience`` evaluations in a row.
        patience: see ``least_usage``.
    """

    start_step: int = 0
    train_encoder: bool = True
    kmeans_batches: int = 20
    kmeans_iterations: int = 50
    decay: float = 0.99
    dead_share: float = 0.1
    replace_every: int = 5
    dropout: float = 1.0
    bypass: float = 0.5
    least_usage: float = 0.1
    patience: int = 3

    def problems(self) -> Iterator[str]:
        """As of ``ModelConfig``."""
        for name in ("kmeans_batches", "kmeans_iterations", "replace_every", "patience"):
            if getattr(self, name) < 1:
                yield f"`{name}`: {getattr(self, name)} is too small; give 1 or more"
        if self.start_step < 0:
            yield f"`start_step`: {self.start_step} is too small; give 0 or more"
        for name in ("dropout", "bypass", "dead_share", "least_usage"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"`{name}`: {getattr(self, name)} is no share; give 0 to 1"
        if not 0 <= self.decay < 1:
            yield f"`decay`: {self.decay} must be at least 0 and below 1"


class Statistics(NamedTuple):
    """What codebooks learn from latents; sums add up over devices and micro-batches.

    Attributes:
        counts: how many latents were nearest to each entry.
        sums: of these latents.
        candidates: latents that may replace entries.
    """

    counts: Float[Array, "codebooks entries"]
    sums: Float[Array, "codebooks entries dim"]
    candidates: Float[Array, "codebooks entries dim"]


class Quantized(NamedTuple):
    """Latents after the quantizer.

    Attributes:
        latents: what the decoder gets; gradients pass the codebooks (straight-through).
        semantic: what the semantic codebooks alone give, ``(batch, frames, dim)``, straight-through as well.
        commitment: of every row, see ``LossConfig``.
        statistics: of all codebooks, the semantic ones first.
    """

    latents: Float[Array, "batch frames hidden_size"]
    semantic: Float[Array, "batch frames dim"]
    commitment: Float[Array, "batch"]
    statistics: Statistics


def quantize(
    quantizer: Mapping[str, Any],
    latents: Float[Array, "batch frames hidden_size"],
    config: MimiConfig,
    settings: QuantizerConfig,
    key: Array,
) -> Quantized:
    """Latents to the nearest entries, with quantizer dropout and bypass.

    Args:
        quantizer: the parameters ``quantizer`` of Mimi.
        latents: of the encoder.
        config, settings: of Mimi and of its training.
        key: of what is random.
    """
    wide = at_least_float32(latents.dtype)
    latents = latents.astype(wide)
    number_key, drop_key, bypass_key, *keys = jax.random.split(key, 3 + len(BRANCHES))
    rows, semantic = len(latents), config.num_semantic_quantizers
    number = jax.random.randint(number_key, (rows,), semantic + 1, config.num_quantizers + 1)
    drops = jax.random.uniform(drop_key, (rows,)) < settings.dropout
    number = jnp.where(drops, number, config.num_quantizers)
    bypasses = jax.random.uniform(bypass_key, (rows,)) < settings.bypass

    total: Any = 0.0
    commitment: Any = 0.0
    statistics, branches = [], []
    for branch, numbers, branch_key in zip(BRANCHES, codebook_numbers(config), keys):
        parts = quantizer[branch]
        projected = project(parts, "input_proj", latents)
        active = jnp.asarray(numbers)[None] < number[:, None]
        found, distance, counted = _residual(codebooks_of(parts, wide), projected, active, branch_key)
        # committed to as far as the latents are wide: else the encoder could shrink them
        distance = distance / (known_variance(parts, wide) * len(numbers))
        passed = projected + lax.stop_gradient(found - projected)
        branches.append(passed)
        passed = jnp.where(bypasses[:, None, None], projected, passed)
        total = total + project(parts, "output_proj", passed)
        commitment = commitment + distance * len(numbers) / config.num_quantizers
        statistics.append(counted)
    joined = Statistics(*(jnp.concatenate(parts) for parts in zip(*statistics)))
    return Quantized(total, branches[0], commitment, joined)


def quantized_codes(
    quantizer: Mapping[str, Any], latents: Float[Array, "batch frames hidden_size"], config: MimiConfig
) -> Int[Array, "batch codebooks frames"]:
    """The codes that Mimi gives, of all codebooks."""
    wide = at_least_float32(latents.dtype)
    codes = []
    for branch in BRANCHES:
        residual = project(quantizer[branch], "input_proj", latents.astype(wide))
        for entries in codebooks_of(quantizer[branch], wide):
            codes.append(nearest(entries, residual))
            residual = residual - entries[codes[-1]]
    return jnp.stack(codes, axis=1)


def unquantized(
    quantizer: Mapping[str, Any], latents: Float[Array, "batch frames hidden_size"]
) -> Float[Array, "batch frames hidden_size"]:
    """What the decoder gets before there are codebooks.

    The two branches quantize the same latents, and their sum is decoded: what the semantic one has is a part of what
    the acoustic one has. So the latter alone is trained here, and the former joins in with the codebooks
    (:func:`started`). Without projections both pass the latents as they are.
    """
    latents = latents.astype(at_least_float32(latents.dtype))
    parts = quantizer[BRANCHES[1]]
    if "input_proj" not in parts:
        return 2 * latents
    return project(parts, "output_proj", project(parts, "input_proj", latents))


def codebook_numbers(config: MimiConfig) -> tuple[range, range]:
    """Of the codebooks of each branch."""
    return range(config.num_semantic_quantizers), range(config.num_semantic_quantizers, config.num_quantizers)


def project(parts: Mapping[str, Any], name: str, x: Float[Array, "*shape features"]) -> Float[Array, "*shape dim"]:
    """A projection of a branch, where it has one."""
    if name not in parts:
        return x
    return jnp.matmul(x, parts[name]["kernel"][0].astype(x.dtype), precision=lax.Precision.HIGHEST)


def codebooks_of(parts: Mapping[str, Any], dtype: Any) -> list[Float[Array, "entries dim"]]:
    """The entries of a branch's codebooks, without gradient."""
    return [lax.stop_gradient(book["embed_sum"].astype(dtype) / _usage(book, dtype)) for book in _buffers_of(parts)]


def known_variance(parts: Mapping[str, Any], dtype: Any) -> Float[Array, ""]:
    """The latents' variance as a branch's codebooks know it: each explains a part of what those before it leave.

    It is the same for all micro-batches of a step, so that their losses add up to that of the batch.
    """
    variance: Any = 0.0
    for entries, book in zip(codebooks_of(parts, dtype), _buffers_of(parts)):
        shares = _usage(book, dtype) / jnp.sum(_usage(book, dtype))
        variance = variance + jnp.sum(shares * jnp.square(entries - jnp.sum(shares * entries, axis=0, keepdims=True)))
    return lax.stop_gradient(jnp.maximum(variance, EPSILON))


def _buffers_of(parts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [parts["layers"][name]["codebook"] for name in sorted(parts["layers"], key=int)]


def _usage(book: Mapping[str, Any], dtype: Any) -> Float[Array, "entries 1"]:
    return jnp.maximum(book["cluster_usage"].astype(dtype), EPSILON)[:, None]


def nearest(entries: Float[Array, "entries dim"], x: Float[Array, "*shape dim"]) -> Int[Array, "*shape"]:
    """Index of the nearest entry (Euclidean), the first of equally near ones."""
    products = jnp.matmul(x, entries.T, precision=lax.Precision.HIGHEST)
    squares = jnp.sum(entries * entries, axis=1).reshape(*[1] * (products.ndim - 1), -1)
    return jnp.argmin(squares - 2 * products, axis=-1).astype(jnp.int32)


def _residual(
    tables: Sequence[Float[Array, "entries dim"]],
    projected: Float[Array, "batch frames dim"],
    active: Bool[Array, "batch codebooks"],
    key: Array,
) -> tuple[Array, Array, Statistics]:
    """The sum of the entries, the squared distances of every row, and the statistics of a branch."""
    constant = lax.stop_gradient(projected)
    distance: Any = 0.0
    found, counted = jnp.zeros_like(constant), []
    for place, (entries, key_) in enumerate(zip(tables, jax.random.split(key, len(tables)))):
        residual = constant - found
        codes = nearest(entries, residual)
        uses = active[:, place, None].astype(residual.dtype)
        chosen = entries[codes] * uses[..., None]
        left = jnp.sum(jnp.square(projected - found - chosen), axis=-1)
        distance = distance + jnp.mean(left * uses, axis=1)
        found = found + chosen
        hits = jax.nn.one_hot(codes.reshape(-1), len(entries), dtype=residual.dtype)
        hits = hits * jnp.broadcast_to(uses, codes.shape).reshape(-1, 1)
        rows = residual.reshape(-1, residual.shape[-1])
        sums = jnp.matmul(hits.T, rows, precision=lax.Precision.HIGHEST)
        counted.append(Statistics(hits.sum(axis=0), sums, rows[_drawn(key_, len(rows), len(entries))]))
    return found, distance, Statistics(*(jnp.stack(parts) for parts in zip(*counted)))


def _drawn(key: Array, most: int, number: int) -> Int[Array, "number"]:
    """Numbers below ``most``, different ones where there are as many."""
    if most >= number:
        return jax.random.permutation(key, most)[:number]
    return jax.random.randint(key, (number,), 0, most)


def updated(
    quantizer: Mapping[str, Any],
    statistics: Statistics,
    config: MimiConfig,
    settings: QuantizerConfig,
    replaces: Bool[Array, ""],
) -> dict[str, Any]:
    """The codebooks after a step: dead entries replaced, then the moving averages moved on.

    Args:
        quantizer: the parameters ``quantizer`` of Mimi, of which those codebooks that are there are updated.
        statistics: of the whole batch, of all codebooks.
        config, settings: of Mimi and of its training.
        replaces: whether dead entries are looked for.

    Returns:
        The codebooks alone, as a nested dict under the branches.
    """
    result: dict[str, Any] = {}
    for branch, numbers in zip(BRANCHES, codebook_numbers(config)):
        for name, layer in quantizer.get(branch, {}).get("layers", {}).items():
            of_one = jax.tree.map(lambda array, number=numbers[int(name)]: array[number], statistics)
            moved = _moved(layer["codebook"], of_one, settings, replaces)
            result.setdefault(branch, {"layers": {}})["layers"][name] = {"codebook": moved}
    return result


def _moved(
    codebook: Mapping[str, Any], statistics: Statistics, settings: QuantizerConfig, replaces: Bool[Array, ""]
) -> dict[str, Any]:
    usage, total = codebook["cluster_usage"], codebook["embed_sum"]
    mean = jnp.mean(usage)
    dead = replaces & (usage < settings.dead_share * mean)
    candidates = statistics.candidates.astype(total.dtype)
    usage = jnp.where(dead, mean, usage)
    total = jnp.where(dead[:, None], mean * candidates, total)
    decay = settings.decay
    return {
        "cluster_usage": decay * usage + (1 - decay) * statistics.counts.astype(usage.dtype),
        "embed_sum": decay * total + (1 - decay) * statistics.sums.astype(total.dtype),
        "initialized": jnp.ones_like(codebook["initialized"]),
    }


def is_started(quantizer: Mapping[str, Any]) -> bool:
    """Whether the codebooks hold entries that mean something."""
    codebooks = [layer["codebook"] for branch in BRANCHES for layer in quantizer[branch]["layers"].values()]
    return all(np.all(codebook["initialized"]) and np.any(codebook["embed_sum"]) for codebook in codebooks)


def unstarted(quantizer: Mapping[str, Any]) -> dict[str, Any]:
    """The quantizer of random weights, whose buffers say that they hold nothing yet."""

    def mark(path: Any, leaf: Any) -> Any:
        return jnp.zeros_like(leaf) if path[-1].key == "initialized" else leaf

    return jax.tree_util.tree_map_with_path(mark, dict(quantizer))


def started(
    quantizer: Mapping[str, Any],
    latents: Float[np.ndarray, "number hidden_size"],
    latents_a_step: int,
    iterations: int,
    seed: int,
    ties: bool = True,
) -> dict[str, Any]:
    """The quantizer with codebooks that k-means has found, stage by stage: each among what those before it leave.

    The semantic branch gets the input projection of the acoustic one, which has been trained (:func:`unquantized`),
    and an output projection of zeros: the decoder hears what it has heard so far, and learns what else there is.

    Args:
        quantizer: NumPy parameters ``quantizer`` of Mimi.
        latents: of the encoder, in no order; more than there are entries.
        latents_a_step: how many a step of training has, which is what usage counts.
        iterations: of each k-means.
        seed: of where it begins.
        ties: False leaves the projections as they are, such as where they are frozen.

    Raises:
        ValueError: fewer latents than entries, or latents that are not finite.
    """
    from scipy.cluster.vq import kmeans2, vq

    if not np.isfinite(latents).all():
        raise ValueError("the latents are not finite; lower optimizer.learning_rate")
    result = jax.tree.map(np.asarray, dict(quantizer))
    semantic, acoustic = (dict(result[branch]) for branch in BRANCHES)
    if ties and "input_proj" in acoustic:
        semantic["input_proj"] = acoustic["input_proj"]
        semantic["output_proj"] = jax.tree.map(np.zeros_like, semantic["output_proj"])
    draw = np.random.default_rng(seed)
    for branch, parts in zip(BRANCHES, (semantic, acoustic)):
        residual = np.asarray(latents, np.float32)
        if "input_proj" in parts:
            residual = residual @ np.asarray(parts["input_proj"]["kernel"][0], np.float32)
        layers = {}
        for name in sorted(parts["layers"], key=int):
            codebook = parts["layers"][name]["codebook"]
            entries = len(codebook["cluster_usage"])
            if len(residual) < entries:
                raise ValueError(
                    f"{len(residual)} latents are too few for {entries} entries; raise quantizer.kmeans_batches to "
                    f"{math.ceil(entries / max(latents_a_step, 1))} or more"
                )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of entries that nothing is near to; they are replaced in training
                centroids, _ = kmeans2(residual, entries, iter=iterations, minit="++", rng=draw)
            codes, _ = vq(residual, centroids)
            usage = np.bincount(codes, minlength=entries) * (latents_a_step / len(residual))
            usage = np.maximum(usage, EPSILON).astype(np.float32)
            layers[name] = {
                "codebook": {
                    "cluster_usage": usage.astype(codebook["cluster_usage"].dtype),
                    "embed_sum": (centroids * usage[:, None]).astype(codebook["embed_sum"].dtype),
                    "initialized": np.ones_like(codebook["initialized"]),
                }
            }
            residual = residual - centroids[codes]
        result[branch] = {**parts, "layers": layers}
    return result


def code_figures(counts: Float[np.ndarray, "codebooks entries"]) -> dict[str, list[float]]:
    """Of how often each entry occurs: the share of entries that do, ``usage``, and the ``perplexity``."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    entropy = -np.sum(np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0), axis=1)
    return {"usage": (counts > 0).mean(axis=1).tolist(), "perplexity": np.exp(entropy).tolist()}
