"""The state of a stream as a file: names of its leaves, and what tells the stream that it belongs to."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...checkpoints.configs import meaning
from ...generation.sampling import THREEFRY
from .stream_state import StreamState

STATE_FORMAT = "moshi-stream-state"
ORIGIN = "origin"
TEXT_IDS = "dialogue.text_ids"
FILE_NAMES = {"dialogue.steps": "dialogue.columns"}
"""Of what has another name in the files."""


def digest(config: Any, dtype: Any, *options: Any) -> str:
    """Tells configurations and kinds of streams apart; what says nothing about the model is left out."""
    fields = {"config": meaning(config), "dtype": jnp.dtype(dtype).name, "options": options}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def origin_tensor(origin: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(origin), dtype=np.uint8)


def named_leaves(state: StreamState) -> dict[str, Any]:
    """The leaves by their paths, as the files name them; keys as the numbers that they are made of."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    return {FILE_NAMES.get(name, name): key_data(leaf) if is_key(leaf) else leaf for name, leaf in named.items()}


def with_leaves(shapes: StreamState, leaves: dict[str, jax.Array]) -> StreamState:
    """The inverse of :func:`named_leaves`."""
    return jax.tree.unflatten(
        jax.tree.structure(shapes),
        [
            jax.random.wrap_key_data(leaf, impl=THREEFRY) if is_key(shape) else leaf
            for leaf, shape in zip(leaves.values(), jax.tree.leaves(shapes), strict=True)
        ],
    )


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_data(keys: Any) -> Any:
    """Of keys, or of their shape."""
    if isinstance(keys, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, keys)
    return jax.random.key_data(keys)
