"""The layers of Mimi's two halves: convolutions, SEANet, the transformer.

Names, argument order and parameter paths follow ``transformers.models.mimi.modeling_mimi``, the paths as in its files.
Inside, arrays are channels last.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int
from transformers import MimiConfig

from ...modeling_flax_outputs import FlaxModelOutput
from ...nn.activations import ACT2FN
from ...nn.attention import attend
from ...nn.cache import Cache, LayerCache, NoCache, RingCache, Steps
from ...nn.convolution import kernel_and_bias
from ...nn.initializers import normal
from ...nn.linear import dense
from ...nn.norm import layer_norm
from ...ops.convolution import PAD_MODES, conv1d, conv_transpose1d, conv_transpose1d_inside, pad_time
from ...ops.rotary import apply_rotary_pos_emb, rotary_embedding
from .topology import (
    ELU,
    ConvTranspose,
    Layer,
    Residual,
    numbered,
    padding_total,
    seanet_decoder,
    seanet_encoder,
    steps_per_frame,
)

Lengths = Int[Array, "batch"] | None


# ------------------------------------------------------------------------------------------------------ convolutions


class History(NamedTuple):
    """What a convolution remembers of a stream when a chunk comes.

    Attributes:
        inputs: the last ones before the chunk, those of a row that had none being zero.
        begun: rows that had inputs. What comes before the first one of the others is padding.
        active: rows that go on; the others keep what they remember.
    """

    inputs: Float[Array, "batch before channels"]
    begun: Bool[Array, "batch 1 1"]
    active: Bool[Array, "batch 1 1"]

    def followed_by(
        self, x: Float[Array, "batch length channels"], mode: str = "constant"
    ) -> tuple[Float[Array, "batch before+length channels"], History]:
        """The inputs with the chunk ``x`` after them, and what to remember when the next one comes."""
        start = jnp.where(self.begun, self.inputs, x[:, :1]) if mode == "replicate" else self.inputs
        x = jnp.concatenate([start, x], axis=1)
        last = x[:, -self.inputs.shape[1] :]
        return x, self._replace(inputs=jnp.where(self.active, last, self.inputs))


# by the names of layers: a convolution's, None if it remembers nothing, or those of the layers in a block
Histories: TypeAlias = dict[str, Any]


class FlaxMimiKernel(nn.Module):
    """Kernel and bias of a convolution; the attributes are those of :func:`~.nn.convolution.kernel_and_bias`."""

    shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None = None
    fan_in: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
        return kernel_and_bias(self, self.shape, self.bias_shape, self.fan_in, self.dtype)


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
        x: Float[Array, "batch length in_channels"],
        lengths: Lengths = None,
        history: History | None = None,
    ) -> tuple[Float[Array, "batch length_out out_channels"], History | None]:
        mode = self.config.pad_mode if self.pad_mode is None else self.pad_mode
        if mode not in PAD_MODES:
            raise ValueError(f"`pad_mode` is {mode!r}, but must be one of {', '.join(PAD_MODES)}.")
        total = padding_total(self.kernel_size, self.stride, self.dilation)
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
        if history is not None:
            x, history = history.followed_by(x, mode)
        elif self.kernel_size > 1:
            right = 0 if self.config.use_causal_conv else total // 2
            x = pad_time(x, total - right, right, self.stride, mode, lengths)
        x = conv1d(x, kernel, self.stride, self.dilation, self.groups)
        return (x if bias is None else x + bias[None, None]), history


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
        x: Float[Array, "batch length in_channels"],
        lengths: Lengths = None,
        history: History | None = None,
    ) -> tuple[Float[Array, "batch length*{self.stride} out_channels"], History | None]:
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
        total = padding_total(self.kernel_size, self.stride)
        right = math.ceil(total * ratio) if causal else total // 2
        left = total - right
        length = x.shape[1]
        x = x.astype(self.dtype)
        if lengths is not None:
            # the padding of a row must not reach back into it
            x = jnp.where(jnp.arange(length)[None, :, None] < lengths[:, None, None], x, 0)
        if history is None:
            x = conv_transpose1d(x, kernel, self.stride, self.groups)[:, left : left + length * self.stride]
        else:
            x, history = history.followed_by(x)
            x = conv_transpose1d_inside(x, kernel, self.stride, self.groups)
        return (x if bias is None else x + bias[None, None]), history


# ------------------------------------------------------------------------------------------------------------ SEANet


class FlaxMimiResnetBlock(nn.Module):
    """Residual block of SEANet; upstream ``MimiResnetBlock``."""

    config: MimiConfig
    block: Residual
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        lengths: Lengths = None,
        histories: Histories | None = None,
    ) -> tuple[Float[Array, "batch length dim"], Histories]:
        residual = x
        if self.block.shortcut is not None:
            shortcut = FlaxMimiConv1d(self.config, *self.block.shortcut, dtype=self.dtype, name="shortcut")
            residual, _ = shortcut(x, lengths)
        branch = FlaxMimiLayers(self.config, self.block.branch, self.dtype, name="block")
        x, histories = branch(x, lengths, histories)
        return residual + x, histories


class FlaxMimiLayers(nn.Module):
    """Layers of SEANet one after another, under their numbers.

    In a stream, each is handed its history by its name, and returns what to remember; ``histories=None`` is the whole
    at once.
    """

    config: MimiConfig
    topology: tuple[Layer, ...]
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length in_channels"],
        lengths: Lengths = None,
        histories: Histories | None = None,
    ) -> tuple[Float[Array, "batch length_out out_channels"], Histories]:
        after: Histories = {}
        for name, layer in numbered(self.topology):
            if layer == ELU:
                x = nn.elu(x)
                continue
            before = None if histories is None else histories[name]
            if isinstance(layer, Residual):
                block = FlaxMimiResnetBlock(self.config, layer, self.dtype, name=name)
                x, after[name] = block(x, lengths, before)
                continue
            conv_class: Any = FlaxMimiConvTranspose1d if isinstance(layer, ConvTranspose) else FlaxMimiConv1d
            conv = conv_class(self.config, *layer, self.dtype, name=name)
            x, after[name] = conv(x, lengths, before)
            lengths = None if lengths is None else layer.length_out(lengths)
        return x, after


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
    ) -> tuple[Float[Array, "batch steps hidden_size"], Histories]:
        layers = FlaxMimiLayers(self.config, seanet_encoder(self.config), self.dtype, name="layers")
        return layers(x, lengths, histories)


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
    ) -> tuple[Float[Array, "batch samples channels"], Histories]:
        layers = FlaxMimiLayers(self.config, seanet_decoder(self.config), self.dtype, name="layers")
        return layers(x, lengths, histories)


# ------------------------------------------------------------------------------------------------------- transformer


class FlaxMimiLayerScale(nn.Module):
    """Learnt scale of a residual branch, small at first (Touvron et al., 2021); upstream ``MimiLayerScale``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        initial = nn.initializers.constant(self.config.layer_scale_initial_scale)
        scale = self.param("scale", initial, (self.config.hidden_size,), jnp.float32)
        return jnp.expand_dims(scale.astype(self.dtype), tuple(range(x.ndim - 1))) * x


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
        normed = layer_norm(config.norm_eps, dtype, "input_layernorm")(x)
        mixed, weights, layer_cache = FlaxMimiAttention(config, dtype, name="self_attn")(
            normed, cos, sin, mask, layer_cache, cache_index, deterministic, output_attentions
        )
        x = x + FlaxMimiLayerScale(config, dtype, name="self_attn_layer_scale")(mixed)
        normed = layer_norm(config.norm_eps, dtype, "post_attention_layernorm")(x)
        hidden = FlaxMimiMLP(config, dtype, name="mlp")(normed)
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


@dataclasses.dataclass
class FlaxMimiTransformerOutput(FlaxModelOutput):
    """Output of the transformer, all ``(batch, steps, hidden_size)`` but ``attentions``; see
    :class:`FlaxMimiEncoderModelOutput`."""

    last_hidden_state: jax.Array | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


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
