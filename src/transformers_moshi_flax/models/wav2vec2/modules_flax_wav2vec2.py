"""The linen modules of Wav2Vec2, from the smallest to the largest; HuBERT's are the same.

Names and parameter paths follow ``transformers.models.wav2vec2.modeling_wav2vec2``. Inside, arrays are channels last.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from ...modeling_flax_outputs import FlaxModelOutput
from ...nn.activations import ACT2FN
from ...nn.attention import SelfAttention
from ...nn.cache import NoCache
from ...nn.convolution import Conv1d, WeightNormConv1d
from ...nn.initializers import normal, uniform
from ...nn.layers import run_layers, with_layer_drop
from ...nn.linear import dense
from ...nn.norm import channel_norm, layer_norm
from ...ops.masking import masked_spans
from .topology import GROUP, LAYER, check_config, convolutions, output_length

CONV_EPS = 1e-5
"""Of the norms in the feature extractor, whatever ``layer_norm_eps`` is."""


@dataclasses.dataclass
class FlaxWav2Vec2BaseModelOutput(FlaxModelOutput):
    """Output of Wav2Vec2.

    Attributes:
        last_hidden_state: ``(batch, frames, hidden_size)``.
        extract_features: of the feature extractor, normed, ``(batch, frames, conv_dim[-1])``.
        hidden_states: input of the first layer and output of every layer, each ``(batch, frames, hidden_size)``; with
            ``do_stable_layer_norm`` ``last_hidden_state`` is the last of them behind one more norm.
        attentions: weights of every layer, each ``(batch, heads, frames, frames)``.
    """

    last_hidden_state: jax.Array | None = None
    extract_features: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


# ------------------------------------------------------------------------------------------------- feature extractor


class FlaxWav2Vec2ConvLayer(nn.Module):
    """A convolution of the feature extractor, its norm if it has one, and an activation; upstream has a class for each
    norm, ``Wav2Vec2GroupNormConvLayer`` and so on."""

    config: Any
    number: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch length in_channels"]) -> Float[Array, "batch length_out channels"]:
        config = self.config
        features, width, stride = convolutions(config)[self.number]
        x = Conv1d(features, width, stride, use_bias=config.conv_bias, dtype=self.dtype, name="conv")(x)
        if config.feat_extract_norm == LAYER:
            x = layer_norm(CONV_EPS, self.dtype, "layer_norm")(x)
        elif config.feat_extract_norm == GROUP and self.number == 0:
            x = channel_norm(CONV_EPS, self.dtype, "layer_norm")(x)
        return ACT2FN[config.feat_extract_activation](x)


class FlaxWav2Vec2ConvLayers(nn.Module):
    """The numbered convolutions of the feature extractor."""

    config: Any
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch samples 1"]) -> Float[Array, "batch frames channels"]:
        layer_class = nn.remat(FlaxWav2Vec2ConvLayer) if self.gradient_checkpointing else FlaxWav2Vec2ConvLayer
        for number in range(len(self.config.conv_dim)):
            x = layer_class(self.config, number, self.dtype, name=str(number))(x)
        return x


class FlaxWav2Vec2FeatureEncoder(nn.Module):
    """Audio to features, by convolutions without padding; upstream ``Wav2Vec2FeatureEncoder``."""

    config: Any
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        self.conv_layers = FlaxWav2Vec2ConvLayers(self.config, self.dtype, self.gradient_checkpointing)

    def __call__(self, input_values: Float[Array, "batch samples"]) -> Float[Array, "batch frames channels"]:
        return self.conv_layers(input_values[..., None].astype(self.dtype))


class FlaxWav2Vec2FeatureProjection(nn.Module):
    """Norm, and a projection to the width of the encoder; upstream ``Wav2Vec2FeatureProjection``.

    Returns:
        The projected features, and the normed ones.
    """

    config: Any
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "batch frames channels"], deterministic: bool = True
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch frames channels"]]:
        config = self.config
        if getattr(config, "feat_proj_layer_norm", True):  # a field of HuBERT alone
            features = layer_norm(config.layer_norm_eps, self.dtype, "layer_norm")(features)
        limit = math.sqrt(1 / features.shape[-1])
        projected = dense(config.hidden_size, uniform(limit), self.dtype, use_bias=True, name="projection")(features)
        dropout = nn.Dropout(float(config.feat_proj_dropout))
        return dropout(projected, deterministic=deterministic), features


# ------------------------------------------------------------------------------------------------------------ encoder


class FlaxWav2Vec2PositionalConvEmbedding(nn.Module):
    """A wide convolution in the place of positions; upstream ``Wav2Vec2PositionalConvEmbedding``."""

    config: Any
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden_states: Float[Array, "batch frames hidden"]) -> Float[Array, "batch frames hidden"]:
        config = self.config
        width, groups = config.num_conv_pos_embeddings, config.num_conv_pos_embedding_groups
        embedded = WeightNormConv1d(width, groups, self.dtype, name="conv")(hidden_states)
        return ACT2FN[config.feat_extract_activation](embedded)


class FlaxWav2Vec2FeedForward(nn.Module):
    """Two layers with biases; upstream ``Wav2Vec2FeedForward``."""

    config: Any
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, hidden_states: Float[Array, "batch frames hidden"], deterministic: bool = True
    ) -> Float[Array, "batch frames hidden"]:
        config = self.config
        initializer = normal(config.initializer_range)
        x = dense(config.intermediate_size, initializer, self.dtype, use_bias=True, name="intermediate_dense")(
            hidden_states
        )
        x = nn.Dropout(float(config.activation_dropout))(ACT2FN[config.hidden_act](x), deterministic=deterministic)
        x = dense(config.hidden_size, initializer, self.dtype, use_bias=True, name="output_dense")(x)
        return nn.Dropout(float(config.hidden_dropout))(x, deterministic=deterministic)


class FlaxWav2Vec2EncoderLayer(nn.Module):
    """Attention and feed-forward layer, with norms behind them, or before them with ``do_stable_layer_norm``; upstream
    ``Wav2Vec2EncoderLayer`` and ``Wav2Vec2EncoderLayerStableLayerNorm``."""

    config: Any
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "batch frames hidden"],
        mask: Bool[Array, "#batch 1 frames"],
        deterministic: bool = True,
        output_attentions: bool = False,
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch heads frames frames"] | None, None]:
        """``mask`` is True for frames to attend. The None is in the place of the cache that decoders' layers have."""
        config, dtype = self.config, self.dtype
        attention = SelfAttention(
            config.num_attention_heads,
            normal(config.initializer_range),
            float(config.attention_dropout),
            dtype=dtype,
            name="attention",
        )
        first_norm = layer_norm(config.layer_norm_eps, dtype, "layer_norm")
        last_norm = layer_norm(config.layer_norm_eps, dtype, "final_layer_norm")
        feed_forward = FlaxWav2Vec2FeedForward(config, dtype, name="feed_forward")
        dropout = nn.Dropout(float(config.hidden_dropout))

        stable, x = config.do_stable_layer_norm, hidden_states
        mixed, weights = attention(first_norm(x) if stable else x, mask, deterministic, output_attentions)
        x = x + dropout(mixed, deterministic=deterministic)
        if stable:
            x = x + feed_forward(last_norm(x), deterministic)
        else:
            x = first_norm(x)
            x = last_norm(x + feed_forward(x, deterministic))
        return with_layer_drop(self, hidden_states, x, float(config.layerdrop), deterministic), weights, None


