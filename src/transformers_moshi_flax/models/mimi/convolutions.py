"""One-dimensional convolutions as single matrix products, channels last.

XLA's CPU backend runs ``lax.conv`` several times slower than an unfold and one product, and products suit TPU and GPU
as well. All functions are pure; ``lengths`` says how many frames of each row count, the others are padding on the
right.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..dots import row_dot_general

PAD_MODES = ("constant", "replicate", "reflect")


def frames_out(length, stride: int):
    """Output frames of a padded convolution for ``length`` input frames (int or integer array): rounded up."""
    return -(-length // stride)


def pad_frames(
    x: Float[Array, "batch frames channels"],
    left: int,
    right: int,
    stride: int,
    mode: str,
    lengths: Int[Array, "batch"] | None = None,
) -> Float[Array, "batch padded channels"]:
    """Pad so that a convolution of that stride covers the last frame; upstream ``MimiConv1d._pad1d``.

    Args:
        x: the frames.
        left, right: padding on either side; on the right, what rounds up to a multiple of ``stride`` comes on top.
        stride: of the convolution.
        mode: ``constant`` (zeros), ``replicate`` or ``reflect``. Reflection of a row that is too short for it first
            appends zeros, as upstream does.
        lengths: frames that count in each row, all if None. A row is padded from its own end on, as if it were alone.

    Returns:
        ``left + frames + right`` frames and those that round up; what lies beyond a row's own padding is arbitrary.
    """
    batch, frames, _ = x.shape
    right_of_all = right + frames_out(frames, stride) * stride - frames
    if lengths is None and mode != "reflect":
        width = ((0, 0), (left, right_of_all), (0, 0))
        return jnp.pad(x, width, mode="edge" if mode == "replicate" else "constant")

    lengths = jnp.full((batch,), frames) if lengths is None else lengths
    lengths = lengths[:, None]
    # source[b, p]: the frame of row b that position p shows
    source = jnp.broadcast_to(jnp.arange(-left, frames + right_of_all), (batch, left + frames + right_of_all))
    if mode == "replicate":
        source = jnp.clip(source, 0, jnp.maximum(lengths - 1, 0))
        return jnp.take_along_axis(x, source[..., None], axis=1)
    if mode == "reflect":
        right_of_row = right + frames_out(lengths, stride) * stride - lengths
        last = jnp.maximum(lengths - 1, jnp.maximum(left, right_of_row))
        source = jnp.abs(source)
        source = jnp.where(source > last, 2 * last - source, source)
    shown = (source >= 0) & (source < lengths)
    x = jnp.take_along_axis(x, jnp.clip(source, 0, frames - 1)[..., None], axis=1)
    return jnp.where(shown[..., None], x, 0)


def unfold(
    x: Float[Array, "batch padded channels"], width: int, stride: int, dilation: int
) -> Float[Array, "batch frames width channels"]:
    """The inputs under the kernel at each of its positions."""
    batch, padded, channels = x.shape
    frames = (padded - (width - 1) * dilation - 1) // stride + 1
    if dilation == 1 and width % stride == 0:
        # blocks of `stride` frames are contiguous: no strided reads
        shifts = width // stride
        blocks = x[:, : (frames + shifts - 1) * stride].reshape(batch, frames + shifts - 1, stride, channels)
        return jnp.concatenate([blocks[:, shift : shift + frames] for shift in range(shifts)], axis=2)
    span = (frames - 1) * stride + 1
    return jnp.stack([x[:, tap * dilation : tap * dilation + span : stride] for tap in range(width)], axis=2)


def conv1d(
    x: Float[Array, "batch padded in_channels"],
    kernel: Float[Array, "width in_per_group out_channels"],
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Float[Array, "batch frames out_channels"]:
    """Convolution without padding (``torch.nn.functional.conv1d``, channels last)."""
    width, in_per_group, out_channels = kernel.shape
    patches = unfold(x, width, stride, dilation)
    batch, frames = patches.shape[:2]
    if groups == 1:
        kernel = kernel.reshape(-1, out_channels)
        return row_dot_general(patches.reshape(batch, frames, -1), kernel, (((2,), (0,)), ((), ())))
    patches = patches.reshape(batch, frames, width, groups, in_per_group)
    kernel = kernel.reshape(width, in_per_group, groups, out_channels // groups)
    return jnp.einsum("btwgi,wigo->btgo", patches, kernel).reshape(batch, frames, out_channels)


def conv_transpose1d(
    x: Float[Array, "batch frames in_channels"],
    kernel: Float[Array, "width out_per_group in_channels"],
    stride: int = 1,
    groups: int = 1,
) -> Float[Array, "batch samples out_channels"]:
    """Transposed convolution without trimming (``torch.nn.functional.conv_transpose1d``, channels last).

    Every frame writes ``width`` samples, ``stride`` after those of the frame before; what overlaps is added.
    """
    frames, width = x.shape[1], kernel.shape[0]
    reach = frames_out(width, stride) - 1
    x = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    return conv_transpose1d_inside(x, kernel, stride, groups)[:, : (frames - 1) * stride + width]


def conv_transpose1d_inside(
    x: Float[Array, "batch frames in_channels"],
    kernel: Float[Array, "width out_per_group in_channels"],
    stride: int = 1,
    groups: int = 1,
) -> Float[Array, "batch samples out_channels"]:
    """The samples of a transposed convolution that every frame which could write to them is there for."""
    batch, frames, in_channels = x.shape
    width, out_per_group, _ = kernel.shape
    shifts = frames_out(width, stride)
    if shifts * stride != width:
        kernel = jnp.pad(kernel, ((0, shifts * stride - width), (0, 0), (0, 0)))
    frames -= shifts - 1
    kernel = kernel.reshape(shifts, stride, out_per_group, in_channels)
    if groups == 1 and batch * frames >= in_channels:
        written = jnp.einsum("bti,swoi->btswo", x, kernel)
        written = sum(written[:, shifts - 1 - shift :][:, :frames, shift] for shift in range(shifts))
        return written.reshape(batch, frames * stride, out_per_group)

    # inputs[s] is `s` frames behind the samples, to which it writes the s-th `stride` rows of the kernel
    inputs = jnp.stack([x[:, shifts - 1 - shift :][:, :frames] for shift in range(shifts)])
    if groups == in_channels and out_per_group == 1:
        written = jnp.sum(inputs[:, :, :, None] * kernel[:, None, None, :, 0], axis=0)
    elif groups > 1:
        inputs = inputs.reshape(shifts, batch, frames, groups, -1)
        kernel = kernel.reshape(shifts, stride, out_per_group, groups, -1)
        written = jnp.sum(jnp.einsum("sbtgi,swogi->sbtwgo", inputs, kernel), axis=0)
    else:
        # few rows: with the kernel on the left, XLA's CPU backend reads it as it lies; transposed before the sum, the
        # product would be turned around again, and the whole kernel with it
        inputs = inputs.reshape(shifts, batch * frames, in_channels).transpose(0, 2, 1)
        kernel = kernel.reshape(shifts, stride * out_per_group, in_channels)
        written = jnp.sum(jnp.einsum("skc,sci->ski", kernel, inputs), axis=0).T
    return written.reshape(batch, frames * stride, groups * out_per_group)
