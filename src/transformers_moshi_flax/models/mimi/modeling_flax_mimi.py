"""Mimi in Flax linen, from the smallest module to the whole codec.

Mimi (Défossez et al., 2024) is a SEANet encoder, a transformer and a downsampling convolution, a split residual vector
quantizer, and the mirror image of the first three. Names, argument order and parameter paths follow
``transformers.models.mimi.modeling_mimi``, the paths as in its files. What departs from it:

- Inside, arrays are channels last; the models take and return upstream's channels-first arrays.
- ``padding_mask`` counts: a row that is padded on the right is coded and decoded as if it were alone.
- What upstream forces to float32 is computed in *at least* float32.
- The codebook buffers are leaves of the parameter tree, without gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int
from transformers import MimiConfig
from transformers.models.mimi.configuration_mimi import MimiDecoderConfig, MimiEncoderConfig

from ...former_names import accept_former_names
from ...generation.programs import Program
from ...input_checks import check_audio, check_ids, check_rank, is_traced, owned
from ...modeling_flax_outputs import FlaxModelOutput
from ...modeling_flax_utils import FlaxPreTrainedModel
from ...nn.activations import ACT2FN
from ...nn.attention import attend
from ...nn.cache import Cache, LayerCache, NoCache, RingCache, Steps
from ...nn.initializers import kaiming_normal, normal, uniform
from ...nn.linear import dense
from ...ops.codebook import nearest_entries, squared_norms
from ...ops.convolution import (
    PAD_MODES,
    conv1d,
    conv_transpose1d,
    conv_transpose1d_inside,
    frames_out,
    pad_frames,
)
from ...ops.precision import at_least_float32
from ...ops.rotary import apply_rotary_pos_emb, rotary_embedding
from .checkpoint_flax_mimi import MIMI_RULES
from .streaming_flax_mimi import (
    FlaxMimiDecoderState,
    FlaxMimiEncoderState,
    Histories,
    check_rows,
    check_state,
    resamples,
    samples_per_frame,
    seanet_histories,
    steps_per_frame,
)

# parts of a Mimi that a step uses, SEANet's encoder first
HALVES = {
    "encode_step": ("encoder", "encoder_transformer", "downsample", "quantizer"),
    "decode_step": ("quantizer", "upsample", "decoder_transformer", "decoder"),
}

Params = Any
Lengths = Int[Array, "batch"] | None


# ----------------------------------------------------------------------------------------------------------- outputs


@flax.struct.dataclass
class FlaxMimiTransformerOutput(FlaxModelOutput):
    """Output of the transformer, all ``(batch, frames, hidden_size)`` but ``attentions``; see
    :class:`FlaxMimiEncoderModelOutput`."""

    last_hidden_state: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class FlaxMimiEncoderModelOutput(FlaxModelOutput):
    """Output of the encoder half.

    Attributes:
        latents: ``(batch, hidden_size, frames)``.
        cache: of the transformer, where the call was part of a stream.
        padding_cache: what the convolutions remember, where the call was part of a stream.
        hidden_states: input and output of every transformer layer, each ``(batch, steps, hidden_size)``, where steps
            come before the downsampling (two a frame in the released Mimi).
        attentions: weights of every transformer layer, each ``(batch, heads, steps, steps)``.
    """

    latents: jax.Array | None = None
    cache: RingCache | None = None
    padding_cache: tuple[jax.Array, ...] | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class FlaxMimiEncoderOutput(FlaxModelOutput):
    """Output of ``encode``: ``audio_codes`` ``(batch, num_quantizers, frames)`` int32, the rest as in
    :class:`FlaxMimiEncoderModelOutput` (whose ``cache`` is ``encoder_cache`` here)."""

    audio_codes: jax.Array | None = None
    encoder_cache: RingCache | None = None
    padding_cache: tuple[jax.Array, ...] | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class FlaxMimiDecoderOutput(FlaxModelOutput):
    """Output of the decoder half: ``audio_values`` ``(batch, audio_channels, samples)``, the state after it as
    ``decoder_cache`` where the call was part of a stream, the rest as in
    :class:`FlaxMimiEncoderModelOutput`."""

    audio_values: jax.Array | None = None
    decoder_cache: FlaxMimiDecoderState | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class FlaxMimiOutput(FlaxModelOutput):
    """Output of the whole codec: ``audio_codes`` ``(batch, num_quantizers, frames)`` int32 and ``audio_values``
    ``(batch, audio_channels, samples)``."""

    audio_codes: jax.Array | None = None
    audio_values: jax.Array | None = None


# ------------------------------------------------------------------------------------------------------ convolutions


class FlaxMimiKernel(nn.Module):
    """Kernel and bias of a convolution, drawn as upstream does: Kaiming normal, and uniform by the number of inputs.

    Attributes:
        shape: of the kernel; ``shape[0] * shape[1]`` is torch's fan-in, of transposed convolutions too.
        bias_shape: None for no bias.
        fan_in: inputs of an output, for the bias.
    """

    shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None = None
    fan_in: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self):
        kernel = self.param("kernel", kaiming_normal, self.shape, jnp.float32).astype(self.dtype)
        if self.bias_shape is None:
            return kernel, None
        bias = self.param("bias", uniform(math.sqrt(1 / self.fan_in)), self.bias_shape)
        return kernel, bias.astype(self.dtype)


class FlaxMimiConv1d(nn.Module):
    """Convolution that pads itself, on the left only if ``config.use_causal_conv``; upstream ``MimiConv1d``.

    Raises:
        ValueError: an unknown ``pad_mode``, or a stride wider than the kernel.
    """

    config: MimiConfig
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    pad_mode: str | None = None
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch frames in_channels"],
        lengths: Lengths = None,
        histories: Histories | None = None,
    ) -> Float[Array, "batch frames_out out_channels"]:
        mode = self.config.pad_mode if self.pad_mode is None else self.pad_mode
        if mode not in PAD_MODES:
            raise ValueError(f"`pad_mode` is {mode!r}, but must be one of {', '.join(PAD_MODES)}.")
        total = (self.kernel_size - 1) * self.dilation + 1 - self.stride
        if total < 0:
            raise ValueError(
                f"`stride` is {self.stride}, wider than `kernel_size` {self.kernel_size}: choose a smaller."
            )
        in_per_group = self.in_channels // self.groups
        kernel, bias = FlaxMimiKernel(
            (self.kernel_size, in_per_group, self.out_channels),
            (self.out_channels,) if self.use_bias else None,
            in_per_group * self.kernel_size,
            self.dtype,
            name="conv",
        )()
        x = x.astype(self.dtype)
        if histories is None:
            right = 0 if self.config.use_causal_conv else total // 2
            x = pad_frames(x, total - right, right, self.stride, mode, lengths)
        else:
            x = histories.extend(x, total, mode)
        x = conv1d(x, kernel, self.stride, self.dilation, self.groups)
        return x if bias is None else x + bias


class FlaxMimiConvTranspose1d(nn.Module):
    """Transposed convolution, trimmed to ``stride`` outputs an input; upstream ``MimiConvTranspose1d``.

    Raises:
        ValueError: ``config.trim_right_ratio`` other than 1 without ``config.use_causal_conv``.
    """

    config: MimiConfig
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch frames in_channels"],
        lengths: Lengths = None,
        histories: Histories | None = None,
    ) -> Float[Array, "batch frames*{self.stride} out_channels"]:
        causal, ratio = self.config.use_causal_conv, self.config.trim_right_ratio
        if not causal and ratio != 1.0:
            raise ValueError(
                f"`trim_right_ratio` is {ratio}, which has no meaning with `use_causal_conv=False`: leave it at 1.0."
            )
        out_per_group = self.out_channels // self.groups
        kernel, bias = FlaxMimiKernel(
            (self.kernel_size, out_per_group, self.in_channels),
            (self.out_channels,) if self.use_bias else None,
            self.in_channels // self.groups * self.kernel_size,
            self.dtype,
            name="conv",
        )()
        total = self.kernel_size - self.stride
        right = math.ceil(total * ratio) if causal else total // 2
        left = total - right
        frames = x.shape[1]
        x = x.astype(self.dtype)
        if lengths is not None:
            # a padding frame must not reach back into the row
            x = jnp.where(jnp.arange(frames)[:, None] < lengths[:, None, None], x, 0)
        if histories is None:
            x = conv_transpose1d(x, kernel, self.stride, self.groups)[:, left : left + frames * self.stride]
        else:
            x = histories.extend(x, frames_out(total, self.stride))
            x = conv_transpose1d_inside(x, kernel, self.stride, self.groups)
        return x if bias is None else x + bias


# ------------------------------------------------------------------------------------------------------------ SEANet


class FlaxMimiResnetBranch(nn.Module):
    """The two convolutions of a residual block, numbered as in the files (0 and 2 are activations)."""

    config: MimiConfig
    dim: int
    dilations: tuple[int, int]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch frames dim"], lengths: Lengths = None, histories: Histories | None = None
    ) -> Float[Array, "batch frames dim"]:
        hidden = self.dim // self.config.compress
        width = self.config.residual_kernel_size
        first, second = self.dilations
        x = FlaxMimiConv1d(self.config, self.dim, hidden, width, dilation=first, dtype=self.dtype, name="1")(
            nn.elu(x), lengths, histories
        )
        return FlaxMimiConv1d(self.config, hidden, self.dim, 1, dilation=second, dtype=self.dtype, name="3")(
            nn.elu(x), lengths, histories
        )


class FlaxMimiResnetBlock(nn.Module):
    """Residual block of SEANet; upstream ``MimiResnetBlock``."""

    config: MimiConfig
    dim: int
    dilations: tuple[int, int]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch frames dim"], lengths: Lengths = None, histories: Histories | None = None
    ) -> Float[Array, "batch frames dim"]:
        residual = x
        if self.config.use_conv_shortcut:
            residual = FlaxMimiConv1d(self.config, self.dim, self.dim, 1, dtype=self.dtype, name="shortcut")(
                x, lengths, histories
            )
        return residual + FlaxMimiResnetBranch(self.config, self.dim, self.dilations, self.dtype, name="block")(
            x, lengths, histories
        )


class FlaxMimiEncoderLayers(nn.Module):
    """The numbered layers of :class:`FlaxMimiEncoder`."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch samples channels"],
        lengths: Lengths = None,
        histories: Histories | None = None,
    ) -> Float[Array, "batch steps hidden_size"]:
        config, dtype = self.config, self.dtype
        dim, index = config.num_filters, 1
        first = FlaxMimiConv1d(config, config.audio_channels, dim, config.kernel_size, dtype=dtype, name="0")
        x = first(x, lengths, histories)
        for ratio in reversed(config.upsampling_ratios):
            for block in range(config.num_residual_layers):
                dilations = (config.dilation_growth_rate**block, 1)
                x = FlaxMimiResnetBlock(config, dim, dilations, dtype, name=str(index))(x, lengths, histories)
                index += 1
            conv = FlaxMimiConv1d(config, dim, 2 * dim, 2 * ratio, ratio, dtype=dtype, name=str(index + 1))
            x = conv(nn.elu(x), lengths, histories)
            lengths = None if lengths is None else frames_out(lengths, ratio)
            dim, index = 2 * dim, index + 2
        last = FlaxMimiConv1d(
            config, dim, config.hidden_size, config.last_kernel_size, dtype=dtype, name=str(index + 1)
        )
        return last(nn.elu(x), lengths, histories)


