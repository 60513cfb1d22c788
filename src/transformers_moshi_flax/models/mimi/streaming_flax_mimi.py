"""What Mimi remembers between the chunks of an endless stream.

Two things: the last inputs of every convolution that looks back, and the keys and values of the transformer. Every row
of the batch is a stream of its own, with its own age; rows may rest, or begin anew, while their neighbours go on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float
from transformers import MimiConfig

from ...input_checks import check_sizes, is_traced
from ...nn.cache import RingCache

# ------------------------------------------------------------------------------------------------------------ frames


def resamples(config: MimiConfig) -> bool:
    """Whether the frames of the codes come at another rate than SEANet's."""
    return config.frame_rate != config.encodec_frame_rate


def steps_per_frame(config: MimiConfig) -> int:
    """Steps of the transformer in a frame of the codes."""
    return config.latent_stride if resamples(config) else 1


def samples_per_frame(config: MimiConfig) -> int:
    """Samples in a frame of the codes. (``config.frame_size`` always counts two steps a frame.)"""
    return math.prod(config.upsampling_ratios) * steps_per_frame(config)


def check_streamable(config: MimiConfig) -> None:
    """Raises ``ValueError`` unless every output depends on whole frames of the past only."""
    if not config.use_causal_conv:
        raise ValueError("`use_causal_conv` is False, so every frame depends on later ones: code the whole at once.")
    if config.trim_right_ratio != 1.0:
        raise ValueError(
            f"`trim_right_ratio` is {config.trim_right_ratio}, so the audio of a frame needs later frames: only 1.0 "
            "can be streamed."
        )
    if config.pad_mode == "reflect":
        raise ValueError(
            "`pad_mode` is 'reflect', so the first frame depends on later ones: only 'constant' and 'replicate' can "
            "be streamed."
        )
    samples, wanted = samples_per_frame(config), config.sampling_rate / config.frame_rate
    if not samples or not math.isclose(samples, wanted, rel_tol=1e-6):
        raise ValueError(
            f"`frame_rate` {config.frame_rate} at `sampling_rate` {config.sampling_rate} makes frames of {wanted:g} "
            f"samples, but the strides of the convolutions make {samples}: only frames of just as many samples can be "
            "streamed."
        )


# --------------------------------------------------------------------------------------------------------- histories


class Histories:
    """Hands every convolution what came before its inputs, and collects what the next chunk will need.

    It lives while a step is traced, and counts on the convolutions being called in the order of the state.

    Args:
        before: inputs remembered, in the order of the calls, each ``(batch, frames, channels)``.
        begun: rows that have heard a chunk already; the others have nothing before their inputs.
        active: rows that go on; the others keep what they remember.
    """

    def __init__(self, before: Sequence[Array], begun: Bool[Array, "batch"], active: Bool[Array, "batch"]):
        self._before, self._begun, self._active = iter(before), begun[:, None, None], active[:, None, None]
        self.after: list[Array] = []

    def extend(
        self, x: Float[Array, "batch frames channels"], frames: int, mode: str = "constant"
    ) -> Float[Array, "batch {frames}+frames channels"]:
        """``x`` with the ``frames`` before it, those of a new row being padding of that mode."""
        if frames == 0:
            return x
        before = next(self._before)
        start = jnp.where(self._begun, before, x[:, :1]) if mode == "replicate" else before
        x = jnp.concatenate([start, x], axis=1)
        self.after.append(jnp.where(self._active, x[:, -frames:], before))
        return x


def _seanet_dilations(config: MimiConfig) -> Iterator[int]:
    return (config.dilation_growth_rate**block for block in range(config.num_residual_layers))


def encoder_histories(config: MimiConfig) -> list[tuple[int, int]]:
    """Frames and channels that each convolution of the encoder half remembers, in the order of the calls."""
    dim = config.num_filters
    sizes = [(config.kernel_size - 1, config.audio_channels)]
    for ratio in reversed(config.upsampling_ratios):
        sizes += [((config.residual_kernel_size - 1) * dilation, dim) for dilation in _seanet_dilations(config)]
        sizes.append((ratio, dim))
        dim *= 2
    sizes.append((config.last_kernel_size - 1, dim))
    if resamples(config):
        sizes.append((config.latent_stride, config.hidden_size))
    return [size for size in sizes if size[0]]


def seanet_histories(config: MimiConfig) -> int:
    """How many of :func:`encoder_histories` are SEANet's; they come first."""
    return len(encoder_histories(config)) - resamples(config)


def decoder_histories(config: MimiConfig) -> list[tuple[int, int]]:
    """As :func:`encoder_histories`, of the decoder half. A transposed convolution remembers one frame."""
    dim = 2 ** len(config.upsampling_ratios) * config.num_filters
    sizes = [(1, config.hidden_size)] if resamples(config) else []
    sizes.append((config.kernel_size - 1, config.hidden_size))
    for _ in config.upsampling_ratios:
        sizes.append((1, dim))
        dim //= 2
        sizes += [((config.residual_kernel_size - 1) * dilation, dim) for dilation in _seanet_dilations(config)]
    sizes.append((config.last_kernel_size - 1, dim))
    return [size for size in sizes if size[0]]


