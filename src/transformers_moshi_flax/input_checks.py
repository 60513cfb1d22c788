"""Checks of what users pass: eager values raise ``ValueError``; traced ones are covered by ``checkify``.

Inside ``jax.jit`` values are not known. There :func:`check_ids` adds ``checkify.debug_check``, which costs nothing
until the caller asks for it: ``checkify.checkify(jax.jit(model.__call__))(...)`` then reports ids out of range. What
is known inside of ``jax.jit``, as arrays that a function closes over are, is checked there as elsewhere.
"""

import numbers
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.extend.core import get_opaque_trace_state

with ThreadPoolExecutor(1) as thread:  # this module may be imported inside of jax.jit, which a new thread is not
    OUTSIDE = thread.submit(get_opaque_trace_state, convention="flax").result()
    """JAX's state outside of every transformation."""


LOUDEST = 100
"""Full scale is 1. Samples may go beyond it, but not by 40 dB: those are no audio, or integers that nobody scaled."""


def is_traced(*arrays) -> bool:
    """Whether any of the arrays is a tracer, so that its values cannot be looked at."""
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def is_tracing(*trees) -> bool:
    """Whether this runs inside of ``jax.jit`` (where every new array is a tracer) or a leaf of ``trees`` is traced."""
    if get_opaque_trace_state(convention="flax") == OUTSIDE:  # nothing is traced: told without looking at every leaf
        return False
    return is_traced(jnp.zeros(()), *jax.tree.leaves(trees))


def owned(array: Any) -> Any:
    """A copy of what is the caller's, who may write something else there while JAX still reads it in place."""
    return array if isinstance(array, jax.Array) else np.array(array)


