"""What Mimi remembers between the chunks of an endless stream.

Two things: the last inputs of every convolution that looks back, and the keys and values of the transformer. Every row
of the batch is a stream of its own, with its own age; rows may rest, or begin anew, while their neighbours go on.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float
from transformers import MimiConfig

from ...input_checks import AnyArray, check_sizes, is_traced, same_structure
from ...nn.cache import RingCache
from .layers_flax_mimi import Histories, History
from .topology import (
    Convolution,
    Path,
    convolutions,
    decoder_convolutions,
    encoder_convolutions,
    samples_per_frame,
    seanet_encoder,
    steps_per_frame,
)

# --------------------------------------------------------------------------------------------------------- histories


def remembering(convolutions: Mapping[Path, Convolution]) -> dict[Path, Convolution]:
    """Those of the convolutions that look back."""
    return {path: conv for path, conv in convolutions.items() if conv.remembered}


def seanet_histories(config: MimiConfig) -> int:
    """How many of the encoder's histories are SEANet's; they come first."""
    return len(remembering(convolutions(seanet_encoder(config))))


def histories_by_name(
    convolutions: Mapping[Path, Convolution],
    inputs: Sequence[Float[Array, "batch _before _channels"]],
    begun: Bool[Array, "batch"],
    active: Bool[Array, "batch"],
) -> Histories:
    """What each of the convolutions is handed in a step.

    Args:
        convolutions: by their paths.
        inputs: of a state, one array for each that looks back.
        begun: rows that have heard a chunk already.
        active: rows that go on.
    """
    begun, active = begun[:, None, None], active[:, None, None]
    histories: dict[Path, History | None] = dict.fromkeys(convolutions)
    for path, array in zip(remembering(convolutions), inputs, strict=True):
        histories[path] = History(array, begun, active)
    return unflatten_dict(histories)


def inputs_by_order(convolutions: Mapping[Path, Convolution], histories: Histories) -> tuple[Array, ...]:
    """The inverse of :func:`histories_by_name`: the ``inputs`` of the next state."""
    flat = flatten_dict(histories)
    return tuple(flat[path].inputs for path in remembering(convolutions))


# ------------------------------------------------------------------------------------------------------------ states


def is_causal(config: MimiConfig) -> bool:
    """Whether no output depends on what follows the frame that it belongs to."""
    return config.use_causal_conv and config.trim_right_ratio == 1.0 and config.pad_mode != "reflect"


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


State = TypeVar("State", bound="_State")


class _State(flax.struct.PyTreeNode):
    """What the two states share; see :class:`FlaxMimiEncoderState`."""

    histories: tuple[Any, ...]
    cache: RingCache

    @staticmethod
    @abc.abstractmethod
    def convolutions(config: MimiConfig) -> dict[Path, Convolution]:
        """Those of the half, in the order of ``histories``."""

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
            histories=tuple(
                jnp.zeros((batch_size, conv.remembered, conv.in_channels), dtype)
                for conv in remembering(cls.convolutions(config)).values()
            ),
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


class FlaxMimiEncoderState(_State):
    """What the encoder remembers; ``FlaxMimiModel.init_encoder_state`` makes one.

    Attributes:
        histories: last inputs of every convolution that looks back, each ``(batch, frames, channels)``.
        cache: keys and values of the transformer.
    """

    histories: tuple[Any, ...]
    cache: RingCache

    @staticmethod
    def convolutions(config: MimiConfig) -> dict[Path, Convolution]:
        return encoder_convolutions(config)


class FlaxMimiDecoderState(_State):
    """What the decoder remembers, in the fields of :class:`FlaxMimiEncoderState`; ``FlaxMimiModel.init_decoder_state``
    makes one."""

    histories: tuple[Any, ...]
    cache: RingCache

    @staticmethod
    def convolutions(config: MimiConfig) -> dict[Path, Convolution]:
        return decoder_convolutions(config)


@jax.jit
def _reset(state: State, rows: Bool[Array, "batch"]) -> State:
    histories = tuple(jnp.where(rows[:, None, None], 0, history) for history in state.histories)
    return state.replace(histories=histories, cache=state.cache.reset(rows))


# ------------------------------------------------------------------------------------------------------------ checks


def check_rows(name: str, rows: ArrayLike, batch_size: int) -> AnyArray:
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
    leaves, wanted = jax.tree.leaves(state), jax.tree.leaves(expected)
    if not same_structure(state, expected):
        raise ValueError(f"`{name}` has {len(leaves)} arrays, but one of this model has {len(wanted)}: make it anew.")
    for leaf, shape in zip(leaves, wanted):
        if leaf.shape != shape.shape or leaf.dtype != shape.dtype:
            raise ValueError(
                f"`{name}` has a leaf {leaf.dtype}{list(leaf.shape)} where this model and batch size have "
                f"{shape.dtype}{list(shape.shape)}: it comes from another configuration, dtype or batch size."
            )
        if isinstance(leaf, jax.Array) and not is_traced(leaf) and leaf.is_deleted():
            raise ValueError(f"`{name}` was consumed by an earlier step: go on with the state that it returned.")
