"""The layers of Mimi's two halves: convolutions, SEANet, the transformer.

Names, argument order and parameter paths follow ``transformers.models.mimi.modeling_mimi``, the paths as in its files.
Inside, arrays are channels last.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int
from transformers import MimiConfig

from ...modeling_flax_outputs import FlaxModelOutput
from ...precision import at_least_float32
from ..activations import ACT2FN
from ..dots import batched_row_dot, row_dot_general
from ..initializers import kaiming_normal, normal, uniform
from ..ring_cache import RingCache, write_steps
from ..rotary import apply_rotary_pos_emb, rotary_embedding
from .convolutions import PAD_MODES, conv1d, conv_transpose1d, conv_transpose1d_inside, pad_frames
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
# keys and values of one layer, (batch * kv_heads, slots, head_dim), and the slot of the next step, (batch,)
Ring = tuple[Array, Array, Array]


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
    def __call__(self) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
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
            x = pad_frames(x, total - right, right, self.stride, mode, lengths)
        x = conv1d(x, kernel, self.stride, self.dilation, self.groups)
        return (x if bias is None else x + bias), history


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
            x = jnp.where(jnp.arange(length)[:, None] < lengths[:, None, None], x, 0)
        if history is None:
            x = conv_transpose1d(x, kernel, self.stride, self.groups)[:, left : left + length * self.stride]
        else:
            x, history = history.followed_by(x)
            x = conv_transpose1d_inside(x, kernel, self.stride, self.groups)
        return (x if bias is None else x + bias), history


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
            conv_class = FlaxMimiConvTranspose1d if isinstance(layer, ConvTranspose) else FlaxMimiConv1d
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
        return scale.astype(self.dtype) * x


def sliding_window_mask(steps: int, window: int) -> Bool[Array, "steps steps"]:
    """True where a query (row) sees a key (column): itself and the ``window - 1`` before it."""
    behind = jnp.arange(steps)[:, None] - jnp.arange(steps)
    return (behind >= 0) & (behind < window)


def dense(features: int, use_bias: bool, kernel_init: Any, dtype: DTypeLike, name: str) -> nn.Dense:
    """A linear layer that is quick for the few steps of a frame."""
    return nn.Dense(features, use_bias, dtype, kernel_init=kernel_init, dot_general=row_dot_general, name=name)


class FlaxMimiMLP(nn.Module):
    """Two layers without bias; upstream ``MimiMLP``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
        initializer = normal(self.config.initializer_range)
        x = dense(self.config.intermediate_size, False, initializer, self.dtype, "fc1")(x)
        x = ACT2FN[self.config.hidden_act](x)
        return dense(self.config.hidden_size, False, initializer, self.dtype, "fc2")(x)


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
        cos: Float[Array, "... steps 1 head_dim"],
        sin: Float[Array, "... steps 1 head_dim"],
        mask: Bool[Array, "... steps keys"],
        deterministic: bool = True,
        ring: Ring | None = None,
    ) -> tuple[Float[Array, "batch steps hidden_size"], Float[Array, "batch heads steps keys"], Ring | None]:
        config = self.config
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if config.hidden_size % heads:
            raise ValueError(
                f"`hidden_size` {config.hidden_size} must be a multiple of `num_attention_heads` {heads}."
            )
        if heads % kv_heads:
            raise ValueError(f"`num_attention_heads` {heads} must be a multiple of `num_key_value_heads` {kv_heads}.")

        def project(name: str, features: int):
            return dense(features, config.attention_bias, normal(config.initializer_range), self.dtype, name)

        batch, steps, _ = x.shape
        query = project("q_proj", heads * head_dim)(x).reshape(batch, steps, heads, head_dim)
        key = project("k_proj", kv_heads * head_dim)(x).reshape(batch, steps, kv_heads, head_dim)
        value = project("v_proj", kv_heads * head_dim)(x).reshape(batch, steps, kv_heads, head_dim)
        query, key = apply_rotary_pos_emb(query, cos, sin), apply_rotary_pos_emb(key, cos, sin)
        if ring is not None:
            mixed, weights, ring = self._attend_ring(query, key, value, mask, ring)
            return project("o_proj", config.hidden_size)(mixed), weights, ring

        # [batch, kv_heads, heads of the group, queries, keys]
        query = query.reshape(batch, steps, kv_heads, heads // kv_heads, head_dim)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", query, key) * (1 / math.sqrt(head_dim))
        scores = jnp.where(mask, scores.astype(at_least_float32(self.dtype)), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = nn.Dropout(float(config.attention_dropout))(weights, deterministic=deterministic)
        mixed = jnp.einsum("bhgqk,bkhd->bqhgd", weights, value).reshape(batch, steps, heads * head_dim)
        return project("o_proj", config.hidden_size)(mixed), weights.reshape(batch, heads, steps, steps), None

    def _attend_ring(self, query, key, value, mask, ring):
        """Writes the new keys and values into the ring, and attends over it, with one batch axis: otherwise XLA's CPU
        backend copies the whole ring."""
        config = self.config
        keys, values, slot = ring
        batch, steps, heads, head_dim = query.shape
        kv_heads = config.num_key_value_heads

        def by_head(array: Array) -> Array:
            # [batch * kv_heads, heads of the group * steps, head_dim]
            return array.transpose(0, 2, 1, 3).reshape(batch * kv_heads, -1, head_dim)

        keys, values = write_steps(keys, by_head(key), slot), write_steps(values, by_head(value), slot)
        scores = batched_row_dot(by_head(query), keys.swapaxes(1, 2)) * (1 / math.sqrt(head_dim))
        scores = scores.reshape(batch, heads, steps, -1)
        scores = jnp.where(mask[:, None], scores.astype(at_least_float32(self.dtype)), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        mixed = batched_row_dot(weights.reshape(batch * kv_heads, -1, weights.shape[-1]), values)
        mixed = mixed.reshape(batch, heads, steps, head_dim).transpose(0, 2, 1, 3)
        return mixed.reshape(batch, steps, heads * head_dim), weights, (keys, values, slot)


class FlaxMimiTransformerLayer(nn.Module):
    """Attention and MLP with pre-norm and layer scale; upstream ``MimiTransformerLayer``."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch steps hidden_size"],
        cos: Float[Array, "... steps 1 head_dim"],
        sin: Float[Array, "... steps 1 head_dim"],
        mask: Bool[Array, "... steps keys"],
        deterministic: bool = True,
        ring: Ring | None = None,
    ) -> tuple[Float[Array, "batch steps hidden_size"], Float[Array, "batch heads steps keys"], Ring | None]:
        config, dtype = self.config, self.dtype

        def norm(name: str):
            # the fast variance E[x²] - E[x]² cancels
            return nn.LayerNorm(config.norm_eps, dtype, use_fast_variance=False, name=name)

        mixed, weights, ring = FlaxMimiAttention(config, dtype, name="self_attn")(
            norm("input_layernorm")(x), cos, sin, mask, deterministic, ring
        )
        x = x + FlaxMimiLayerScale(config, dtype, name="self_attn_layer_scale")(mixed)
        hidden = FlaxMimiMLP(config, dtype, name="mlp")(norm("post_attention_layernorm")(x))
        return x + FlaxMimiLayerScale(config, dtype, name="mlp_layer_scale")(hidden), weights, ring


class FlaxMimiTransformerLayers(nn.Module):
    """The numbered layers of :class:`FlaxMimiTransformerModel`; returns all states and all weights."""

    config: MimiConfig
    dtype: DTypeLike = jnp.float32
    gradient_checkpointing: bool = False

    @nn.compact
    def __call__(self, x, cos, sin, mask, deterministic: bool = True, rings: tuple[Ring, ...] | None = None):
        """With ``rings``, one per layer, the transformer attends over them; they are returned updated."""
        layer_class = FlaxMimiTransformerLayer
        if self.gradient_checkpointing and rings is None:
            layer_class = nn.remat(layer_class, static_argnums=(5,))
        states, attentions, updated = [x], [], []
        for index in range(self.config.num_hidden_layers):
            layer = layer_class(self.config, self.dtype, name=str(index))
            x, weights, ring = layer(x, cos, sin, mask, deterministic, None if rings is None else rings[index])
            states.append(x)
            attentions.append(weights)
            updated.append(ring)
        return tuple(states), tuple(attentions), tuple(updated)


@flax.struct.dataclass
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
        steps = x.shape[1]
        positions = jnp.arange(steps)[:, None]  # the heads come after the steps
        cos, sin = rotary_embedding(positions, self.config.head_dim, self.config.rope_parameters, self.dtype)
        mask = sliding_window_mask(steps, self.config.sliding_window)
        states, attentions, _ = self.layers(x.astype(self.dtype), cos, sin, mask, deterministic)
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
        config, steps = self.config, x.shape[1]
        positions = cache.positions(steps)[..., None]
        cos, sin = rotary_embedding(positions, config.head_dim, config.rope_parameters, self.dtype)
        rings = tuple((keys, values, cache.slot) for keys, values in zip(cache.keys, cache.values))
        states, _, rings = self.layers(x, cos, sin, cache.mask(steps, config.sliding_window), True, rings)
        keys, values, _ = zip(*rings)
        return cache.replace(keys=keys, values=values).advance(steps, active), states[-1]