class FlaxMimiEncoder(nn.Module):
    """SEANet encoder, channels last; upstream ``MimiEncoder``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch samples channels"],
        lengths: Lengths = None,
        histories: Histories | None = None,
    ) -> Float[Array, "batch steps hidden_size"]:
        return FlaxMimiEncoderLayers(self.config, self.dtype, name="layers")(x, lengths, histories)


class FlaxMimiDecoderLayers(nn.Module):
    """The numbered layers of :class:`FlaxMimiDecoder`."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch steps hidden_size"],
        lengths: Lengths = None,
        histories: Histories | None = None,
    ) -> Float[Array, "batch samples channels"]:
        config, dtype = self.config, self.dtype
        dim, index = 2 ** len(config.upsampling_ratios) * config.num_filters, 1
        first = FlaxMimiConv1d(config, config.hidden_size, dim, config.kernel_size, dtype=dtype, name="0")
        x = first(x, lengths, histories)
        for ratio in config.upsampling_ratios:
            conv = FlaxMimiConvTranspose1d(config, dim, dim // 2, 2 * ratio, ratio, dtype=dtype, name=str(index + 1))
            x = conv(nn.elu(x), lengths, histories)
            lengths = None if lengths is None else lengths * ratio
            dim, index = dim // 2, index + 2
            for block in range(config.num_residual_layers):
                dilations = (config.dilation_growth_rate**block, 1)
                x = FlaxMimiResnetBlock(config, dim, dilations, dtype, name=str(index))(x, lengths, histories)
                index += 1
        last = FlaxMimiConv1d(
            config, dim, config.audio_channels, config.last_kernel_size, dtype=dtype, name=str(index + 1)
        )
        return last(nn.elu(x), lengths, histories)


class FlaxMimiDecoder(nn.Module):
    """SEANet decoder, channels last; upstream ``MimiDecoder``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch steps hidden_size"],
        lengths: Lengths = None,
        histories: Histories | None = None,
    ) -> Float[Array, "batch samples channels"]:
        return FlaxMimiDecoderLayers(self.config, self.dtype, name="layers")(x, lengths, histories)


# ------------------------------------------------------------------------------------------------------- transformer


class FlaxMimiLayerScale(nn.Module):
    """Learnt scale of a residual branch, small at first (Touvron et al., 2021); upstream ``MimiLayerScale``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        initial = nn.initializers.constant(self.config.layer_scale_initial_scale)
        scale = self.param("scale", initial, (self.config.hidden_size,), jnp.float32)
        return scale.astype(self.dtype) * x


class FlaxMimiMLP(nn.Module):
    """Two layers without bias; upstream ``MimiMLP``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        initializer = normal(self.config.initializer_range)
        x = dense(self.config.intermediate_size, initializer, self.dtype, name="fc1")(x)
        x = ACT2FN[self.config.hidden_act](x)
        return dense(self.config.hidden_size, initializer, self.dtype, name="fc2")(x)


class FlaxMimiAttention(nn.Module):
    """Causal attention in a sliding window, heads in groups that share keys and values; upstream ``MimiAttention``.

    Raises:
        ValueError: ``hidden_size`` no multiple of the heads, or the heads no multiple of the key-value heads.
    """

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch steps hidden_size"],
        cos: Float[Array, "#batch steps 1 head_dim"],
        sin: Float[Array, "#batch steps 1 head_dim"],
        mask: Bool[Array, "#batch steps slots"],
        layer_cache: LayerCache | None = None,
        cache_index: Any = 0,
        deterministic: bool = True,
        output_attentions: bool = False,
    ) -> tuple[
        Float[Array, "batch steps hidden_size"], Float[Array, "batch heads steps slots"] | None, LayerCache | None
    ]:
        config = self.config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if config.hidden_size % heads:
            raise ValueError(
                f"`hidden_size` {config.hidden_size} must be a multiple of `num_attention_heads` {heads}."
            )
        if heads % kv_heads:
            raise ValueError(f"`num_attention_heads` {heads} must be a multiple of `num_key_value_heads` {kv_heads}.")

        def project(name: str, features: int):
            return dense(features, normal(config.initializer_range), self.dtype, config.attention_bias, name)

        batch, steps, _ = x.shape
        query = project("q_proj", heads * head_dim)(x).reshape(batch, steps, heads, head_dim)
        key = project("k_proj", kv_heads * head_dim)(x).reshape(batch, steps, kv_heads, head_dim)
        value = project("v_proj", kv_heads * head_dim)(x).reshape(batch, steps, kv_heads, head_dim)
        query, key = apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin)
        dropout = None
        if config.attention_dropout and not deterministic:
            dropout = nn.Dropout(float(config.attention_dropout), deterministic=False)
        mixed, weights, layer_cache = attend(
            query, key, value, mask, layer_cache, cache_index, dropout, output_attentions
        )
        return project("o_proj", config.hidden_size)(mixed), weights, layer_cache


class FlaxMimiTransformerLayer(nn.Module):
    """Attention and MLP with pre-norm and layer scale; upstream ``MimiTransformerLayer``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch steps hidden_size"],
        cos: Float[Array, "#batch steps 1 head_dim"],
        sin: Float[Array, "#batch steps 1 head_dim"],
        mask: Bool[Array, "#batch steps slots"],
        layer_cache: LayerCache | None = None,
        cache_index: Any = 0,
        deterministic: bool = True,
        output_attentions: bool = False,
    ) -> tuple[
        Float[Array, "batch steps hidden_size"], Float[Array, "batch heads steps slots"] | None, LayerCache | None
    ]:
        config, dtype = self.config, self.dtype

        def norm(name: str):
            # the fast variance E[x²] - E[x]² cancels
            return nn.LayerNorm(config.norm_eps, dtype, use_fast_variance=False, name=name)

        mixed, weights, layer_cache = FlaxMimiAttention(config, dtype, name="self_attn")(
            norm("input_layernorm")(x), cos, sin, mask, layer_cache, cache_index, deterministic, output_attentions
        )
        x = x + FlaxMimiLayerScale(config, dtype, name="self_attn_layer_scale")(mixed)
        hidden = FlaxMimiMLP(config, dtype, name="mlp")(norm("post_attention_layernorm")(x))
        return x + FlaxMimiLayerScale(config, dtype, name="mlp_layer_scale")(hidden), weights, layer_cache


