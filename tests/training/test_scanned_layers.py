"""Scanned and recomputed layers: the same loss and gradients, in a program that does not grow with the layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.configs import tiny_moshi_config
from tests.training.examples import draw_batch, make_module, small_config
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.models.moshi.modules_flax_moshi import FlaxMoshiForCausalLMModule
from transformers_moshi_flax.nn.cache import LinearCache
from transformers_moshi_flax.partitioning import param_shardings
from transformers_moshi_flax.training.mesh import make_mesh
from transformers_moshi_flax.training.objective import ObjectiveConfig, objective_loss
from transformers_moshi_flax.training.optimizer import OptimizerConfig, make_optimizer
from transformers_moshi_flax.training.scanned_layers import stack_layers, unstack_layers
from transformers_moshi_flax.training.train_state import split_params


def two_layers(**overrides: Any) -> Any:
    return small_config(num_hidden_layers=2, depth_decoder_config={"num_hidden_layers": 2}, **overrides)


def gradient(module: Any, batch: dict[str, np.ndarray]) -> Any:
    def loss(params: Any) -> jax.Array:
        return objective_loss(module, params, batch, ObjectiveConfig())[0]

    return jax.jit(jax.value_and_grad(loss))


def of_moshi(params: dict[str, Any]) -> dict[str, Any]:
    return split_params(params)[0]


def test_there_and_back() -> None:
    _, params = make_module(two_layers())
    stacked = stack_layers(params)
    flat, expected = (flatten_dict(tree, sep="/") for tree in (stacked, params))
    name = "depth_decoder/layers/{}/mlp/fc1/2/kernel"
    np.testing.assert_array_equal(flat[name.format("stacked")][1], expected[name.format(1)])
    assert not any("decoder/model/layers/0" in path or "depth_decoder/layers/0" in path for path in flat)
    assert stacked["audio_encoder"] == params["audio_encoder"]
    again = flatten_dict(unstack_layers(stacked), sep="/")
    assert again.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(again[path], leaf)
    assert flatten_dict(unstack_layers(params)).keys() == flatten_dict(params).keys()


def test_layers_must_be_alike() -> None:
    _, params = make_module(two_layers())
    del params["decoder"]["model"]["layers"]["0"]["mlp"]["fc1"]["kernel"]
    message = r"`params` has decoder/model/layers/stacked/mlp/fc1/kernel for some layers, but not for \[0\]"
    with pytest.raises(ValueError, match=message):
        stack_layers(params)


def test_loss_and_gradients_are_equal(x64: None) -> None:
    config = two_layers()
    module, params = make_module(config, dtype=jnp.float64)
    params = of_moshi(jax.tree.map(lambda leaf: leaf.astype(np.float64), params))
    batch = draw_batch(config, (5, 3), 5)
    loss, gradients = gradient(module, batch)(params)
    expected = flatten_dict(gradients, sep="/")
    for scanned in (False, True):
        changed = module.clone(gradient_checkpointing=True, scan_layers=scanned)
        other_loss, other = gradient(changed, batch)(stack_layers(params) if scanned else params)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-12)
        other = flatten_dict(unstack_layers(other), sep="/")
        assert other.keys() == expected.keys()
        for path, leaf in expected.items():
            np.testing.assert_allclose(other[path], leaf, rtol=0, atol=1e-12 * (1 + np.abs(leaf).max()), err_msg=path)


def test_program_does_not_grow_with_the_layers() -> None:
    def products(layers: int, scan_layers: bool) -> int:
        config = tiny_moshi_config(num_hidden_layers=layers)
        module = FlaxMoshiForCausalLMModule(config, gradient_checkpointing=True, scan_layers=scan_layers)
        ids = jnp.zeros((1, 3), jnp.int32)
        params = jax.eval_shape(module.init, jax.random.key(0), ids)
        loss = jax.grad(lambda params: module.apply(params, ids, labels=ids).loss)
        return jax.jit(loss).lower(params).as_text().count("dot_general")

    assert products(5, True) == products(2, True) < products(2, False) < products(5, False)


def test_dropout_follows_its_key() -> None:
    config = two_layers(attention_dropout=0.5)
    module, params = make_module(config)
    params = of_moshi(params)
    scanned, batch = module.clone(scan_layers=True), draw_batch(config, (4,), 4)

    @jax.jit
    def hidden_states(rng: jax.Array) -> Any:
        outputs = scanned.apply(
            {"params": stack_layers(params)},
            input_ids=jnp.asarray(batch["input_ids"]),
            moshi_audio_codes=jnp.asarray(batch["moshi_audio_codes"]),
            deterministic=False,
            rngs={"dropout": rng},
        )
        return outputs.hidden_states

    first, again, other = (hidden_states(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[-1], again[-1])
    assert len(first) == 3 and np.abs(first[-1] - other[-1]).max() > 1e-3


def test_rates_of_single_layers_are_those_of_their_paths_in_files() -> None:
    _, params = make_module(two_layers())
    params = of_moshi(params)
    rates = {r"decoder/model/layers/1/.*": 0.5, r"depth_decoder/layers/.*": 0.25, r".*/layers/0/mlp/fc1/.*": 3.0}
    config = OptimizerConfig(learning_rate_multipliers=rates, schedule="constant", learning_rate=0.1)

    def updates(params: dict[str, Any]) -> dict[str, np.ndarray]:
        optimizer, _ = make_optimizer(config, 2, params)
        with jax.numpy_dtype_promotion("standard"):
            changes, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        return flatten_dict(unstack_layers(changes), sep="/")

    expected, found = updates(params), updates(stack_layers(params))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, err_msg=path)
    with pytest.raises(ValueError, match=r"'decoder/model/layers/2/\.\*', which matches no parameter"):
        other = OptimizerConfig(learning_rate_multipliers={"decoder/model/layers/2/.*": 0.5})
        make_optimizer(other, 2, stack_layers(params))


def test_partition_rules_know_stacked_layers() -> None:
    _, params = make_module(two_layers())
    shapes = jax.eval_shape(lambda: of_moshi(stack_layers(params)))
    specs = {
        path: sharding.spec for path, sharding in flatten_dict(param_shardings(make_mesh(), shapes), sep="/").items()
    }
    assert specs["decoder/model/layers/stacked/mlp/fc2/kernel"] == jax.P(None, "tensor", "fsdp")
    assert specs["depth_decoder/layers/stacked/self_attn/q_proj/linear/1/kernel"] == jax.P(None, "fsdp", "tensor")
    _, frozen = split_params(shapes, [r"depth_decoder/layers/stacked/.*"])
    assert set(frozen) == {"depth_decoder"}


def test_scanned_layers_have_no_cache_and_are_no_model() -> None:
    config = two_layers()
    module, params = make_module(config)
    with pytest.raises(ValueError, match="`cache` cannot be used with `scan_layers`"):
        module.clone(scan_layers=True).apply(
            {"params": of_moshi(stack_layers(params))},
            input_ids=jnp.zeros((1, 1), jnp.int32),
            cache=LinearCache.create(config, 1, 2),
        )
    with pytest.raises(ValueError, match="has no keyword argument 'scan_layers'"):
        FlaxMoshiForConditionalGeneration(config, scan_layers=True, _do_init=False)
