"""What a configuration says of Mimi's convolutions, and of the frames that they make.

SEANet (Tagliasacchi et al., 2020) is a list of numbered layers. It is written here once, for the modules that compute
it and for the states of a stream, which hold what each convolution remembers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from transformers import MimiConfig

from ...ops.convolution import output_length

# ------------------------------------------------------------------------------------------------------------ layers

ELU: Final = "elu"


def padding_total(kernel_size: int, stride: int = 1, dilation: int = 1) -> int:
    """Steps of padding that a convolution needs for one output every ``stride`` inputs."""
    return (kernel_size - 1) * dilation + 1 - stride


class Conv(NamedTuple):
    """A convolution, in the arguments of ``FlaxMimiConv1d``."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    pad_mode: str | None = None
    use_bias: bool = True

    @property
    def remembered(self) -> int:
        """Inputs before a chunk that its outputs depend on."""
        return padding_total(self.kernel_size, self.stride, self.dilation)

    def length_out(self, length):
        """How many outputs ``length`` inputs have (int or integer array)."""
        return length if self.stride == 1 else output_length(length, self.stride)


class ConvTranspose(NamedTuple):
    """A transposed convolution, in the arguments of ``FlaxMimiConvTranspose1d``."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    use_bias: bool = True

    @property
    def remembered(self) -> int:
        """As of :class:`Conv`: those that still write to the chunk's outputs."""
        return output_length(padding_total(self.kernel_size, self.stride), self.stride)

    def length_out(self, length):
        return length * self.stride


class Residual(NamedTuple):
    """A residual block: a branch of numbered layers beside a convolution of width 1, or beside nothing."""

    branch: tuple[Literal["elu"] | Conv, ...]
    shortcut: Conv | None


Convolution: TypeAlias = Conv | ConvTranspose
Layer: TypeAlias = Convolution | Residual | Literal["elu"]


def residual(config: MimiConfig, dim: int, dilation: int) -> Residual:
    hidden = dim // config.compress
    first = Conv(dim, hidden, config.residual_kernel_size, dilation=dilation)
    shortcut = Conv(dim, dim, 1) if config.use_conv_shortcut else None
    return Residual((ELU, first, ELU, Conv(hidden, dim, 1)), shortcut)


def residuals(config: MimiConfig, dim: int) -> list[Residual]:
    """The residual blocks of a resolution, each looking further back than the one before."""
    return [residual(config, dim, config.dilation_growth_rate**index) for index in range(config.num_residual_layers)]


def seanet_encoder(config: MimiConfig) -> tuple[Layer, ...]:
    """SEANet's encoder; a layer's place is its number in the files."""
    dim = config.num_filters
    layers: list[Layer] = [Conv(config.audio_channels, dim, config.kernel_size)]
    for ratio in reversed(config.upsampling_ratios):
        layers += [*residuals(config, dim), ELU, Conv(dim, 2 * dim, 2 * ratio, ratio)]
        dim *= 2
    return (*layers, ELU, Conv(dim, config.hidden_size, config.last_kernel_size))


def seanet_decoder(config: MimiConfig) -> tuple[Layer, ...]:
    """SEANet's decoder; a layer's place is its number in the files."""
    dim = 2 ** len(config.upsampling_ratios) * config.num_filters
    layers: list[Layer] = [Conv(config.hidden_size, dim, config.kernel_size)]
    for ratio in config.upsampling_ratios:
        layers += [ELU, ConvTranspose(dim, dim // 2, 2 * ratio, ratio), *residuals(config, dim // 2)]
        dim //= 2
    return (*layers, ELU, Conv(dim, config.audio_channels, config.last_kernel_size))


def downsampling(config: MimiConfig) -> Conv:
    """From the steps of the transformer to the frames of the codes."""
    stride, dim = config.latent_stride, config.hidden_size
    return Conv(dim, dim, 2 * stride, stride, pad_mode="replicate", use_bias=False)


def upsampling(config: MimiConfig) -> ConvTranspose:
    """From the frames of the codes to the steps of the transformer."""
    stride, dim = config.latent_stride, config.hidden_size
    return ConvTranspose(dim, dim, 2 * stride, stride, config.upsample_groups, use_bias=False)


# ------------------------------------------------------------------------------------------------------------ frames


def resamples(config: MimiConfig) -> bool:
    """Whether the frames of the codes come at another rate than SEANet's steps."""
    return config.frame_rate != config.encodec_frame_rate


def steps_per_frame(config: MimiConfig) -> int:
    """Steps of the transformer in a frame of the codes."""
    return config.latent_stride if resamples(config) else 1


def samples_per_frame(config: MimiConfig) -> int:
    """Samples in a frame of the codes. (``config.frame_size`` always counts two steps a frame.)"""
    return math.prod(config.upsampling_ratios) * steps_per_frame(config)


def encoded_length(config: MimiConfig, samples):
    """Frames that ``samples`` samples become (int or integer array): every layer rounds up."""
    return output_length(samples, samples_per_frame(config))


# ------------------------------------------------------------------------------------------------------------ stream

Path: TypeAlias = tuple[str, ...]
"""The names under which a convolution is found."""


def numbered(layers: Sequence[Layer]) -> Iterator[tuple[str, Layer]]:
    return ((str(number), layer) for number, layer in enumerate(layers))


def convolutions(layers: Sequence[Layer]) -> dict[Path, Convolution]:
    """The convolutions among the layers, in their order. (Shortcuts are left out: they look at no other step.)"""
    found: dict[Path, Convolution] = {}
    for name, layer in numbered(layers):
        if isinstance(layer, Residual):
            found |= {(name, *path): conv for path, conv in convolutions(layer.branch).items()}
        elif isinstance(layer, Conv | ConvTranspose):
            found[name,] = layer
    return found


def encoder_convolutions(config: MimiConfig) -> dict[Path, Convolution]:
    """The convolutions of the encoder half, SEANet's first."""
    found = {("encoder", *path): conv for path, conv in convolutions(seanet_encoder(config)).items()}
    return {**found, ("downsample",): downsampling(config)} if resamples(config) else found


def decoder_convolutions(config: MimiConfig) -> dict[Path, Convolution]:
    """The convolutions of the decoder half, SEANet's last."""
    found = {("decoder", *path): conv for path, conv in convolutions(seanet_decoder(config)).items()}
    return {("upsample",): upsampling(config), **found} if resamples(config) else found
