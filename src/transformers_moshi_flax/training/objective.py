"""From a batch to its loss: what is predicted from what, how it is weighted, and the statistics that are kept.

:class:`Objective` is what a step of training asks of any task. That of dialogues is here:

The hidden state of frame t predicts text and codes of frame t + 1, as in generation. Text and audio are normalised by
the sums of their own weights over the *whole* batch: a micro-batch, or what lies on one device, gives a share of the
loss, and the shares add up.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..models.moshi.modules_flax_moshi import next_frame_labels
from ..nn.embedding import IGNORE_INDEX
from ..nn.linear import dropout_rngs
from .losses import audio_weights, divided, is_one_of, text_weights, token_losses, weighted_sum

INPUTS = ("input_ids", "attention_mask", "user_audio_codes", "moshi_audio_codes")
LABELS = ("text_labels", "audio_labels")

Batch = Mapping[str, Any]
"""The arrays named in :data:`INPUTS` and :data:`LABELS`: text and mask ``(batch, frames)``, codes ``(batch, codebooks,
frames)``; the inputs delayed, the labels undelayed, -100 where nothing is to be predicted."""


@runtime_checkable
class Objective(Protocol):
    """What a task makes smaller; a batch is a mapping of arrays with rows in front, ``input_ids`` among them."""

    def arrays(self, batch: Batch) -> dict[str, Array]:
        """What the objective reads of a batch, on the device; ValueError if something is missing."""

    def totals(self, module: nn.Module, batch: Batch) -> dict[str, Float[Array, ""]]:
        """What the losses of a whole batch are divided by; it depends on labels alone."""

    def loss(
        self,
        module: nn.Module,
        params: Mapping[str, Any],
        batch: Batch,
        totals: Mapping[str, Float[Array, ""]] | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss of a batch, or the share of a part of one with those totals, and sums that add up over batches."""

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Float[Array, ""]]:
        """What is reported, from the added sums of :meth:`loss`; ``loss`` is among it."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """How the parts of the loss of dialogues are weighted; an :class:`Objective`.

    Attributes:
        text_weight: of the mean cross-entropy of text in the loss.
        audio_weight: of that of the codes.
        text_padding_weight: of a text label that is in ``text_padding_ids``, where other labels have 1.
        first_codebook_weight: of a label of the first, semantic codebook, where other codebooks have 1.
        text_padding_ids: text tokens that say nothing: PAD and end-of-PAD.

    Raises:
        ValueError: a weight is negative or not finite, or both parts have none.
    """

    text_weight: float = 1.0
    audio_weight: float = 1.0
    text_padding_weight: float = 0.5
    first_codebook_weight: float = 1.0
    text_padding_ids: tuple[int, ...] = (3, 0)

    def __post_init__(self):
        for name in ("text_weight", "audio_weight", "text_padding_weight", "first_codebook_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` must be a finite number, at least 0, but is {value}.")
        if self.text_weight == self.audio_weight == 0:
            raise ValueError("`text_weight` and `audio_weight` are both 0; give at least one a weight.")

    def arrays(self, batch: Batch) -> dict[str, Array]:
        """See :func:`batch_arrays`."""
        return batch_arrays(batch)

    def totals(self, module: nn.Module, batch: Batch) -> dict[str, Float[Array, ""]]:
        """See :func:`weight_totals`."""
        return weight_totals(module, batch, self)

    def loss(
        self,
        module: nn.Module,
        params: Mapping[str, Any],
        batch: Batch,
        totals: Mapping[str, Float[Array, ""]] | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """See :func:`objective_loss`."""
        return objective_loss(module, params, batch, self, totals, dropout_rng, train)

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Float[Array, ""]]:
        """See :func:`metrics_of`."""
        return metrics_of(sums, self)


def check_padding_ids(objective: ObjectiveConfig, vocab_size: int) -> None:
    """ValueError if ``text_padding_ids`` has ids that are no text tokens of the model."""
    wrong = [token for token in objective.text_padding_ids if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(
            f"`text_padding_ids` has {wrong}, but the text tokens of the model are 0 to {vocab_size - 1}; give those "
            "of PAD and end-of-PAD."
        )


def batch_arrays(batch: Batch) -> dict[str, Array]:
    """The arrays that the objective reads, on the device, without what else there is.

    Raises:
        ValueError: some are missing.
    """
    missing = [name for name in (*INPUTS, *LABELS) if name not in batch]
    if missing:
        raise ValueError(f"`batch` lacks {', '.join(missing)}; it has {', '.join(batch) or 'nothing'}.")
    return {name: jnp.asarray(batch[name]) for name in (*INPUTS, *LABELS)}


def batch_labels(module: nn.Module, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """The labels of frames 1, 2, …: text ``(batch, frames - 1)``, delayed codes ``(batch, frames - 1, codebooks)``."""
    mask = batch["attention_mask"].astype(bool)
    return next_frame_labels(batch["text_labels"], batch["audio_labels"], mask, module.config.audio_vocab_size)


def weight_totals(module: nn.Module, batch: Batch, objective: ObjectiveConfig) -> dict[str, Float[Array, ""]]:
    """The sums of the weights of a whole batch, by which its losses are divided: ``text`` and ``audio``."""
    text, audio = batch_labels(module, batch_arrays(batch))
    return {
        "text": jnp.sum(text_weights(text, objective.text_padding_weight, objective.text_padding_ids)),
        "audio": jnp.sum(audio_weights(audio, objective.first_codebook_weight)),
    }


def objective_loss(
    module: nn.Module,
    params: Mapping[str, Any],
    batch: Batch,
    objective: ObjectiveConfig,
    totals: Mapping[str, Float[Array, ""]] | None = None,
    dropout_rng: Array | None = None,
    train: bool = False,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of a batch, or the share that a part of a batch has in it.

    Args:
        module: a ``FlaxMoshiForConditionalGenerationModule``.
        params: its parameters; those of Mimi are not used.
        batch: see :data:`Batch`.
        objective: the weights.
        totals: :func:`weight_totals` of the whole batch that this is a part of; by default those of ``batch``.
        dropout_rng: a PRNG key, needed if ``train`` and the configuration has dropout.
        train: with dropout.

    Returns:
        The loss, a scalar in at least float32, and sums that add up over batches, for :func:`metrics_of`.
    """
    batch = batch_arrays(batch)
    totals = weight_totals(module, batch, objective) if totals is None else totals
    arguments: dict[str, Any] = dict(batch)
    logits: Any = module.apply(
        {"params": params},
        **arguments,
        deterministic=not train,
        rngs=None if dropout_rng is None else dropout_rngs(dropout_rng),
        method="next_frame_logits",
    )
    text_logits, audio_logits = logits
    text, audio = batch_labels(module, batch)
    text_losses, text_correct = token_losses(text_logits, text)
    audio_losses, audio_correct = token_losses(audio_logits, audio)
    text_weight = text_weights(text, objective.text_padding_weight, objective.text_padding_ids)
    audio_weight = audio_weights(audio, objective.first_codebook_weight)
    text_loss, audio_loss = weighted_sum(text_losses, text_weight), weighted_sum(audio_losses, audio_weight)
    parts = ((objective.text_weight, text_loss, "text"), (objective.audio_weight, audio_loss, "audio"))
    # what has no weight has no gradients to be computed either
    first, *others = (
        weight * divided(part, totals[name].astype(part.dtype)) for weight, part, name in parts if weight
    )
    loss = sum(others, first)

    def count(where: Array, axis: tuple[int, ...] = (0, 1)) -> Array:
        return jnp.sum(where, axis=axis, dtype=jnp.int32)

    known = text != IGNORE_INDEX
    words = known & ~is_one_of(text, objective.text_padding_ids)
    mask = batch["attention_mask"].astype(bool)
    sums = {
        "text_loss": text_loss,
        "text_weight": jnp.sum(text_weight),
        "text_tokens": count(known),
        "text_correct": count(text_correct & known),
        "words": count(words),
        "words_correct": count(text_correct & words),
        "audio_loss": audio_loss,
        "audio_weight": jnp.sum(audio_weight),
        "audio_tokens": count(audio != IGNORE_INDEX),
        "audio_correct": count(audio_correct),
        "frames": count(mask[:, :-1] & mask[:, 1:]),
    }
    return loss, jax.lax.stop_gradient(sums)