class FlaxMimiTransformerLayers(nn.Module):
    """The numbered layers of :class:`FlaxMimiTransformerModel`; returns all states, all weights and the cache."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch steps hidden_size"],
        steps: Steps,
        cache: Cache,
        deterministic: bool = True,
        output_attentions: bool = False,
    ) -> tuple[tuple[Array, ...], tuple[Array | None, ...], Cache]:
        config = self.config
        positions = steps.positions[..., None]  # the heads come after the steps
        cos, sin = rotary_embedding(positions, config.head_dim, config.rope_parameters, self.dtype)
        layer_class = FlaxMimiTransformerLayer
        if self.gradient_checkpointing and cache.layer(0) is None:
            layer_class = nn.remat(layer_class, static_argnums=(7, 8))
        states, attentions, layer_caches = [x], [], []
        for number in range(config.num_hidden_layers):
            layer = layer_class(config, self.dtype, name=str(number))
            x, weights, layer_cache = layer(
                x, cos, sin, steps.mask, cache.layer(number), steps.index, deterministic, output_attentions
            )
            states.append(x)
            attentions.append(weights)
            layer_caches.append(layer_cache)
        return tuple(states), tuple(attentions), cache.with_layers(layer_caches)


class FlaxMimiTransformerModel(nn.Module):
    """Transformer without final norm; upstream ``MimiTransformerModel``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        self.layers = FlaxMimiTransformerLayers(self.config, self.dtype, self.gradient_checkpointing)

    def __call__(
        self,
        x: Float[Array, "batch steps hidden_size"],
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> FlaxMimiTransformerOutput:
        batch, length, _ = x.shape
        steps, cache = NoCache().next_steps(length, self.config.sliding_window, batch)
        states, attentions, _ = self.layers(x.astype(self.dtype), steps, cache, deterministic, output_attentions)
        return FlaxMimiTransformerOutput(
            last_hidden_state=states[-1],
            hidden_states=states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )

    def step(
        self,
        cache: RingCache,
        x: Float[Array, "batch steps hidden_size"],
        active: Bool[Array, "batch"],
    ) -> tuple[RingCache, Float[Array, "batch steps hidden_size"]]:
        """The last states of the next frames of a stream: of one frame, or of several, one after another."""
        per_frame = steps_per_frame(self.config)
        batch, steps, hidden = x.shape
        x = x.astype(self.dtype)
        if steps == per_frame:
            return self._frame(cache, x, active)
        frames = jnp.moveaxis(x.reshape(batch, -1, per_frame, hidden), 1, 0)
        scan = nn.scan(
            lambda module, cache, frame: module._frame(cache, frame, active),
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        cache, frames = scan(self, cache, frames)
        return cache, jnp.moveaxis(frames, 0, 1).reshape(batch, steps, hidden)

    def _frame(self, cache: RingCache, x: Array, active: Array) -> tuple[RingCache, Array]:
        batch, length, _ = x.shape
        steps, cache = cache.next_steps(length, self.config.sliding_window, batch, active[:, None])
        states, _, cache = self.layers(x, steps, cache)
        return cache, states[-1]


# --------------------------------------------------------------------------------------------------------- quantizer


class Codebook(NamedTuple):
    """A table of entries as the files keep it: entry i is ``total[i] / usage[i]``.

    What is computed from it divides afterwards: the whole table is larger than anything that a frame needs.
    """

    total: Float[Array, "entries dim"]
    usage: Float[Array, "entries"]
    squares: Float[Array, "entries"] | None = None  # :func:`squared_norms` of ``total``, if they are known

    def nearest(self, x: Float[Array, "*shape dim"]) -> Int[Array, "*shape"]:
        """Index of the nearest entry (Euclidean), the first of equally near ones; int32."""
        squares = squared_norms(self.total) if self.squares is None else self.squares
        return nearest_entries(self.total, self.usage, squares, x)

    def __getitem__(self, codes: Int[Array, "*shape"]) -> Float[Array, "*shape dim"]:
        return self.total[codes] / self.usage[codes][..., None]


class FlaxMimiEuclideanCodebook(nn.Module):
    """Entries of a codebook from running sums; upstream ``MimiEuclideanCodebook``.

    The three leaves are upstream's buffers, so no gradient flows into them. They start as upstream's do, with all
    entries zero. A fourth, ``squares``, is used where :func:`prepared_for_frames` has put it.
    """

    config: MimiConfig
    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self) -> Codebook:
        """The table in at least float32."""
        size, dim = self.config.codebook_size, self.config.codebook_dim
        self.param("initialized", nn.initializers.ones, (1,), jnp.float32)
        usage = self.param("cluster_usage", nn.initializers.ones, (size,), jnp.float32)
        total = self.param("embed_sum", nn.initializers.zeros, (size, dim), jnp.float32)
        usage, total = (lax.stop_gradient(leaf.astype(at_least_float32(self.dtype))) for leaf in (usage, total))
        return Codebook(total, jnp.maximum(usage, self.epsilon), self.get_variable("params", "squares"))


class FlaxMimiVectorQuantization(nn.Module):
    """One stage of the residual quantizer; upstream ``MimiVectorQuantization``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.codebook = FlaxMimiEuclideanCodebook(self.config, self.dtype)

    def encode(self, x: Float[Array, "*shape dim"]) -> Int[Array, "*shape"]:
        return self.codebook().nearest(x)

    def decode(self, codes: Int[Array, "*shape"]) -> Float[Array, "*shape dim"]:
        return self.codebook()[codes]


class FlaxMimiQuantizerLayers(nn.Module):
    """The numbered stages of :class:`FlaxMimiResidualVectorQuantizer`; returns the tables of the first ``number``."""

    config: MimiConfig
    num_quantizers: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, number: int | None) -> tuple[Codebook, ...]:
        every = number is None or self.is_initializing()
        stages = [
            FlaxMimiVectorQuantization(self.config, self.dtype, name=str(index))
            for index in range(self.num_quantizers if every else number)
        ]
        return tuple(stage.codebook() for stage in stages)[:number]


class FlaxMimiResidualVectorQuantizer(nn.Module):
    """Each stage quantizes what the stages before it left over; upstream ``MimiResidualVectorQuantizer``.

    Channels last, in at least float32.
    """

    config: MimiConfig
    num_quantizers: int
    dtype: DTypeLike = jnp.float32

    def setup(self):
        config, inner = self.config, self.config.vector_quantization_hidden_dimension
        wide = at_least_float32(self.dtype)
        self.layers = FlaxMimiQuantizerLayers(config, self.num_quantizers, self.dtype)
        self.input_proj = self.output_proj = None
        if inner != config.hidden_size:
            self.input_proj = FlaxMimiKernel((1, config.hidden_size, inner), dtype=wide)
            self.output_proj = FlaxMimiKernel((1, inner, config.hidden_size), dtype=wide)

    def _weights(self, number: int | None):
        """Both projections, so that a call of either direction reaches every parameter, and the first tables."""
        if self.input_proj is None:
            return None, None, self.layers(number)
        return self.input_proj()[0][0], self.output_proj()[0][0], self.layers(number)

    def encode(
        self, latents: Float[Array, "batch frames hidden_size"], num_quantizers: int | None = None
    ) -> Int[Array, "batch num_quantizers frames"]:
        """The codes of the first ``num_quantizers`` stages, of all if None."""
        projection, _, tables = self._weights(num_quantizers)
        residual = latents.astype(at_least_float32(self.dtype))
        if projection is not None:
            residual = jnp.matmul(residual, projection, precision=lax.Precision.HIGHEST)
        codes = [jnp.zeros((latents.shape[0], 0, latents.shape[1]), jnp.int32)]
        for table in tables:
            chosen = table.nearest(residual)
            residual = residual - table[chosen]
            codes.append(chosen[:, None])
        return jnp.concatenate(codes, axis=1)

    def decode(self, codes: Int[Array, "batch num_quantizers frames"]) -> Float[Array, "batch frames hidden_size"]:
        """The sum of the entries, projected back."""
        _, projection, tables = self._weights(codes.shape[1])
        shape = (codes.shape[0], codes.shape[2], self.config.codebook_dim)
        total = jnp.zeros(shape, at_least_float32(self.dtype))
        for index in range(codes.shape[1]):
            total = total + tables[index][codes[:, index]]
        return total if projection is None else total @ projection


class FlaxMimiSplitResidualVectorQuantizer(nn.Module):
    """Semantic and acoustic codebooks, both quantizing the latents; upstream ``MimiSplitResidualVectorQuantizer``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    def setup(self):
        config = self.config
        semantic = config.num_semantic_quantizers
        self.semantic_residual_vector_quantizer = FlaxMimiResidualVectorQuantizer(config, semantic, self.dtype)
        self.acoustic_residual_vector_quantizer = FlaxMimiResidualVectorQuantizer(
            config, config.num_quantizers - semantic, self.dtype
        )

    def encode(
        self, latents: Float[Array, "batch frames hidden_size"], num_quantizers: int | None = None
    ) -> Int[Array, "batch num_quantizers frames"]:
        """Codes of all or the first ``num_quantizers`` codebooks, int32.

        Raises:
            ValueError: more than there are, or fewer than the semantic ones.
        """
        most, least = self.config.num_quantizers, self.config.num_semantic_quantizers
        number = most if num_quantizers is None else num_quantizers
        if not least <= number <= most:
            raise ValueError(
                f"`num_quantizers` is {number}, but this Mimi has {most} codebooks, of which the {least} semantic are "
                f"always used: choose from {least} to {most}."
            )
        semantic = self.semantic_residual_vector_quantizer.encode(latents)
        acoustic = self.acoustic_residual_vector_quantizer.encode(latents, number - least)
        return jnp.concatenate([semantic, acoustic], axis=1)

    def decode(self, codes: Int[Array, "batch num_quantizers frames"]) -> Float[Array, "batch frames hidden_size"]:
        """Latents of the codes. Codes outside the codebook are clamped: the models check what is not traced."""
        semantic = self.config.num_semantic_quantizers
        latents = self.semantic_residual_vector_quantizer.decode(codes[:, :semantic])
        return latents + self.acoustic_residual_vector_quantizer.decode(codes[:, semantic:])


def codebooks_for_frames(params: Params, config: MimiConfig, num_quantizers: int) -> dict[tuple[str, str], Params]:
    """The parameters of the first codebooks, by the names of quantizer and layer."""
    semantic = config.num_semantic_quantizers
    numbers = {"semantic": semantic, "acoustic": num_quantizers - semantic}
    return {
        (name, index): params["quantizer"][name]["layers"][index]["codebook"]
        for name, number in ((f"{kind}_residual_vector_quantizer", number) for kind, number in numbers.items())
        for index in map(str, range(number))
    }


def norms_for_frames(
    codebooks: dict[tuple[str, str], Params], dtype: DTypeLike
) -> dict[tuple[str, str], Float[Array, "entries"]]:
    """The norms of all entries, which every frame would compute from the whole tables."""
    wide = at_least_float32(dtype)
    return {place: squared_norms(codebook["embed_sum"].astype(wide)) for place, codebook in codebooks.items()}


def with_norms(
    params: Params, codebooks: dict[tuple[str, str], Params], norms: dict[tuple[str, str], Float[Array, "entries"]]
) -> Params:
    """The parameters with these codebooks alone, and the norms of their entries."""
    quantizer = dict(params["quantizer"])
    for name in {name for name, _ in codebooks}:
        layers = {
            index: {"codebook": {**codebook, "squares": norms[other, index]}}
            for (other, index), codebook in codebooks.items()
            if other == name
        }
        quantizer[name] = {**quantizer[name], "layers": layers}
    return {**params, "quantizer": quantizer}


def parts_of(params: Params, names: tuple[str, ...]) -> Params:
    """These parts of a Mimi, as far as it has them."""
    return {name: params[name] for name in names if name in params}


def prepared_for_frames(params: Params, config: MimiConfig, num_quantizers: int, dtype: DTypeLike) -> Params:
    """The parameters of a Mimi for coding with ``num_quantizers`` codebooks, frame by frame."""
    codebooks = codebooks_for_frames(params, config, num_quantizers)
    return with_norms(params, codebooks, norms_for_frames(codebooks, dtype))


# ------------------------------------------------------------------------------------------------------------ halves


def encoded_length(config: MimiConfig, samples):
    """Frames that ``samples`` samples become (int or integer array): every layer rounds up."""
    return frames_out(samples, samples_per_frame(config))


def _row_lengths(padding_mask: Bool[Array, "batch ..."] | None) -> Lengths:
    """Samples that count in each row of a mask ``(batch, samples)`` or ``(batch, channels, samples)``."""
    if padding_mask is None:
        return None
    mask = padding_mask if padding_mask.ndim == 2 else padding_mask.any(axis=1)
    return mask.sum(axis=-1, dtype=jnp.int32)


def _require_encoder(config: MimiConfig) -> None:
    if config.encoder_config is None:
        raise ValueError("this Mimi has no encoder (`encoder_config=None`): load one that has it to encode audio.")


def _require_decoder(config: MimiConfig) -> None:
    if config.decoder_config is None:
        raise ValueError("this Mimi has no decoder (`decoder_config=None`): load one that has it to decode codes.")


def _all_rows(state: FlaxMimiEncoderState | FlaxMimiDecoderState) -> Bool[Array, "batch"]:
    return jnp.ones((state.batch_size,), dtype=bool)


class _EncoderHalf:
    """SEANet encoder, transformer and downsampling, for the two modules that hold them under the same names."""

    def _setup_encoder(self):
        config, dtype = self.config, self.dtype
        self.encoder = FlaxMimiEncoder(config, dtype)
        self.encoder_transformer = FlaxMimiTransformerModel(config, dtype, self.gradient_checkpointing)
        if resamples(config):
            stride, dim = config.latent_stride, config.hidden_size
            self.downsample = FlaxMimiConv1d(
                config, dim, dim, 2 * stride, stride, pad_mode="replicate", use_bias=False, dtype=dtype
            )

    def _encode_latents(self, input_values, padding_mask, output_attentions, output_hidden_states, deterministic):
        """Latents channels last, and the transformer's output."""
        lengths = _row_lengths(padding_mask)
        x = self.encoder(input_values.swapaxes(1, 2), lengths)
        outputs = self.encoder_transformer(x, output_attentions, output_hidden_states, deterministic)
        x = outputs.last_hidden_state
        if resamples(self.config):
            if lengths is not None:
                lengths = frames_out(lengths, math.prod(self.config.upsampling_ratios))
            x = self.downsample(x, lengths)
        return x, outputs

    def _step_latents(self, state, input_values, active):
        """The next state, and the latents, channels last, of the next frames of a stream."""
        active = _all_rows(state) if active is None else active
        count = seanet_histories(self.config)
        convolved, features = self.convolve_step(state.histories[:count], state.cache.length, input_values, active)
        state, latents = self._transform_step(state.replace(histories=state.histories[count:]), features, active)
        return state.replace(histories=(*convolved, *state.histories)), latents

    def convolve_step(
        self,
        histories: tuple[Array, ...],
        filled: Int[Array, "batch"],
        input_values: Float[Array, "batch channels samples"],
        active: Bool[Array, "batch"],
    ) -> tuple[tuple[Array, ...], Float[Array, "batch steps hidden_size"]]:
        """SEANet's part of a step: what its convolutions remember, and its features of the next frames.

        Args:
            histories: what they remember so far, the first ones of :class:`FlaxMimiEncoderState`.
            filled: of the state's cache; zero where a stream begins.
            input_values: whole frames of audio.
            active: rows that go on.
        """
        remembered = Histories(histories, filled > 0, active)
        # what is not finite would stay in the ring, and no weight is small enough for it
        input_values = jnp.where(active[:, None, None], input_values, 0)
        features = self.encoder(input_values.swapaxes(1, 2), None, remembered)
        return tuple(remembered.after), features

    def _transform_step(self, state, features, active):
        """The rest of a step, for a state without the histories of SEANet."""
        histories = state.histories_of(active)
        cache, x = self.encoder_transformer.step(state.cache, features, active)
        if resamples(self.config):
            x = self.downsample(x, None, histories)
        return state.replace(histories=tuple(histories.after), cache=cache), x


class _DecoderHalf:
    """Upsampling, transformer and SEANet decoder, for the two modules that hold them under the same names."""

    def _setup_decoder(self):
        config, dtype = self.config, self.dtype
        if resamples(config):
            stride, dim = config.latent_stride, config.hidden_size
            self.upsample = FlaxMimiConvTranspose1d(
                config, dim, dim, 2 * stride, stride, config.upsample_groups, use_bias=False, dtype=dtype
            )
        self.decoder_transformer = FlaxMimiTransformerModel(config, dtype, self.gradient_checkpointing)
        self.decoder = FlaxMimiDecoder(config, dtype)

    def _decode_latents(self, x, padding_mask, output_attentions, output_hidden_states, deterministic):
        """Audio from latents that are channels last."""
        lengths = _row_lengths(padding_mask)
        if lengths is not None:
            # A row without padding keeps frames beyond the mask, which says only where to cut the audio.
            padded = lengths < padding_mask.shape[-1]
            lengths = jnp.where(padded, jnp.minimum(encoded_length(self.config, lengths), x.shape[1]), x.shape[1])
        if resamples(self.config):
            x = self.upsample(x, lengths)
            lengths = None if lengths is None else lengths * self.config.latent_stride
        outputs = self.decoder_transformer(x, output_attentions, output_hidden_states, deterministic)
        audio = self.decoder(outputs.last_hidden_state, lengths).swapaxes(1, 2)
        if padding_mask is not None:
            audio = audio[..., : padding_mask.shape[-1]]
        return FlaxMimiDecoderOutput(
            audio_values=audio, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _step_audio(self, state, x, active):
        """The next state, and the audio of the next frames of a stream, whose latents are channels last."""
        active = _all_rows(state) if active is None else active
        histories = state.histories_of(active)
        x = jnp.where(active[:, None, None], x, 0)
        if resamples(self.config):
            x = self.upsample(x, None, histories)
        cache, x = self.decoder_transformer.step(state.cache, x, active)
        audio = self.decoder(x, None, histories).swapaxes(1, 2)
        return state.replace(histories=tuple(histories.after), cache=cache), audio


class FlaxMimiEncoderModule(_EncoderHalf, nn.Module):
    """From audio to latents; upstream ``MimiEncoderModel``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        self._setup_encoder()

    def __call__(
        self,
        input_values: Float[Array, "batch channels samples"],
        padding_mask: Bool[Array, "batch ..."] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> FlaxMimiEncoderModelOutput:
        latents, outputs = self._encode_latents(
            input_values, padding_mask, output_attentions, output_hidden_states, deterministic
        )
        return FlaxMimiEncoderModelOutput(
            latents=latents.swapaxes(1, 2), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def encode_step(
        self,
        state: FlaxMimiEncoderState,
        input_values: Float[Array, "batch channels samples"],
        active: Bool[Array, "batch"] | None = None,
    ) -> tuple[FlaxMimiEncoderState, Float[Array, "batch hidden_size frames"]]:
        """The next state, and the latents of the next whole frames of a stream; see :class:`FlaxMimiModule`."""
        state, latents = self._step_latents(state, input_values, active)
        return state, latents.swapaxes(1, 2)


class FlaxMimiDecoderModule(_DecoderHalf, nn.Module):
    """From latents to audio; upstream ``MimiDecoderModel``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        self._setup_decoder()

    def __call__(
        self,
        latents: Float[Array, "batch hidden_size frames"],
        padding_mask: Bool[Array, "batch ..."] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> FlaxMimiDecoderOutput:
        latents = latents.swapaxes(1, 2)
        return self._decode_latents(latents, padding_mask, output_attentions, output_hidden_states, deterministic)

    def decode_step(
        self,
        state: FlaxMimiDecoderState,
        latents: Float[Array, "batch hidden_size frames"],
        active: Bool[Array, "batch"] | None = None,
    ) -> tuple[FlaxMimiDecoderState, Float[Array, "batch channels samples"]]:
        """The next state, and the audio of the next frames of a stream; see :class:`FlaxMimiModule`."""
        return self._step_audio(state, latents.swapaxes(1, 2), active)


class FlaxMimiModule(_EncoderHalf, _DecoderHalf, nn.Module):
    """The codec, without a half that the configuration drops; upstream ``MimiModel``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    def setup(self):
        if self.config.encoder_config is not None:
            self._setup_encoder()
        if self.config.decoder_config is not None:
            self._setup_decoder()
        self.quantizer = FlaxMimiSplitResidualVectorQuantizer(self.config, self.dtype)

    def encode(
        self,
        input_values: Float[Array, "batch channels samples"],
        padding_mask: Bool[Array, "batch ..."] | None = None,
        num_quantizers: int | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> FlaxMimiEncoderOutput:
        """Codes of audio; ValueError if the configuration drops the encoder."""
        _require_encoder(self.config)
        latents, outputs = self._encode_latents(
            input_values, padding_mask, output_attentions, output_hidden_states, deterministic
        )
        return FlaxMimiEncoderOutput(
            audio_codes=self.quantizer.encode(latents, num_quantizers),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def decode(
        self,
        audio_codes: Int[Array, "batch num_quantizers frames"],
        padding_mask: Bool[Array, "batch ..."] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> FlaxMimiDecoderOutput:
        """Audio of codes; ValueError if the configuration drops the decoder."""
        _require_decoder(self.config)
        latents = self.quantizer.decode(audio_codes).astype(self.dtype)
        return self._decode_latents(latents, padding_mask, output_attentions, output_hidden_states, deterministic)

    def encode_step(
        self,
        state: FlaxMimiEncoderState,
        input_values: Float[Array, "batch channels samples"],
        active: Bool[Array, "batch"] | None = None,
        num_quantizers: int | None = None,
    ) -> tuple[FlaxMimiEncoderState, Int[Array, "batch num_quantizers frames"]]:
        """The next state, and the codes of the next whole frames of a stream.

        Rows that are not ``active`` keep their state (but for the ring's slot that their next step writes), and their
        codes mean nothing.
        """
        _require_encoder(self.config)
        state, latents = self._step_latents(state, input_values, active)
        return state, self.quantizer.encode(latents, num_quantizers)

    def encode_features_step(
        self,
        state: FlaxMimiEncoderState,
        features: Float[Array, "batch steps hidden_size"],
        active: Bool[Array, "batch"],
        num_quantizers: int | None = None,
    ) -> tuple[FlaxMimiEncoderState, Int[Array, "batch num_quantizers frames"]]:
        """What :meth:`encode_step` does after :meth:`convolve_step`, whose histories the states here lack."""
        state, latents = self._transform_step(state, features, active)
        return state, self.quantizer.encode(latents, num_quantizers)

    def decode_step(
        self,
        state: FlaxMimiDecoderState,
        audio_codes: Int[Array, "batch num_quantizers frames"],
        active: Bool[Array, "batch"] | None = None,
    ) -> tuple[FlaxMimiDecoderState, Float[Array, "batch channels samples"]]:
        """The next state, and the audio of the next frames of a stream; ``active`` as for :meth:`encode_step`."""
        _require_decoder(self.config)
        latents = self.quantizer.decode(audio_codes).astype(self.dtype)
        return self._step_audio(state, latents, active)

    def __call__(
        self,
        input_values: Float[Array, "batch channels samples"] | None = None,
        padding_mask: Bool[Array, "batch ..."] | None = None,
        num_quantizers: int | None = None,
        audio_codes: Int[Array, "batch num_quantizers frames"] | None = None,
        deterministic: bool = True,
    ) -> FlaxMimiOutput:
        """Codes of the audio, unless they are given, and the audio of the codes, cut to the length of the input.

        ``init`` takes no input and returns no output: it calls the halves that there are.
        """
        if self.is_initializing():
            self._reach_all_parameters()
            return FlaxMimiOutput()
        if audio_codes is None:
            audio_codes = self.encode(
                input_values, padding_mask, num_quantizers, deterministic=deterministic
            ).audio_codes
        audio_values = self.decode(audio_codes, padding_mask, deterministic=deterministic).audio_values
        if input_values is not None and padding_mask is None:
            audio_values = audio_values[..., : input_values.shape[-1]]
        return FlaxMimiOutput(audio_codes=audio_codes, audio_values=audio_values)

    def _reach_all_parameters(self) -> None:
        config = self.config
        if config.encoder_config is not None:
            self.encode(jnp.zeros((1, config.audio_channels, 1), self.dtype))
        if config.decoder_config is not None:
            self.decode(jnp.zeros((1, config.num_quantizers, 1), jnp.int32))


# ------------------------------------------------------------------------------------------------- the public models


def _checked_audio(config: MimiConfig, input_values: ArrayLike, rows: Any = ...) -> ArrayLike:
    """``rows``: those whose values count."""
    shape = {"batch": None, "channels": config.audio_channels, "samples": None}
    check_audio("input_values", input_values, shape, rows)
    audio = owned(input_values)
    with np.errstate(over="ignore"):  # in rows that do not count
        return audio.astype(jax.dtypes.canonicalize_dtype(audio.dtype), copy=False)


def _checked_codes(config: MimiConfig, audio_codes: ArrayLike, rows: Any = ...) -> jax.Array:
    """``rows``: those whose values count."""
    check_rank("audio_codes", audio_codes, ("batch", "num_quantizers", "frames"))
    batch, number, frames = np.shape(audio_codes)
    least, most = config.num_semantic_quantizers, config.num_quantizers
    if not least <= number <= most:
        raise ValueError(
            f"`audio_codes` has {number} codebooks, but this Mimi decodes {least} to {most}: its shape must be "
            f"(batch, num_quantizers, frames), and is {(batch, number, frames)}."
        )
    if not batch or not frames:
        raise ValueError(f"`audio_codes` is empty, its shape is {(batch, number, frames)}: give at least one frame.")
    looked_at = audio_codes if is_traced(audio_codes, rows) else np.asarray(audio_codes)[rows]
    check_ids("audio_codes", looked_at, config.codebook_size)
    return jnp.asarray(owned(audio_codes), jnp.int32)


def _streams(name: str, asked: bool | None, default: bool, *states: Any) -> bool:
    """Whether a call is part of a stream: it was asked for, or is given what the chunk before returned."""
    if not isinstance(asked, bool | np.bool_ | None):
        raise ValueError(f"`{name}` must be True, False, or None for what the configuration says, but is {asked!r}.")
    given = any(state is not None for state in states)
    if given and asked is not None and not asked:
        raise ValueError(f"`{name}` is False, but the state of a stream is given: leave one of them out.")
    return given or bool(default if asked is None else asked)


def _refuse_in_stream(arguments: dict[str, Any], padding_mask: ArrayLike | None, batch: int, samples: int) -> None:
    """Raises ``ValueError`` for what has no meaning in a stream, or is not kept there."""
    wrong = [name for name, value in arguments.items() if value]
    if _checked_mask(padding_mask, batch, samples) is not None:
        wrong.append("padding_mask")
    if wrong:
        names = ", ".join(f"`{name}`" for name in wrong)
        raise ValueError(f"{names} cannot be combined with a stream: leave it out, or code the whole at once.")


def _check_batch(name: str, array: ArrayLike, state: FlaxMimiEncoderState | FlaxMimiDecoderState) -> None:
    if np.shape(array)[0] != state.batch_size:
        raise ValueError(
            f"`{name}` has {np.shape(array)[0]} rows, but the state has {state.batch_size}: give all of them, and "
            "say in `active` which go on."
        )


def _checked_mask(padding_mask: ArrayLike | None, batch: int, samples: int | None = None) -> jax.Array | None:
    """The mask as booleans; ``samples`` is None where its length need not be that of anything else."""
    if padding_mask is None:
        return None
    mask = padding_mask if is_traced(padding_mask) else np.asarray(padding_mask)
    if mask.ndim not in (2, 3) or mask.shape[0] != batch or samples not in (None, mask.shape[-1]):
        length = "samples" if samples is None else samples
        raise ValueError(
            f"`padding_mask` must have the shape ({batch}, {length}) or ({batch}, channels, {length}), but has the "
            f"shape {mask.shape}."
        )
    if not is_traced(mask):
        if not np.isin(mask, (0, 1)).all():
            raise ValueError("`padding_mask` must hold only 0 (padding) and 1 (audio).")
        if (np.diff(mask.astype(np.int8), axis=-1) > 0).any():
            raise ValueError("`padding_mask` has padding before audio: pad on the right (`padding_side='right'`).")
        if samples is not None and mask.all():
            return None  # nothing to mask: keep the quick path
    return jnp.asarray(mask.astype(bool))


class FlaxMimiPreTrainedModel(FlaxPreTrainedModel):
    """What the Mimi classes share.

    ``base_model_prefix`` is ``"mimi"`` for the halves too: upstream's ``"encoder"`` would name SEANet in the files.
    """

    config_class = MimiConfig
    base_model_prefix = "mimi"
    main_input_name = "input_values"
    checkpoint_rules = MIMI_RULES
    checkpoint_prefixes = ("", "audio_encoder.")
    default_input_shape = (1, 1, 1)

    def _run(
        self,
        method: str,
        inputs: dict[str, ArrayLike | None],
        params: Params | None,
        return_dict: bool | None,
        train: bool,
        dropout_rng: jax.Array | None,
        **options: Any,
    ):
        """Call a method of the module, compiled once per shapes and options: hundreds of operations, each compiled
        for itself, would take many times as long."""
        if train and self.config.attention_dropout and dropout_rng is None:
            raise ValueError("`train=True` with `attention_dropout` needs `dropout_rng`: pass a PRNG key.")
        programs = self._compiled()
        key = (method, train, *sorted(options.items()))
        if key not in programs:
            module = self.module

            def program(params, rngs, inputs):
                return module.apply(
                    {"params": params}, **inputs, **options, deterministic=not train, rngs=rngs, method=method
                )

            programs[key] = jax.jit(program)
        rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
        outputs = programs[key](self.params if params is None else params, rngs, inputs)
        return self._returned(outputs, return_dict)

    def _compiled(self) -> dict[Any, Any]:
        """The programs of the present module, which is rebuilt when gradient checkpointing is switched."""
        if getattr(self, "_programs_of", None) is not self.module:
            self._programs_of, self._programs = self.module, {}
        return self._programs

    def _returned(self, outputs: FlaxModelOutput, return_dict: bool | None) -> FlaxModelOutput | tuple:
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if return_dict else outputs.to_tuple()

    def _step(
        self,
        method: str,
        state: Any,
        inputs: ArrayLike,
        active: ArrayLike | None = None,
        params: Params | None = None,
        donated: bool = True,
        **options: Any,
    ) -> tuple[Any, jax.Array]:
        """The next state and output of a stream, compiled once per shapes and options.

        ``state``, ``inputs`` and ``active`` have been checked. ``donated`` lets the result take the state's memory.
        """
        programs = self._compiled()
        key = (method, donated, *sorted(options.items()))
        if key not in programs:
            module = self.module

            def program(params, state, inputs, active):
                return module.apply({"params": params}, state, inputs, active, **options, method=method)

            program.__name__ = method
            programs[key] = Program(program, (1,) if donated else ())
        active = np.ones(inputs.shape[0], dtype=bool) if active is None else active
        params = self.params if params is None else params
        if "num_quantizers" in options:
            params = self._with_norms(params, options["num_quantizers"])
        # of the other half, every call would look at every parameter
        params = parts_of(params, HALVES[method])
        return programs[key](params, state, inputs, active)

    def _with_norms(self, params: Params, num_quantizers: int | None) -> Params:
        """``params`` with the norms of the codebooks' entries, which are kept until there are other tables."""
        number = self.config.num_quantizers if num_quantizers is None else num_quantizers
        if number not in range(self.config.num_semantic_quantizers, self.config.num_quantizers + 1):
            return params  # the program says what is wrong
        codebooks = codebooks_for_frames(params, self.config, number)
        tables = {place: codebook["embed_sum"] for place, codebook in codebooks.items()}
        # of arrays that may change, nothing can be kept
        known = all(isinstance(table, jax.Array) and not is_traced(table) for table in tables.values())
        if not known or any("squares" in codebook for codebook in codebooks.values()):
            return params
        before, norms = getattr(self, "_norms", ({}, {}))
        if before.keys() != tables.keys() or any(before[place] is not table for place, table in tables.items()):
            norms = norms_for_frames(codebooks, self.dtype)
            if is_traced(*norms.values()):  # inside of jax.jit everything new is
                return params
            self._norms = tables, norms
        return with_norms(params, codebooks, norms)

    def _checked_state(self, name: str, state: Any, state_class: type) -> Any:
        if not isinstance(state, state_class):
            raise ValueError(f"`{name}` must be a {state_class.__name__}, but is a {type(state).__name__}.")
        programs, batch_size = self._compiled(), state.batch_size
        key = (state_class, batch_size)
        if key not in programs:
            programs[key] = jax.eval_shape(lambda: state_class.create(self.config, batch_size, self.dtype))
        check_state(name, state, programs[key])
        return state

    def _checked_chunk(self, state: Any, audio: ArrayLike, rows: Any = ...) -> ArrayLike:
        """Audio for a step from ``state``: whole frames, as many rows."""
        check_rank("input_values", audio, ("batch", "channels", "samples"))
        _check_batch("input_values", audio, state)
        audio = _checked_audio(self.config, audio, rows)
        kept = self._compiled()
        if samples_per_frame not in kept:  # reading a configuration takes longer than the other checks
            kept[samples_per_frame] = samples_per_frame(self.config)
        size = kept[samples_per_frame]
        if audio.shape[-1] % size:
            raise ValueError(
                f"`input_values` has {audio.shape[-1]} samples, but a stream is coded in whole frames of {size}: keep "
                "the rest for the next call."
            )
        return audio

    def _encode_chunk(
        self,
        input_values: ArrayLike,
        padding_mask: ArrayLike | None,
        past: tuple[str, Any],
        padding_cache: tuple[jax.Array, ...] | None,
        params: Params | None,
        refused: dict[str, Any],
        **options: Any,
    ) -> tuple[FlaxMimiEncoderState, jax.Array]:
        """A step with upstream's arguments; ``past`` is the name of the one for the transformer, and its value."""
        name, cache = past
        check_rank("input_values", input_values, ("batch", "channels", "samples"))
        batch, _, samples = np.shape(input_values)
        _refuse_in_stream(refused, padding_mask, batch, samples)
        if (cache is None) != (padding_cache is None):
            given, lacking = (name, "padding_cache") if padding_cache is None else ("padding_cache", name)
            raise ValueError(
                f"`{given}` is given without `{lacking}`: pass on both, as the chunk before returned them."
            )
        if cache is None:
            state = FlaxMimiEncoderState.create(self.config, batch, self.dtype)
        else:
            for argument, value, kind in ((name, cache, RingCache), ("padding_cache", padding_cache, tuple)):
                if not isinstance(value, kind):
                    raise ValueError(
                        f"`{argument}` must be a {kind.__name__}, but is of the type {type(value).__name__}: "
                        "pass on what the chunk before returned under this name."
                    )
            state = FlaxMimiEncoderState(histories=padding_cache, cache=cache)
            state = self._checked_state(f"{name}` and `padding_cache", state, FlaxMimiEncoderState)
        audio = self._checked_chunk(state, input_values)
        return self._step("encode_step", state, audio, params=params, donated=False, **options)

    def _decode_chunk(
        self,
        inputs: jax.Array,
        padding_mask: ArrayLike | None,
        past: tuple[str, Any],
        params: Params | None,
        return_dict: bool | None,
        refused: dict[str, Any],
    ) -> FlaxMimiDecoderOutput | tuple:
        """As :meth:`_encode_chunk`, of checked codes or latents."""
        name, state = past
        batch, _, frames = inputs.shape
        _refuse_in_stream(refused, padding_mask, batch, frames * samples_per_frame(self.config))
        if state is None:
            state = FlaxMimiDecoderState.create(self.config, batch, self.dtype)
        else:
            state = self._checked_state(name, state, FlaxMimiDecoderState)
        _check_batch("audio_codes" if name.startswith("decoder") else "latents", inputs, state)
        state, audio = self._step("decode_step", state, inputs, params=params, donated=False)
        outputs = FlaxMimiDecoderOutput(audio_values=audio, decoder_cache=state)
        return self._returned(outputs, return_dict)

    def _flags(self, output_attentions: bool | None, output_hidden_states: bool | None) -> dict[str, bool]:
        config = self.config
        return {
            "output_attentions": config.output_attentions if output_attentions is None else output_attentions,
            "output_hidden_states": (
                config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
        }

    def get_encoded_length(self, input_length):
        """Frames of the codes of ``input_length`` samples (an int or an integer array, of any shape)."""
        return encoded_length(self.config, input_length)

    def get_audio_codes_mask(
        self, padding_mask: ArrayLike, padding_side: str = "right"
    ) -> Bool[Array, "batch frames"]:
        """Which frames of the codes count, from the mask of the samples. Not traceable: the shape depends on values.

        Args:
            padding_mask: ``(batch, samples)``, 1 for audio.
            padding_side: ``"right"``, or ``"left"`` if the frames are to be aligned at the end.

        Returns:
            As many frames as the longest row has.

        Raises:
            ValueError: another rank or side.
        """
        check_rank("padding_mask", padding_mask, ("batch", "samples"))
        if padding_side not in ("left", "right"):
            raise ValueError(f"`padding_side` is {padding_side!r}, but must be 'left' or 'right'.")
        lengths = encoded_length(self.config, np.asarray(padding_mask).astype(np.int64).sum(axis=-1))
        mask = np.arange(lengths.max()) < lengths[:, None]
        return jnp.asarray(mask if padding_side == "right" else mask[:, ::-1])


class FlaxMimiEncoderModel(FlaxMimiPreTrainedModel):
    """The encoder half: SEANet encoder, transformer, downsampling; upstream ``MimiEncoderModel``."""

    config_class = MimiEncoderConfig
    module_class = FlaxMimiEncoderModule

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        return {"input_values": jnp.zeros((input_shape[0], self.config.audio_channels, input_shape[-1]))}

    @accept_former_names
    def __call__(
        self,
        input_values: ArrayLike,
        padding_mask: ArrayLike | None = None,
        cache: RingCache | None = None,
        padding_cache: tuple[jax.Array, ...] | None = None,
        use_streaming: bool | None = None,
        *,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxMimiEncoderModelOutput | tuple:
        """Latents of audio.

        Args:
            input_values: ``(batch, channels, samples)``, floating, in [-1, 1].
            padding_mask: ``(batch, samples)`` or ``(batch, channels, samples)``, 1 for audio and 0 for padding, which
                must be on the right. The latents of a row's own frames are those of the row alone; frames after its
                end are returned too and mean nothing (:meth:`get_audio_codes_mask` tells which count).
            cache, padding_cache: as the chunk before returned them, for the next chunk of a stream. Both or none. The
                former name of ``cache`` is ``past_key_values``.
            use_streaming: True for the first chunk of a stream, which then is in whole frames; the configuration's if
                None.

        Raises:
            ValueError: wrong rank or channels; empty, integer or non-finite audio; a mask of another shape or with
                padding on the left. Values are not checked where they are traced. In a stream: no whole frames, a
                configuration that cannot be streamed, caches of another model or batch size, and arguments that have
                no meaning there.
        """
        if _streams("use_streaming", use_streaming, self.config.use_streaming, cache, padding_cache):
            refused = {"train": train, **self._flags(output_attentions, output_hidden_states)}
            past = ("cache", cache)
            state, latents = self._encode_chunk(input_values, padding_mask, past, padding_cache, params, refused)
            outputs = FlaxMimiEncoderModelOutput(latents=latents, cache=state.cache, padding_cache=state.histories)
            return self._returned(outputs, return_dict)
        audio = _checked_audio(self.config, input_values)
        mask = _checked_mask(padding_mask, audio.shape[0], audio.shape[-1])
        flags = self._flags(output_attentions, output_hidden_states)
        inputs = {"input_values": audio, "padding_mask": mask}
        return self._run("__call__", inputs, params, return_dict, train, dropout_rng, **flags)


class FlaxMimiDecoderModel(FlaxMimiPreTrainedModel):
    """The decoder half: upsampling, transformer, SEANet decoder; upstream ``MimiDecoderModel``."""

    config_class = MimiDecoderConfig
    main_input_name = "latents"
    module_class = FlaxMimiDecoderModule

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        return {"latents": jnp.zeros((input_shape[0], self.config.hidden_size, input_shape[-1]))}

    @accept_former_names
    def __call__(
        self,
        latents: ArrayLike,
        padding_mask: ArrayLike | None = None,
        cache: Any = None,
        *,
        use_cache: bool | None = None,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxMimiDecoderOutput | tuple:
        """Audio of latents.

        Args:
            latents: ``(batch, hidden_size, frames)``.
            padding_mask: as in :meth:`FlaxMimiModel.decode`.
            cache, use_cache: as ``decoder_cache`` and ``use_cache`` there. The former name of ``cache`` is
                ``past_key_values``.

        Raises:
            ValueError: wrong rank or size; no frames; a mask of another batch size or with padding on the left; in a
                stream, as for :meth:`FlaxMimiModel.decode`.
        """
        check_rank("latents", latents, ("batch", "hidden_size", "frames"))
        latents = jnp.asarray(latents)
        if latents.shape[1] != self.config.hidden_size or 0 in latents.shape:
            raise ValueError(
                f"`latents` must have the shape (batch, {self.config.hidden_size}, frames) with at least one frame, "
                f"but has the shape {latents.shape}."
            )
        flags = self._flags(output_attentions, output_hidden_states)
        if _streams("use_cache", use_cache, self.config.use_cache, cache):
            past, refused = ("cache", cache), {"train": train, **flags}
            return self._decode_chunk(latents, padding_mask, past, params, return_dict, refused)
        inputs = {"latents": latents, "padding_mask": _checked_mask(padding_mask, latents.shape[0])}
        return self._run("__call__", inputs, params, return_dict, train, dropout_rng, **flags)


class FlaxMimiModel(FlaxMimiPreTrainedModel):
    """The codec; upstream ``MimiModel``. ``encoder_config=None`` or ``decoder_config=None`` drops a half."""

    module_class = FlaxMimiModule

    def dummy_inputs(self, input_shape: tuple[int, ...]) -> dict[str, Any]:
        return {}

    @accept_former_names
    def encode(
        self,
        input_values: ArrayLike,
        padding_mask: ArrayLike | None = None,
        num_quantizers: int | None = None,
        encoder_cache: RingCache | None = None,
        padding_cache: tuple[jax.Array, ...] | None = None,
        use_streaming: bool | None = None,
        *,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxMimiEncoderOutput | tuple:
        """Codes of audio, ``(batch, num_quantizers, frames)`` int32; arguments and errors as in
        :class:`FlaxMimiEncoderModel`.

        Args:
            num_quantizers: how many codebooks, the semantic ones first; all if None.
            encoder_cache, padding_cache, use_streaming: for a stream, as there. :meth:`encode_step` does the same in
                place. The former name of ``encoder_cache`` is ``encoder_past_key_values``.

        Raises:
            ValueError: also ``num_quantizers`` that do not exist, or no encoder.
        """
        given = (encoder_cache, padding_cache)
        if _streams("use_streaming", use_streaming, self.config.use_streaming, *given):
            _require_encoder(self.config)
            past = ("encoder_cache", encoder_cache)
            refused = {"train": train, **self._flags(output_attentions, output_hidden_states)}
            state, codes = self._encode_chunk(
                input_values, padding_mask, past, padding_cache, params, refused, num_quantizers=num_quantizers
            )
            outputs = FlaxMimiEncoderOutput(
                audio_codes=codes, encoder_cache=state.cache, padding_cache=state.histories
            )
            return self._returned(outputs, return_dict)
        audio = _checked_audio(self.config, input_values)
        mask = _checked_mask(padding_mask, audio.shape[0], audio.shape[-1])
        inputs = {"input_values": audio, "padding_mask": mask}
        flags = self._flags(output_attentions, output_hidden_states)
        return self._run(
            "encode", inputs, params, return_dict, train, dropout_rng, num_quantizers=num_quantizers, **flags
        )

    @accept_former_names
    def decode(
        self,
        audio_codes: ArrayLike,
        padding_mask: ArrayLike | None = None,
        decoder_cache: Any = None,
        *,
        use_cache: bool | None = None,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> FlaxMimiDecoderOutput | tuple:
        """Audio of codes, ``(batch, channels, samples)``.

        Args:
            audio_codes: ``(batch, num_quantizers, frames)`` in ``[0, codebook_size)``; fewer codebooks than there are
                give a coarser sound.
            padding_mask: of the samples, as for :meth:`encode`. The audio is cut to its length, and the samples of a
                padded row are those of the row alone.
            decoder_cache: as the chunk before returned them, for the next chunk of a stream: all of the state, that
                of the convolutions too. :meth:`decode_step` does the same in place. Its former name is
                ``decoder_past_key_values``.
            use_cache: True for the first chunk of a stream; the configuration's if None.

        Raises:
            ValueError: wrong rank or number of codebooks, no frames, codes outside the codebook (traced ones are
                clamped, and ``checkify`` reports them), a bad mask, or no decoder. In a stream: a configuration that
                cannot be streamed, a state of another model or batch size, and arguments that have no meaning there.
        """
        codes = _checked_codes(self.config, audio_codes)
        flags = self._flags(output_attentions, output_hidden_states)
        if _streams("use_cache", use_cache, self.config.use_cache, decoder_cache):
            _require_decoder(self.config)
            past, refused = ("decoder_cache", decoder_cache), {"train": train, **flags}
            return self._decode_chunk(codes, padding_mask, past, params, return_dict, refused)
        inputs = {"audio_codes": codes, "padding_mask": _checked_mask(padding_mask, codes.shape[0])}
        return self._run("decode", inputs, params, return_dict, train, dropout_rng, **flags)

    def init_encoder_state(self, batch_size: int) -> FlaxMimiEncoderState:
        """What :meth:`encode_step` begins with: ``batch_size`` rows that have heard nothing.

        Raises:
            ValueError: no encoder, no rows, or a configuration that cannot be streamed
                (:meth:`FlaxMimiEncoderState.create`).
        """
        _require_encoder(self.config)
        return FlaxMimiEncoderState.create(self.config, batch_size, self.dtype)

    def init_decoder_state(self, batch_size: int) -> FlaxMimiDecoderState:
        """What :meth:`decode_step` begins with; see :meth:`init_encoder_state`."""
        _require_decoder(self.config)
        return FlaxMimiDecoderState.create(self.config, batch_size, self.dtype)

    def encode_step(
        self,
        state: Any,
        audio: ArrayLike,
        active: ArrayLike | None = None,
        num_quantizers: int | None = None,
        params: Params | None = None,
    ) -> tuple[FlaxMimiEncoderState, Int[Array, "batch num_quantizers frames"]]:
        """The codes of the next frames of every row: those that :meth:`encode` gives for the whole.

        One program per shapes, updating the state in place: ``state`` is consumed, and may not be used again. Errors
        come before that.

        Args:
            state: a :class:`FlaxMimiEncoderState` from :meth:`init_encoder_state`, or from the step before.
            audio: ``(batch, channels, samples)``, floating, in [-1, 1]; one or more whole frames
                (``samples_per_frame(config)`` samples).
            active: ``(batch,)`` bool, rows that go on; all if None. The others keep their state, whatever their audio,
                and their codes mean nothing.
            num_quantizers: how many codebooks, the semantic ones first; all if None.

        Returns:
            The next state, and the codes, int32.

        Raises:
            ValueError: no whole frames; wrong rank, rows or channels; integer or non-finite audio in an active row;
                ``active`` of another shape or dtype; a state of another configuration or batch size, or one that was
                consumed; ``num_quantizers`` that do not exist. Traced values are not checked.
        """
        state = self._checked_state("state", state, FlaxMimiEncoderState)
        active = None if active is None else check_rows("active", active, state.batch_size)
        audio = self._checked_chunk(state, audio, ... if active is None else active)
        return self._step("encode_step", state, audio, active, params, num_quantizers=num_quantizers)

    def decode_step(
        self,
        state: Any,
        codes: ArrayLike,
        active: ArrayLike | None = None,
        params: Params | None = None,
    ) -> tuple[FlaxMimiDecoderState, Float[Array, "batch channels samples"]]:
        """The audio of the next frames of every row: that of :meth:`decode` for the whole.

        Args:
            state: a :class:`FlaxMimiDecoderState` from :meth:`init_decoder_state`, or from the step before; consumed
                as by :meth:`encode_step`.
            codes: ``(batch, num_quantizers, frames)`` in ``[0, codebook_size)``, one or more frames.
            active: as for :meth:`encode_step`.

        Returns:
            The next state, and the audio.

        Raises:
            ValueError: wrong rank, rows or number of codebooks; no frames; codes of an active row outside the
                codebook; the rest as for :meth:`encode_step`.
        """
        state = self._checked_state("state", state, FlaxMimiDecoderState)
        active = None if active is None else check_rows("active", active, state.batch_size)
        check_rank("audio_codes", codes, ("batch", "num_quantizers", "frames"))
        _check_batch("audio_codes", codes, state)
        codes = _checked_codes(self.config, codes, ... if active is None else active)
        return self._step("decode_step", state, codes, active, params)

    def __call__(
        self,
        input_values: ArrayLike | None = None,
        padding_mask: ArrayLike | None = None,
        num_quantizers: int | None = None,
        audio_codes: ArrayLike | None = None,
        *,
        params: Params | None = None,
        dropout_rng: jax.Array | None = None,
        train: bool = False,
        return_dict: bool | None = None,
    ) -> FlaxMimiOutput | tuple:
        """Audio to codes to audio, cut to the length of the input.

        Args:
            input_values, padding_mask, num_quantizers: as for :meth:`encode`. With ``audio_codes``, the input is not
                encoded and may be left out.
            audio_codes: codes to decode, as for :meth:`decode`.

        Raises:
            ValueError: as for :meth:`encode` and :meth:`decode`; neither audio nor codes; ``num_quantizers`` together
                with ``audio_codes``, where it has no effect.
        """
        if input_values is None and audio_codes is None:
            raise ValueError("`input_values` and `audio_codes` are both None: give one of them.")
        if num_quantizers is not None and audio_codes is not None:
            raise ValueError(f"`num_quantizers` is {num_quantizers}, but `audio_codes` are given: leave one out.")
        codes = None if audio_codes is None else _checked_codes(self.config, audio_codes)
        audio = None if input_values is None else _checked_audio(self.config, input_values)
        batch = codes.shape[0] if audio is None else audio.shape[0]
        mask = _checked_mask(padding_mask, batch, None if audio is None else audio.shape[-1])
        inputs = {"input_values": audio, "padding_mask": mask, "audio_codes": codes}
        return self._run("__call__", inputs, params, return_dict, train, dropout_rng, num_quantizers=num_quantizers)
