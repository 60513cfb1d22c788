"""Convolutions over time, channels last."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..ops.convolution import conv1d
from ..ops.precision import at_least_float32
from .initializers import kaiming_normal, normal, uniform


def kernel_and_bias(
    module: nn.Module, shape: tuple[int, ...], bias_shape: tuple[int, ...] | None, fan_in: int, dtype: DTypeLike
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """Kernel and bias of a convolution, drawn as upstream does: Kaiming normal, and uniform by the number of inputs.

    Args:
        module: whose parameters they are.
        shape: of the kernel; ``shape[0] * shape[1]`` is torch's fan-in, of transposed convolutions too.
        bias_shape: None for no bias.
        fan_in: inputs of an output, for the bias.
        dtype: of both.
    """
    kernel = module.param("kernel", kaiming_normal, shape, jnp.float32).astype(dtype)
    if bias_shape is None:
        return kernel, None
    bias = module.param("bias", uniform(math.sqrt(1 / fan_in)), bias_shape)
    return kernel, bias.astype(dtype)


class Conv1d(nn.Module):
    """Convolution with zeros around the input (``torch.nn.Conv1d``).

    Attributes:
        features: channels of the output.
        width: of the kernel.
        stride: steps of the input for one of the output.
        padding: zeros before and behind the input.
        use_bias: whether there is a bias.
        dtype: of the computation.
    """

    features: int
    width: int
    stride: int = 1
    padding: int = 0
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch length in_channels"]) -> Float[Array, "batch length_out features"]:
        inputs = x.shape[-1]
        kernel, bias = kernel_and_bias(
            self,
            (self.width, inputs, self.features),
            (self.features,) if self.use_bias else None,
            self.width * inputs,
            self.dtype,
        )
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (self.padding, self.padding), (0, 0)))
        x = conv1d(x, kernel, self.stride)
        return x if bias is None else x + bias[None, None]


class WeightNormConv1d(nn.Module):
    """Convolution in groups whose kernel has a norm of its own at every place (Salimans & Kingma, 2016), as many steps
    long as its input; ``torch.nn.utils.parametrizations.weight_norm(conv, dim=2)``.

    ``kernel`` gives the direction, ``scale``, ``(width,)``, the norm. Of an even width, the output at a step sees one
    step more before it than behind it.

    Attributes:
        width: of the kernel.
        groups: of channels, as many of the input as of the output.
        dtype: of the computation; the kernel is normed in at least float32.
    """

    width: int
    groups: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch length channels"]) -> Float[Array, "batch length channels"]:
        channels = x.shape[-1]
        shape = (self.width, channels // self.groups, channels)
        wide = at_least_float32(self.dtype)
        direction = self.param("kernel", normal(2 * math.sqrt(1 / (self.width * channels))), shape, jnp.float32)
        direction = direction.astype(wide)
        norm = jnp.sqrt(jnp.sum(jnp.square(direction), axis=(1, 2)))
        scale = self.param("scale", lambda key: jax.lax.stop_gradient(norm).astype(jnp.float32)).astype(wide)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32).astype(self.dtype)
        kernel = direction * (scale / norm)[:, None, None]
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (self.width // 2, (self.width - 1) // 2), (0, 0)))
        return conv1d(x, kernel.astype(self.dtype), groups=self.groups) + bias[None, None]
