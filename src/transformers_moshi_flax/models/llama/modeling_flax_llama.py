"""The public language models, around the linen modules of ``modules_flax_llama.py``.

One pair of classes for all models of ``CONFIG_CLASSES``: the configuration says which it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array
from transformers import LlamaConfig

from ...former_names import accept_former_names
from ...generation.decoding import Request
from ...generation.text import TextDecoder
from ...modeling_flax_decoder import FlaxDecoderModel, FlaxTextForCausalLM, FlaxTextModel
from ...modeling_flax_embeddings import FlaxTextEmbeddingsMixin
from ...modeling_flax_outputs import FlaxCausalLMOutputWithPast
from ...modeling_flax_utils import FlaxPreTrainedModel
from ...nn.cache import LinearCache
from .checkpoint_flax_llama import LLAMA_RULES
from .fields_flax_llama import CONFIG_CLASSES, LlamaFields, fields_of
from .modules_flax_llama import FlaxLlamaForCausalLMModule, FlaxLlamaModule

UPSTREAM_PREFIXES = {
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "helium": "Helium",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
"""How the names of upstream's classes begin, by ``model_type``."""


class FlaxLlamaPreTrainedModel(FlaxDecoderModel, FlaxTextEmbeddingsMixin):
    """What the classes share.

    A configuration that asks for what is not supported raises a ``ValueError`` that names field, value and remedy,
    before weights are read.
    """

    config_class = LlamaConfig
    config_classes = CONFIG_CLASSES
    base_model_prefix = "model"
    checkpoint_rules = LLAMA_RULES
    pipeline_tag = "text-generation"

    @property
    def cache_sizes(self) -> LlamaFields:
        return fields_of(self.config)

    @property
    def embedding_scale(self) -> float | None:
        return fields_of(self.config).embedding_scale

    @property
    def rounds_lengths(self) -> bool:
        """Not where the rotary embedding depends on the length of a call."""
        return not fields_of(self.config).is_dynamic

    @property
    def upstream_name(self) -> str:
        end = type(self).__name__.removeprefix("FlaxLlama")
        text = "Text" if self.config.model_type == "gemma3_text" and end == "Model" else ""
        return UPSTREAM_PREFIXES[self.config.model_type] + text + end


class FlaxLlamaModel(FlaxTextModel, FlaxLlamaPreTrainedModel):
    """A language model without a head; upstream ``LlamaModel``, ``Gemma3TextModel`` and so on."""

    module_class = FlaxLlamaModule
    input_tables = ("embed_tokens/embedding",)
    checkpoint_prefixes = ("", "model.")


@dataclasses.dataclass(frozen=True)
class LlamaTextDecoder(TextDecoder):
    """Tells the module the places of tokens in the text of each row, without the padding before it."""

    def places(self, request: Request, start: Any, length: int) -> dict[str, Array]:
        padding = jnp.argmax(request.attention_mask, axis=1).astype(jnp.int32)[:, None]
        slots = start + jnp.arange(length, dtype=jnp.int32)
        return {
            "position_ids": jnp.maximum(slots[None] - padding, 0),
            "context_length": request.prompt_length - padding,
        }


class FlaxLlamaForCausalLM(FlaxTextForCausalLM, FlaxLlamaPreTrainedModel):
    """A language model with a head; upstream ``LlamaForCausalLM``, ``Qwen3ForCausalLM`` and so on."""

    module_class = FlaxLlamaForCausalLMModule
    input_tables = ("model/embed_tokens/embedding",)

    @property
    def output_table(self) -> str:
        return self.input_tables[0] if fields_of(self.config).tie_word_embeddings else "lm_head/kernel"

    def _part_classes(self) -> dict[str, tuple[type[FlaxPreTrainedModel], Any]]:
        return {"model": (FlaxLlamaModel, self.config)}

    @property
    def model(self) -> FlaxLlamaModel:
        """The model without its head as a model of its own, on the same parameters."""
        return self._part("model")

    def make_decoder(self) -> LlamaTextDecoder:
        return LlamaTextDecoder(self.module, self.cache_sizes)

    @accept_former_names
    def __call__(  # type: ignore[override]  # upstream's order is another one here than in Moshi
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: Any | None = None,
        position_ids: ArrayLike | None = None,
        cache: LinearCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxCausalLMOutputWithPast | tuple[Any, ...]:
        """Runs model and head, with the arguments in upstream's order; they, and errors, are as of
        :meth:`FlaxTextForCausalLM.__call__`."""
        return super().__call__(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache,
            labels,
            logits_to_keep,
            params,
            dropout_rng,
            train,
            output_attentions,
            output_hidden_states,
            return_dict,
        )