class FlaxWav2Vec2EncoderLayers(nn.Module):
    """The numbered layers of :class:`FlaxWav2Vec2Encoder`; returns all states and all weights."""

    config: Any
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        layer_class = FlaxWav2Vec2EncoderLayer
        if self.gradient_checkpointing:
            # deterministic and output_attentions are Python values (self counts)
            layer_class = nn.remat(layer_class, static_argnums=(3, 4))
        self.blocks = [
            layer_class(self.config, self.dtype, name=str(number)) for number in range(self.config.num_hidden_layers)
        ]

    def __call__(
        self,
        hidden_states: Float[Array, "batch frames hidden"],
        mask: Bool[Array, "#batch 1 frames"],
        deterministic: bool = True,
        output_attentions: bool = False,
    ) -> tuple[tuple[Array, ...], tuple[Array | None, ...]]:
        last, _, inputs, attentions = run_layers(
            self, self.blocks, hidden_states, NoCache(), lambda number: (mask,), (deterministic, output_attentions)
        )
        return (*inputs, last), attentions


class FlaxWav2Vec2Encoder(nn.Module):
    """Positions and layers; upstream ``Wav2Vec2Encoder`` and ``Wav2Vec2EncoderStableLayerNorm``.

    Returns:
        The last hidden state, the input of the first layer with the output of every layer, and all weights.
    """

    config: Any
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        config = self.config
        self.pos_conv_embed = FlaxWav2Vec2PositionalConvEmbedding(config, self.dtype)
        self.layer_norm = layer_norm(config.layer_norm_eps, self.dtype)
        self.layers = FlaxWav2Vec2EncoderLayers(config, self.dtype, self.gradient_checkpointing)
        self.dropout = nn.Dropout(float(config.hidden_dropout))

    def __call__(
        self,
        hidden_states: Float[Array, "batch frames hidden"],
        mask: Bool[Array, "batch frames"] | None = None,
        deterministic: bool = True,
        output_attentions: bool = False,
    ) -> tuple[Float[Array, "batch frames hidden"], tuple[Array, ...], tuple[Array | None, ...]]:
        """``mask`` is True for frames that count. The others are zero for the positions, as what is around a row is,
        and nobody attends them."""
        if mask is None:
            mask = jnp.ones((1, hidden_states.shape[1]), dtype=bool)
        else:
            hidden_states = jnp.where(mask[..., None], hidden_states, 0)
        hidden_states = hidden_states + self.pos_conv_embed(hidden_states)
        stable = self.config.do_stable_layer_norm
        if not stable:
            hidden_states = self.layer_norm(hidden_states)
        hidden_states = self.dropout(hidden_states, deterministic=deterministic)
        states, attentions = self.layers(hidden_states, mask[:, None], deterministic, output_attentions)
        return self.layer_norm(states[-1]) if stable else states[-1], states, attentions