# ------------------------------------------------------------------------------------------------------------ states


State = TypeVar("State", bound="_State")


class _State:
    """What the two states share; see :class:`FlaxMimiEncoderState`."""

    histories: tuple[Any, ...]
    cache: RingCache

    @staticmethod
    def history_sizes(config: MimiConfig) -> list[tuple[int, int]]:
        raise NotImplementedError

    @classmethod
    def create(cls: type[State], config: MimiConfig, batch_size: int, dtype: DTypeLike = jnp.float32) -> State:
        """The state of ``batch_size`` rows that have heard nothing.

        Args:
            config: of the codec, or of a half.
            batch_size: rows.
            dtype: that the model computes in.

        Raises:
            ValueError: the configuration cannot be streamed: convolutions that are not causal
                (``use_causal_conv=False``, ``trim_right_ratio`` other than 1, ``pad_mode="reflect"``), frames that
                are not whole; no rows.
        """
        check_streamable(config)
        check_sizes(batch_size=batch_size)
        return cls(
            histories=tuple(jnp.zeros((batch_size, *size), dtype) for size in cls.history_sizes(config)),
            cache=RingCache.create(config, batch_size, dtype, steps_per_frame(config)),
        )

    @property
    def batch_size(self) -> int:
        return self.cache.position.shape[0]

    def reset(self: State, rows: ArrayLike) -> State:
        """With ``rows``, ``(batch,)`` bool, as they were at first. The result takes over the memory of the others.

        Raises:
            ValueError: ``rows`` of another shape or dtype.
        """
        return _reset(self, check_rows("rows", rows, self.batch_size))

    def histories_of(self, active: Bool[Array, "batch"]) -> Histories:
        return Histories(self.histories, self.cache.length > 0, active)


@flax.struct.dataclass
class FlaxMimiEncoderState(_State):
    """What the encoder remembers; ``FlaxMimiModel.init_encoder_state`` makes one.

    Attributes:
        histories: last inputs of every convolution that looks back, each ``(batch, frames, channels)``.
        cache: keys and values of the transformer.
    """

    histories: tuple[Any, ...]
    cache: RingCache

    @staticmethod
    def history_sizes(config: MimiConfig) -> list[tuple[int, int]]:
        return encoder_histories(config)


@flax.struct.dataclass
class FlaxMimiDecoderState(_State):
    """What the decoder remembers, in the fields of :class:`FlaxMimiEncoderState`; ``FlaxMimiModel.init_decoder_state``
    makes one."""

    histories: tuple[Any, ...]
    cache: RingCache

    @staticmethod
    def history_sizes(config: MimiConfig) -> list[tuple[int, int]]:
        return decoder_histories(config)


@jax.jit
def _reset(state: State, rows: Bool[Array, "batch"]) -> State:
    histories = tuple(jnp.where(rows[:, None, None], 0, history) for history in state.histories)
    return state.replace(histories=histories, cache=state.cache.reset(rows))


# ------------------------------------------------------------------------------------------------------------ checks


def check_rows(name: str, rows: ArrayLike, batch_size: int) -> ArrayLike:
    """``rows`` as an array; raises ``ValueError`` unless it is ``(batch_size,)`` bool."""
    rows = rows if is_traced(rows) else np.array(rows)  # JAX may read the memory of the caller later
    if rows.shape != (batch_size,) or rows.dtype != bool:
        raise ValueError(
            f"`{name}` must be one bool per row, of the shape ({batch_size},), but has the shape {rows.shape} and the "
            f"dtype {rows.dtype}."
        )
    return rows


def check_state(name: str, state: Any, expected: Any) -> None:
    """Raises ``ValueError`` unless the leaves of ``state`` have the shapes and dtypes of ``expected`` and live."""
    leaves, structure = jax.tree.flatten(state)
    wanted, wanted_structure = jax.tree.flatten(expected)
    if structure != wanted_structure:
        raise ValueError(f"`{name}` has {len(leaves)} arrays, but one of this model has {len(wanted)}: make it anew.")
    for leaf, shape in zip(leaves, wanted):
        if leaf.shape != shape.shape or leaf.dtype != shape.dtype:
            raise ValueError(
                f"`{name}` has a leaf {leaf.dtype}{list(leaf.shape)} where this model and batch size have "
                f"{shape.dtype}{list(shape.shape)}: it comes from another configuration, dtype or batch size."
            )
        if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.is_deleted():
            raise ValueError(f"`{name}` was consumed by an earlier step: go on with the state that it returned.")
