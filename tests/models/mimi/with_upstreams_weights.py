"""Mimi's modules with upstream's weights: both in float64, on the same inputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.torch_oracle import numpy, randomize, to_double
from transformers_moshi_flax.checkpoints.rules import read_params
from transformers_moshi_flax.models.mimi.checkpoint_flax_mimi import mimi_rules

WHERE = ("quantizer", "any")  # a path under which the table knows every module


def audio(batch: int, samples: int, seed: int = 0, channels: int = 1, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, channels, samples)).astype(dtype)


def run(theirs: torch.nn.Module, module: Any, *inputs: Any, method: str = "__call__") -> Any:
    """Our module in double, with the weights that upstream's has, which went through the table."""
    template = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, method=method))["params"]
    state = {".".join((*WHERE, name)): numpy(tensor) for name, tensor in theirs.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if name.rsplit(".", 1)[1] not in NOT_SAVED}
    params, missing, unexpected, mismatched = read_params({WHERE[0]: {WHERE[1]: template}}, mimi_rules(), state)
    assert not missing and not unexpected and not mismatched, (missing, unexpected, mismatched)
    params = jax.tree.map(jnp.asarray, params[WHERE[0]][WHERE[1]])
    arrays = [value for value in inputs if isinstance(value, jax.Array)]
    # one program: operation by operation, each would be compiled for itself
    compiled = jax.jit(
        lambda *arrays: module.apply({"params": params}, *arrays, *inputs[len(arrays) :], method=method)
    )
    return compiled(*arrays)


NOT_SAVED = ("stride", "kernel_size", "padding_total")  # buffers of upstream that its files lack


def double(theirs: torch.nn.Module) -> torch.nn.Module:
    return to_double(randomize(theirs))


def last_to_first(x: Any) -> np.ndarray:
    return np.swapaxes(np.asarray(x), 1, 2)