def metrics_of(sums: Mapping[str, Any], objective: ObjectiveConfig) -> dict[str, Float[Array, ""]]:
    """What is reported, scalars all, from the added sums of :func:`objective_loss`.

    Returns:
        ``loss``, ``text_loss``, ``audio_loss`` as the objective has them; their perplexities ``text_perplexity`` and
        ``audio_perplexity``; the shares of right predictions ``text_accuracy``, ``text_accuracy_without_padding``,
        ``audio_accuracy`` and ``audio_accuracy_codebook_0``, …; and the number of predicted ``frames``. What has no
        labels is 0.
    """

    def share(right: Any, of: Any) -> Array:
        return divided(jnp.asarray(right, jnp.float32), jnp.asarray(of, jnp.float32))

    text_loss = divided(sums["text_loss"], sums["text_weight"])
    audio_loss = divided(sums["audio_loss"], sums["audio_weight"])
    right, codes = sums["audio_correct"], sums["audio_tokens"]
    return {
        "loss": objective.text_weight * text_loss + objective.audio_weight * audio_loss,
        "text_loss": text_loss,
        "audio_loss": audio_loss,
        "text_perplexity": jnp.exp(text_loss),
        "audio_perplexity": jnp.exp(audio_loss),
        "text_accuracy": share(sums["text_correct"], sums["text_tokens"]),
        "text_accuracy_without_padding": share(sums["words_correct"], sums["words"]),
        "audio_accuracy": share(jnp.sum(right), jnp.sum(codes)),
        **{f"audio_accuracy_codebook_{k}": share(right[k], codes[k]) for k in range(right.shape[0])},
        "frames": sums["frames"],
    }
