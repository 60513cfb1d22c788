"""The loss of a language model: the mean cross-entropy of all tokens that follow another one of their text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...nn.cache import PackedTexts
from ...nn.embedding import IGNORE_INDEX
from ...nn.linear import dropout_rngs
from ..losses import divided, token_losses, weighted_sum
from ..objective import Batch

ARRAYS = ("input_ids", "segment_ids", "labels")
"""Of a batch, each ``(batch, tokens)`` int32; see ``make_loader`` in ``packing.py``."""


@dataclasses.dataclass(frozen=True)
class TextObjective:
    """An :class:`~transformers_moshi_flax.training.objective.Objective`, for modules with a head of text.

    Attributes:
        names: of the arrays that it reads.
    """

    names: tuple[str, ...] = ARRAYS

    def arrays(self, batch: Batch) -> dict[str, Array]:
        """The arrays named in :attr:`names`; ValueError if some are missing."""
        missing = [name for name in self.names if name not in batch]
        if missing:
            raise ValueError(f"`batch` lacks {', '.join(missing)}; it has {', '.join(batch) or 'nothing'}.")
        return {name: jnp.asarray(batch[name]) for name in self.names}

    def totals(self, module: nn.Module, batch: Batch) -> dict[str, Float[Array, ""]]:
        """How many tokens of the batch are predicted."""
        return {"tokens": jnp.sum(batch["labels"] != IGNORE_INDEX, dtype=jnp.float32)}

    def loss(
        self,
        module: nn.Module,
        params: Mapping[str, Any],
        batch: Batch,
        totals: Mapping[str, Float[Array, ""]] | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The mean over all tokens that have a label, in at least float32, and sums for :meth:`metrics`."""
        batch = self.arrays(batch)
        totals = self.totals(module, batch) if totals is None else totals
        rngs = None if dropout_rng is None else dropout_rngs(dropout_rng)
        logits = self.logits(module, params, batch, deterministic=not train, rngs=rngs)
        labels = batch["labels"]
        known = labels != IGNORE_INDEX
        losses, correct = token_losses(logits, labels)
        total = weighted_sum(losses, known.astype(losses.dtype))
        sums = {
            "loss": total,
            "tokens": jnp.sum(known, dtype=jnp.int32),
            "correct": jnp.sum(correct, dtype=jnp.int32),
        }
        return divided(total, totals["tokens"].astype(total.dtype)), jax.lax.stop_gradient(sums)

    def logits(
        self, module: nn.Module, params: Mapping[str, Any], batch: Mapping[str, Array], **options: Any
    ) -> Float[Array, "batch tokens vocab"]:
        """What is predicted at every token; ``options`` are those of ``module.apply``."""
        outputs: Any = module.apply(
            {"params": params},
            batch["input_ids"],
            cache=PackedTexts(batch["segment_ids"]),
            output_attentions=False,
            **options,
        )
        return outputs.logits

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Float[Array, ""]]:
        """``loss``, its exponential ``perplexity``, the share of right predictions ``accuracy``, and how many
        ``tokens`` were predicted."""
        tokens = jnp.asarray(sums["tokens"], jnp.float32)
        loss = divided(sums["loss"], tokens.astype(sums["loss"].dtype))
        return {
            "loss": loss,
            "perplexity": jnp.exp(loss),
            "accuracy": divided(jnp.asarray(sums["correct"], jnp.float32), tokens),
            "tokens": sums["tokens"],
        }
