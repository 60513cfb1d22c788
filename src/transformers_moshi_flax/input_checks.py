"""Checks of what users pass: eager values raise ``ValueError``; traced ones are covered by ``checkify``.

Each model has a table of its inputs: :class:`Input` says what one is, and :func:`check_inputs` compares all of a call
with their table, whatever the entry.

Inside ``jax.jit`` values are not known. There :func:`check_ids` adds ``checkify.debug_check``, which costs nothing
until the caller asks for it: ``checkify.checkify(jax.jit(model.__call__))(...)`` then reports ids out of range. What
is known inside of ``jax.jit``, as arrays that a function closes over are, is checked there as elsewhere.
"""

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeGuard, overload

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


AnyArray = jax.Array | np.ndarray
"""On the device or on the host."""


@overload
def is_traced(array: Any, /) -> TypeGuard[jax.Array]: ...


@overload
def is_traced(*arrays: Any) -> bool: ...


def is_traced(*arrays: Any) -> bool:
    """Whether any of the arrays is a tracer, so that its values cannot be looked at."""
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def is_tracing(*trees) -> bool:
    """Whether this runs inside of ``jax.jit`` (where every new array is a tracer) or a leaf of ``trees`` is traced."""
    if get_opaque_trace_state(convention="flax") == OUTSIDE:  # nothing is traced: told without looking at every leaf
        return False
    return is_traced(jnp.zeros(()), *jax.tree.leaves(trees))


def same_structure(one: Any, other: Any) -> bool:
    """Whether two pytrees differ in their leaves at most."""
    structures: list[object] = [jax.tree.structure(one), jax.tree.structure(other)]
    return structures[0] == structures[1]


def private_copy(array: Any) -> AnyArray:
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


@dataclasses.dataclass(frozen=True)
class Input:
    """What an argument must be. Tables of these are what :func:`check_inputs` compares calls with.

    Attributes:
        axes: the axes of its shape by name, and their sizes. None is any, but the same wherever the name stands in a
            call; several are alternatives, and a range is those in it.
        kind: ``"ids"`` (integers in ``[0, size)``, or among ``allowed``; of any value where ``size`` is None),
            ``"audio"`` (floats on the scale of [-1, 1]), ``"floats"``, ``"mask"`` (0 and 1) or ``"bools"``.
        size: of the vocabulary.
        allowed: further ids.
        frame_size: samples a frame, where the last axis has samples: their frames are then counted, the last one
            padded, as those of the other arguments.
        may_go_on: whether there may be more frames than in the other arguments.
        may_be_empty: whether an axis of any size may be of none.
        at_trace_time: for what the values must be known, if they may not be traced.
        called: what it is, in the message about another shape.
        hint: what to do about another shape.
        remedy: what to do about other values.
    """

    axes: Mapping[str, int | range | tuple[int | None, ...] | None]
    kind: str
    size: int | None = None
    allowed: tuple[int, ...] = ()
    frame_size: int = 0
    may_go_on: bool = False
    may_be_empty: bool = False
    at_trace_time: str = ""
    called: str = ""
    hint: str = ""
    remedy: str = ""


Sizes = dict[str, int]
"""Of axes, by their names."""


def check_inputs(table: Mapping[str, Input], given: Mapping[str, Any], sizes: Sizes | None = None) -> Sizes:
    """Raises ``ValueError`` for the first of the arguments that is not as the table describes it.

    Args:
        table: the inputs by name. The first one that is given sets the sizes of the axes for those behind it.
        given: the arguments; None is one that is not given.
        sizes: that are known before.

    Returns:
        The sizes of the axes.
    """
    sizes = dict(sizes or {})
    refuse_params(**{name: given.get(name) for name in table})
    for name, expected in table.items():
        if given.get(name) is not None:
            check_input(name, given[name], expected, sizes)
    return sizes


def check_input(name: str, value: Any, expected: Input, sizes: Sizes | None = None, rows: Any = ...) -> None:
    """Raises ``ValueError`` unless an argument is as described.

    Args:
        name: of the argument.
        value: what was passed. Traced values are checked as far as they are known.
        expected: what it must be.
        sizes: of the axes of the call; those that are new are added.
        rows: those of the first axis whose values count.
    """
    refuse_params(**{name: value})
    check_shape(name, np.shape(value), expected, {} if sizes is None else sizes)
    if expected.at_trace_time and is_traced(value):
        raise ValueError(f"`{name}` {expected.at_trace_time}: it must be known at trace time.")
    if rows is not ... and not is_traced(value, rows):
        value = np.asarray(value)[np.asarray(rows)]
    check_values(name, value, expected)


