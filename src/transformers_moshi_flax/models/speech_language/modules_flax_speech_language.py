"""The linen modules of the joined model: the projector, and the whole.

Names and parameter paths follow the files of ``transformers.models.voxtral.modeling_voxtral``.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Integer, Shaped

from ...modeling_flax_outputs import FlaxCausalLMOutputWithPast
from ...nn.activations import ACT2FN
from ...nn.cache import Cache
from ...nn.initializers import normal
from ...nn.linear import dense
from ..llama import FlaxLlamaForCausalLMModule
from .configuration_speech_language import LINEAR, ProjectorFields, check_config, projector_of


def stacked(
    states: Float[Array, "recordings frames hidden"], factor: int, stride: int
) -> Float[Array, "recordings tokens stacked"]:
    """``factor`` frames beside each other, every ``stride`` frames; zeros stand behind the last one."""
    tokens = -(-states.shape[1] // stride)
    padded = jnp.pad(states, ((0, 0), (0, max(0, (tokens - 1) * stride + factor - states.shape[1])), (0, 0)))
    last = (tokens - 1) * stride + 1
    return jnp.concatenate([padded[:, first : first + last : stride] for first in range(factor)], axis=2)


class FlaxSpeechLanguageProjector(nn.Module):
    """From stacked frames to embeddings of tokens; upstream ``VoxtralMultiModalProjector``."""

    fields: ProjectorFields
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, frames: Float[Array, "recordings tokens stacked"]) -> Float[Array, "recordings tokens hidden"]:
        fields, initializer = self.fields, normal(self.fields.initializer_range)
        if fields.kind == LINEAR:
            return dense(fields.output_size, initializer, self.dtype, fields.use_bias, "linear")(frames)
        inner = dense(fields.hidden_size, initializer, self.dtype, fields.use_bias, "linear_1")(frames)
        inner = ACT2FN[fields.activation](inner)
        return dense(fields.output_size, initializer, self.dtype, fields.use_bias, "linear_2")(inner)


class FlaxSpeechLanguageModule(nn.Module):
    """Encoder, projector and language model; upstream ``VoxtralForConditionalGeneration``.

    Raises:
        ValueError: a configuration that is not supported.
    """

    config: Any
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        config = self.config
        self.tower = check_config(config)
        self.audio_tower = self.tower.module(self.dtype, self.gradient_checkpointing)
        self.multi_modal_projector = FlaxSpeechLanguageProjector(projector_of(config), self.dtype)
        self.language_model = FlaxLlamaForCausalLMModule(config.text_config, self.dtype, self.gradient_checkpointing)

    def embed(self, input_ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq hidden"]:
        return self.language_model.embed(input_ids)

    def audio_features(
        self,
        audio: Float[Array, "recordings ..."],
        audio_attention_mask: Shaped[Array, "recordings steps"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "recordings tokens hidden"], Int[Array, "recordings"]]:
        """The embeddings of recordings, and how many of each count.

        Args:
            audio: as the encoder takes it.
            audio_attention_mask: 1 for what counts in its last axis, from the first on.
            deterministic: nothing is random.
        """
        projector = projector_of(self.config)
        states = self.tower.states(self.audio_tower, audio, audio_attention_mask, deterministic)
        frames = jnp.full(states.shape[:1], states.shape[1], jnp.int32)
        if audio_attention_mask is not None:
            frames = self.tower.frames(jnp.sum(audio_attention_mask.astype(jnp.int32), axis=1))
            counted = jnp.arange(states.shape[1], dtype=jnp.int32)[None] < frames[:, None]
            states = jnp.where(counted[..., None], states, 0)
        stacks = stacked(states, projector.stack_factor, projector.stack_stride)
        return self.multi_modal_projector(stacks), projector.tokens(frames)

    def with_audio(
        self,
        input_ids: Int[Array, "batch seq"],
        features: Float[Array, "recordings tokens hidden"],
        counts: Int[Array, "recordings"],
    ) -> Float[Array, "batch seq hidden"]:
        """The embeddings of a text in which audio stands where its token is, recording after recording."""
        is_audio = input_ids == self.config.audio_token_id
        embedded = self.embed(jnp.where(is_audio, 0, input_ids))
        number = jnp.cumsum(is_audio.reshape(-1).astype(jnp.int32)) - 1
        ends = jnp.cumsum(counts)
        recording = jnp.minimum(jnp.searchsorted(ends, number, side="right"), counts.shape[0] - 1)
        taken = features.at[recording, number - (ends - counts)[recording]].get(mode="clip")
        return jnp.where(is_audio[..., None], taken.reshape(embedded.shape).astype(embedded.dtype), embedded)

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"] | None = None,
        attention_mask: Shaped[Array, "batch slots"] | None = None,
        position_ids: Integer[Array, "#batch seq"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Array, "batch seq hidden"] | None = None,
        labels: Int[Array, "batch seq"] | None = None,
        logits_to_keep: int = 0,
        context_length: Integer[Array, "#batch 1"] | None = None,
        deterministic: bool = True,
        output_attentions: bool = True,
    ) -> FlaxCausalLMOutputWithPast:
        """Runs the language model, whose arguments these are; audio is in ``inputs_embeds`` (:meth:`with_audio`)."""
        if self.is_initializing():
            self.audio_features(jnp.zeros(self.tower.shape_of_one(), self.dtype))
        return self.language_model(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            labels,
            logits_to_keep,
            context_length,
            deterministic,
            output_attentions,
        )
