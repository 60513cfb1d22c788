"""HuBERT: Wav2Vec2's modules and files under its own names."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped
from transformers import HubertConfig

from ...modeling_flax_outputs import FlaxBaseModelOutput
from ..wav2vec2 import FlaxWav2Vec2Module, FlaxWav2Vec2PreTrainedModel


class FlaxHubertModule(FlaxWav2Vec2Module):
    """As :class:`FlaxWav2Vec2Module`, without the features in the output; upstream ``HubertModel``."""

    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Shaped[Array, "batch samples"] | None = None,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> FlaxBaseModelOutput:
        outputs = super().__call__(
            input_values, attention_mask, mask_time_indices, deterministic, output_attentions, output_hidden_states
        )
        return FlaxBaseModelOutput(outputs.last_hidden_state, outputs.hidden_states, outputs.attentions)


class FlaxHubertPreTrainedModel(FlaxWav2Vec2PreTrainedModel):
    """What the classes share; batch norm of the positions (``conv_pos_batch_norm``) is refused."""

    config_class = HubertConfig
    base_model_prefix = "hubert"
    checkpoint_prefixes = ("", "hubert.")


class FlaxHubertModel(FlaxHubertPreTrainedModel):
    """HuBERT (Hsu et al., 2021) without a head; upstream ``HubertModel``."""

    module_class = FlaxHubertModule

    def __call__(
        self,
        input_values: ArrayLike | None,
        attention_mask: ArrayLike | None = None,
        mask_time_indices: ArrayLike | None = None,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxBaseModelOutput | tuple[Any, ...]:
        """Runs the model; arguments and errors as of :meth:`FlaxWav2Vec2Model.__call__`, and what it says of padding.

        In training, spans of frames are drawn within the length of each row, where upstream draws them over the whole
        width of the batch.
        """
        table, inputs = self._checked(input_values, attention_mask, mask_time_indices)
        flags = (output_attentions, output_hidden_states, return_dict)
        return self._run(table, inputs, params, dropout_rng, train, *flags)
