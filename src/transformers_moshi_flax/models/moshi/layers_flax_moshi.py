"""The parts of Moshi's two decoders: linears, attention, layers, embeddings.

Names and parameter paths follow ``transformers.models.moshi.modeling_moshi``. Three things depart from it, see
``docs/differences.md``: state is explicit (caches are passed in and returned), what upstream forces to float32 is
computed in *at least* float32, and the per-codebook linears keep one kernel per codebook, because XLA copies slices of
stacked weights in every frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer
from transformers import MoshiConfig
from transformers.models.moshi.configuration_moshi import MoshiDepthConfig

from ...input_checks import AnyArray, is_traced
from ...nn.activations import ACT2FN
from ...nn.attention import attend
from ...nn.cache import Cache, LayerCache, Steps
from ...nn.embedding import embed, embedding_table
from ...nn.initializers import normal
from ...nn.layers import run_layers, scan_layers
from ...nn.linear import KERNEL, dense, is_kernel_alone
from ...nn.norm import RMSNorm
from ...ops.rotary import apply_rotary_pos_emb, rotary_embedding
from ...partitioning import STACKED


class FlaxMoshiFlexibleLinear(nn.Module):
    """One linear layer per codebook; upstream ``MoshiFlexibleLinear``.

    Each codebook is an ordinary linear layer named by its number.
    """

    input_size: int
    output_size: int
    num_layers: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch seq input_size"], layer_idx: int | Sequence[int] | AnyArray | None = None
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
        if layer_idx is None:
            layer_idx = tuple(range(self.num_layers))
        indices = None if is_traced(layer_idx) else self._known_indices(layer_idx, length)
        # no others: generation traces this hundreds of times, each for one codebook
        codebooks = {
            index: dense(self.output_size, normal(1.0), self.dtype, name=str(index))
            for index in (sorted(set(indices)) if indices and not self.is_initializing() else range(self.num_layers))
        }
        if self.is_initializing():
            for codebook in codebooks.values():
                codebook(x[:, :1])
        if indices is None:
            gathered = jnp.broadcast_to(jnp.asarray(layer_idx), (length,))
            if not all(is_kernel_alone(codebook) for codebook in codebooks.values()):
                # rare: every codebook's outputs, of which each position takes those of its own
                outputs = jnp.stack([codebook(x) for codebook in codebooks.values()])
                positions = jnp.arange(length)
                return outputs[gathered, :, positions].swapaxes(0, 1)
            kernels = jnp.stack([codebook.variables["params"][KERNEL] for codebook in codebooks.values()])
            chosen = kernels[gathered]
            return jnp.einsum("bsi,sio->bso", x.astype(self.dtype), chosen.astype(self.dtype))
        if len(set(indices)) == 1:
            return codebooks[indices[0]](x)
        # the gradient of a split is one concatenation, that of slices a sum of as many padded arrays
        steps = lax.split(x, [1] * length, axis=1)
        return jnp.concatenate([codebooks[index](step) for index, step in zip(indices, steps)], axis=1)

    def _known_indices(self, layer_idx: int | Sequence[int] | AnyArray, length: int) -> list[int]:
        """One index per position; ValueError for others."""
        given = np.asarray(layer_idx)
        if given.ndim == 0:
            given = np.full((1 if length == 0 else length,), given)
        if given.shape != (length,):
            raise ValueError(
                f"`layer_idx` must have one index per position ({length}), but has the shape {given.shape}."
            )
        if given.min() < 0 or given.max() >= self.num_layers:
            raise ValueError(f"`layer_idx` must be in [0, {self.num_layers}), but is {given.tolist()}.")
        return given.tolist()


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
            self.linear = dense(self.output_dim, normal(self.initializer_range), self.dtype)

    def __call__(self, x: Float[Array, "batch seq input_dim"], layer_idx=None) -> Float[Array, "batch seq output_dim"]:
        return self.linear(x, layer_idx) if self.use_flexible_linear else self.linear(x)


class FlaxMoshiGatingMLP(nn.Module):
    """Gated feed-forward layer, ``fc2(act(a) * b)`` with ``a, b = split(fc1(x))``; upstream ``MoshiGatingMLP``."""

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
            self.fc1 = dense(config.ffn_dim, normal(config.initializer_range), self.dtype)
            self.fc2 = dense(config.hidden_size, normal(config.initializer_range), self.dtype)
        self.activation_fn = ACT2FN[config.hidden_act]

    def __call__(
        self, hidden_states: Float[Array, "batch seq hidden"], layer_idx=None
    ) -> Float[Array, "batch seq hidden"]:
        arguments = (layer_idx,) if self.use_flexible_linear else ()
        gate, up = jnp.split(self.fc1(hidden_states, *arguments), 2, axis=-1)
        return self.fc2(self.activation_fn(gate) * up, *arguments)


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
        attention_mask: Bool[Array, "#batch seq slots"],
        position_ids: Integer[Array, "#batch seq"] | None = None,
        layer_cache: LayerCache | None = None,
        cache_index: Any = 0,
        codebook_idx: Any = None,
        deterministic: bool = True,
        output_attentions: bool = True,
    ) -> tuple[Float[Array, "batch seq hidden"], Float[Array, "batch heads seq slots"] | None, LayerCache | None]:
        """Attends over this call's keys, or over the cache's slots after writing this call's into them.

        Args:
            hidden_states: inputs.
            attention_mask: True where a query may attend a key slot.
            position_ids: positions for the rotary embedding (unused without it).
            layer_cache: keys and values of this layer.
            cache_index: the slot of the first new key, a scalar, or one per row, ``(batch,)``.
            codebook_idx: the ``layer_idx`` of the per-codebook linears.
            deterministic: no dropout.
            output_attentions: False returns None for the weights.

        Returns:
            The output, the attention weights and the updated cache of this layer.
        """
        config = self.config
        batch_size, length, _ = hidden_states.shape

        def heads(projection: FlaxMoshiLinear) -> Array:
            return projection(hidden_states, codebook_idx).reshape(batch_size, length, -1, config.head_dim)

        query, key, value = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)
        if self.use_rope:
            assert position_ids is not None
            cos, sin = rotary_embedding(position_ids[..., None], config.head_dim, config.rope_parameters, self.dtype)
            query, key = apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin)
        dropout = None if deterministic or not config.attention_dropout else partial(self.dropout, deterministic=False)
        output, weights, layer_cache = attend(
            query, key, value, attention_mask, layer_cache, cache_index, dropout, output_attentions
        )
        return self.o_proj(output, codebook_idx), weights, layer_cache


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
        self.input_layernorm = RMSNorm(config.rms_norm_eps, self.dtype)
        self.post_attention_layernorm = RMSNorm(config.rms_norm_eps, self.dtype)

    def __call__(
        self,
        hidden_states: Float[Array, "batch seq hidden"],
        attention_mask: Bool[Array, "#batch seq slots"],
        position_ids: Integer[Array, "#batch seq"] | None = None,
        layer_cache: LayerCache | None = None,
        cache_index: Any = 0,
        codebook_idx: Any = None,
        deterministic: bool = True,
        output_attentions: bool = True,
    ) -> tuple[Float[Array, "batch seq hidden"], Float[Array, "batch heads seq slots"] | None, LayerCache | None]:
        """Arguments and returns as :class:`FlaxMoshiAttention`."""
        attended, weights, layer_cache = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask,
            position_ids,
            layer_cache,
            cache_index,
            codebook_idx,
            deterministic,
            output_attentions,
        )
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), codebook_idx)
        return hidden_states, weights, layer_cache


class FlaxMoshiLayers(nn.Module):
    """The stack of decoder layers of either decoder, children named by number.

    With ``scan_layers`` there is one child, ``stacked``, whose parameters have a leading axis of layers, and a loop
    over it: compilation does not grow with the layers, and layers that are recomputed are so one after another. Such
    parameters come from ``training.scanned_layers.stack_layers``; there is no cache then.
    """

    config: MoshiConfig | MoshiDepthConfig
    use_flexible_linear: bool = False
    use_rope: bool = True
    dtype: jnp.dtype = jnp.float32
    gradient_checkpointing: bool = False
    scan_layers: bool = False

    def setup(self):
        # codebook_idx, deterministic and output_attentions are Python values (self counts)
        layer_class = (
            nn.remat(FlaxMoshiDecoderLayer, static_argnums=(6, 7, 8), prevent_cse=not self.scan_layers)
            if self.gradient_checkpointing
            else FlaxMoshiDecoderLayer
        )
        names = [STACKED] if self.scan_layers else [str(index) for index in range(self.config.num_hidden_layers)]
        self.blocks = [
            layer_class(self.config, self.use_flexible_linear, self.use_rope, self.dtype, name=name) for name in names
        ]

    def __call__(
        self,
        hidden_states: Float[Array, "batch seq hidden"],
        steps: Steps,
        cache: Cache,
        position_ids: Integer[Array, "#batch seq"] | None = None,
        codebook_idx: Any = None,
        deterministic: bool = True,
        output_attentions: bool = True,
    ) -> tuple[Float[Array, "batch seq hidden"], Cache, tuple[Array, ...], tuple[Array | None, ...]]:
        """Runs the layers, each writing the next steps into its part of the cache.

        Args:
            hidden_states: inputs.
            steps, cache: of ``cache.next_steps``.
            position_ids: for the rotary embedding.
            codebook_idx, deterministic, output_attentions: as of :class:`FlaxMoshiAttention`.

        Returns:
            The last hidden state, the updated cache, the input of every layer and all attention weights.

        Raises:
            ValueError: a cache together with ``scan_layers``.
        """
        flags = (codebook_idx, deterministic, output_attentions)
        if self.scan_layers:
            if cache.layer(0) is not None:
                raise ValueError(
                    "`cache` cannot be used with `scan_layers`, which is for training; use a module without "
                    "it, and the parameters of `unstack_layers`."
                )
            arrays, length = (steps.mask, position_ids, None, 0), self.config.num_hidden_layers
            hidden_states, inputs, attentions = scan_layers(self.blocks[0], hidden_states, arrays, flags, length)
            return hidden_states, cache, inputs, attentions
        return run_layers(
            self,
            self.blocks,
            hidden_states,
            cache,
            lambda number: (steps.mask, position_ids, cache.layer(number), steps.index),
            flags,
        )


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
