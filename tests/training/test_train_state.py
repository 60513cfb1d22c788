"""Which parameters are trained, and the state before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformers_moshi_flax.training.optimizer import OptimizerConfig, make_optimizer
from transformers_moshi_flax.training.train_state import LossScale, create_train_state, merge_params, split_params


def params(dtype: Any = np.float32) -> dict[str, Any]:
    leaf = np.ones((2, 3), dtype)
    return {
        "audio_encoder": {"encoder": {"kernel": leaf}},
        "decoder": {"lm_head": {"kernel": leaf}, "model": {"embed_tokens": {"embedding": leaf}}},
    }


def test_split_and_merge() -> None:
    trainable, frozen = split_params(params(), ["decoder/model/.*"])
    assert list(trainable["decoder"]) == ["lm_head"] and "audio_encoder" not in trainable
    assert jax.tree.structure(merge_params(trainable, frozen)) == jax.tree.structure(params())


def test_mimi_is_never_trained() -> None:
    trainable, frozen = split_params(params())
    assert list(trainable) == ["decoder"] and list(frozen) == ["audio_encoder"]


def test_wrong_paths() -> None:
    with pytest.raises(ValueError, match=r"`freeze` has 'decoder/lm_hea', which matches .*; near are decoder/lm_head"):
        split_params(params(), ["decoder/lm_hea"])
    with pytest.raises(ValueError, match="leaves no parameter to train"):
        split_params(params(), [".*"])


def told_if_narrow(dtype: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` returns; that the parameters are narrow is told here, with the remedy, or not at all."""
    if dtype == jnp.float32:
        return make()
    with pytest.warns(UserWarning, match=rf"are {jnp.dtype(dtype)}, .*`param_dtype=jnp\.float32`") as told:
        made = make()
    assert len(told) == 1
    return made


def test_frozen_parameters_may_be_narrow() -> None:
    trainable, _ = split_params(params(np.float32), ["decoder/model/.*"])
    _, frozen = split_params(params(jnp.bfloat16), ["decoder/model/.*"])
    optimizer, _ = make_optimizer(OptimizerConfig(), 10, trainable)
    create_train_state(trainable, frozen, optimizer, dtype=jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_master_weights_and_moments_are_float32(dtype: Any) -> None:
    trainable, frozen = split_params(params(dtype), ["decoder/model/.*"])
    optimizer, _ = told_if_narrow(dtype, lambda: make_optimizer(OptimizerConfig(), 10, trainable))
    state = told_if_narrow(dtype, lambda: create_train_state(trainable, frozen, optimizer, dtype=dtype))
    assert state.params["decoder"]["lm_head"]["kernel"].dtype == jnp.float32
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert [leaf.dtype for leaf in moments] == [jnp.float32] * 2, "two moments for the one trainable leaf"
    assert state.frozen_params["audio_encoder"]["encoder"]["kernel"].dtype == dtype
    assert (state.loss_scale is not None) == (dtype == jnp.float16)
    assert jax.tree.structure(state.all_params) == jax.tree.structure(params())


def test_loss_scale() -> None:
    scale = LossScale.create()
    halved = scale.adjusted(jnp.array(False)).adjusted(jnp.array(False))
    assert halved.scale == scale.scale / 4
    grown = scale.replace(good_steps=jnp.int32(LossScale.GROWTH_INTERVAL - 1)).adjusted(jnp.array(True))
    assert grown.scale == 2 * scale.scale and grown.good_steps == 0
    least = scale.replace(scale=jnp.float32(LossScale.LEAST), good_steps=jnp.int32(7)).adjusted(jnp.array(False))
    assert least.scale == LossScale.LEAST and least.good_steps == 0
