"""The shapes of a model's parameters, found without tracing every one of its many equal layers, and what fits them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.core import ShapedArray
from jax.tree_util import PyTreeDef

from .input_checks import shortened
from .nn.initializers import without_values


def param_shapes(init: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """As ``jax.eval_shape(init)``, several times as fast for deep models.

    The parameters that a linen module makes follow from its class, its fields and the shapes of its inputs. Of the
    calls in which these agree, such as those of a decoder's layers, only the first is traced, and the parameters and
    outputs of the others are made up in its image.

    Args:
        init: runs ``module.init`` and returns the parameters.

    Returns:
        The tree of ``jax.ShapeDtypeStruct``.
    """
    seen: dict[Any, tuple[PyTreeDef, list[Any]]] = {}
    kept = []  # what signatures identify by address must not be freed

    def trace_once(call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        # parameters that are already there come from setup or an earlier call, and others may differ in them
        if context.method_name != "__call__" or not module.path or module.variables.get("params"):
            return call(*args, **kwargs)
        structure, leaves = _form((args, kwargs))
        signature = (*_kind(module), structure, *map(_identity, leaves))
        if signature not in seen:
            outputs = call(*args, **kwargs)
            seen[signature] = _form((outputs, dict(module.variables.get("params", {}))))
            kept.append((module, args, kwargs))
            return outputs
        structure, leaves = seen[signature]
        outputs, params = structure.unflatten([_filled(leaf) for leaf in leaves])
        for name, value in params.items():
            module.put_variable("params", name, value)
        return outputs

    with without_values(), nn.intercept_methods(trace_once):
        # a function of its own: JAX keeps traces by function, and this one is of no other use
        return jax.eval_shape(lambda: init())


def refuse_unsavable(params: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """ValueError, naming the leaves, for parameters whose files a model could not load. Nothing is fetched.

    Args:
        params: a parameter tree.
        shapes: of the model.
    """
    wanted, given = flatten_dict(shapes), flatten_dict(params)
    problems = [f"{name} is missing" for name in sorted("/".join(path) for path in wanted.keys() - given.keys())]
    replicated = False
    for path, leaf in given.items():
        name = "/".join(map(str, path))
        if path not in wanted:
            problems.append(f"{name} is no parameter of the model")
        elif not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, jax.core.Tracer):
            problems.append(f"{name} is no array with values, but a {type(leaf).__name__}")
        elif leaf.shape != wanted[path].shape:
            problems.append(f"{name} has the shape {leaf.shape} instead of {wanted[path].shape}")
            replicated |= leaf.shape[1:] == wanted[path].shape
        elif jnp.issubdtype(wanted[path].dtype, jnp.floating) and not jnp.issubdtype(leaf.dtype, jnp.floating):
            problems.append(f"{name} is {leaf.dtype.name} instead of floating-point")
        elif not jnp.issubdtype(wanted[path].dtype, jnp.floating) and leaf.dtype != wanted[path].dtype:
            problems.append(f"{name} is {leaf.dtype.name} instead of {wanted[path].dtype.name}")
    if problems:
        remedy = "give arrays with the paths and shapes of params_shape_tree"
        if replicated:
            remedy = "take a leading axis of devices off with flax.jax_utils.unreplicate(params)"
        raise ValueError(f"params would not load again: {shortened(problems, 8, '; ')}. Nothing is written; {remedy}")


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """The class and the fields, but for name and parent."""
    fields = [field.name for field in dataclasses.fields(module) if field.name not in ("name", "parent")]
    return type(module), *(_identity(getattr(module, name)) for name in fields)


def _form(tree: Any) -> tuple[PyTreeDef, list[Any]]:
    """The structure and the leaves of a tree, of arrays the shapes and dtypes alone."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]


def _filled(leaf: Any) -> Any:
    return jax.lax.empty(leaf.shape, leaf.dtype) if isinstance(leaf, ShapedArray) else leaf


def _identity(value: Any) -> tuple[type, Any]:
    """Equal for two values only if they are interchangeable; not every value can be hashed or compared."""
    return type(value), value if isinstance(value, bool | int | float | str | ShapedArray) else id(value)
