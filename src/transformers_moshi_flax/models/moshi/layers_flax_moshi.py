"""The parts of Moshi's two decoders: caches, norm, linears, attention, layers, embeddings, cross-entropy.

Names and parameter paths follow ``transformers.models.moshi.modeling_moshi``. Three things depart from it, see
``docs/differences.md``: state is explicit (caches are passed in and returned), what upstream forces to float32 is
computed in *at least* float32, and the per-codebook linears keep one kernel per codebook, because XLA copies slices of
stacked weights in every frame.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Integer
from transformers import MoshiConfig
from transformers.models.moshi.configuration_moshi import MoshiDepthConfig

from ...input_checks import is_traced, is_tracing
from ...partitioning import STACKED, gathered_table, split_rows
from ...precision import at_least_float32
from ..activations import ACT2FN
from ..dots import row_dot_general
from ..initializers import normal
from ..ring_cache import RingCache, write_steps
from ..rotary import apply_rotary_pos_emb, rotary_embedding

IGNORE_INDEX = -100

LayerCache = tuple[Float[Array, "batch_heads max_length head_dim"], Float[Array, "batch_heads max_length head_dim"]]


# ------------------------------------------------------------------------------------------------------- caches


@flax.struct.dataclass
class FlaxMoshiCache:
    """Static key-value cache of the backbone, made by ``init_cache`` and returned updated by every call.

    Batch and heads are one axis, the batch dimension of the attention's dots: with two, XLA's CPU backend reshapes
    after the update, fuses both, and then copies the whole cache several times in every step.

    Attributes:
        keys, values: one array per layer, ``(batch * kv_heads, max_length, head_dim)``.
        mask: ``(batch, max_length)``, which of the frames written so far may be attended.
        length: frames written so far, a scalar.
    """

    # Any: under jax.eval_shape the leaves are shapes
    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    mask: Any
    length: Any

    @property
    def max_length(self) -> int:
        return self.mask.shape[-1]

    @classmethod
    def create(cls, config, batch_size: int, max_length: int, dtype=jnp.float32) -> FlaxMoshiCache:
        shape = (batch_size * config.num_key_value_heads, max_length, config.head_dim)
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
        keys, values: one array per layer, ``(batch * kv_heads, num_codebooks, head_dim)``.
        mask: ``(batch, num_codebooks)``, which of the codebooks written so far may be attended.
        length: codebooks written so far, a Python integer.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    mask: Any
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

    @nn.compact
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
        if layer_idx is None:
            layer_idx = tuple(range(self.num_layers))
        traced = is_traced(layer_idx)
        if not traced:
            layer_idx = np.asarray(layer_idx)
            if layer_idx.ndim == 0:
                layer_idx = np.full((1 if length == 0 else length,), layer_idx)
            if layer_idx.shape != (length,):
                raise ValueError(
                    f"`layer_idx` must have one index per position ({length}), but has the shape {layer_idx.shape}."
                )
            if layer_idx.min() < 0 or layer_idx.max() >= self.num_layers:
                raise ValueError(f"`layer_idx` must be in [0, {self.num_layers}), but is {layer_idx.tolist()}.")
        every = traced or self.is_initializing()
        # no others: generation traces this hundreds of times, each for one codebook
        codebooks = {
            index: nn.Dense(
                self.output_size,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=normal(1.0),
                dot_general=row_dot_general,
                name=str(index),
            )
            for index in (range(self.num_layers) if every else sorted(set(layer_idx.tolist())))
        }
        if self.is_initializing():
            for codebook in codebooks.values():
                codebook(x[:, :1])
        if traced:
            kernels = jnp.stack([codebook.variables["params"]["kernel"] for codebook in codebooks.values()])
            chosen = kernels[jnp.broadcast_to(layer_idx, (length,))]
            return jnp.einsum("bsi,sio->bso", x.astype(self.dtype), chosen.astype(self.dtype))
        if (layer_idx == layer_idx[0]).all():
            return codebooks[int(layer_idx[0])](x)
        # the gradient of a split is one concatenation, that of slices a sum of as many padded arrays
        positions = lax.split(x, [1] * length, axis=1)
        return jnp.concatenate([codebooks[int(layer)](row) for layer, row in zip(layer_idx, positions)], axis=1)


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
    return nn.Dense(
        features,
        use_bias=False,
        dtype=dtype,
        kernel_init=normal(initializer_range),
        dot_general=row_dot_general,
    )


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
            self.fc1 = dense(config.ffn_dim, config.initializer_range, self.dtype)
            self.fc2 = dense(config.hidden_size, config.initializer_range, self.dtype)
        self.activation_fn = ACT2FN[config.hidden_act]

    def __call__(
        self, hidden_states: Float[Array, "batch seq hidden"], layer_idx=None
    ) -> Float[Array, "batch seq hidden"]:
        arguments = (layer_idx,) if self.use_flexible_linear else ()
        gate, up = jnp.split(self.fc1(hidden_states, *arguments), 2, axis=-1)
        return self.fc2(self.activation_fn(gate) * up, *arguments)


def attention_mask_of(
    query_slots: Int[Array, "seq"], key_mask: Bool[Array, "batch slots"], sliding_window: int
) -> Bool[Array, "batch seq slots"]:
    """Which keys each query may attend: unmasked, not later, and fewer than ``sliding_window`` slots back."""
    key_slots = jnp.arange(key_mask.shape[-1], dtype=jnp.int32)[None, :]
    distance = query_slots[:, None] - key_slots
    return ((distance >= 0) & (distance < sliding_window))[None] & key_mask[:, None, :]


SLOTS_IN_USE = 256
"""Where at most so many slots of a large cache are in use, attention leaves out the others. It copies those in use on
the way, so that more of them, or several such steps, cost more than they spare (``docs/benchmarks.md``)."""

LARGE_CACHE = 1024
"""Slots of a large cache."""


def write_slots(
    cached: Float[Array, "batch_heads slots head_dim"], new: Float[Array, "batch_heads seq head_dim"], index: Any
) -> Float[Array, "batch_heads slots head_dim"]:
    """Puts ``new`` into the slots from ``index`` on, a scalar, or one per row."""
    if np.ndim(index):
        return write_steps(cached, new, index)
    return lax.dynamic_update_slice_in_dim(cached, new.astype(cached.dtype), index, axis=1)


def attention_weights(
    query: Float[Array, "batch_groups queries head_dim"],
    key: Float[Array, "batch_groups slots head_dim"],
    mask: Bool[Array, "batch seq slots"],
) -> Float[Array, "batch heads seq slots"]:
    """Softmax in at least float32 of the scaled products, in the dtype of ``query``.

    Args:
        query: the queries of one group of heads beside each other, ``queries = heads / groups * seq``.
        key: of the groups.
        mask: True where a query may attend a slot.
    """
    batch_size, length, slots = mask.shape
    wide = at_least_float32(query.dtype)
    scores = jnp.einsum("xqd,xsd->xqs", query, key, preferred_element_type=wide) * (1 / math.sqrt(query.shape[-1]))
    scores = scores.reshape(batch_size, -1, length, slots)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(wide).min)
    return nn.softmax(scores, axis=-1).astype(query.dtype)


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
        position_ids: Integer[Array, "#batch seq"] | None = None,
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
            cache_index: the slot of the first new key, a scalar, or one per row, ``(batch,)``.
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
            cos, sin = rotary_embedding(position_ids[:, None], head_dim, config.rope_parameters, self.dtype)
            query, key = apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin)

        # one batch axis, and the queries of one group beside each other: [batch * kv_heads, group * seq, head_dim]
        query = query.reshape(batch_size * kv_heads, -1, head_dim)
        key, value = (array.reshape(batch_size * kv_heads, length, head_dim) for array in (key, value))
        if layer_cache is not None:
            layer_cache = tuple(
                write_slots(cached, new, cache_index) for cached, new in zip(layer_cache, (key, value))
            )
            key, value = layer_cache

        def attend(slots: int) -> tuple[Array, Array]:
            """Over the first ``slots``; the others get no weight."""
            weights = attention_weights(query, key[:, :slots].astype(self.dtype), attention_mask[..., :slots])
            dropped = self.dropout(weights, deterministic=deterministic)
            dropped = dropped.reshape(batch_size * kv_heads, -1, slots)
            output = jnp.einsum("xqs,xsd->xqd", dropped, value[:, :slots].astype(self.dtype))
            return output, jnp.pad(weights, [(0, 0)] * 3 + [(0, attention_mask.shape[-1] - slots)])

        slots = attention_mask.shape[-1]
        if layer_cache is None or not deterministic or slots < LARGE_CACHE:
            output, weights = attend(slots)
        else:
            few = ~jnp.any(attention_mask[..., SLOTS_IN_USE:])
            output, weights = lax.cond(few, partial(attend, SLOTS_IN_USE), partial(attend, slots))
        output = output.reshape(batch_size, -1, length, head_dim).transpose(0, 2, 1, 3)
        output = self.o_proj(output.reshape(batch_size, length, -1), codebook_idx)
        return output, weights, layer_cache


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
        position_ids: Integer[Array, "#batch seq"] | None = None,
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
        # codebook_idx and deterministic are Python values (self counts); in a loop nothing can be shared anyway
        layer_class = (
            nn.remat(FlaxMoshiDecoderLayer, static_argnums=(6, 7), prevent_cse=not self.scan_layers)
            if self.gradient_checkpointing
            else FlaxMoshiDecoderLayer
        )
        names = [STACKED] if self.scan_layers else [str(index) for index in range(self.config.num_hidden_layers)]
        self.blocks = [
            layer_class(self.config, self.use_flexible_linear, self.use_rope, self.dtype, name=name) for name in names
        ]

    def __call__(
        self, hidden_states, attention_mask, position_ids, cache, codebook_idx, deterministic
    ) -> tuple[Array, FlaxMoshiCache | FlaxMoshiDepthCache | RingCache | None, tuple[Array, ...], tuple[Array, ...]]:
        """Returns the last hidden state, the updated cache, the input of every layer and all attention weights.

        Raises:
            ValueError: a cache together with ``scan_layers``.
        """
        if self.scan_layers:
            if cache is not None:
                raise ValueError(
                    "`cache` cannot be used with `scan_layers`, which is for training; use a module without "
                    "it, and the parameters of `unstack_layers`."
                )
            arguments = (attention_mask, position_ids, codebook_idx, deterministic)
            hidden_states, inputs, attentions = self.scan(hidden_states, *arguments)
            return hidden_states, None, inputs, attentions
        inputs, attentions, layer_caches = [], [], []
        cache_index = cache.slot if isinstance(cache, RingCache) else call_length(cache)

        def layer(block: nn.Module, *arrays: Any) -> tuple[Array, Array, LayerCache | None]:
            return block(*arrays, codebook_idx, deterministic)

        if cache is not None and may_share_traces(self):
            layer = nn.jit(layer)
        for index, block in enumerate(self.blocks):
            hidden_states = split_rows(hidden_states)
            inputs.append(hidden_states)
            layer_cache = None if cache is None else (cache.keys[index], cache.values[index])
            hidden_states, weights, layer_cache = layer(
                block, hidden_states, attention_mask, position_ids, layer_cache, cache_index
            )
            attentions.append(weights)
            layer_caches.append(layer_cache)
        hidden_states = split_rows(hidden_states)
        if cache is not None:
            keys, values = zip(*layer_caches)
            cache = cache.replace(keys=tuple(keys), values=tuple(values))
        return hidden_states, cache, tuple(inputs), tuple(attentions)

    def scan(
        self, hidden_states, attention_mask, position_ids, codebook_idx, deterministic
    ) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
        """The layers as a loop: the last hidden state, the input of every layer and all attention weights."""

        def layer(block: nn.Module, hidden_states: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            inputs = split_rows(hidden_states)
            outputs, weights, _ = block(inputs, attention_mask, position_ids, None, 0, codebook_idx, deterministic)
            return split_rows(outputs), (inputs, weights)

        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.config.num_hidden_layers,
        )
        # around the loop too: what it carries, and its gradient, would else be split as what comes before it
        hidden_states, (inputs, attentions) = layers(self.blocks[0], split_rows(hidden_states), None)
        return split_rows(hidden_states), tuple(inputs), tuple(attentions)


def may_share_traces(module: nn.Module) -> bool:
    """Whether submodules that are called in the same way may share a trace, which spares two thirds of the tracing.

    Not outside of ``jax.jit``, where it would compile them; nor if they may draw numbers or methods are intercepted,
    as both can depend on a module's path.
    """
    return is_tracing() and not module.scope.rngs and not nn.module._global_interceptor_stack


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
    return nn.Embed(num_embeddings, features, dtype=dtype, embedding_init=normal(initializer_range), name=name)


def embed(table: nn.Embed, ids: Int[Array, "*shape"]) -> Float[Array, "*shape features"]:
    """Looks ids up; ``IGNORE_INDEX`` gives a zero embedding, as the original's token id -1."""
    gathered, known = gathered_table(table.embedding), jnp.maximum(ids, 0)
    if gathered is None:
        embedded = table(known)
    else:
        embedded = split_rows(jnp.take(gathered.astype(table.dtype), known, axis=0))
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
