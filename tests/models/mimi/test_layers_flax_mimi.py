"""Convolutions, SEANet and the transformer against upstream's, layer by layer."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
import torch
from transformers.models.mimi import modeling_mimi

from tests.configs import tiny_mimi_config
from tests.models.mimi.with_upstreams_weights import audio, double, last_to_first, run
from tests.torch_oracle import assert_close, double_oracle
from transformers_moshi_flax.models.mimi import layers_flax_mimi as flax_mimi
from transformers_moshi_flax.models.mimi.topology import residual


@pytest.mark.parametrize("samples", [2, 31])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mode", ["constant", "replicate", "reflect"])
def test_conv1d(mode: str, causal: bool, samples: int, x64: None):
    config = tiny_mimi_config(pad_mode=mode, use_causal_conv=causal)
    x = audio(2, samples, channels=6)
    for width, stride, dilation, groups in ((3, 1, 4, 1), (8, 4, 1, 1), (5, 3, 1, 2)):
        theirs = double(modeling_mimi.MimiConv1d(config, 6, 10, width, stride, dilation, groups))
        module = flax_mimi.FlaxMimiConv1d(config, 6, 10, width, stride, dilation, groups, dtype=jnp.float64)
        result, _ = run(theirs, module, jnp.asarray(last_to_first(x)))
        assert_close(last_to_first(result), theirs(torch.tensor(x)), 1e-10, f"{(width, stride, dilation, groups)}")


@pytest.mark.parametrize("causal, ratio", [(True, 1.0), (True, 0.4), (False, 1.0)])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_conv_transpose1d(groups: int, causal: bool, ratio: float, x64: None):
    config = tiny_mimi_config(use_causal_conv=causal, trim_right_ratio=ratio)
    out = 6 if groups == 6 else 9
    for width, stride, frames in ((8, 4, 7), (5, 2, 1)):
        x = audio(2, frames, channels=6)
        theirs = double(modeling_mimi.MimiConvTranspose1d(config, 6, out, width, stride, groups))
        module = flax_mimi.FlaxMimiConvTranspose1d(config, 6, out, width, stride, groups, dtype=jnp.float64)
        result, _ = run(theirs, module, jnp.asarray(last_to_first(x)))
        assert_close(last_to_first(result), theirs(torch.tensor(x)), 1e-10, f"{(width, stride)}")


@pytest.mark.parametrize("shortcut", [True, False])
def test_resnet_block(shortcut: bool, x64: None):
    config = tiny_mimi_config(use_conv_shortcut=shortcut)
    x = audio(2, 11, channels=8)
    theirs = double(modeling_mimi.MimiResnetBlock(config, 8, [2, 1]))
    module = flax_mimi.FlaxMimiResnetBlock(config, residual(config, 8, 2), jnp.float64)
    result, _ = run(theirs, module, jnp.asarray(last_to_first(x)))
    assert_close(last_to_first(result), theirs(torch.tensor(x)), 1e-10)


@pytest.mark.parametrize("ours, theirs", [("FlaxMimiEncoder", "MimiEncoder"), ("FlaxMimiDecoder", "MimiDecoder")])
def test_seanet(ours: str, theirs: str, x64: None):
    config = tiny_mimi_config(num_residual_layers=2, upsampling_ratios=[3, 2, 5])
    x = audio(2, 37, channels=1 if ours == "FlaxMimiEncoder" else 32)
    oracle = double(getattr(modeling_mimi, theirs)(config))
    result, _ = run(oracle, getattr(flax_mimi, ours)(config, jnp.float64), jnp.asarray(last_to_first(x)))
    assert_close(last_to_first(result), oracle(torch.tensor(x)), 1e-10)


@pytest.mark.parametrize(
    "kv_heads, window, bias, act", [(4, 3, False, "gelu"), (2, 50, True, "silu"), (1, 1, False, "relu")]
)
def test_transformer(kv_heads: int, window: int, bias: bool, act: str, x64: None):
    config = tiny_mimi_config(
        num_key_value_heads=kv_heads, sliding_window=window, attention_bias=bias, hidden_act=act, head_dim=10
    )
    config._attn_implementation = "eager"
    x = audio(2, 32, channels=9)
    theirs = double(modeling_mimi.MimiTransformerModel(config))
    with double_oracle():
        expected = theirs(torch.tensor(x)).last_hidden_state
    result = run(theirs, flax_mimi.FlaxMimiTransformerModel(config, jnp.float64), jnp.asarray(x))
    assert_close(result.last_hidden_state, expected, 1e-10)