# -------------------------------------------------------------------------------------------------------------- model


class FlaxWav2Vec2Module(nn.Module):
    """Feature extractor, masking augmentation and encoder; upstream ``Wav2Vec2Model``.

    Raises:
        ValueError: a configuration that is not supported.
    """

    config: Any
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        config = self.config
        check_config(config)
        self.feature_extractor = FlaxWav2Vec2FeatureEncoder(config, self.dtype, self.gradient_checkpointing)
        self.feature_projection = FlaxWav2Vec2FeatureProjection(config, self.dtype)
        self.encoder = FlaxWav2Vec2Encoder(config, self.dtype, self.gradient_checkpointing)
        if config.mask_time_prob or config.mask_feature_prob:
            self.masked_spec_embed = self.param(
                "masked_spec_embed", nn.initializers.uniform(1.0), (config.hidden_size,), jnp.float32
            )

    def __call__(
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Shaped[Array, "batch samples"] | None = None,
        mask_time_indices: Bool[Array, "batch frames"] | None = None,
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> FlaxWav2Vec2BaseModelOutput:
        """Arguments as of :meth:`FlaxWav2Vec2Model.__call__`."""
        features = self.feature_extractor(input_values)
        lengths, mask = None, None
        if attention_mask is not None:
            lengths = output_length(self.config, jnp.sum(attention_mask.astype(jnp.int32), axis=1))
            mask = jnp.arange(features.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        hidden_states, features = self.feature_projection(features, deterministic)
        hidden_states = self.masked(hidden_states, lengths, mask_time_indices, deterministic)
        last, states, attentions = self.encoder(hidden_states, mask, deterministic, output_attentions)
        return FlaxWav2Vec2BaseModelOutput(
            last_hidden_state=last,
            extract_features=features,
            hidden_states=states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )

    def masked(
        self,
        hidden_states: Float[Array, "batch frames hidden"],
        lengths: Int[Array, "batch"] | None,
        mask_time_indices: Bool[Array, "batch frames"] | None,
        deterministic: bool,
    ) -> Float[Array, "batch frames hidden"]:
        """Masking augmentation: spans of frames become one learnt vector, spans of channels zero.

        Args:
            hidden_states: projected features.
            lengths: frames of each row.
            mask_time_indices: which frames, in the place of random ones.
            deterministic: no random ones.

        Raises:
            ValueError: a span is longer than there are frames.
        """
        config = self.config
        if not config.apply_spec_augment:
            return hidden_states
        batch, frames, hidden = hidden_states.shape
        time = mask_time_indices
        if time is None and config.mask_time_prob and not deterministic:
            if config.mask_time_length > frames:
                raise ValueError(
                    f"`mask_time_length` is {config.mask_time_length}, but there are {frames} frames in training: "
                    "give longer audio, or load with a smaller mask_time_length= or apply_spec_augment=False."
                )
            time = masked_spans(
                self.make_rng("dropout"),
                jnp.full((batch,), frames, jnp.int32) if lengths is None else lengths,
                frames,
                float(config.mask_time_prob),
                config.mask_time_length,
                config.mask_time_min_masks,
            )
        if time is not None:
            embedding = self.masked_spec_embed.astype(hidden_states.dtype)
            hidden_states = jnp.where(time[..., None], embedding[None, None], hidden_states)
        if config.mask_feature_prob and not deterministic:
            channels = masked_spans(
                self.make_rng("dropout"),
                jnp.full((batch,), hidden, jnp.int32),
                hidden,
                float(config.mask_feature_prob),
                config.mask_feature_length,
                config.mask_feature_min_masks,
            )
            hidden_states = jnp.where(channels[:, None], 0, hidden_states)
        return hidden_states