def is_whole(value: Any) -> bool:
    """Whether ``value`` is an integer of Python or NumPy."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def shortened(items: Sequence[str], shown: int, separator: str) -> str:
    """The first few, and how many more there are."""
    more = f"{separator}and {len(items) - shown} more" if len(items) > shown else ""
    return separator.join(items[:shown]) + more


def check_sizes(**sizes: Any) -> None:
    """Raises ``ValueError`` for the first size that is no whole number of at least 1."""
    for name, size in sizes.items():
        if not is_whole(size) or size < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, but is {size!r}.")


def refuse_params(**arguments: Any) -> None:
    """Raises ``ValueError`` for a dictionary in the place of an array: parameters, in another argument's place.

    The former Flax models had ``params`` before other arguments, so they may be passed by position.
    """
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            raise ValueError(
                f"`{name}` is a dictionary, as parameters are: pass them by name, `params=...`. The arguments are in "
                "the order of upstream's `forward`."
            )


def check_rank(name: str, array, axes: tuple[str, ...]) -> None:
    """Raises ``ValueError`` unless ``array`` has one dimension per name in ``axes``."""
    refuse_params(**{name: array})
    if np.ndim(array) != len(axes):
        raise ValueError(f"`{name}` must have the shape ({', '.join(axes)}), but has the shape {np.shape(array)}.")


def check_audio(
    name: str, audio: Any, shape: Mapping[str, int | None], rows: Any = ..., hint: str = "", may_be_empty: bool = False
) -> None:
    """Raises ``ValueError`` unless ``audio`` is of this shape and :func:`check_samples` takes it.

    Args:
        name: of the argument.
        audio: what was passed.
        shape: the axes and their sizes, None for any.
        rows: those of the first axis whose values count.
        hint: what to do about another shape.
        may_be_empty: whether an axis of any size may be of none.
    """
    found = np.shape(audio)
    sizes = tuple(shape.values())
    if len(found) != len(sizes) or any(size not in (None, length) for size, length in zip(sizes, found)):
        axes = ", ".join(axis if size is None else str(size) for axis, size in shape.items())
        axes += "," * (len(sizes) == 1)
        raise ValueError(f"`{name}` must have the shape ({axes}), but has the shape {found}{hint and ': ' + hint}.")
    if 0 in found and not may_be_empty:
        raise ValueError(f"`{name}` is empty, its shape is {found}: give at least one sample.")
    check_samples(f"`{name}`", audio, rows)


def check_samples(subject: str, samples: Any, rows: Any = ...) -> None:
    """Raises ``ValueError`` unless ``samples`` are finite floats on the scale of [-1, 1].

    They may go beyond it as far as :data:`LOUDEST`. Of traced ones, only the dtype is known.

    Args:
        subject: what messages begin with.
        samples: of any shape.
        rows: those whose values count.
    """
    samples = samples if is_traced(samples) else np.asarray(samples)
    if not jnp.issubdtype(samples.dtype, jnp.floating):
        raise ValueError(
            f"{subject} must be floats in [-1, 1], but has the dtype {samples.dtype}: scale the samples (those of "
            "int16 by 1 / 32768)."
        )
    if is_traced(samples, rows):
        return
    loudest = np.abs(samples[rows]).max(initial=0)
    if not np.isfinite(loudest):
        raise ValueError(f"{subject} has samples that are NaN or infinite: repair the audio.")
    if loudest > LOUDEST:
        raise ValueError(
            f"{subject} has samples of up to {float(loudest):.3g}, but must be in [-1, 1]: scale them (by 1 / 32768 "
            "if they are of int16)."
        )


def check_ids(name: str, ids, size: int, allowed: tuple[int, ...] = (), remedy: str = "") -> None:
    """Raises ``ValueError`` for ids outside ``[0, size)`` that are not among ``allowed``.

    JAX would clamp them silently. Traced ids are checked under ``checkify`` only.
    """
    ids = ids if is_traced(ids) else np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"`{name}` must hold integer ids, but has the dtype {ids.dtype}. {remedy}".rstrip())
    if is_traced(ids):
        good = (ids >= 0) & (ids < size)
        for value in allowed:
            good |= ids == value
        checkify.debug_check(jnp.all(good), f"`{name}` has ids outside [0, {size})")
        return
    wrong = ids[((ids < 0) | (ids >= size)) & ~np.isin(ids, allowed)]
    if wrong.size:
        extra = f" (or one of {allowed})" if allowed else ""
        raise ValueError(
            f"`{name}` has the id {wrong.flat[0]}, outside the vocabulary: ids must be in [0, {size}){extra}. "
            f"{remedy}".rstrip()
        )


def check_mask(name: str, mask, batch_size: int, lengths: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless ``mask`` is ``(batch_size, one of lengths)`` of zeros and ones."""
    check_rank(name, mask, ("batch", "frames"))
    if np.shape(mask)[0] != batch_size or np.shape(mask)[1] not in lengths:
        expected = " or ".join(f"({batch_size}, {length})" for length in lengths)
        raise ValueError(f"`{name}` must have the shape {expected}, but has the shape {np.shape(mask)}.")
    if not is_traced(mask) and not np.isin(np.asarray(mask), (0, 1)).all():
        raise ValueError(f"`{name}` must hold only 0 (ignored) and 1 (attended).")


def check_left_padding(name: str, mask, padding: str = "0", otherwise: str = "") -> None:
    """Raises ``ValueError`` if a row of a mask ends with padding, from which nothing can be generated.

    A traced mask is checked under ``checkify`` only.

    Args:
        name: of the argument that the mask comes from.
        mask: ``(batch, frames)``.
        padding: what stands for it in the argument.
        otherwise: what else can be done about it.
    """
    if is_traced(mask):
        checkify.debug_check(jnp.all(mask[:, -1] != 0), f"`{name}` ends with {padding}: pad on the left")
    else:
        padded = np.flatnonzero(np.asarray(mask)[:, -1] == 0)
        if padded.size:
            raise ValueError(
                f"`{name}` ends with {padding} in row {padded[0]}, but what follows is generated from the last frame: "
                f"pad on the left (`padding_side='left'`){otherwise}."
            )
