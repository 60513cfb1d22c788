"""The list of SEANet's layers against upstream's modules, and what each convolution of a stream remembers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mimi import modeling_mimi

from tests.configs import tiny_mimi_config
from transformers_moshi_flax.models.mimi import FlaxMimiModule
from transformers_moshi_flax.models.mimi.streaming_flax_mimi import (
    FlaxMimiDecoderState,
    FlaxMimiEncoderState,
    histories_by_name,
    inputs_by_order,
    seanet_histories,
)
from transformers_moshi_flax.models.mimi.topology import (
    ELU,
    Conv,
    ConvTranspose,
    Layer,
    Residual,
    convolutions,
    decoder_convolutions,
    downsampling,
    encoder_convolutions,
    seanet_decoder,
    seanet_encoder,
    upsampling,
)

CONFIGURATIONS = [
    {},
    {"num_residual_layers": 3, "dilation_growth_rate": 3, "upsampling_ratios": [3, 2, 5], "use_conv_shortcut": True},
    {"num_residual_layers": 0, "kernel_size": 1, "last_kernel_size": 5, "upsampling_ratios": [4]},
]


def layer_of(theirs: torch.nn.Module) -> Layer:
    """Upstream's module in our words."""
    if isinstance(theirs, torch.nn.ELU):
        return ELU
    if isinstance(theirs, modeling_mimi.MimiResnetBlock):
        shortcut = None if isinstance(theirs.shortcut, torch.nn.Identity) else layer_of(theirs.shortcut)
        return Residual(tuple(layer_of(layer) for layer in theirs.block), shortcut)
    conv = theirs.conv
    sizes = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0])
    if isinstance(theirs, modeling_mimi.MimiConvTranspose1d):
        return ConvTranspose(*sizes, conv.groups)
    return Conv(*sizes, conv.dilation[0], conv.groups)


@pytest.mark.parametrize("overrides", CONFIGURATIONS)
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_layers_are_upstreams_in_their_places(half: str, overrides: dict[str, Any]):
    config = tiny_mimi_config(**overrides)
    ours = {"encoder": seanet_encoder, "decoder": seanet_decoder}[half](config)
    theirs = {"encoder": modeling_mimi.MimiEncoder, "decoder": modeling_mimi.MimiDecoder}[half](config)
    assert ours == tuple(layer_of(layer) for layer in theirs.layers)


@pytest.mark.parametrize("overrides", CONFIGURATIONS)
def test_memory_is_upstreams_padding(overrides: dict[str, Any]):
    """All that upstream pads with on the left, and where it cuts the right off, those that still write there."""
    config = tiny_mimi_config(**overrides)
    for layers, seanet in (
        (seanet_encoder(config), modeling_mimi.MimiEncoder(config)),
        (seanet_decoder(config), modeling_mimi.MimiDecoder(config)),
    ):
        for (number, *inside), conv in convolutions(layers).items():
            theirs = seanet.layers[int(number)]
            theirs = theirs.block[int(*inside)] if inside else theirs
            if isinstance(conv, Conv):
                assert conv.remembered == int(theirs.padding_total)
            else:
                assert conv.remembered == 1 and theirs.padding_right == conv.stride


def test_resampling_is_upstreams():
    config = tiny_mimi_config()
    down = modeling_mimi.MimiEncoderModel(config.encoder_config).downsample
    up = modeling_mimi.MimiDecoderModel(config.decoder_config).upsample
    assert downsampling(config) == layer_of(down)._replace(pad_mode=down.pad_mode, use_bias=False)
    assert upsampling(config) == layer_of(up)._replace(use_bias=False)
    assert down.conv.bias is None and up.conv.bias is None
    assert encoder_convolutions(config)["downsample",] == downsampling(config)
    assert decoder_convolutions(config)["upsample",] == upsampling(config)


def test_states_keep_the_order_of_the_layers():
    """The order and shapes of saved streams and of ``padding_cache``, written out."""
    config = tiny_mimi_config(num_residual_layers=2, upsampling_ratios=[3, 2])
    encoder, decoder = (state.create(config, 1) for state in (FlaxMimiEncoderState, FlaxMimiDecoderState))
    sizes = [(6, 1), (2, 4), (4, 4), (2, 4), (2, 8), (4, 8), (3, 8), (2, 16), (2, 32)]
    assert [history.shape[1:] for history in encoder.histories] == sizes and seanet_histories(config) == len(sizes) - 1
    sizes = [(1, 32), (6, 32), (1, 16), (2, 8), (4, 8), (1, 8), (2, 4), (4, 4), (2, 4)]
    assert [history.shape[1:] for history in decoder.histories] == sizes


def test_histories_are_handed_over_by_name():
    """In whatever order they lie: no convolution may take another's, nor go without."""
    config = tiny_mimi_config(upsampling_ratios=[2, 2], num_filters=4)
    module = FlaxMimiModule(config)
    params = jax.jit(module.init)(jax.random.key(0))["params"]
    seanet = convolutions(seanet_encoder(config))
    rng = np.random.default_rng(0)
    inputs = [
        jnp.float32(rng.standard_normal((2, conv.remembered, conv.in_channels)))
        for conv in seanet.values()
        if conv.remembered
    ]
    x, rows = jnp.float32(rng.standard_normal((2, 8, 1))), jnp.array([True, True])
    histories = histories_by_name(seanet, inputs, rows, rows)

    @jax.jit
    def run(histories: dict[str, Any]) -> tuple[Any, ...]:
        features, after = module.apply(
            {"params": params}, x, None, histories, method=lambda codec, *args: codec.encoder(*args)
        )
        return features, *inputs_by_order(seanet, after)

    backwards = dict(reversed(histories.items()))
    assert list(backwards) != list(histories)
    jax.tree.map(np.testing.assert_array_equal, run(backwards), run(histories))
    with pytest.raises(KeyError, match="'0'"):
        run({name: history for name, history in histories.items() if name != "0"})
    with pytest.raises(ValueError, match="zip"):
        histories_by_name(seanet, inputs[:-1], rows, rows)
