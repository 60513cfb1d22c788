"""The loss of a speech-language model: that of a language model, of the answers' tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from ..text.objective import TextObjective

ARRAYS = ("input_ids", "labels", "audio", "audio_counts")
MASK = "audio_attention_mask"
"""Of a batch; see ``make_loader`` in ``examples.py``."""


@dataclasses.dataclass(frozen=True)
class SpeechTextObjective(TextObjective):
    """An :class:`~transformers_moshi_flax.training.objective.Objective`, for a ``FlaxSpeechLanguageModule``."""

    names: tuple[str, ...] = ARRAYS

    def logits(
        self, module: nn.Module, params: Mapping[str, Any], batch: Mapping[str, Array], **options: Any
    ) -> Float[Array, "batch tokens vocab"]:
        """As of :class:`TextObjective`."""

        def merged(array: Array) -> Array:
            return array.reshape(-1, *array.shape[2:])

        variables = {"params": params}
        mask = merged(batch[MASK]) if MASK in batch else None
        features, _ = module.apply(variables, merged(batch["audio"]), mask, method="audio_features", **options)
        embedded = module.apply(
            variables, batch["input_ids"], features, batch["audio_counts"].reshape(-1), method="with_audio"
        )
        outputs: Any = module.apply(variables, inputs_embeds=embedded, output_attentions=False, **options)
        return outputs.logits