def check_shape(name: str, found: tuple[int, ...], expected: Input, sizes: Sizes) -> None:
    """Raises ``ValueError`` unless the shape is as described; adds to ``sizes``."""
    fits = len(found) == len(expected.axes)
    counts, shown = {}, []
    for number, (axis, size) in enumerate(expected.axes.items()):
        count = found[number] if fits else 0
        counted = "frames" if expected.frame_size and axis == "samples" else axis
        if counted != axis:
            count = -(-count // expected.frame_size)
        known = sizes.get(counted)
        allowed = [known if one is None else one for one in (size if isinstance(size, tuple) else (size,))]
        goes_on = expected.may_go_on and counted == "frames" and known is not None
        fits = fits and any(
            one is None or (count in one if isinstance(one, range) else count == one or (goes_on and count > one))
            for one in allowed
        )
        shown.append("at least " * goes_on + " or ".join({shown_size(axis, one): None for one in allowed}))
        if counted != axis and known is not None:
            shown[-1] += f" * {expected.frame_size}"
        if not expected.may_go_on:
            counts[counted] = count
    if not fits:
        shape = ", ".join(shown) + "," * (len(shown) == 1)
        rule = f"be {expected.called}, of the shape" if expected.called else "have the shape"
        hint = expected.hint and f": {expected.hint}"
        raise ValueError(f"`{name}` must {rule} ({shape}), but has the shape {found}{hint}.")
    if 0 in found and not expected.may_be_empty:
        axis = [*expected.axes][found.index(0)]
        one = {"batch": "row"}.get(axis, axis.removesuffix("s"))
        raise ValueError(f"`{name}` is empty, its shape is {found}: give at least one {one}.")
    sizes.update({axis: count for axis, count in counts.items() if axis not in sizes})


def shown_size(axis: str, size: int | range | None) -> str:
    """As messages have it."""
    if isinstance(size, range):
        return f"{size.start} to {size.stop - 1} {axis}"
    return axis if size is None else str(size)


def check_values(name: str, value: Any, expected: Input) -> None:
    """Raises ``ValueError`` unless dtype and values are as described."""
    if expected.kind == "ids":
        check_ids(name, value, expected.size, expected.allowed, expected.remedy)
    elif expected.kind == "audio":
        check_samples(f"`{name}`", value)
    elif expected.kind == "mask":
        if not is_traced(value) and not np.isin(np.asarray(value), (0, 1)).all():
            raise ValueError(f"`{name}` must hold only 0 (ignored) and 1 (attended).")
    else:
        dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
        wanted = {"bools": np.bool_, "floats": np.floating}[expected.kind]
        if not jnp.issubdtype(dtype, wanted):
            rule = f"be {expected.called}" if expected.called else f"hold {expected.kind}"
            raise ValueError(f"`{name}` must {rule}, but has the dtype {dtype}.")


def check_samples(subject: str, samples: Any) -> None:
    """Raises ``ValueError`` unless ``samples`` are finite floats on the scale of [-1, 1].

    They may go beyond it as far as :data:`LOUDEST`. Of traced ones, only the dtype is known.

    Args:
        subject: what messages begin with.
        samples: of any shape.
    """
    samples = samples if is_traced(samples) else np.asarray(samples)
    if not jnp.issubdtype(samples.dtype, jnp.floating):
        raise ValueError(
            f"{subject} must be floats in [-1, 1], but has the dtype {samples.dtype}: scale the samples (those of "
            "int16 by 1 / 32768)."
        )
    if is_traced(samples):
        return
    loudest = np.abs(samples).max(initial=0)
    if not np.isfinite(loudest):
        raise ValueError(f"{subject} has samples that are NaN or infinite: repair the audio.")
    if loudest > LOUDEST:
        raise ValueError(
            f"{subject} has samples of up to {float(loudest):.3g}, but must be in [-1, 1]: scale them (by 1 / 32768 "
            "if they are of int16)."
        )


def check_ids(name: str, ids: Any, size: int | None, allowed: tuple[int, ...] = (), remedy: str = "") -> None:
    """Raises ``ValueError`` for ids outside ``[0, size)`` that are not among ``allowed``.

    JAX would clamp them silently. Traced ids are checked under ``checkify`` only.
    """
    ids = ids if is_traced(ids) else np.asarray(ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"`{name}` must hold integer ids, but has the dtype {ids.dtype}. {remedy}".rstrip())
    if size is None:
        return
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
