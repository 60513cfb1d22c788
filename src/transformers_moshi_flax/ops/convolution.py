"""One-dimensional convolutions, channels last.

``lengths`` says how many steps of time of each row count, the others are padding on the right.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from . import cpu
from .dispatch import for_cpu

PAD_MODES = ("constant", "replicate", "reflect")


def output_length(length, stride: int):
    """Output length of a padded convolution of an input of ``length`` (int or integer array): rounded up."""
    return -(-length // stride)


def pad_time(
    x: Float[Array, "batch length channels"],
    left: int,
    right: int,
    stride: int,
    mode: str,
    lengths: Int[Array, "batch"] | None = None,
) -> Float[Array, "batch padded channels"]:
    """Pad so that a convolution of that stride covers the last step; upstream ``MimiConv1d._pad1d``.

    Args:
        x: the input.
        left, right: padding on either side; on the right, what rounds up to a multiple of ``stride`` comes on top.
        stride: of the convolution.
        mode: ``constant`` (zeros), ``replicate`` or ``reflect``. Reflection of a row that is too short for it first
            appends zeros, as upstream does.
        lengths: steps that count in each row, all if None. A row is padded from its own end on, as if it were alone.

    Returns:
        ``left + length + right`` steps of time and those that round up; what lies beyond a row's own padding is
        arbitrary.
    """
    batch, length, _ = x.shape
    right_of_all = right + output_length(length, stride) * stride - length
    if lengths is None and mode != "reflect":
        width = ((0, 0), (left, right_of_all), (0, 0))
        return jnp.pad(x, width, mode="edge" if mode == "replicate" else "constant")

    lengths = jnp.full((batch,), length) if lengths is None else lengths
    lengths = lengths[:, None]
    # source[b, p]: the step of row b that position p shows
    source = jnp.broadcast_to(jnp.arange(-left, length + right_of_all), (batch, left + length + right_of_all))
    if mode == "replicate":
        source = jnp.clip(source, 0, jnp.maximum(lengths - 1, 0))
        return jnp.take_along_axis(x, source[..., None], axis=1)
    if mode == "reflect":
        right_of_row = right + output_length(lengths, stride) * stride - lengths
        last = jnp.maximum(lengths - 1, jnp.maximum(left, right_of_row))
        source = jnp.abs(source)
        source = jnp.where(source > last, 2 * last - source, source)
    shown = (source >= 0) & (source < lengths)
    x = jnp.take_along_axis(x, jnp.clip(source, 0, length - 1)[..., None], axis=1)
    return jnp.where(shown[..., None], x, 0)


def conv1d(
    x: Float[Array, "batch padded in_channels"],
    kernel: Float[Array, "width in_per_group out_channels"],
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Float[Array, "batch length out_channels"]:
    """Convolution without padding (``torch.nn.functional.conv1d``, channels last)."""
    definition = partial(
        lax.conv_general_dilated,
        window_strides=(stride,),
        padding="VALID",
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )
    return for_cpu(definition, partial(cpu.conv1d, stride=stride, dilation=dilation, groups=groups), x, kernel)


def conv_transpose1d(
    x: Float[Array, "batch length in_channels"],
    kernel: Float[Array, "width out_per_group in_channels"],
    stride: int = 1,
    groups: int = 1,
) -> Float[Array, "batch samples out_channels"]:
    """Transposed convolution without trimming (``torch.nn.functional.conv_transpose1d``, channels last).

    Every step writes ``width`` samples, ``stride`` after those of the step before; what overlaps is added.
    """
    length, width = x.shape[1], kernel.shape[0]
    reach = output_length(width, stride) - 1
    x = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    return conv_transpose1d_inside(x, kernel, stride, groups)[:, : (length - 1) * stride + width]


def conv_transpose1d_inside(
    x: Float[Array, "batch length in_channels"],
    kernel: Float[Array, "width out_per_group in_channels"],
    stride: int = 1,
    groups: int = 1,
) -> Float[Array, "batch samples out_channels"]:
    """The samples of a transposed convolution that every step which could write to them is there for."""
    shifts = output_length(kernel.shape[0], stride)
    kernel = jnp.pad(kernel, ((0, shifts * stride - kernel.shape[0]), (0, 0), (0, 0)))

    def definition(x: Array, kernel: Array) -> Array:
        # a convolution of the input, with zeros between them, with the kernel turned around
        width, out_per_group, _ = kernel.shape
        kernel = kernel[::-1].reshape(width, out_per_group, groups, -1).transpose(0, 3, 2, 1)
        return lax.conv_general_dilated(
            x,
            kernel.reshape(width, -1, groups * out_per_group),
            window_strides=(1,),
            padding=[(stride - 1, stride - 1)],
            lhs_dilation=(stride,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=groups,
        )

    return for_cpu(definition, partial(cpu.conv_transpose1d, stride=stride, groups=groups), x, kernel)
