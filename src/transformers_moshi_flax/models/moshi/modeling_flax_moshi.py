"""Moshi in Flax linen, from the smallest module to the whole model.

Moshi (Défossez et al., 2024) is a decoder over frames of 80 ms ("Helium", the backbone) with a second, small decoder
over the codebooks of one frame (the depth decoder). The names, the argument order and the parameter paths follow
``transformers.models.moshi.modeling_moshi``. Three things depart from it, see ``docs/differences.md``: state is
explicit (caches are passed in and returned), what upstream forces to float32 is computed in *at least* float32, and
the per-codebook linears keep one kernel per codebook, because XLA copies slices of stacked weights in every frame.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
from transformers import GenerationConfig, MoshiConfig
from transformers.models.moshi.configuration_moshi import MoshiDepthConfig
from transformers.utils import logging

from ...generation import FlaxGenerationMixin
from ...generation.configuration import (
    METADATA_FIELDS,
    NEUTRAL,
    OUTPUT_FIELDS,
    RUNTIME_FIELDS,
    SAMPLING_FIELDS,
    merge_generation_config,
    resolve_plan,
    resolve_sampling,
)
from ...generation.sampling import Sampling, row_keys
from ...input_checks import check_ids, check_mask, check_rank, is_traced
from ...modeling_flax_outputs import (
    FlaxBaseModelOutputWithPast,
    FlaxCausalLMOutputWithPast,
    FlaxModelOutput,
)
from ...modeling_flax_utils import FlaxPreTrainedModel
from ..activations import ACT2FN
from ..mimi.modeling_flax_mimi import FlaxMimiModule
from .checkpoint_flax_moshi import MOSHI_RULES
from .delay_pattern import apply_delay_pattern_mask, build_delay_pattern_mask
from .generation_flax_moshi import FlaxMoshiGenerateOutput, decode_audio, encode_audio, generate_frames

logger = logging.get_logger(__name__)

IGNORE_INDEX = -100

LayerCache = tuple[Float[Array, "batch kv_heads slots head_dim"], Float[Array, "batch kv_heads slots head_dim"]]


def at_least_float32(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


# ------------------------------------------------------------------------------------------------------- caches


@flax.struct.dataclass
class FlaxMoshiCache:
    """Static key-value cache of the backbone, made by ``init_cache`` and returned updated by every call.

    Attributes:
        keys, values: one array per layer, ``(batch, kv_heads, max_length, head_dim)``.
        mask: ``(batch, max_length)``, which of the frames written so far may be attended.
        length: frames written so far, a scalar.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array
    length: jax.Array

    @property
    def max_length(self) -> int:
        return self.mask.shape[-1]

    @classmethod
    def create(cls, config, batch_size: int, max_length: int, dtype=jnp.float32) -> FlaxMoshiCache:
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers)),
            values=tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers)),
            mask=jnp.zeros((batch_size, max_length), dtype=bool),
            length=jnp.zeros((), dtype=jnp.int32),
        )


@flax.struct.dataclass
class FlaxMoshiDepthCache:
    """Key-value cache of the depth decoder. ``length`` is static, since it selects each codebook's own weights.

    Attributes:
        keys, values: one array per layer, ``(batch, kv_heads, num_codebooks, head_dim)``.
        mask: ``(batch, num_codebooks)``, which of the codebooks written so far may be attended.
        length: codebooks written so far, a Python integer.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    mask: jax.Array
    length: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def max_length(self) -> int:
        return self.mask.shape[-1]

    @classmethod
    def create(cls, config, batch_size: int, max_length: int, dtype=jnp.float32) -> FlaxMoshiDepthCache:
        cache = FlaxMoshiCache.create(config, batch_size, max_length, dtype)
        return cls(keys=cache.keys, values=cache.values, mask=cache.mask, length=0)


# ------------------------------------------------------------------------------------------------ building blocks


class FlaxMoshiRMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich, 2019) in at least float32; upstream ``MoshiRMSNorm``."""

    eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden_states: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        scale = self.param("scale", nn.initializers.ones, (hidden_states.shape[-1],), jnp.float32)
        wide = at_least_float32(self.dtype)
        x = hidden_states.astype(wide)
        x = x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(wide)).astype(self.dtype)


class FlaxMoshiFlexibleLinear(nn.Module):
    """One linear layer per codebook; upstream ``MoshiFlexibleLinear``.

    Each codebook is an ordinary ``nn.Dense`` named by its number, so that tools for dense layers reach it.
    """

    input_size: int
    output_size: int
    num_layers: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.codebooks = [
            nn.Dense(
                self.output_size,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(1.0),
                name=str(index),
            )
            for index in range(self.num_layers)
        ]

    def __call__(
        self, x: Float[Array, "batch seq input_size"], layer_idx: int | tuple[int, ...] | Any | None = None
    ) -> Float[Array, "batch seq output_size"]:
        """Applies to each position of the sequence its codebook's layer.

        Args:
            x: inputs.
            layer_idx: None (position i uses layer i, and the sequence has ``num_layers`` positions), one integer
                for the whole sequence, or one index per position: a tuple or 1-D array. Indices known at trace
                time select weights for free; a traced array gathers them, which copies weights.

        Raises:
            ValueError: if an index is out of range or their number differs from the sequence's length. Traced
                indices are clamped by JAX.
        """
        length = x.shape[1]
        if self.is_initializing():
            for codebook in self.codebooks:
                codebook(x[:, :1])
        if layer_idx is None:
            layer_idx = tuple(range(self.num_layers))
        elif is_traced(layer_idx):
            kernels = jnp.stack([codebook.variables["params"]["kernel"] for codebook in self.codebooks])
            chosen = kernels[jnp.broadcast_to(layer_idx, (length,))]
            return jnp.einsum("bsi,sio->bso", x.astype(self.dtype), chosen.astype(self.dtype))
        layer_idx = np.asarray(layer_idx)
        if layer_idx.ndim == 0:
            layer_idx = np.full((1 if length == 0 else length,), layer_idx)
        if layer_idx.shape != (length,):
            raise ValueError(
                f"`layer_idx` must have one index per position ({length}), but has the shape {layer_idx.shape}."
            )
        if layer_idx.min() < 0 or layer_idx.max() >= self.num_layers:
            raise ValueError(f"`layer_idx` must be in [0, {self.num_layers}), but is {layer_idx.tolist()}.")
        if (layer_idx == layer_idx[0]).all():
            return self.codebooks[layer_idx[0]](x)
        return jnp.concatenate([self.codebooks[layer](x[:, i : i + 1]) for i, layer in enumerate(layer_idx)], axis=1)


class FlaxMoshiLinear(nn.Module):
    """A bias-free linear layer, shared or one per codebook; upstream ``MoshiLinear``."""

    input_dim: int
    output_dim: int
    num_codebooks: int
    use_flexible_linear: bool = False
    dtype: jnp.dtype = jnp.float32
    initializer_range: float = 0.02

    def setup(self):
        if self.use_flexible_linear:
            self.linear = FlaxMoshiFlexibleLinear(self.input_dim, self.output_dim, self.num_codebooks, self.dtype)
        else:
            self.linear = dense(self.output_dim, self.initializer_range, self.dtype)

    def __call__(self, x: Float[Array, "batch seq input_dim"], layer_idx=None) -> Float[Array, "batch seq output_dim"]:
        return self.linear(x, layer_idx) if self.use_flexible_linear else self.linear(x)


def dense(features: int, initializer_range: float, dtype) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=nn.initializers.normal(initializer_range))


class FlaxMoshiGatingMLP(nn.Module):
    """Gated feed-forward layer, ``fc2(act(a) * b)`` with ``a, b`` the halves of ``fc1``; upstream ``MoshiGatingMLP``."""

    config: MoshiConfig | MoshiDepthConfig
    use_flexible_linear: bool = False
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config = self.config
        if self.use_flexible_linear:
            self.fc1 = FlaxMoshiFlexibleLinear(config.hidden_size, config.ffn_dim, config.num_codebooks, self.dtype)
            self.fc2 = FlaxMoshiFlexibleLinear(
                config.ffn_dim // 2, config.hidden_size, config.num_codebooks, self.dtype
            )
        else:
            self.fc1 = dense(config.ffn_dim, config.initializer_range, self.dtype)
            self.fc2 = dense(config.hidden_size, config.initializer_range, self.dtype)
        self.activation_fn = ACT2FN[config.hidden_act]

    def __call__(
        self, hidden_states: Float[Array, "batch seq hidden"], layer_idx=None
    ) -> Float[Array, "batch seq hidden"]:
        arguments = (layer_idx,) if self.use_flexible_linear else ()
        gate, up = jnp.split(self.fc1(hidden_states, *arguments), 2, axis=-1)
        return self.fc2(self.activation_fn(gate) * up, *arguments)


def rotary_embedding(
    position_ids: Int[Array, "batch seq"], head_dim: int, theta: float, dtype
) -> tuple[Float[Array, "batch seq head_dim"], Float[Array, "batch seq head_dim"]]:
    """Cosines and sines of the rotary embedding (Su et al., 2021), angles in at least float32; upstream
    ``MoshiRotaryEmbedding`` with the default rope type."""
    wide = at_least_float32(dtype)
    inverse_frequencies = 1.0 / (theta ** (jnp.arange(0, head_dim, 2, dtype=wide) / head_dim))
    angles = position_ids[..., None].astype(wide) * inverse_frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def apply_rotary_pos_emb(
    x: Float[Array, "batch heads seq head_dim"],
    cos: Float[Array, "batch seq head_dim"],
    sin: Float[Array, "batch seq head_dim"],
) -> Float[Array, "batch heads seq head_dim"]:
    """Rotates each pair (i, i + head_dim / 2) of the heads by the angle of its position."""
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return x * cos[:, None] + rotated * sin[:, None]


def attention_mask_of(
    query_slots: Int[Array, "seq"], key_mask: Bool[Array, "batch slots"], sliding_window: int
) -> Bool[Array, "batch seq slots"]:
    """Which keys each query may attend: unmasked, not later, and fewer than ``sliding_window`` slots back."""
    key_slots = jnp.arange(key_mask.shape[-1], dtype=jnp.int32)[None, :]
    distance = query_slots[:, None] - key_slots
    return ((distance >= 0) & (distance < sliding_window))[None] & key_mask[:, None, :]


class FlaxMoshiAttention(nn.Module):
    """Causal self-attention with grouped key-value heads and a sliding window; upstream ``MoshiAttention``."""

    config: MoshiConfig | MoshiDepthConfig
    use_flexible_linear: bool = False
    use_rope: bool = True
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config = self.config
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"`hidden_size` must be divisible by `num_attention_heads`, but they are {config.hidden_size} and "
                f"{config.num_attention_heads}."
            )

        def linear(input_dim: int, output_dim: int) -> FlaxMoshiLinear:
            return FlaxMoshiLinear(
                input_dim,
                output_dim,
                config.num_codebooks,
                self.use_flexible_linear,
                self.dtype,
                config.initializer_range,
            )

        inner = config.num_attention_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, inner)
        self.k_proj = linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = linear(inner, config.hidden_size)
        self.dropout = nn.Dropout(rate=config.attention_dropout)

    def __call__(
        self,
        hidden_states: Float[Array, "batch seq hidden"],
        attention_mask: Bool[Array, "batch seq slots"],
        position_ids: Int[Array, "batch seq"] | None = None,
        layer_cache: LayerCache | None = None,
        cache_index: Any = 0,
        codebook_idx: Any = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch seq hidden"], Float[Array, "batch heads seq slots"], LayerCache | None]:
        """Attends over this call's keys, or over the cache's slots after writing this call's into them.

        Args:
            hidden_states: inputs.
            attention_mask: True where a query may attend a key slot.
            position_ids: positions for the rotary embedding (unused without it).
            layer_cache: keys and values of this layer.
            cache_index: the slot of the first new key.
            codebook_idx: the ``layer_idx`` of the per-codebook linears.
            deterministic: no dropout.

        Returns:
            The output, the attention weights and the updated cache of this layer.
        """
        config = self.config
        batch_size, length, _ = hidden_states.shape
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim

        def heads(projection: FlaxMoshiLinear) -> Array:
            projected = projection(hidden_states, codebook_idx)
            return projected.reshape(batch_size, length, -1, head_dim).transpose(0, 2, 1, 3)

        query, key, value = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        if self.use_rope:
            cos, sin = rotary_embedding(position_ids, head_dim, config.rope_parameters["rope_theta"], self.dtype)
            query, key = apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin)

        if layer_cache is not None:
            key = lax.dynamic_update_slice_in_dim(
                layer_cache[0], key.astype(layer_cache[0].dtype), cache_index, axis=2
            )
            value = lax.dynamic_update_slice_in_dim(
                layer_cache[1], value.astype(layer_cache[1].dtype), cache_index, axis=2
            )
            layer_cache = (key, value)
        slots = attention_mask.shape[-1]
        key, value = key[:, :, :slots].astype(self.dtype), value[:, :, :slots].astype(self.dtype)

        # the queries of one group stand beside each other: [batch, kv_heads, group * seq, head_dim]
        groups = config.num_attention_heads // kv_heads
        query = query.reshape(batch_size, kv_heads, groups * length, head_dim)
        wide = at_least_float32(self.dtype)
        scores = jnp.einsum("bkqd,bksd->bkqs", query, key, preferred_element_type=wide) * (1 / math.sqrt(head_dim))
        scores = scores.reshape(batch_size, kv_heads, groups, length, slots)
        scores = jnp.where(attention_mask[:, None, None], scores, jnp.finfo(wide).min)
        weights = nn.softmax(scores, axis=-1).astype(self.dtype)
        dropped = self.dropout(weights, deterministic=deterministic)
        output = jnp.einsum("bkqs,bksd->bkqd", dropped.reshape(batch_size, kv_heads, groups * length, slots), value)
        output = output.reshape(batch_size, kv_heads * groups, length, head_dim).transpose(0, 2, 1, 3)
        output = self.o_proj(output.reshape(batch_size, length, -1), codebook_idx)
        return output, weights.reshape(batch_size, kv_heads * groups, length, slots), layer_cache


class FlaxMoshiDecoderLayer(nn.Module):
    """Pre-norm transformer layer; upstream ``MoshiDecoderLayer``. The norms are shared by all codebooks."""

    config: MoshiConfig | MoshiDepthConfig
    use_flexible_linear: bool = False
    use_rope: bool = True
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config = self.config
        self.self_attn = FlaxMoshiAttention(config, self.use_flexible_linear, self.use_rope, self.dtype)
        self.mlp = FlaxMoshiGatingMLP(config, self.use_flexible_linear, self.dtype)
        self.input_layernorm = FlaxMoshiRMSNorm(config.rms_norm_eps, self.dtype)
        self.post_attention_layernorm = FlaxMoshiRMSNorm(config.rms_norm_eps, self.dtype)

    def __call__(
        self,
        hidden_states: Float[Array, "batch seq hidden"],
        attention_mask: Bool[Array, "batch seq slots"],
        position_ids: Int[Array, "batch seq"] | None = None,
        layer_cache: LayerCache | None = None,
        cache_index: Any = 0,
        codebook_idx: Any = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch seq hidden"], Float[Array, "batch heads seq slots"], LayerCache | None]:
        """Arguments and returns as :class:`FlaxMoshiAttention`."""
        attended, weights, layer_cache = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask,
            position_ids,
            layer_cache,
            cache_index,
            codebook_idx,
            deterministic,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), codebook_idx)
        return hidden_states, weights, layer_cache


class FlaxMoshiLayers(nn.Module):
    """The stack of decoder layers of either decoder, children named by number."""

    config: MoshiConfig | MoshiDepthConfig
    use_flexible_linear: bool = False
    use_rope: bool = True
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        # codebook_idx and deterministic are Python values
        layer_class = (
            nn.remat(FlaxMoshiDecoderLayer, static_argnums=(5, 6))
            if self.gradient_checkpointing
            else FlaxMoshiDecoderLayer
        )
        self.blocks = [
            layer_class(self.config, self.use_flexible_linear, self.use_rope, self.dtype, name=str(index))
            for index in range(self.config.num_hidden_layers)
        ]

    def __call__(
        self, hidden_states, attention_mask, position_ids, cache, codebook_idx, deterministic
    ) -> tuple[Array, FlaxMoshiCache | FlaxMoshiDepthCache | None, tuple[Array, ...], tuple[Array, ...]]:
        """Returns the last hidden state, the updated cache, the input of every layer and all attention weights."""
        inputs, attentions, layer_caches = [], [], []
        for index, block in enumerate(self.blocks):
            inputs.append(hidden_states)
            layer_cache = None if cache is None else (cache.keys[index], cache.values[index])
            hidden_states, weights, layer_cache = block(
                hidden_states,
                attention_mask,
                position_ids,
                layer_cache,
                0 if cache is None else cache.length,
                codebook_idx,
                deterministic,
            )
            attentions.append(weights)
            layer_caches.append(layer_cache)
        if cache is not None:
            keys, values = zip(*layer_caches)
            cache = cache.replace(keys=tuple(keys), values=tuple(values))
        return hidden_states, cache, tuple(inputs), tuple(attentions)


class FlaxMoshiEmbeddings(nn.Module):
    """A numbered list of embedding tables of one size (upstream's ``nn.ModuleList`` of embeddings)."""

    num_tables: int
    num_embeddings: int
    features: int
    initializer_range: float = 0.02
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.tables = [
            embedding_table(self.num_embeddings, self.features, self.initializer_range, self.dtype, name=str(index))
            for index in range(self.num_tables)
        ]

    def __call__(self, index: int, ids: Int[Array, "*shape"]) -> Float[Array, "*shape features"]:
        return embed(self.tables[index], ids)


def embedding_table(num_embeddings: int, features: int, initializer_range: float, dtype, name=None) -> nn.Embed:
    initializer = nn.initializers.normal(initializer_range)
    return nn.Embed(num_embeddings, features, dtype=dtype, embedding_init=initializer, name=name)


def embed(table: nn.Embed, ids: Int[Array, "*shape"]) -> Float[Array, "*shape features"]:
    """Looks ids up; ``IGNORE_INDEX`` gives a zero embedding, as the original's token id -1."""
    embedded = table(jnp.maximum(ids, 0))
    return jnp.where((ids == IGNORE_INDEX)[..., None], jnp.zeros((), embedded.dtype), embedded)


def cross_entropy(
    logits: Float[Array, "*shape vocab"], labels: Int[Array, "*shape"], ignored: Bool[Array, "*shape"]
) -> Float[Array, ""]:
    """Mean cross-entropy in at least float32 over the labels that are not ignored (NaN if all are, as in PyTorch)."""
    logits = logits.astype(at_least_float32(logits.dtype))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(ignored, 0, labels))
    kept = ~ignored
    return jnp.sum(jnp.where(kept, losses, 0)) / jnp.sum(kept).astype(losses.dtype)


def call_length(cache: FlaxMoshiCache | FlaxMoshiDepthCache | None) -> Any:
    return 0 if cache is None else cache.length


def masked_keys(attention_mask, cache, batch_size: int, length: int) -> tuple[Array, Any]:
    """The mask over all key slots, this call's included, and the cache that remembers it.

    ``attention_mask`` covers this call's frames, or all slots of the cache.
    """
    if attention_mask is None:
        attention_mask = jnp.ones((batch_size, length), dtype=bool)
    attention_mask = jnp.asarray(attention_mask).astype(bool)
    if cache is None:
        return attention_mask, None
    if attention_mask.shape[-1] == cache.max_length and length != cache.max_length:
        mask = attention_mask
    else:
        mask = lax.dynamic_update_slice_in_dim(cache.mask, attention_mask, cache.length, axis=1)
    return mask, cache.replace(mask=mask)


# ------------------------------------------------------------------------------------------------- the backbone


class FlaxMoshiModule(nn.Module):
    """The backbone: text embedding, decoder layers, final norm; upstream ``MoshiModel``."""

    config: MoshiConfig
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        config = self.config
        self.embed_tokens = embedding_table(
            config.vocab_size + 1, config.hidden_size, config.initializer_range, self.dtype
        )
        self.layers = FlaxMoshiLayers(config, dtype=self.dtype, gradient_checkpointing=self.gradient_checkpointing)
        self.norm = FlaxMoshiRMSNorm(config.rms_norm_eps, self.dtype)

    def embed(self, input_ids: Int[Array, "batch frames"]) -> Float[Array, "batch frames hidden"]:
        return embed(self.embed_tokens, input_ids)

    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values: FlaxMoshiCache | None = None,
        inputs_embeds=None,
        deterministic: bool = True,
    ) -> FlaxBaseModelOutputWithPast:
        hidden_states = self.embed(input_ids) if inputs_embeds is None else inputs_embeds.astype(self.dtype)
        batch_size, length, _ = hidden_states.shape
        slots = call_length(past_key_values) + jnp.arange(length, dtype=jnp.int32)
        if position_ids is None:
            position_ids = slots[None]
        key_mask, past_key_values = masked_keys(attention_mask, past_key_values, batch_size, length)
        mask = attention_mask_of(slots, key_mask, self.config.sliding_window)
        hidden_states, past_key_values, inputs, attentions = self.layers(
            hidden_states, mask, position_ids, past_key_values, None, deterministic
        )
        hidden_states = self.norm(hidden_states)
        if past_key_values is not None:
            past_key_values = past_key_values.replace(length=past_key_values.length + length)
        return FlaxBaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*inputs, hidden_states),
            attentions=attentions,
        )


class FlaxMoshiForCausalLMModule(nn.Module):
    """The backbone with the text head; upstream ``MoshiForCausalLM``."""

    config: MoshiConfig
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        self.model = FlaxMoshiModule(self.config, self.dtype, self.gradient_checkpointing)
        self.lm_head = dense(self.config.vocab_size, self.config.initializer_range, self.dtype)

    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values: FlaxMoshiCache | None = None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep: int = 0,
        deterministic: bool = True,
    ) -> FlaxCausalLMOutputWithPast:
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, deterministic)
        hidden_states = outputs.last_hidden_state[:, -logits_to_keep:]
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1], labels[:, 1:], labels[:, 1:] == IGNORE_INDEX)
        return FlaxCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            last_hidden_state=hidden_states,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# --------------------------------------------------------------------------------------------- the depth decoder


class FlaxMoshiDepthDecoderModule(nn.Module):
    """The decoder over the codebooks of one frame; upstream ``MoshiDepthDecoder``. Always causal."""

    config: MoshiDepthConfig
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False

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
        input_ids=None,
        last_hidden_state=None,
        attention_mask=None,
        past_key_values: FlaxMoshiDepthCache | None = None,
        inputs_embeds=None,
        position_ids: tuple[int, ...] | None = None,
        labels=None,
        deterministic: bool = True,
    ) -> FlaxCausalLMOutputWithPast:
        batch_size, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        past_length = call_length(past_key_values)
        slots = tuple(range(past_length, past_length + length))
        codebook_idx = slots if position_ids is None else position_ids
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, codebook_idx)
        # the hidden state of the frame conditions every codebook
        last_hidden_state = jnp.broadcast_to(last_hidden_state, (batch_size, length, last_hidden_state.shape[-1]))
        hidden_states = inputs_embeds.astype(self.dtype) + self.input_projections(last_hidden_state, codebook_idx)

        key_mask, past_key_values = masked_keys(attention_mask, past_key_values, batch_size, length)
        mask = attention_mask_of(
            jnp.asarray(slots, dtype=jnp.int32), key_mask[:, : past_length + length], self.config.sliding_window
        )
        hidden_states, past_key_values, inputs, attentions = self.layers(
            hidden_states, mask, None, past_key_values, codebook_idx, deterministic
        )
        if past_key_values is not None:
            past_key_values = past_key_values.replace(length=past_length + length)
        logits = self.lm_heads(hidden_states, codebook_idx)
        loss = None
        if labels is not None:
            ignored = (labels == IGNORE_INDEX) | (labels == self.config.audio_vocab_size)
            loss = cross_entropy(logits, labels, ignored)
        return FlaxCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*inputs, hidden_states),
            attentions=attentions,
        )


# ---------------------------------------------------------------------------------------------- the whole of Moshi


@flax.struct.dataclass
class FlaxMoshiConditionalGenerationOutputWithPast(FlaxModelOutput):
    """Output of :class:`FlaxMoshiForConditionalGeneration`.

    Attributes:
        loss: the sum of ``text_loss`` and ``depth_loss``, as far as their labels were passed.
        logits: text logits, ``(batch, frames, vocab_size)``.
        last_hidden_state: of the backbone, ``(batch, frames, hidden_size)``.
        past_key_values: the backbone's updated cache, if one was passed.
        hidden_states, attentions: of the backbone.
        text_loss: mean cross-entropy of the text tokens of frames 1, 2, ….
        depth_loss: mean cross-entropy of their audio codes.
        audio_logits: ``(batch, frames - 1, num_codebooks, audio_vocab_size)``; entry t predicts frame t + 1.
        depth_hidden_states, depth_attentions: of the depth decoder, over ``batch * (frames - 1)`` sequences.
    """

    loss: jax.Array | None = None
    logits: jax.Array | None = None
    last_hidden_state: jax.Array | None = None
    past_key_values: Any = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None
    text_loss: jax.Array | None = None
    depth_loss: jax.Array | None = None
    audio_logits: jax.Array | None = None
    depth_hidden_states: tuple[jax.Array, ...] | None = None
    depth_attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
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
        self.decoder = FlaxMoshiForCausalLMModule(config, self.dtype, self.gradient_checkpointing)
        self.depth_decoder = FlaxMoshiDepthDecoderModule(
            config.depth_decoder_config, self.dtype, self.gradient_checkpointing
        )

    def encode_audio(self, input_values: Float[Array, "batch 1 samples"]) -> Int[Array, "batch codebooks frames"]:
        """The codes of a waveform, as many codebooks as Moshi hears."""
        return self.audio_encoder.encode(input_values, num_quantizers=self.config.num_codebooks).audio_codes

    def decode_audio(self, audio_codes: Int[Array, "batch codebooks frames"]) -> Float[Array, "batch 1 samples"]:
        return self.audio_encoder.decode(audio_codes).audio_values

    def embed(
        self, input_ids=None, user_audio_codes=None, moshi_audio_codes=None
    ) -> Float[Array, "batch frames hidden"]:
        """The sum of the embeddings of the streams that are given (text, Moshi's codes, the user's codes)."""
        embedded = [] if input_ids is None else [self.decoder.model.embed(input_ids)]
        for first, codes in ((0, moshi_audio_codes), (self.config.num_codebooks, user_audio_codes)):
            if codes is not None:
                embedded += [self.embed_tokens(first + k, codes[:, k]) for k in range(codes.shape[1])]
        return sum(embedded[1:], start=embedded[0])

    def decode_frame(self, inputs_embeds, attention_mask, past_key_values) -> FlaxCausalLMOutputWithPast:
        """The backbone with its cache, logits of the last frame only."""
        return self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            logits_to_keep=1,
        )

    def decode_codebook(self, input_ids, last_hidden_state, past_key_values) -> FlaxCausalLMOutputWithPast:
        """The depth decoder on the next codebook of a frame."""
        return self.depth_decoder(input_ids, last_hidden_state, past_key_values=past_key_values)

    def depth_inputs(self, text_labels, audio_labels, hidden_states, attention_mask):
        """Pairs the hidden state of frame t with text and (delayed) codes of frame t + 1, as generation does."""
        pad = self.config.audio_vocab_size
        codes, _ = build_delay_pattern_mask(audio_labels, pad, pad, audio_labels.shape[-1] + 1)
        codes = codes[:, :, 1:].transpose(0, 2, 1)
        inputs = jnp.concatenate([text_labels[:, 1:, None], codes[:, :, :-1]], axis=-1)
        labels = jnp.where((codes == pad) | ~attended_pairs(attention_mask)[..., None], IGNORE_INDEX, codes)
        num_codebooks = labels.shape[-1]
        return (
            inputs.reshape(-1, num_codebooks),
            hidden_states[:, :-1].reshape(-1, 1, hidden_states.shape[-1]),
            labels.reshape(-1, num_codebooks),
        )

    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        user_input_values=None,
        user_audio_codes=None,
        moshi_input_values=None,
        moshi_audio_codes=None,
        past_key_values: FlaxMoshiCache | None = None,
        inputs_embeds=None,
        text_labels=None,
        audio_labels=None,
        deterministic: bool = True,
    ) -> FlaxMoshiConditionalGenerationOutputWithPast:
        if self.is_initializing():
            self._reach_all_of_mimi()
        if inputs_embeds is None:
            if user_audio_codes is None and user_input_values is not None:
                user_audio_codes = self.encode_audio(user_input_values)
            if moshi_audio_codes is None and moshi_input_values is not None:
                moshi_audio_codes = self.encode_audio(moshi_input_values)
            inputs_embeds = self.embed(input_ids, user_audio_codes, moshi_audio_codes)

        mask = jnp.ones(inputs_embeds.shape[:2], dtype=bool) if attention_mask is None else attention_mask.astype(bool)
        outputs = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            deterministic=deterministic,
        )
        text_loss = depth_loss = depth = None
        if text_labels is not None:
            masked = ~attended_pairs(mask) | (text_labels[:, 1:] == IGNORE_INDEX)
            text_loss = cross_entropy(outputs.logits[:, :-1], text_labels[:, 1:], masked)
        if audio_labels is not None:
            ids, hidden_states, labels = self.depth_inputs(text_labels, audio_labels, outputs.last_hidden_state, mask)
            depth = self.depth_decoder(ids, hidden_states, labels=labels, deterministic=deterministic)
            depth_loss = depth.loss
        batch_size, length = mask.shape
        return FlaxMoshiConditionalGenerationOutputWithPast(
            loss=text_loss if depth_loss is None else text_loss + depth_loss,
            logits=outputs.logits,
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
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
            self.encode_audio(jnp.zeros((1, config.audio_channels, config.frame_size)))
        if config.decoder_config is not None:
            self.decode_audio(jnp.zeros((1, config.num_quantizers, 1), dtype=jnp.int32))


def attended_pairs(mask: Bool[Array, "batch frames"]) -> Bool[Array, "batch frames-1"]:
    """Where a frame and the next one, which it predicts, both count."""
    return mask[:, :-1] & mask[:, 1:]


# ---------------------------------------------------------------------------------------------- the public models


class FlaxMoshiPreTrainedModel(FlaxPreTrainedModel):
    """What the Moshi classes share: the call around ``module.apply`` and the cache."""

    config_class = MoshiConfig
    base_model_prefix = "model"
    checkpoint_rules = MOSHI_RULES
    cache_class = FlaxMoshiCache

    def init_cache(self, batch_size: int, max_length: int) -> FlaxMoshiCache | FlaxMoshiDepthCache:
        """An empty static cache for ``max_length`` frames, to be passed as ``past_key_values``.

        Raises:
            ValueError: if either size is below 1.
        """
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {value}.")
        return self.cache_class.create(self.config, batch_size, max_length, self.dtype)

    def _cache_for(self, past_key_values, use_cache: bool | None, batch_size: int, max_length: int):
        """``use_cache=True`` without a cache starts one for the whole context of the configuration."""
        if past_key_values is None and use_cache:
            return self.init_cache(batch_size, max_length)
        return past_key_values

    def _finish(self, outputs, params, use_cache, output_attentions, output_hidden_states, return_dict):
        """Leaves out what was not asked for."""
        config = self.config
        asked = {
            "attentions": config.output_attentions if output_attentions is None else output_attentions,
            "hidden_states": config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            "past_key_values": use_cache is not False,
        }
        dropped = {
            field: None
            for field in vars(outputs)
            for name, wanted in asked.items()
            if field in (name, f"depth_{name}") and not wanted
        }
        outputs = outputs.replace(**dropped)
        return_dict = config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    def _apply(self, params, dropout_rng, train: bool, method=None, **inputs):
        """Runs the module with ``params`` (default: the model's own)."""
        if train and dropout_rng is None and self.config.attention_dropout > 0:
            raise ValueError(
                "`train=True` with `attention_dropout` > 0 needs `dropout_rng`: pass a key of `jax.random.key`."
            )
        rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
        params = self.params if params is None else params
        return self.module.apply({"params": params}, **inputs, deterministic=not train, rngs=rngs)


def check_cache(cache, config, batch_size: int, length: int) -> None:
    """Raises ``ValueError`` if a call of ``length`` frames does not fit into the cache."""
    if cache is None:
        return
    if len(cache.keys) != config.num_hidden_layers or cache.keys[0].shape[0] != batch_size:
        raise ValueError(
            f"`past_key_values` is a cache of {len(cache.keys)} layers for a batch of {cache.keys[0].shape[0]}, but "
            f"the model has {config.num_hidden_layers} and the batch is {batch_size}: make one with `init_cache`."
        )
    if not is_traced(cache.length) and int(cache.length) + length > cache.max_length:
        raise ValueError(
            f"`past_key_values` has {cache.max_length} slots, {int(cache.length)} of them used, and cannot take "
            f"{length} more frames: make a larger one with `init_cache(batch_size, max_length)`."
        )


def check_decoder_inputs(config, cache, input_ids, inputs_embeds, attention_mask, position_ids) -> tuple[int, int]:
    """Checks what the backbone is called with; returns batch size and frames."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    if input_ids is not None:
        check_rank("input_ids", input_ids, ("batch", "frames"))
        check_ids("input_ids", input_ids, config.vocab_size + 1)
        batch_size, length = np.shape(input_ids)
    else:
        batch_size, length = check_embeds(inputs_embeds, config)
    check_cache(cache, config, batch_size, length)
    if attention_mask is not None:
        check_mask("attention_mask", attention_mask, batch_size, mask_lengths(length, cache))
    if position_ids is not None and np.shape(position_ids) not in ((batch_size, length), (1, length)):
        raise ValueError(
            f"`position_ids` must have the shape ({batch_size}, {length}), but has the shape {np.shape(position_ids)}."
        )
    return batch_size, length


def check_embeds(inputs_embeds, config) -> tuple[int, int]:
    check_rank("inputs_embeds", inputs_embeds, ("batch", "frames", "hidden_size"))
    if inputs_embeds.shape[-1] != config.hidden_size:
        raise ValueError(
            f"`inputs_embeds` must have {config.hidden_size} features (`hidden_size`), but has {inputs_embeds.shape[-1]}."
        )
    return inputs_embeds.shape[:2]


def mask_lengths(length: int, cache) -> tuple[int, ...]:
    return (length,) if cache is None else (length, cache.max_length)


def as_int32(ids):
    return None if ids is None else jnp.asarray(ids).astype(jnp.int32)


def as_array(array):
    return None if array is None else jnp.asarray(array)


class FlaxMoshiModel(FlaxMoshiPreTrainedModel):
    """The backbone without a head; upstream ``MoshiModel``."""

    module_class = FlaxMoshiModule
    checkpoint_prefixes = ("", "model.", "decoder.model.")

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        return {"input_ids": jnp.zeros(input_shape, dtype=jnp.int32)}

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: Any | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: FlaxMoshiCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        use_cache: bool | None = None,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxBaseModelOutputWithPast | tuple[Any, ...]:
        """Runs the backbone.

        Args:
            input_ids: text ids in ``[0, vocab_size]``; ``vocab_size`` is the start token.
            attention_mask: 1 for frames to attend, 0 for padding; ``(batch, frames)`` for this call's frames, or
                ``(batch, max_length)`` for all slots of the cache.
            position_ids: positions of the rotary embedding; by default the frames are counted, from the cache's length.
            past_key_values: a cache of :meth:`init_cache`; it is returned updated, never changed in place.
            inputs_embeds: instead of ``input_ids``.
            use_cache: True without ``past_key_values`` starts a cache of ``max_position_embeddings`` frames; False
                does not return the cache.
            params: the parameters (default: the model's own).
            dropout_rng: key of the dropout, needed with ``train=True`` where ``attention_dropout`` > 0.
            train: applies dropout.
            output_attentions, output_hidden_states, return_dict: as in ``transformers``.

        Raises:
            ValueError: for wrong shapes, ids outside the vocabulary (where the ids are traced: only under
                ``checkify``, otherwise JAX clamps them) and more frames than the cache has room for.
        """
        config = self.config
        batch_size, length = check_decoder_inputs(
            config, past_key_values, input_ids, inputs_embeds, attention_mask, position_ids
        )
        cache = self._cache_for(past_key_values, use_cache, batch_size, max(length, config.max_position_embeddings))
        outputs = self._apply(
            params,
            dropout_rng,
            train,
            input_ids=as_int32(input_ids),
            attention_mask=as_array(attention_mask),
            position_ids=as_int32(position_ids),
            past_key_values=cache,
            inputs_embeds=as_array(inputs_embeds),
        )
        return self._finish(outputs, params, use_cache, output_attentions, output_hidden_states, return_dict)


class FlaxMoshiForCausalLM(FlaxGenerationMixin, FlaxMoshiPreTrainedModel):
    """The backbone with the text head, usable for text alone; upstream ``MoshiForCausalLM``."""

    module_class = FlaxMoshiForCausalLMModule
    checkpoint_prefixes = ("", "decoder.")

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        return {"input_ids": jnp.zeros(input_shape, dtype=jnp.int32)}

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: Any | None = None,
        position_ids: ArrayLike | None = None,
        past_key_values: FlaxMoshiCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        use_cache: bool | None = None,
        labels: ArrayLike | None = None,
        logits_to_keep: int = 0,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxCausalLMOutputWithPast | tuple[Any, ...]:
        """Runs backbone and head. Arguments and errors as :meth:`FlaxMoshiModel.__call__`, and:

        Args:
            labels: ids in ``[0, vocab_size)``, or -100 to ignore; shifted inside, so pass ``input_ids``.
            logits_to_keep: logits and ``last_hidden_state`` of the last frames only, 0 for all. Not with ``labels``.
        """
        config = self.config
        batch_size, length = check_decoder_inputs(
            config, past_key_values, input_ids, inputs_embeds, attention_mask, position_ids
        )
        if labels is not None:
            check_labels("labels", labels, (batch_size, length), config.vocab_size)
            if logits_to_keep:
                raise ValueError("`logits_to_keep` cannot be used with `labels`, which need all logits.")
        if logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must not be negative, but is {logits_to_keep}.")
        cache = self._cache_for(past_key_values, use_cache, batch_size, max(length, config.max_position_embeddings))
        outputs = self._apply(
            params,
            dropout_rng,
            train,
            input_ids=as_int32(input_ids),
            attention_mask=as_array(attention_mask),
            position_ids=as_int32(position_ids),
            past_key_values=cache,
            inputs_embeds=as_array(inputs_embeds),
            labels=as_int32(labels),
            logits_to_keep=logits_to_keep,
        )
        return self._finish(outputs, params, use_cache, output_attentions, output_hidden_states, return_dict)


def check_labels(name: str, labels, shape: tuple[int, ...], size: int) -> None:
    if np.shape(labels) != shape:
        raise ValueError(f"`{name}` must have the shape {shape}, but has the shape {np.shape(labels)}.")
    check_ids(name, labels, size, allowed=(IGNORE_INDEX,), remedy=f"Use {IGNORE_INDEX} for labels to ignore.")


class FlaxMoshiDepthDecoder(FlaxMoshiPreTrainedModel):
    """The decoder over the codebooks of one frame; upstream ``MoshiDepthDecoder``."""

    config_class = MoshiDepthConfig
    base_model_prefix = ""
    module_class = FlaxMoshiDepthDecoderModule
    checkpoint_prefixes = ("", "depth_decoder.")
    cache_class = FlaxMoshiDepthCache

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        batch_size, num_codebooks = input_shape[0], self.config.num_codebooks
        return {
            "input_ids": jnp.zeros((batch_size, num_codebooks), dtype=jnp.int32),
            "last_hidden_state": jnp.zeros((batch_size, 1, self.config.input_size)),
        }

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        last_hidden_state: ArrayLike | None = None,
        attention_mask: Any | None = None,
        past_key_values: FlaxMoshiDepthCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        use_cache: bool | None = None,
        position_ids: Any | None = None,
        labels: ArrayLike | None = None,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxCausalLMOutputWithPast | tuple[Any, ...]:
        """Runs the depth decoder over the codebooks of frames, one frame a row.

        Args:
            input_ids: the text token of the frame, then the codes of its codebooks 0, 1, …; ``(batch, codebooks)``
                with at most ``num_codebooks`` columns. -100 gives a zero embedding.
            last_hidden_state: the backbone's hidden state of the frame before, ``(batch, 1, input_size)``, or one per
                position.
            attention_mask: 1 for positions to attend; always causal, with or without it.
            past_key_values: a cache of ``init_cache(batch_size, num_codebooks)``.
            inputs_embeds: instead of ``input_ids``.
            use_cache: True without ``past_key_values`` starts a cache of ``num_codebooks`` positions.
            position_ids: which codebook each position is, known at trace time (default: counted from the cache's
                length).
            labels: the code that each position predicts; -100 and ``audio_vocab_size`` are ignored. Not shifted.
            params, dropout_rng, train, output_attentions, output_hidden_states, return_dict: as
                :meth:`FlaxMoshiModel.__call__`.

        Raises:
            ValueError: for wrong shapes, ids outside the vocabularies, more positions than codebooks.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if last_hidden_state is None:
            raise ValueError("`last_hidden_state` is missing: pass the backbone's hidden state of the frame before.")
        check_rank("last_hidden_state", last_hidden_state, ("batch", "1 or codebooks", "input_size"))
        if last_hidden_state.shape[-1] != config.input_size:
            raise ValueError(
                f"`last_hidden_state` must have {config.input_size} features (`input_size`), but has "
                f"{last_hidden_state.shape[-1]}."
            )
        given = input_ids if inputs_embeds is None else inputs_embeds
        axes = ("batch", "codebooks") if inputs_embeds is None else ("batch", "codebooks", "hidden_size")
        check_rank("input_ids" if inputs_embeds is None else "inputs_embeds", given, axes)
        batch_size, length = np.shape(given)[:2]
        past = call_length(past_key_values)
        if past + length > config.num_codebooks:
            raise ValueError(
                f"`{'input_ids' if inputs_embeds is None else 'inputs_embeds'}` has {length} positions after {past} "
                f"cached ones, but a frame has only {config.num_codebooks} (`num_codebooks`)."
            )
        check_cache(past_key_values, config, batch_size, length)
        codebooks = tuple(range(past, past + length))
        if position_ids is not None:
            if is_traced(position_ids):
                raise ValueError("`position_ids` selects the codebooks' weights: it must be known at trace time.")
            rows = np.asarray(position_ids).reshape(-1, length)
            codebooks = tuple(int(index) for index in rows[0])
            if (rows != rows[0]).any() or min(codebooks) < 0 or max(codebooks) >= config.num_codebooks:
                raise ValueError(
                    f"`position_ids` must be the same codebooks in [0, {config.num_codebooks}) for every row, but is "
                    f"{np.asarray(position_ids).tolist()}."
                )
        if input_ids is not None:
            for column, codebook in enumerate(codebooks):
                size = config.audio_vocab_size + 1 if codebook else config.vocab_size + 1
                check_ids("input_ids", input_ids[:, column], size, allowed=(IGNORE_INDEX,))
        if labels is not None:
            check_labels("labels", labels, (batch_size, length), config.audio_vocab_size + 1)
        if attention_mask is not None:
            check_mask("attention_mask", attention_mask, batch_size, mask_lengths(length, past_key_values))
        outputs = self._apply(
            params,
            dropout_rng,
            train,
            input_ids=as_int32(input_ids),
            last_hidden_state=jnp.asarray(last_hidden_state),
            attention_mask=as_array(attention_mask),
            past_key_values=self._cache_for(past_key_values, use_cache, batch_size, config.num_codebooks),
            inputs_embeds=as_array(inputs_embeds),
            position_ids=codebooks,
            labels=as_int32(labels),
        )
        return self._finish(outputs, params, use_cache, output_attentions, output_hidden_states, return_dict)


class FlaxMoshiForConditionalGeneration(FlaxGenerationMixin, FlaxMoshiPreTrainedModel):
    """The whole of Moshi, speech and text in and out; upstream ``MoshiForConditionalGeneration``."""

    base_model_prefix = ""
    module_class = FlaxMoshiForConditionalGenerationModule

    def __init__(self, config: MoshiConfig, *args, **kwargs):
        if config.audio_encoder_config is None or config.depth_decoder_config is None:
            raise ValueError(
                "`config` lacks `audio_encoder_config` or `depth_decoder_config`: give both, or use FlaxMoshiForCausalLM."
            )
        available = config.audio_encoder_config.num_quantizers
        if config.num_codebooks > available:
            raise ValueError(
                f"`num_codebooks` is {config.num_codebooks}, but the audio encoder has only {available} (`num_quantizers`)."
            )
        super().__init__(config, *args, **kwargs)

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        batch_size = input_shape[0]
        text = jnp.zeros((batch_size, 2), dtype=jnp.int32)
        codes = jnp.zeros((batch_size, self.config.num_codebooks, 2), dtype=jnp.int32)
        return {
            "input_ids": text,
            "user_audio_codes": codes,
            "moshi_audio_codes": codes,
            "text_labels": text,
            "audio_labels": codes,
        }

    def get_depth_decoder(self) -> FlaxMoshiDepthDecoder:
        """The depth decoder as a model of its own, sharing the parameters."""
        model = FlaxMoshiDepthDecoder(self.config.depth_decoder_config, dtype=self.dtype, _do_init=False)
        model._is_initialized = True
        model.params = self.params["depth_decoder"]
        return model

    def freeze_audio_encoder(self, mask: dict | None = None) -> dict:
        """A tree of booleans for optax (``optax.masked``, ``multi_transform``): False for the audio encoder's leaves.

        Args:
            mask: a mask to freeze further (default: everything trains).
        """
        return self._freeze("audio_encoder", mask)

    def freeze_depth_decoder(self, mask: dict | None = None) -> dict:
        """As :meth:`freeze_audio_encoder`, for the depth decoder."""
        return self._freeze("depth_decoder", mask)

    def _freeze(self, part: str, mask: dict | None) -> dict:
        if mask is None:
            mask = jax.tree.map(lambda _: True, self.params_shape_tree)
        return {**mask, part: jax.tree.map(lambda _: False, mask[part])}

    def get_unconditional_inputs(self, num_samples: int = 1) -> FlaxMoshiUnconditionalInput:
        """The start frame of ``num_samples`` rows, to generate from nothing.

        Raises:
            ValueError: if ``num_samples`` is below 1.
        """
        if num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, but is {num_samples}.")
        codes = jnp.full((num_samples, self.config.num_codebooks, 1), self.config.audio_vocab_size, dtype=jnp.int32)
        return FlaxMoshiUnconditionalInput(
            input_ids=jnp.full((num_samples, 1), self.config.vocab_size, dtype=jnp.int32),
            user_audio_codes=codes,
            moshi_audio_codes=codes,
            attention_mask=jnp.ones((num_samples, 1), dtype=jnp.int32),
        )

    @staticmethod
    def build_delay_pattern_mask(
        input_ids: ArrayLike, bos_token_id: int, pad_token_id: int, max_length: int
    ) -> tuple[jax.Array, jax.Array]:
        """See :func:`~transformers_moshi_flax.models.moshi.delay_pattern.build_delay_pattern_mask`."""
        return build_delay_pattern_mask(jnp.asarray(input_ids), bos_token_id, pad_token_id, max_length)

    @staticmethod
    def apply_delay_pattern_mask(input_ids: ArrayLike, decoder_pad_token_mask: ArrayLike) -> jax.Array:
        """See :func:`~transformers_moshi_flax.models.moshi.delay_pattern.apply_delay_pattern_mask`."""
        return apply_delay_pattern_mask(jnp.asarray(input_ids), jnp.asarray(decoder_pad_token_mask))

    # ------------------------------------------------------------------------------------------------ inputs

    def _check_audio(self, name: str, codes, input_values) -> None:
        """Checks one audio stream, as codes ``{name}_audio_codes`` or as waveform ``{name}_input_values``."""
        config = self.config
        if codes is not None:
            check_rank(f"{name}_audio_codes", codes, ("batch", "num_codebooks", "frames"))
            if np.shape(codes)[1] != config.num_codebooks or np.shape(codes)[2] == 0:
                raise ValueError(
                    f"`{name}_audio_codes` must have {config.num_codebooks} codebooks (`num_codebooks`) and at least one "
                    f"frame, but has the shape {np.shape(codes)}."
                )
            check_ids(f"{name}_audio_codes", codes, config.audio_vocab_size + 1)
        elif input_values is not None:
            check_waveform(f"{name}_input_values", input_values, config.audio_encoder_config.audio_channels)

    def _frames(self, codes, input_values) -> int | None:
        """Frames of one audio stream."""
        if codes is not None:
            return np.shape(codes)[-1]
        return (
            None
            if input_values is None
            else -(-np.shape(input_values)[-1] // self.config.audio_encoder_config.frame_size)
        )

    def _check_lengths(
        self, text_length: int, text_name: str, moshi_frames: int | None, user_frames: int | None
    ) -> None:
        if moshi_frames is not None and moshi_frames != text_length:
            raise ValueError(
                f"`{text_name}` has {text_length} frames, but Moshi's stream (`moshi_audio_codes` or `moshi_input_values`) "
                f"has {moshi_frames}: make them equally long, one text id per frame of "
                f"{self.config.audio_encoder_config.frame_size} samples."
            )
        if user_frames is not None and user_frames < text_length:
            raise ValueError(
                f"The user's stream (`user_audio_codes` or `user_input_values`) has {user_frames} frames, fewer than the "
                f"{text_length} of `{text_name}`: pad it with silence."
            )

    def __call__(
        self,
        input_ids: ArrayLike | None = None,
        attention_mask: ArrayLike | None = None,
        user_input_values: ArrayLike | None = None,
        user_audio_codes: ArrayLike | None = None,
        moshi_input_values: ArrayLike | None = None,
        moshi_audio_codes: ArrayLike | None = None,
        past_key_values: FlaxMoshiCache | None = None,
        inputs_embeds: ArrayLike | None = None,
        text_labels: ArrayLike | None = None,
        audio_labels: ArrayLike | None = None,
        use_cache: bool | None = None,
        params: Any | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxMoshiConditionalGenerationOutputWithPast | tuple[Any, ...]:
        """Runs the backbone over frames of three streams and, with labels, the losses of text and audio.

        The input codes are delayed already (``build_delay_pattern_mask``); ``audio_labels`` are not.

        Args:
            input_ids: text ids in ``[0, vocab_size]``, ``(batch, frames)``.
            attention_mask: 1 for frames to attend, 0 for padding, ``(batch, frames)``; masked frames are left out of the
                losses.
            user_input_values, moshi_input_values: waveforms, ``(batch, 1, samples)`` at 24 kHz in [-1, 1].
            user_audio_codes, moshi_audio_codes: codes in ``[0, audio_vocab_size]``, ``(batch, num_codebooks, frames)``;
                they have priority over the waveforms.
            past_key_values: a cache of ``init_cache``.
            inputs_embeds: instead of all streams, ``(batch, frames, hidden_size)``.
            text_labels: ids in ``[0, vocab_size)`` or -100, ``(batch, frames)``; shifted inside.
            audio_labels: codes in ``[0, audio_vocab_size]`` or -100, ``(batch, num_codebooks, frames)``; delayed and
                shifted inside. They need ``text_labels``, which start each frame's codes.
            use_cache, params, dropout_rng, train, output_attentions, output_hidden_states, return_dict: as
                :meth:`FlaxMoshiModel.__call__`.

        Raises:
            ValueError: no input, streams of different length, ids outside a vocabulary, audio that is empty, not finite
                or of the wrong rank, more frames than the cache has room for.
        """
        config = self.config
        streams = (input_ids, user_input_values, user_audio_codes, moshi_input_values, moshi_audio_codes)
        if inputs_embeds is None and all(stream is None for stream in streams):
            raise ValueError(
                "Pass at least one of `input_ids`, `user_input_values`, `user_audio_codes`, `moshi_input_values`, "
                "`moshi_audio_codes` and `inputs_embeds`."
            )
        if inputs_embeds is None:
            self._check_audio("user", user_audio_codes, user_input_values)
            self._check_audio("moshi", moshi_audio_codes, moshi_input_values)
            lengths = {
                "moshi": self._frames(moshi_audio_codes, moshi_input_values),
                "user": self._frames(user_audio_codes, user_input_values),
            }
            if input_ids is not None:
                check_rank("input_ids", input_ids, ("batch", "frames"))
                check_ids("input_ids", input_ids, config.vocab_size + 1)
                lengths["text"] = np.shape(input_ids)[1]
            lengths = {name: length for name, length in lengths.items() if length is not None}
            batches = {np.shape(stream)[0] for stream in streams if stream is not None}
            if len(set(lengths.values())) > 1 or len(batches) > 1:
                raise ValueError(
                    "`input_ids` and the audio streams must have the same batch size and number of frames, but the "
                    f"frames are {lengths} and the batch sizes {sorted(batches)}: pad the shorter ones."
                )
            batch_size, length = batches.pop(), next(iter(lengths.values()))
        else:
            batch_size, length = check_embeds(inputs_embeds, config)
        check_cache(past_key_values, config, batch_size, length)
        if attention_mask is not None:
            check_mask("attention_mask", attention_mask, batch_size, mask_lengths(length, past_key_values))
        if text_labels is not None:
            check_labels("text_labels", text_labels, (batch_size, length), config.vocab_size)
        if audio_labels is not None:
            if text_labels is None:
                raise ValueError("`audio_labels` need `text_labels`: the text token starts each frame's codes.")
            shape = (batch_size, config.num_codebooks, length)
            check_labels("audio_labels", audio_labels, shape, config.audio_vocab_size + 1)
        if text_labels is not None and length < 2:
            raise ValueError("`text_labels` need at least 2 frames: each frame predicts the next.")
        cache = self._cache_for(past_key_values, use_cache, batch_size, max(length, config.max_position_embeddings))
        outputs = self._apply(
            params,
            dropout_rng,
            train,
            input_ids=as_int32(input_ids),
            attention_mask=as_array(attention_mask),
            user_input_values=as_array(user_input_values),
            user_audio_codes=as_int32(user_audio_codes),
            moshi_input_values=as_array(moshi_input_values),
            moshi_audio_codes=as_int32(moshi_audio_codes),
            past_key_values=cache,
            inputs_embeds=as_array(inputs_embeds),
            text_labels=as_int32(text_labels),
            audio_labels=as_int32(audio_labels),
        )
        return self._finish(outputs, params, use_cache, output_attentions, output_hidden_states, return_dict)

    # -------------------------------------------------------------------------------------------- generation

    def generate(
        self,
        input_ids: ArrayLike | None = None,
        user_input_values: ArrayLike | None = None,
        user_audio_codes: ArrayLike | None = None,
        moshi_input_values: ArrayLike | None = None,
        moshi_audio_codes: ArrayLike | None = None,
        inputs_embeds: ArrayLike | None = None,
        return_audio_waveforms: bool = True,
        return_audio_codes: bool | None = None,
        concat_unconditional_inputs: bool = True,
        generation_config: GenerationConfig | None = None,
        prng_key: jax.Array | None = None,
        params: Any | None = None,
        **kwargs: Any,
    ) -> FlaxMoshiGenerateOutput:
        """Generates text and audio, frame by frame; ``docs/architecture.md`` has the diagram.

        Prefill, time loop and codebook loop are one XLA program, compiled once per shapes and options and kept on the
        model; audio is encoded before and decoded after it. Inside ``jax.jit`` outputs keep the full length; called
        eagerly they are cut after the longest row.

        Args:
            input_ids: text ids of the prompt, ``(batch, frames)``. Without any input the start frame is the prompt.
            user_input_values, moshi_input_values: waveforms of the prompt, ``(batch, 1, samples)`` at 24 kHz.
            user_audio_codes, moshi_audio_codes: or their codes, ``(batch, num_codebooks, frames)``, undelayed. The user's
                stream may be longer than the prompt and is then heard while Moshi speaks; after its end there is silence.
            inputs_embeds: the prompt's embeddings, ``(batch, frames, hidden_size)``, instead of those of the streams;
                the streams are still needed for the codes. Sequences then begin with ``input_ids`` if they are given, and
                with the generated tokens otherwise.
            return_audio_waveforms: decode the audio.
            return_audio_codes: return the codes.
            concat_unconditional_inputs: put the start frame before the prompt.
            generation_config: options; what is None in it comes from the model's ``generation_config``.
            prng_key: a key, or one per row, for sampling (default: ``jax.random.key(0)``).
            params: the parameters (default: the model's own).
            **kwargs: fields of ``GenerationConfig`` for the text (``max_new_tokens``, ``do_sample``, ``temperature``,
                ``top_k``, ``top_p``, ``eos_token_id``, …), with the prefix ``depth_decoder_`` for the audio, and
                ``attention_mask`` ``(batch, frames)``. ``max_length`` counts the prompt and the start frame.

        Returns:
            ``sequences`` have the prompt (after the start frame, if it is concatenated) and the new tokens.
            ``audio_codes`` and ``audio_sequences`` have the prompt's frames and one less than the new tokens.

        Raises:
            ValueError: unknown or unsupported options (named); streams that are missing, of different length or batch
                size; ids outside a vocabulary; audio that is empty or not finite.
        """
        config = self.config
        depth_kwargs = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("depth_decoder_")}
        # `depth_decoder_config` is a field of the generation configuration, not an option of the depth decoder
        if "depth_decoder_config" in depth_kwargs:
            kwargs["depth_decoder_config"] = depth_kwargs.pop("depth_decoder_config")
        options, inputs = merge_generation_config(
            self.generation_config, generation_config, kwargs, extra=("attention_mask",)
        )
        depth_sampling = resolve_depth_sampling(
            getattr(options, "depth_decoder_config", None), depth_kwargs, config.num_codebooks
        )
        attention_mask = inputs.get("attention_mask")

        given = {
            "`input_ids` or `inputs_embeds`": input_ids is not None or inputs_embeds is not None,
            "`user_input_values` or `user_audio_codes`": user_input_values is not None or user_audio_codes is not None,
            "`moshi_input_values` or `moshi_audio_codes`": moshi_input_values is not None
            or moshi_audio_codes is not None,
        }
        if not any(given.values()):
            start = self.get_unconditional_inputs()
            input_ids, user_audio_codes, moshi_audio_codes = (
                start.input_ids,
                start.user_audio_codes,
                start.moshi_audio_codes,
            )
            concat_unconditional_inputs = False
        elif not all(given.values()):
            missing = " and ".join(name for name, there in given.items() if not there)
            raise ValueError(f"Pass {missing} as well, or no input at all (see `get_unconditional_inputs`).")

        self._check_audio("user", user_audio_codes, user_input_values)
        self._check_audio("moshi", moshi_audio_codes, moshi_input_values)
        batch_size, length = self._check_prompt(input_ids, inputs_embeds)
        text_name = "input_ids" if inputs_embeds is None else "inputs_embeds"
        self._check_lengths(
            length,
            text_name,
            self._frames(moshi_audio_codes, moshi_input_values),
            self._frames(user_audio_codes, user_input_values),
        )
        for name, stream in (
            ("user_audio_codes", user_audio_codes),
            ("user_input_values", user_input_values),
            ("moshi_audio_codes", moshi_audio_codes),
            ("moshi_input_values", moshi_input_values),
        ):
            if stream is not None and np.shape(stream)[0] != batch_size:
                raise ValueError(
                    f"`{name}` has a batch of {np.shape(stream)[0]}, but `{text_name}` has {batch_size}: make them equal."
                )
        if attention_mask is not None:
            check_mask("attention_mask", attention_mask, batch_size, (length,))
            attention_mask = jnp.asarray(attention_mask).astype(bool)
        keys = row_keys(jax.random.key(0) if prng_key is None else prng_key, batch_size)

        concat_unconditional_inputs = concat_unconditional_inputs and inputs_embeds is None
        plan = resolve_plan(options, length + int(concat_unconditional_inputs), config.vocab_size)
        if return_audio_waveforms and config.audio_encoder_config.decoder_config is None:
            raise ValueError(
                "`return_audio_waveforms=True` needs the audio decoder, which this configuration has dropped: pass "
                "`return_audio_waveforms=False`."
            )

        params = self.params if params is None else params
        encode = self.compiled(encode_audio)
        input_ids, inputs_embeds = as_int32(input_ids), as_array(inputs_embeds)
        user_audio_codes, moshi_audio_codes = as_int32(user_audio_codes), as_int32(moshi_audio_codes)
        if user_audio_codes is None:
            user_audio_codes = encode(params, jnp.asarray(user_input_values))
        if moshi_audio_codes is None:
            moshi_audio_codes = encode(params, jnp.asarray(moshi_input_values))
        codec = config.audio_encoder_config
        blank_codes = encode(params, jnp.zeros((1, codec.audio_channels, codec.frame_size), dtype=self.dtype))

        if concat_unconditional_inputs:
            start = self.get_unconditional_inputs(batch_size)
            input_ids = jnp.concatenate([start.input_ids, input_ids], axis=-1)
            user_audio_codes = jnp.concatenate([start.user_audio_codes, user_audio_codes], axis=-1)
            moshi_audio_codes = jnp.concatenate([start.moshi_audio_codes, moshi_audio_codes], axis=-1)
            if attention_mask is not None:
                attention_mask = jnp.concatenate([start.attention_mask.astype(bool), attention_mask], axis=-1)

        program = self.compiled(
            generate_frames,
            make_cache=self.init_cache,
            make_depth_cache=self._make_depth_cache,
            max_length=plan.max_length,
            eos_token_ids=plan.eos_token_ids,
            pad_token_id=plan.pad_token_id,
        )
        sequences, lengths, codes, audio_lengths = program(
            params,
            input_ids,
            user_audio_codes,
            moshi_audio_codes,
            blank_codes,
            inputs_embeds,
            attention_mask,
            keys,
            plan.sampling,
            depth_sampling,
        )
        if not is_traced(sequences):
            sequences = sequences[:, : int(lengths.max())]
            codes = codes[:, :, : int(audio_lengths.max())]
        if input_ids is None:
            sequences, lengths = sequences[:, length:], lengths - length
        audio = None
        if return_audio_waveforms:
            audio = self._decode_frames(params, codes, audio_lengths)
        return FlaxMoshiGenerateOutput(
            audio_sequences=audio,
            sequences=sequences,
            audio_codes=codes if return_audio_codes else None,
            sequence_lengths=lengths,
            audio_lengths=audio_lengths,
        )

    def _check_prompt(self, input_ids, inputs_embeds) -> tuple[int, int]:
        """Batch size and frames of the prompt."""
        if input_ids is not None:
            check_rank("input_ids", input_ids, ("batch", "frames"))
            check_ids("input_ids", input_ids, self.config.vocab_size + 1)
        if inputs_embeds is None:
            batch_size, length = np.shape(input_ids)
        else:
            batch_size, length = check_embeds(inputs_embeds, self.config)
            if input_ids is not None and np.shape(input_ids) != (batch_size, length):
                raise ValueError(
                    f"`input_ids` must have one id per frame of `inputs_embeds`, ({batch_size}, {length}), but has the "
                    f"shape {np.shape(input_ids)}."
                )
        if length == 0:
            raise ValueError("The prompt is empty: pass at least one frame, or no input at all.")
        return batch_size, length

    def _make_depth_cache(self, batch_size: int) -> FlaxMoshiDepthCache:
        config = self.config.depth_decoder_config
        return FlaxMoshiDepthCache.create(config, batch_size, config.num_codebooks, self.dtype)

    def _decode_frames(self, params, codes, audio_lengths) -> jax.Array:
        """The waveform; nothing where no frame was generated."""
        if codes.shape[-1] == 0:
            return jnp.zeros((codes.shape[0], self.config.audio_encoder_config.audio_channels, 0), dtype=jnp.float32)
        return self.compiled(decode_audio)(params, codes, audio_lengths)


def check_waveform(name: str, audio, channels: int) -> None:
    """Raises ``ValueError`` unless ``audio`` is ``(batch, channels, samples)`` of finite floats, not empty."""
    check_rank(name, audio, ("batch", "channels", "samples"))
    if np.shape(audio)[1] != channels or np.shape(audio)[2] == 0:
        raise ValueError(
            f"`{name}` must have {channels} channel(s) and at least one sample, but has the shape {np.shape(audio)}."
        )
    if not is_traced(audio):
        audio = np.asarray(audio)
        if audio.dtype.kind not in "fV":
            raise ValueError(f"`{name}` must be floats in [-1, 1], but has the dtype {audio.dtype}.")
        if not np.isfinite(audio.astype(np.float32)).all():
            raise ValueError(f"`{name}` has samples that are not finite: replace NaN and infinity before.")


def resolve_depth_sampling(depth_config: Any, kwargs: dict[str, Any], num_codebooks: int) -> Sampling:
    """How codes are chosen: ``depth_decoder_*`` arguments over the generation configuration's sub-configuration.

    Raises:
        ValueError: for options without an effect, or a length other than one text token and all codebooks.
    """
    prefix = "depth_decoder_"
    values = dict(depth_config.to_dict() if isinstance(depth_config, GenerationConfig) else depth_config or {})
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    if "temp" in values:
        # the published conversion writes a name that nothing reads
        logger.warning("the generation configuration of the depth decoder says `temp`: read as `temperature`")
        values.setdefault("temperature", values.pop("temp"))
    for name, value in kwargs.items():
        values[name.removeprefix(prefix)] = value
    for name, value in values.items():
        if name in ("min_length", "max_length"):
            if value not in (None, num_codebooks + 1):
                raise ValueError(
                    f"`{prefix}{name}` must be {num_codebooks + 1} (a text token and all codebooks), but is {value}."
                )
        elif name not in (*SAMPLING_FIELDS, *RUNTIME_FIELDS, *METADATA_FIELDS, *OUTPUT_FIELDS):
            if value is not None and value != NEUTRAL.get(name):
                raise ValueError(f"`{prefix}{name}={value!r}` is not supported by `generate` here: leave it unset.")
    return resolve_sampling(values, prefix)
