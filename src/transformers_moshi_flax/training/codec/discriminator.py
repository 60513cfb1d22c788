"""Multi-scale STFT discriminators (EnCodec, Défossez et al., 2022), and what they say of a codec.

Each scale looks at real and imaginary parts of a short-time Fourier transform, by convolutions over time and
frequency. Weights are normalised (Salimans & Kingma, 2016): a kernel is a direction and a length of each output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ...ops.precision import at_least_float32
from .losses import stft

KERNEL, DILATIONS, SLOPE = (3, 9), (1, 2, 4), 0.2

Opinion = tuple[Array, tuple[Array, ...]]
"""Logits of a scale ``(rows, frames, bins, 1)``, large for what is real, and the features of its layers."""


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminators; they are trained where ``losses.adversarial`` has a weight.

    Attributes:
        windows: samples of the window of each, multiples of 32.
        filters: channels of each layer.
        learning_rate: of Adam, constant.
        b1, b2: of Adam.
        start_step: the step from which on they are trained and heard.
    """

    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    filters: int = 32
    learning_rate: float = 3e-4
    b1: float = 0.5
    b2: float = 0.9
    start_step: int = 0

    def problems(self) -> Iterator[str]:
        """As of ``ModelConfig``."""
        if not self.windows or any(window < 32 or window % 32 for window in self.windows):
            yield f"`windows`: {list(self.windows)} must be multiples of 32"
        if self.filters < 1:
            yield f"`filters`: {self.filters} is too small; give 1 or more"
        if self.start_step < 0:
            yield f"`start_step`: {self.start_step} is too small; give 0 or more"
        if self.learning_rate <= 0:
            yield f"`learning_rate`: {self.learning_rate} must be above 0"
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"`{name}`: {getattr(self, name)} must be at least 0 and below 1"


class NormalizedConv(nn.Module):
    """A two-dimensional convolution with normalised weights, padded so that only a stride makes it smaller."""

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "rows frames bins channels"]) -> Float[Array, "rows frames bins2 features"]:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        direction = self.param("direction", nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), shape)
        axes = (0, 1, 2)
        length = self.param("length", lambda key: jnp.sqrt(jnp.sum(direction**2, axis=axes)))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = direction * (length / jnp.sqrt(jnp.sum(direction**2, axis=axes)))[None, None, None]
        padding = [((size - 1) * step // 2,) * 2 for size, step in zip(self.kernel_size, self.dilation)]
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            self.strides,
            padding,
            rhs_dilation=self.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x + bias.astype(self.dtype)[None, None, None]


class STFTDiscriminator(nn.Module):
    """One scale; EnCodec's ``DiscriminatorSTFT``."""

    window: int
    filters: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, audio: Float[Array, "rows channels samples"]) -> Opinion:
        spectrum = stft(audio, self.window, reflects=False)
        # [rows, frames, bins, real parts of all channels and then imaginary ones]
        x = jnp.moveaxis(jnp.concatenate([spectrum.real, spectrum.imag], axis=1), 1, -1)
        layers = [((1, 1), (1, 1), KERNEL)]
        layers += [((1, 2), (dilation, 1), KERNEL) for dilation in DILATIONS]
        layers += [((1, 1), (1, 1), (3, 3))]
        features = []
        for number, (strides, dilation, kernel_size) in enumerate(layers):
            conv = NormalizedConv(self.filters, kernel_size, strides, dilation, self.dtype, name=f"convs_{number}")
            x = nn.leaky_relu(conv(x), SLOPE)
            features.append(x)
        return NormalizedConv(1, (3, 3), dtype=self.dtype, name="conv_post")(x), tuple(features)


class MultiScaleSTFTDiscriminator(nn.Module):
    """All scales; EnCodec's ``MultiScaleSTFTDiscriminator``."""

    windows: Sequence[int]
    filters: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, audio: Float[Array, "rows channels samples"]) -> tuple[Opinion, ...]:
        return tuple(
            STFTDiscriminator(window, self.filters, self.dtype, name=f"discriminators_{number}")(audio)
            for number, window in enumerate(self.windows)
        )


def discriminator_loss(real: Sequence[Opinion], fake: Sequence[Opinion]) -> Float[Array, ""]:
    """Hinge loss of the discriminators, averaged over scales."""
    losses = [
        jnp.mean(jax.nn.relu(1 - _wide(theirs))) + jnp.mean(jax.nn.relu(1 + _wide(ours)))
        for (theirs, _), (ours, _) in zip(real, fake)
    ]
    return _mean(losses)


def adversarial_loss(fake: Sequence[Opinion]) -> Float[Array, ""]:
    """Hinge loss of the codec, averaged over scales."""
    return _mean([jnp.mean(jax.nn.relu(1 - _wide(ours))) for ours, _ in fake])


def feature_matching_loss(real: Sequence[Opinion], fake: Sequence[Opinion]) -> Float[Array, ""]:
    """Mean absolute difference of features, as a share of the mean size of the real ones; averaged over all layers."""
    losses = [
        jnp.mean(jnp.abs(_wide(theirs) - _wide(ours))) / jnp.maximum(jnp.mean(jnp.abs(_wide(theirs))), 1e-8)
        for (_, real_features), (_, fake_features) in zip(real, fake)
        for theirs, ours in zip(jax.lax.stop_gradient(real_features), fake_features)
    ]
    return _mean(losses)


def _mean(losses: Sequence[Float[Array, ""]]) -> Float[Array, ""]:
    return reduce(jnp.add, losses) / len(losses)


def _wide(x: Array) -> Array:
    return x.astype(at_least_float32(x.dtype))
