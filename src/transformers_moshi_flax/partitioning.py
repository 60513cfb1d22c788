"""How parameters lie on a mesh: a table over parameter paths, for all models.

The mesh axes are ``data``, ``fsdp`` and ``tensor``; axes that a mesh lacks count as size 1. Linear layers that fan out
are split by their columns over ``tensor``, those that fan in by their rows, embeddings by their features; the other
large axis goes to ``fsdp``. Norms, biases, convolutions, codebooks and the scales of quantized layers are small and
lie on every device.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from .input_checks import shortened

_KERNEL = r"kernel(?:_int8|_int4|_nf4)?"

PARTITION_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (
        rf"(?:.*/)?(?:q_proj|k_proj|v_proj|fc1|gate_proj|up_proj|intermediate_dense)/(?:.*/)?{_KERNEL}",
        PartitionSpec("fsdp", "tensor"),
    ),
    (rf"(?:.*/)?(?:o_proj|out_proj|fc2|down_proj|output_dense)/(?:.*/)?{_KERNEL}", PartitionSpec("tensor", "fsdp")),
    (
        rf"(?:.*/)?(?:lm_head|lm_heads/\d+|input_projections/\d+)/{_KERNEL}",
        PartitionSpec("fsdp", "tensor"),
    ),
    (r"(?:.*/)?(?:text_)?embed_tokens/(?:\d+/)?embedding", PartitionSpec(None, ("fsdp", "tensor"))),
    (r".*", PartitionSpec()),
)
"""Regular expression on the "/"-joined path -> axes; the first that matches counts."""


ROW_AXES = ("data", "fsdp")

STACKED = "stacked"
"""In place of the number in the path of layers whose parameters are stacked; no axis splits the leading dimension."""


def split_rows(array: jax.Array) -> jax.Array:
    """``array`` with its rows alone split, over ``data`` and ``fsdp``, where a mesh with them is set.

    Said of what goes into every layer, so that parameters are gathered where they are used, a layer at a time. Left
    alone, the compiler rather gathers the rows: parameters split over ``fsdp`` would make it an axis like ``tensor``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = _automatic(mesh, ROW_AXES)
    if not axes or array.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return array
    # not UNCONSTRAINED: where a product sums over what `tensor` splits and its result is to be split by it too, beside
    # rows over two axes, XLA's partitioner (jax 0.10) leaves rows on devices that should have others
    return jax.lax.with_sharding_constraint(array, PartitionSpec(axes))


def gathered_table(table: ArrayLike) -> jax.Array | None:
    """An embedding table with its features split over ``tensor`` alone, where a mesh is set, else None.

    Looked up as it lies, split over ``fsdp`` too, the result would have to change both its axes to be split by rows:
    XLA's partitioner replicates it on the way.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _automatic(mesh, ROW_AXES):
        return None
    return jax.lax.with_sharding_constraint(table, PartitionSpec(None, _automatic(mesh, ("tensor",)) or None))


def _automatic(mesh: AbstractMesh, names: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of ``names`` that the compiler splits by; of the others (explicit, ``shard_map``) the caller speaks."""
    types = dict(zip(mesh.axis_names, mesh.axis_types))
    return tuple(name for name in names if types.get(name) == AxisType.Auto)


def param_shardings(mesh: Mesh, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """A sharding for every parameter, by :data:`PARTITION_RULES`.

    Args:
        mesh: with any of the axes ``data``, ``fsdp``, ``tensor``.
        shapes: a parameter tree whose leaves have a ``shape``, such as ``model.params_shape_tree``.

    Returns:
        A tree of ``NamedSharding``.

    Raises:
        ValueError: the mesh has other axes, or splits a dimension that it does not divide; all such are listed.
    """
    unknown = set(mesh.axis_names) - {"data", "fsdp", "tensor"}
    if unknown:
        raise ValueError(f"the mesh has the axes {sorted(unknown)}; use 'data', 'fsdp' and 'tensor'")
    shardings, problems = {}, []
    for path, leaf in flatten_dict(shapes, sep="/").items():
        rule = next(spec for pattern, spec in PARTITION_RULES if re.fullmatch(pattern, path))
        axes = [_on_mesh(mesh, entry) for entry in ((None, *rule) if STACKED in path.split("/") else rule)]
        problems += [
            f"{path} has {size} in dimension {dimension}, not divisible by {'x'.join(names)} = {_size(mesh, names)}"
            for dimension, (size, names) in enumerate(zip(leaf.shape, axes))
            if size % _size(mesh, names)
        ]
        shardings[path] = NamedSharding(mesh, PartitionSpec(*(names or None for names in axes)))
    if problems:
        raise ValueError(f"the mesh does not fit the parameters: {'; '.join(problems)}. Use smaller axes")
    return unflatten_dict(shardings, sep="/")


def _on_mesh(mesh: Mesh, entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return tuple(name for name in names if name in mesh.axis_names)


def _size(mesh: Mesh, names: tuple[str, ...]) -> int:
    size = 1
    for name in names:
        size *= mesh.shape[name]
    return size


def resolve_shardings(sharding: Any, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """``sharding=`` of ``from_pretrained``: a mesh, one sharding for all, or a tree of them -> by "/"-joined path.

    Raises:
        ValueError: it is none of these, the tree lacks parameters, or shardings do not fit the parameters' shapes.
    """
    flat_shapes = flatten_dict(shapes, sep="/")
    if isinstance(sharding, Mesh):
        sharding = param_shardings(sharding, shapes)
    if isinstance(sharding, jax.sharding.Sharding):
        return _fitting(dict.fromkeys(flat_shapes, sharding), flat_shapes)
    if not isinstance(sharding, Mapping):
        raise ValueError(f"sharding must be a Mesh, a Sharding or a tree of them, got {type(sharding).__name__}")
    flat = flatten_dict(sharding, sep="/")
    wrong = sorted(path for path in flat_shapes if not isinstance(flat.get(path), jax.sharding.Sharding))
    if wrong:
        raise ValueError(f"sharding has no Sharding for {wrong[:8]}; give one for every parameter")
    return _fitting({path: flat[path] for path in flat_shapes}, flat_shapes)


def _fitting(
    shardings: dict[str, jax.sharding.Sharding], shapes: Mapping[str, Any]
) -> dict[str, jax.sharding.Sharding]:
    problems = []
    for path, sharding in shardings.items():
        try:
            sharding.shard_shape(shapes[path].shape)
        except (ValueError, IndexError):  # IndexError: more axes than dimensions
            problems.append(f"{path} of shape {shapes[path].shape} by {getattr(sharding, 'spec', sharding)}")
    if problems:
        raise ValueError(
            f"sharding cannot split {shortened(problems, 8, '; ')}. Give a mesh, or a tree of Shardings that divide "
            "the parameters"
        )
    return shardings
