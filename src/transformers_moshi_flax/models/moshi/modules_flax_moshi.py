"""The linen modules of Moshi: backbone, text head, depth decoder, and the whole of them with Mimi.

Moshi (Défossez et al., 2024) is a decoder over frames of 80 ms ("Helium", the backbone) with a second, small decoder
over the codebooks of one frame (the depth decoder). The public classes around the modules are in
``modeling_flax_moshi.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped
from transformers import MoshiConfig
from transformers.models.moshi.configuration_moshi import MoshiDepthConfig

from ...modeling_flax_outputs import (
    FlaxBaseModelOutputWithPast,
    FlaxCausalLMOutputWithPast,
    FlaxModelOutput,
)
from ...nn.cache import Cache, LinearCache, NoCache, StaticCache
from ...nn.embedding import IGNORE_INDEX, embed, embedding_table
from ...nn.initializers import normal
from ...nn.linear import dense
from ...nn.loss import cross_entropy
from ...nn.norm import RMSNorm
from ..mimi.modules_flax_mimi import FlaxMimiModule
from ..mimi.streaming_flax_mimi import FlaxMimiDecoderState, FlaxMimiEncoderState
from ..mimi.topology import samples_per_frame
from .delay_pattern import build_delay_pattern_mask
from .layers_flax_moshi import (
    FlaxMoshiEmbeddings,
    FlaxMoshiFlexibleLinear,
    FlaxMoshiLayers,
)

# ------------------------------------------------------------------------------------------------- the backbone


class FlaxMoshiModule(nn.Module):
    """The backbone: text embedding, decoder layers, final norm; upstream ``MoshiModel``."""

    config: MoshiConfig
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False
    scan_layers: bool = False

    def setup(self):
        config = self.config
        self.embed_tokens = embedding_table(
            config.vocab_size + 1, config.hidden_size, config.initializer_range, self.dtype
        )
        self.layers = FlaxMoshiLayers(
            config,
            dtype=self.dtype,
            gradient_checkpointing=self.gradient_checkpointing,
            scan_layers=self.scan_layers,
        )
        self.norm = RMSNorm(config.rms_norm_eps, self.dtype)

    def embed(self, input_ids: Int[Array, "batch frames"]) -> Float[Array, "batch frames hidden"]:
        return embed(self.embed_tokens, input_ids)

    def __call__(
        self,
        input_ids: Int[Array, "batch frames"] | None = None,
        attention_mask: Shaped[Array, "batch slots"] | None = None,
        position_ids: Integer[Array, "#batch frames"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Array, "batch frames hidden"] | None = None,
        deterministic: bool = True,
        output_attentions: bool = True,
    ) -> FlaxBaseModelOutputWithPast:
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids)
        hidden_states = inputs_embeds.astype(self.dtype)
        batch_size, length, _ = hidden_states.shape
        past = NoCache() if cache is None else cache
        steps, past = past.next_steps(length, self.config.sliding_window, batch_size, attention_mask)
        position_ids = steps.positions if position_ids is None else position_ids
        hidden_states, past, inputs, attentions = self.layers(
            hidden_states, steps, past, position_ids, None, deterministic, output_attentions
        )
        hidden_states = self.norm(hidden_states)
        return FlaxBaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            cache=None if cache is None else past,
            hidden_states=(*inputs, hidden_states),
            attentions=attentions if output_attentions else None,
        )


class FlaxMoshiForCausalLMModule(nn.Module):
    """The backbone with the text head; upstream ``MoshiForCausalLM``."""

    config: MoshiConfig
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False
    scan_layers: bool = False

    def setup(self):
        self.model = FlaxMoshiModule(self.config, self.dtype, self.gradient_checkpointing, self.scan_layers)
        self.lm_head = dense(self.config.vocab_size, normal(self.config.initializer_range), self.dtype)

    def embed(self, input_ids: Int[Array, "batch frames"]) -> Float[Array, "batch frames hidden"]:
        return self.model.embed(input_ids)

    def __call__(
        self,
        input_ids: Int[Array, "batch frames"] | None = None,
        attention_mask: Shaped[Array, "batch slots"] | None = None,
        position_ids: Integer[Array, "#batch frames"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Array, "batch frames hidden"] | None = None,
        labels: Int[Array, "batch frames"] | None = None,
        logits_to_keep: int = 0,
        deterministic: bool = True,
        output_attentions: bool = True,
    ) -> FlaxCausalLMOutputWithPast:
        outputs = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, deterministic, output_attentions
        )
        hidden_states = outputs.last_hidden_state[:, -logits_to_keep:]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1], labels[:, 1:], labels[:, 1:] == IGNORE_INDEX)
        return FlaxCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            last_hidden_state=hidden_states,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# --------------------------------------------------------------------------------------------- the depth decoder


@dataclasses.dataclass
class FlaxMoshiDepthDecoderOutputWithPast(FlaxModelOutput):
    """Output of the depth decoder; upstream ``CausalLMOutputWithPast``.

    Attributes:
        loss: mean cross-entropy, if labels were passed.
        logits: ``(batch, codebooks, audio_vocab_size)``.
        cache: the updated cache, if one was passed.
        hidden_states: input of every layer and what the heads read, each ``(batch, codebooks, hidden_size)``.
        attentions: weights of every layer, each ``(batch, heads, codebooks, keys)``.
    """

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


class FlaxMoshiDepthDecoderModule(nn.Module):
    """The decoder over the codebooks of one frame; upstream ``MoshiDepthDecoder``. Always causal."""

    config: MoshiDepthConfig
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False
    scan_layers: bool = False

    def setup(self):
        config = self.config
        self.text_embed_tokens = embedding_table(
            config.vocab_size + 1, config.hidden_size, config.initializer_range, self.dtype
        )
        # the last codebook is never an input
        self.embed_tokens = FlaxMoshiEmbeddings(
            config.num_codebooks - 1,
            config.audio_vocab_size + 1,
            config.hidden_size,
            config.initializer_range,
            self.dtype,
        )
        self.input_projections = FlaxMoshiFlexibleLinear(
            config.input_size, config.hidden_size, config.num_codebooks, self.dtype
        )
        self.layers = FlaxMoshiLayers(
            config,
            use_flexible_linear=True,
            use_rope=False,
            dtype=self.dtype,
            gradient_checkpointing=self.gradient_checkpointing,
            scan_layers=self.scan_layers,
        )
        self.lm_heads = FlaxMoshiFlexibleLinear(
            config.hidden_size, config.audio_vocab_size, config.num_codebooks, self.dtype
        )

    def embed(
        self, input_ids: Int[Array, "batch seq"], codebook_idx: tuple[int, ...]
    ) -> Float[Array, "batch seq hidden"]:
        """Position 0 is the text token, position i > 0 the code of codebook i - 1."""
        embedded = [
            embed(self.text_embed_tokens, input_ids[:, i])
            if index == 0
            else self.embed_tokens(index - 1, input_ids[:, i])
            for i, index in enumerate(codebook_idx)
        ]
        return jnp.stack(embedded, axis=1)

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"] | None = None,
        last_hidden_state: Float[Array, "batch last input_size"] | None = None,
        attention_mask: Shaped[Array, "batch slots"] | None = None,
        cache: StaticCache | None = None,
        inputs_embeds: Float[Array, "batch seq hidden"] | None = None,
        position_ids: tuple[int, ...] | None = None,
        labels: Int[Array, "batch seq"] | None = None,
        deterministic: bool = True,
        output_attentions: bool = True,
    ) -> FlaxMoshiDepthDecoderOutputWithPast:
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None and last_hidden_state is not None
        batch_size, length = given.shape[:2]
        past = NoCache() if cache is None else cache
        codebook_idx = tuple(range(past.length, past.length + length)) if position_ids is None else position_ids
        if inputs_embeds is None:
            inputs_embeds = self.embed(given, codebook_idx)
        # the hidden state of the frame conditions every codebook
        last_hidden_state = jnp.broadcast_to(last_hidden_state, (batch_size, length, last_hidden_state.shape[-1]))
        hidden_states = inputs_embeds.astype(self.dtype) + self.input_projections(last_hidden_state, codebook_idx)

        steps, past = past.next_steps(length, self.config.sliding_window, batch_size, attention_mask)
        hidden_states, past, inputs, attentions = self.layers(
            hidden_states, steps, past, None, codebook_idx, deterministic, output_attentions
        )
        logits = self.lm_heads(hidden_states, codebook_idx)
        loss = None
        if labels is not None:
            ignored = (labels == IGNORE_INDEX) | (labels == self.config.audio_vocab_size)
            loss = cross_entropy(logits, labels, ignored)
        return FlaxMoshiDepthDecoderOutputWithPast(
            loss=loss,
            logits=logits,
            cache=None if cache is None else past,
            hidden_states=(*inputs, hidden_states),
            attentions=attentions if output_attentions else None,
        )


# ---------------------------------------------------------------------------------------------- the whole of Moshi


@dataclasses.dataclass
class FlaxMoshiConditionalGenerationOutputWithPast(FlaxModelOutput):
    """Output of :class:`FlaxMoshiForConditionalGeneration`.

    Attributes:
        loss: the sum of ``text_loss`` and ``depth_loss``, as far as their labels were passed.
        logits: text logits, ``(batch, frames, vocab_size)``.
        last_hidden_state: of the backbone, ``(batch, frames, hidden_size)``.
        cache: the backbone's updated cache, if one was passed.
        hidden_states, attentions: of the backbone.
        text_loss: mean cross-entropy of the text tokens of frames 1, 2, ….
        depth_loss: mean cross-entropy of their audio codes.
        audio_logits: ``(batch, frames - 1, num_codebooks, audio_vocab_size)``; entry t predicts frame t + 1.
        depth_hidden_states, depth_attentions: of the depth decoder, over ``batch * (frames - 1)`` sequences.
    """

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    last_hidden_state: jax.Array | None = None
    cache: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    text_loss: jax.Array | None = None
    depth_loss: jax.Array | None = None
    audio_logits: jax.Array | None = None
    depth_hidden_states: tuple[jax.Array, ...] | None = None
    depth_attentions: tuple[jax.Array, ...] | None = None


@dataclasses.dataclass
class FlaxMoshiUnconditionalInput(FlaxModelOutput):
    """Inputs of one start frame, for generation from nothing; upstream ``MoshiUnconditionalInput``.

    Attributes:
        input_ids: ``(batch, 1)``, the text start token ``vocab_size``.
        user_audio_codes, moshi_audio_codes: ``(batch, num_codebooks, 1)``, the audio start code ``audio_vocab_size``.
        attention_mask: ``(batch, 1)`` of ones.
    """

    input_ids: jax.Array | None = None
    user_audio_codes: jax.Array | None = None
    moshi_audio_codes: jax.Array | None = None
    attention_mask: jax.Array | None = None


class FlaxMoshiForConditionalGenerationModule(nn.Module):
    """Audio embeddings, backbone, depth decoder and Mimi; upstream ``MoshiForConditionalGeneration``."""

    config: MoshiConfig
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False
    scan_layers: bool = False

    def setup(self):
        config = self.config
        # Moshi's own codebooks first, then the user's
        self.embed_tokens = FlaxMoshiEmbeddings(
            2 * config.num_codebooks,
            config.audio_vocab_size + 1,
            config.hidden_size,
            config.initializer_range,
            self.dtype,
        )
        self.audio_encoder = FlaxMimiModule(config.audio_encoder_config, self.dtype, self.gradient_checkpointing)
        self.decoder = FlaxMoshiForCausalLMModule(config, self.dtype, self.gradient_checkpointing, self.scan_layers)
        self.depth_decoder = FlaxMoshiDepthDecoderModule(
            config.depth_decoder_config, self.dtype, self.gradient_checkpointing, self.scan_layers
        )

    def encode_audio(
        self,
        input_values: Float[Array, "batch channels samples"],
        padding_mask: Bool[Array, "batch ..."] | None = None,
    ) -> Int[Array, "batch codebooks frames"]:
        """The codes of a waveform, as many codebooks as Moshi hears."""
        return self.audio_encoder.encode(input_values, padding_mask, self.config.num_codebooks).audio_codes

    def decode_audio(
        self, audio_codes: Int[Array, "batch codebooks frames"]
    ) -> Float[Array, "batch channels samples"]:
        return self.audio_encoder.decode(audio_codes).audio_values

    def convolve_audio_step(
        self,
        histories: tuple[Array, ...],
        cache_length: Int[Array, "batch"],
        input_values: Float[Array, "batch channels samples"],
        active: Bool[Array, "batch"],
    ) -> tuple[tuple[Array, ...], Float[Array, "batch steps hidden_size"]]:
        """The first part of :meth:`encode_audio`, of the next frames of a stream; see :class:`FlaxMimiModule`."""
        return self.audio_encoder.convolve_step(histories, cache_length, input_values, active)

    def encode_features_step(
        self,
        state: FlaxMimiEncoderState,
        features: Float[Array, "batch steps hidden_size"],
        active: Bool[Array, "batch"],
    ) -> tuple[FlaxMimiEncoderState, Int[Array, "batch codebooks frames"]]:
        """The second part, from the features of the first."""
        return self.audio_encoder.encode_features_step(state, features, active, self.config.num_codebooks)

    def decode_audio_step(
        self,
        state: FlaxMimiDecoderState,
        audio_codes: Int[Array, "batch codebooks frames"],
        active: Bool[Array, "batch"],
    ) -> tuple[FlaxMimiDecoderState, Float[Array, "batch channels samples"]]:
        """As :meth:`decode_audio`, of the next frames of a stream."""
        return self.audio_encoder.decode_step(state, audio_codes, active)

    def embed(
        self, input_ids=None, user_audio_codes=None, moshi_audio_codes=None
    ) -> Float[Array, "batch frames hidden"]:
        """The sum of the embeddings of the streams that are given (text, Moshi's codes, the user's codes)."""
        embedded = [] if input_ids is None else [self.decoder.model.embed(input_ids)]
        for first, codes in ((0, moshi_audio_codes), (self.config.num_codebooks, user_audio_codes)):
            if codes is not None:
                embedded += [self.embed_tokens(first + k, codes[:, k]) for k in range(codes.shape[1])]
        return sum(embedded[1:], start=embedded[0])

    def listen(
        self,
        text_ids: Int[Array, "batch frames"],
        user_codes: Int[Array, "batch codebooks frames"],
        moshi_codes: Int[Array, "batch codebooks frames"],
        cache: Cache,
        attention_mask: Shaped[Array, "batch frames"] | None = None,
        inputs_embeds: tuple[Float[Array, "batch frames hidden"], Bool[Array, "1 frames 1"]] | None = None,
        output_attentions: bool = False,
    ) -> FlaxCausalLMOutputWithPast:
        """The backbone on the next frames, logits and last hidden state of the last one only.

        Args:
            text_ids: the text.
            user_codes, moshi_codes: delayed codes.
            cache: of the backbone.
            attention_mask: as the cache understands it.
            inputs_embeds: embeddings, and in which frames they stand for those of the ids and codes.
            output_attentions: whether the attentions are needed.
        """
        embedded = self.embed(text_ids, user_codes, moshi_codes)
        if inputs_embeds is not None:
            given, where = inputs_embeds
            embedded = jnp.where(where, given.astype(embedded.dtype), embedded)
        return self.decoder(
            inputs_embeds=embedded,
            attention_mask=attention_mask,
            cache=cache,
            logits_to_keep=1,
            output_attentions=output_attentions,
        )

    def next_codebook(
        self,
        input_ids: Int[Array, "batch 1"],
        last_hidden_state: Float[Array, "batch 1 input_size"],
        cache: StaticCache,
    ) -> FlaxMoshiDepthDecoderOutputWithPast:
        """The depth decoder on the next codebook of a frame."""
        return self.depth_decoder(input_ids, last_hidden_state, cache=cache, output_attentions=False)

    def depth_inputs(self, text_labels, audio_labels, hidden_states, attention_mask):
        """Pairs the hidden state of frame t with text and (delayed) codes of frame t + 1, as generation does."""
        text, codes = next_frames(text_labels, audio_labels, self.config.audio_vocab_size)
        _, labels = next_frame_labels(text_labels, audio_labels, attention_mask, self.config.audio_vocab_size)
        num_codebooks = codes.shape[-1]
        inputs = jnp.concatenate([text[..., None], codes[..., :-1]], axis=-1)
        return (
            inputs.reshape(-1, num_codebooks),
            hidden_states[:, : text.shape[1]].reshape(-1, 1, hidden_states.shape[-1]),
            labels.reshape(-1, num_codebooks),
        )

    def next_frame_logits(
        self,
        input_ids: Int[Array, "batch frames"],
        attention_mask: Int[Array, "batch frames"],
        user_audio_codes: Int[Array, "batch codebooks frames"],
        moshi_audio_codes: Int[Array, "batch codebooks frames"],
        text_labels: Int[Array, "batch frames"],
        audio_labels: Int[Array, "batch codebooks frames"],
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch frames-1 vocab"], Float[Array, "batch frames-1 codebooks audio_vocab"]]:
        """What training needs of :meth:`__call__`: the logits of every frame but the first, and nothing beside them.

        Entry t predicts frame t + 1, whose labels :func:`next_frame_labels` gives. The last frame predicts nothing, so
        the backbone is not run on it.
        """
        inputs_embeds = self.embed(input_ids[:, :-1], user_audio_codes[..., :-1], moshi_audio_codes[..., :-1])
        outputs = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask[:, :-1],
            deterministic=deterministic,
            output_attentions=False,
        )
        ids, hidden_states, _ = self.depth_inputs(
            text_labels, audio_labels, outputs.last_hidden_state, attention_mask.astype(bool)
        )
        depth = self.depth_decoder(ids, hidden_states, deterministic=deterministic, output_attentions=False)
        return outputs.logits, depth.logits.reshape(*outputs.logits.shape[:2], *depth.logits.shape[1:])

    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        user_audio_codes=None,
        moshi_audio_codes=None,
        cache: LinearCache | None = None,
        inputs_embeds=None,
        text_labels=None,
        audio_labels=None,
        deterministic: bool = True,
        output_attentions: bool = True,
    ) -> FlaxMoshiConditionalGenerationOutputWithPast:
        if self.is_initializing():
            self._reach_all_of_mimi()
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, user_audio_codes, moshi_audio_codes)

        mask = jnp.ones(inputs_embeds.shape[:2], dtype=bool) if attention_mask is None else attention_mask.astype(bool)
        outputs = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            deterministic=deterministic,
            output_attentions=output_attentions,
        )
        text_loss = depth_loss = depth = None
        if text_labels is not None:
            masked = ~attended_pairs(mask) | (text_labels[:, 1:] == IGNORE_INDEX)
            text_loss = cross_entropy(outputs.logits[:, :-1], text_labels[:, 1:], masked)
        if audio_labels is not None:
            ids, hidden_states, labels = self.depth_inputs(text_labels, audio_labels, outputs.last_hidden_state, mask)
            depth = self.depth_decoder(
                ids, hidden_states, labels=labels, deterministic=deterministic, output_attentions=output_attentions
            )
            depth_loss = depth.loss
        batch_size, length = mask.shape
        return FlaxMoshiConditionalGenerationOutputWithPast(
            loss=text_loss if depth_loss is None else text_loss + depth_loss,
            logits=outputs.logits,
            last_hidden_state=outputs.last_hidden_state,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            text_loss=text_loss,
            depth_loss=depth_loss,
            audio_logits=None
            if depth is None
            else depth.logits.reshape(batch_size, length - 1, *depth.logits.shape[1:]),
            depth_hidden_states=None if depth is None else depth.hidden_states,
            depth_attentions=None if depth is None else depth.attentions,
        )

    def _reach_all_of_mimi(self) -> None:
        config = self.config.audio_encoder_config
        if config.encoder_config is not None:
            self.encode_audio(jnp.zeros((1, config.audio_channels, samples_per_frame(config))))
        if config.decoder_config is not None:
            self.decode_audio(jnp.zeros((1, config.num_quantizers, 1), dtype=jnp.int32))


def attended_pairs(mask: Bool[Array, "batch frames"]) -> Bool[Array, "batch frames-1"]:
    """Where a frame and the next one, which it predicts, both count."""
    return mask[:, :-1] & mask[:, 1:]


def next_frames(
    text_labels: Int[Array, "batch frames"], audio_labels: Int[Array, "batch codebooks frames"], audio_vocab_size: int
) -> tuple[Int[Array, "batch frames-1"], Int[Array, "batch frames-1 codebooks"]]:
    """Text and delayed codes of frames 1, 2, …; ``audio_vocab_size`` stands for codes of before the first frame."""
    frames = audio_labels.shape[-1]
    codes, _ = build_delay_pattern_mask(audio_labels, audio_vocab_size, audio_vocab_size, frames + 1)
    return text_labels[:, 1:], codes[:, :, 1:].transpose(0, 2, 1)


def next_frame_labels(
    text_labels: Int[Array, "batch frames"],
    audio_labels: Int[Array, "batch codebooks frames"],
    attention_mask: Bool[Array, "batch frames"],
    audio_vocab_size: int,
) -> tuple[Int[Array, "batch frames-1"], Int[Array, "batch frames-1 codebooks"]]:
    """As :func:`next_frames`, with ``IGNORE_INDEX`` at what is not to be predicted.

    That is: padding codes, and frames that are masked or follow a masked one.
    """
    text, codes = next_frames(text_labels, audio_labels, audio_vocab_size)
    attended = attended_pairs(attention_mask)
    text = jnp.where(attended, text, IGNORE_INDEX)
    return text, jnp.where((codes == audio_vocab_size) | ~attended[..., None], IGNORE_INDEX, codes)
