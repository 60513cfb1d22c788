"""The linen modules of Whisper's encoder, from the smallest to the largest.

Names and parameter paths follow ``transformers.models.whisper.modeling_whisper``. Inside, arrays are channels last.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ...modeling_flax_outputs import FlaxBaseModelOutput
from ...nn.activations import ACT2FN
from ...nn.attention import SelfAttention
from ...nn.cache import NoCache
from ...nn.convolution import Conv1d
from ...nn.initializers import normal
from ...nn.layers import run_layers, with_layer_drop
from ...nn.linear import dense
from ...nn.norm import layer_norm

EPS = 1e-5
"""Of all norms."""


def check_config(config: Any) -> None:
    """Raises ``ValueError`` for sizes that do not go together, and an activation that is not known."""
    heads, kind = config.encoder_attention_heads, config.model_type
    if config.d_model % heads:
        raise ValueError(
            f"`encoder_attention_heads` of this {kind!r} configuration is {heads}, which does not divide the "
            f"{config.d_model} channels (`d_model`): change one."
        )
    if config.d_model % 2 or config.d_model < 4:
        raise ValueError(
            f"`d_model` of this {kind!r} configuration is {config.d_model}, but positions are pairs of sine and "
            "cosine: take an even one of at least 4."
        )
    if config.activation_function not in ACT2FN:
        raise ValueError(
            f"`activation_function` of this {kind!r} configuration is {config.activation_function!r}, which is not "
            f"supported: use one of {', '.join(sorted(ACT2FN))}."
        )


def sinusoids(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> Float[Array, "length width"]:
    """Sines, then cosines of positions in wavelengths from 2π to 20000π; an initializer, whose key is not used."""
    length, width = shape
    rates = np.exp(-np.log(10_000) / (width // 2 - 1) * np.arange(width // 2))
    angles = np.arange(length)[:, None] * rates[None]
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype)


class FlaxWhisperPositions(nn.Module):
    """The table of positions, which is not trained."""

    config: Any
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "frames hidden"]:
        config = self.config
        table = self.param("embedding", sinusoids, (config.max_source_positions, config.d_model), jnp.float32)
        return jax.lax.stop_gradient(table).astype(self.dtype)


class FlaxWhisperEncoderLayer(nn.Module):
    """Attention and two linear layers, with norms before them; upstream ``WhisperEncoderLayer``."""

    config: Any
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        hidden_states: Float[Array, "batch frames hidden"],
        mask: Bool[Array, "1 1 frames"],
        deterministic: bool = True,
        output_attentions: bool = False,
    ) -> tuple[Float[Array, "batch frames hidden"], Float[Array, "batch heads frames frames"] | None, None]:
        """The None is in the place of the cache that decoders' layers have."""
        config, dtype = self.config, self.dtype
        initializer = normal(config.init_std if hasattr(config, "init_std") else config.initializer_range)
        attention = SelfAttention(
            config.encoder_attention_heads,
            initializer,
            float(config.attention_dropout),
            key_bias=False,
            dtype=dtype,
            name="self_attn",
        )
        dropout = nn.Dropout(float(config.dropout))
        normed = layer_norm(EPS, dtype, "self_attn_layer_norm")(hidden_states)
        mixed, weights = attention(normed, mask, deterministic, output_attentions)
        x = hidden_states + dropout(mixed, deterministic=deterministic)
        inner = dense(config.encoder_ffn_dim, initializer, dtype, use_bias=True, name="fc1")(
            layer_norm(EPS, dtype, "final_layer_norm")(x)
        )
        inner = nn.Dropout(float(config.activation_dropout))(
            ACT2FN[config.activation_function](inner), deterministic=deterministic
        )
        outer = dense(config.d_model, initializer, dtype, use_bias=True, name="fc2")(inner)
        x = x + dropout(outer, deterministic=deterministic)
        if x.dtype == jnp.float16:  # whose largest numbers some checkpoints go beyond
            largest = float(jnp.finfo(jnp.float16).max) - 1000
            x = jnp.clip(x, -largest, largest)
        return with_layer_drop(self, hidden_states, x, float(config.encoder_layerdrop), deterministic), weights, None


class FlaxWhisperEncoderLayers(nn.Module):
    """The numbered layers; returns the input of every layer, the last output, and all weights."""

    config: Any
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        layer_class = FlaxWhisperEncoderLayer
        if self.gradient_checkpointing:
            # deterministic and output_attentions are Python values (self counts)
            layer_class = nn.remat(layer_class, static_argnums=(3, 4))
        self.blocks = [
            layer_class(self.config, self.dtype, name=str(number)) for number in range(self.config.encoder_layers)
        ]

    def __call__(
        self,
        hidden_states: Float[Array, "batch frames hidden"],
        deterministic: bool = True,
        output_attentions: bool = False,
    ) -> tuple[tuple[Array, ...], Float[Array, "batch frames hidden"], tuple[Array | None, ...]]:
        mask = jnp.ones((1, 1, hidden_states.shape[1]), dtype=bool)
        last, _, inputs, attentions = run_layers(
            self, self.blocks, hidden_states, NoCache(), lambda number: (mask,), (deterministic, output_attentions)
        )
        return inputs, last, attentions


class FlaxWhisperEncoderModule(nn.Module):
    """Two convolutions, positions, layers and a norm; upstream ``WhisperEncoder``.

    Raises:
        ValueError: a configuration that is not supported.
    """

    config: Any
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        config = self.config
        check_config(config)
        self.conv1 = Conv1d(config.d_model, 3, padding=1, dtype=self.dtype)
        self.conv2 = Conv1d(config.d_model, 3, stride=2, padding=1, dtype=self.dtype)
        self.embed_positions = FlaxWhisperPositions(config, self.dtype)
        self.layers = FlaxWhisperEncoderLayers(config, self.dtype, self.gradient_checkpointing)
        self.layer_norm = layer_norm(EPS, self.dtype)
        self.dropout = nn.Dropout(float(config.dropout))

    def __call__(
        self,
        input_features: Float[Array, "batch bins mel_frames"],
        deterministic: bool = True,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> FlaxBaseModelOutput:
        """Arguments as of :meth:`FlaxWhisperEncoder.__call__`."""
        x = nn.gelu(self.conv1(input_features.swapaxes(1, 2)), approximate=False)
        x = nn.gelu(self.conv2(x), approximate=False)
        x = self.dropout(x + self.embed_positions()[None], deterministic=deterministic)
        inputs, last, attentions = self.layers(x, deterministic, output_attentions)
        last = self.layer_norm(last)
        return FlaxBaseModelOutput(
            last_hidden_state=last,
            hidden_states=(*inputs, last) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )
