"""The linen modules of the language models, from the smallest to the largest.

One set for all of them: what they differ in are fields (``fields_flax_llama.py``). Names and parameter paths follow
``transformers.models.llama.modeling_llama``, which the other models of upstream share.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from ...modeling_flax_outputs import FlaxBaseModelOutputWithPast, FlaxCausalLMOutputWithPast
from ...nn.activations import ACT2FN
from ...nn.attention import attend
from ...nn.cache import Cache, LayerCache, NoCache
from ...nn.embedding import IGNORE_INDEX, embed, embedding_table
from ...nn.initializers import normal
from ...nn.layers import run_layers, scan_layers
from ...nn.linear import Dense, dense
from ...nn.loss import cross_entropy
from ...nn.norm import RMSNorm
from ...ops.linear import dot_general
from ...ops.rotary import apply_rotary_pos_emb, rotary_embedding
from ...partitioning import STACKED
from .fields_flax_llama import LlamaFields, Rope, fields_of


class FlaxLlamaMLP(nn.Module):
    """Gated feed-forward layer, ``down_proj(act(gate_proj(x)) * up_proj(x))``."""

    fields: LlamaFields
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        fields = self.fields

        def linear(features: int) -> Dense:
            return dense(features, normal(fields.initializer_range), self.dtype, fields.mlp_bias)

        self.gate_proj = linear(fields.intermediate_size)
        self.up_proj = linear(fields.intermediate_size)
        self.down_proj = linear(fields.hidden_size)
        self.activation = ACT2FN[fields.activation]

    def __call__(self, hidden_states: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        return self.down_proj(self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class FlaxLlamaAttention(nn.Module):
    """Causal self-attention with grouped key-value heads."""

    fields: LlamaFields
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        fields = self.fields

        def linear(features: int, use_bias: bool) -> Dense:
            return dense(features, normal(fields.initializer_range), self.dtype, use_bias)

        self.q_proj = linear(fields.num_attention_heads * fields.head_dim, fields.qkv_bias)
        self.k_proj = linear(fields.num_key_value_heads * fields.head_dim, fields.qkv_bias)
        self.v_proj = linear(fields.num_key_value_heads * fields.head_dim, fields.qkv_bias)
        self.o_proj = linear(fields.hidden_size, fields.output_bias)
        if fields.qk_norm:
            self.q_norm = RMSNorm(fields.rms_norm_eps, self.dtype, fields.norm_offset)
            self.k_norm = RMSNorm(fields.rms_norm_eps, self.dtype, fields.norm_offset)
        self.dropout = nn.Dropout(rate=fields.attention_dropout)

    def __call__(
        self,
        hidden_states: Float[Array, "batch seq hidden"],
        cos: Float[Array, "#batch seq 1 head_dim"],
        sin: Float[Array, "#batch seq 1 head_dim"],
        attention_mask: Bool[Array, "#batch seq slots"],
        layer_cache: LayerCache | None = None,
        cache_index: Any = 0,
        deterministic: bool = True,
        output_attentions: bool = True,
    ) -> tuple[Float[Array, "batch seq hidden"], Float[Array, "batch heads seq slots"] | None, LayerCache | None]:
        """Attends over this call's keys, or over the cache's slots after writing this call's into them.

        Args:
            hidden_states: inputs.
            cos, sin: of the rotary embedding.
            attention_mask: True where a query may attend a key slot.
            layer_cache: keys and values of this layer.
            cache_index: the slot of the first new key.
            deterministic: no dropout.
            output_attentions: False returns None for the weights.

        Returns:
            The output, the attention weights and the updated cache of this layer.
        """
        fields = self.fields
        batch_size, length, _ = hidden_states.shape

        def heads(projection: Dense) -> Array:
            return projection(hidden_states).reshape(batch_size, length, -1, fields.head_dim)

        query, key, value = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        if fields.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (apply_rotary_pos_emb(x, cos, sin, fields.interleaved_rotary) for x in (query, key))
        dropout = None if deterministic or not fields.attention_dropout else partial(self.dropout, deterministic=False)
        output, weights, layer_cache = attend(
            query,
            key,
            value,
            attention_mask,
            layer_cache,
            cache_index,
            dropout,
            output_attentions,
            fields.query_scale,
            fields.attention_soft_cap,
        )
        return self.o_proj(output), weights, layer_cache


class FlaxLlamaDecoderLayer(nn.Module):
    """Transformer layer with norms before attention and MLP, and in some models behind them."""

    fields: LlamaFields
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        fields = self.fields

        def norm() -> RMSNorm:
            return RMSNorm(fields.rms_norm_eps, self.dtype, fields.norm_offset)

        self.self_attn = FlaxLlamaAttention(fields, self.dtype)
        self.mlp = FlaxLlamaMLP(fields, self.dtype)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        if fields.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def __call__(
        self,
        hidden_states: Float[Array, "batch seq hidden"],
        cos: Float[Array, "#batch seq 1 head_dim"],
        sin: Float[Array, "#batch seq 1 head_dim"],
        attention_mask: Bool[Array, "#batch seq slots"],
        layer_cache: LayerCache | None = None,
        cache_index: Any = 0,
        deterministic: bool = True,
        output_attentions: bool = True,
    ) -> tuple[Float[Array, "batch seq hidden"], Float[Array, "batch heads seq slots"] | None, LayerCache | None]:
        """Arguments and returns as :class:`FlaxLlamaAttention`."""
        attended, weights, layer_cache = self.self_attn(
            self.input_layernorm(hidden_states),
            cos,
            sin,
            attention_mask,
            layer_cache,
            cache_index,
            deterministic,
            output_attentions,
        )
        if not self.fields.post_norms:
            hidden_states = hidden_states + attended
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights, layer_cache
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        mixed = self.mlp(self.pre_feedforward_layernorm(hidden_states))
        return hidden_states + self.post_feedforward_layernorm(mixed), weights, layer_cache


class FlaxLlamaLayers(nn.Module):
    """The stack of decoder layers, children named by number.

    With ``scan_layers`` there is one child, ``stacked``, and a loop over it, as of Moshi's; all layers are of one kind
    then, and there is no cache.
    """

    fields: LlamaFields
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False
    scan_layers: bool = False

    def setup(self):
        if self.scan_layers and len(set(self.fields.layers)) > 1:
            raise ValueError(
                "`scan_layers` runs one layer in a loop, but `layer_types` has several kinds: leave it False."
            )
        # deterministic and output_attentions are Python values (self counts)
        layer_class = (
            nn.remat(FlaxLlamaDecoderLayer, static_argnums=(7, 8), prevent_cse=not self.scan_layers)
            if self.gradient_checkpointing
            else FlaxLlamaDecoderLayer
        )
        names = [STACKED] if self.scan_layers else [str(index) for index in range(self.fields.num_hidden_layers)]
        self.blocks = [layer_class(self.fields, self.dtype, name=name) for name in names]

    def __call__(
        self,
        hidden_states: Float[Array, "batch seq hidden"],
        cache: Cache,
        attention_mask: Shaped[Array, "batch slots"] | None,
        position_ids: Integer[Array, "#batch seq"] | None,
        context_length: Integer[Array, "#batch 1"] | None,
        deterministic: bool = True,
        output_attentions: bool = True,
    ) -> tuple[Float[Array, "batch seq hidden"], Cache, tuple[Array, ...], tuple[Array | None, ...]]:
        """Runs the layers, each writing the next steps into its part of the cache.

        Args:
            hidden_states: inputs.
            cache: before the steps.
            attention_mask: as of the cache's ``next_steps``.
            position_ids, context_length: as of :class:`FlaxLlamaModule`.
            deterministic, output_attentions: as of :class:`FlaxLlamaAttention`.

        Returns:
            The last hidden state, the updated cache, the input of every layer and all attention weights.

        Raises:
            ValueError: a cache together with ``scan_layers``.
        """
        kinds = self.fields.layers
        batch_size, length, _ = hidden_states.shape
        # what is the same in several layers is made once
        steps = {
            window: cache.next_steps(length, window, batch_size, attention_mask)
            for window in dict.fromkeys(kind.window for kind in kinds)
        }
        first, after = steps[kinds[0].window]
        positions = first.positions if position_ids is None else position_ids
        angles = {
            rope: self.angles(rope, positions, context_length) for rope in dict.fromkeys(kind.rope for kind in kinds)
        }
        flags = (deterministic, output_attentions)
        if self.scan_layers:
            if after.layer(0) is not None:
                raise ValueError("`cache` cannot be used with `scan_layers`, which is for training.")
            arrays = (*angles[kinds[0].rope], first.mask, None, first.index)
            last, inputs, attentions = scan_layers(self.blocks[0], hidden_states, arrays, flags, len(kinds))
            return last, after, inputs, attentions
        return run_layers(
            self,
            self.blocks,
            hidden_states,
            after,
            lambda number: (
                *angles[kinds[number].rope],
                steps[kinds[number].window][0].mask,
                after.layer(number),
                first.index,
            ),
            flags,
        )

    def angles(
        self, rope: Rope, positions: Integer[Array, "#batch seq"], context_length: Integer[Array, "#batch 1"] | None
    ) -> tuple[Array, Array]:
        """Cosines and sines of a rotary embedding, ``(batch or 1, seq, 1, head_dim)``."""
        if context_length is None:
            context_length = jnp.max(positions, axis=-1, keepdims=True, initial=0) + 1
        return rotary_embedding(
            positions[..., None],
            self.fields.head_dim,
            dict(rope),
            self.dtype,
            self.fields.max_position_embeddings,
            context_length[..., None],
        )


class FlaxLlamaModule(nn.Module):
    """Embeddings, decoder layers, final norm; upstream ``LlamaModel``."""

    config: Any
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False
    scan_layers: bool = False

    def setup(self):
        fields = self.fields = fields_of(self.config)
        self.embed_tokens = embedding_table(
            fields.vocab_size, fields.hidden_size, fields.initializer_range, self.dtype
        )
        self.layers = FlaxLlamaLayers(fields, self.dtype, self.gradient_checkpointing, self.scan_layers)
        self.norm = RMSNorm(fields.rms_norm_eps, self.dtype, fields.norm_offset)

    def embed(self, input_ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq hidden"]:
        embedded = embed(self.embed_tokens, input_ids)
        scale = self.fields.embedding_scale
        return embedded if scale is None else embedded * jnp.asarray(scale, self.dtype)

    def project(self, hidden_states: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq vocab"]:
        """The head of models whose head is the table of embeddings."""
        table = jnp.asarray(self.embed_tokens.embedding, self.dtype)
        return dot_general(hidden_states, table, (((2,), (1,)), ((), ())))

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"] | None = None,
        attention_mask: Shaped[Array, "batch slots"] | None = None,
        position_ids: Integer[Array, "#batch seq"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Array, "batch seq hidden"] | None = None,
        context_length: Integer[Array, "#batch 1"] | None = None,
        deterministic: bool = True,
        output_attentions: bool = True,
    ) -> FlaxBaseModelOutputWithPast:
        """Runs the model on the next tokens.

        Args:
            input_ids: the tokens.
            attention_mask: as the cache understands it.
            position_ids: of the rotary embedding; by default counted from the cache's length.
            cache: the past.
            inputs_embeds: instead of ``input_ids``.
            context_length: how long the text is that the tokens belong to, as far as they do not go beyond it; by
                default it ends with the last of them. Only ``dynamic`` rotary embeddings depend on it.
            deterministic, output_attentions: as of :class:`FlaxLlamaAttention`.

        Raises:
            ValueError: neither ids nor embeddings.
        """
        if inputs_embeds is not None:
            hidden_states = inputs_embeds.astype(self.dtype)
        elif input_ids is not None:
            hidden_states = self.embed(input_ids)
        else:
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        hidden_states, past, inputs, attentions = self.layers(
            hidden_states,
            NoCache() if cache is None else cache,
            attention_mask,
            position_ids,
            context_length,
            deterministic,
            output_attentions,
        )
        hidden_states = self.norm(hidden_states)
        return FlaxBaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            cache=None if cache is None else past,
            hidden_states=(*inputs, hidden_states),
            attentions=attentions if output_attentions else None,
        )


class FlaxLlamaForCausalLMModule(nn.Module):
    """The model with a head; upstream ``LlamaForCausalLM``."""

    config: Any
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False
    scan_layers: bool = False

    def setup(self):
        fields = self.fields = fields_of(self.config)
        self.model = FlaxLlamaModule(self.config, self.dtype, self.gradient_checkpointing, self.scan_layers)
        if not fields.tie_word_embeddings:
            self.lm_head = dense(fields.vocab_size, normal(fields.initializer_range), self.dtype)

    def embed(self, input_ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq hidden"]:
        return self.model.embed(input_ids)

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
        """As :class:`FlaxLlamaModule`, and:

        Args:
            labels: shifted inside; ``IGNORE_INDEX`` is left out.
            logits_to_keep: logits and last hidden state of the last tokens only, 0 for all.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            context_length,
            deterministic,
            output_attentions,
        )
        hidden_states = outputs.last_hidden_state[:, -logits_to_keep:]
        tied, cap = self.fields.tie_word_embeddings, self.fields.logits_soft_cap
        logits = self.model.project(hidden_states) if tied else self.lm_head(hidden_states)
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
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
