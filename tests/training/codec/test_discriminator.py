"""The discriminators next to EnCodec's construction in PyTorch with the same weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

from transformers_moshi_flax.training.codec.discriminator import (
    DiscriminatorConfig,
    MultiScaleSTFTDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)

WINDOWS, FILTERS = (128, 64), 6


def torch_scale(window: int, params: dict[str, Any], audio: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As ``DiscriminatorSTFT``: convolutions of (time, frequency), weight norm of torch, leaky ReLU of 0.2."""
    hann = torch.hann_window(window, dtype=torch.float64)
    rows, channels, _ = audio.shape
    found = torch.stft(audio.flatten(0, 1), window, window // 4, window=hann, center=False, return_complex=True)
    found = (found / hann.square().sum().sqrt()).unflatten(0, (rows, channels))
    x = torch.cat([found.real, found.imag], dim=1).swapaxes(2, 3)
    shapes = [((3, 9), (1, 1), (1, 1))] + [((3, 9), (1, 2), (d, 1)) for d in (1, 2, 4)] + [((3, 3), (1, 1), (1, 1))]
    features = []
    for number, (kernel, stride, dilation) in enumerate([*shapes, ((3, 3), (1, 1), (1, 1))]):
        last = number == len(shapes)
        leaves = params["conv_post" if last else f"convs_{number}"]
        padding = tuple((size - 1) * step // 2 for size, step in zip(kernel, dilation))
        outputs = len(leaves["bias"])
        conv = torch.nn.Conv2d(x.shape[1], outputs, kernel, stride, padding, dilation, dtype=torch.float64)
        conv = weight_norm(conv)
        with torch.no_grad():
            conv.bias.copy_(torch.from_numpy(np.array(leaves["bias"])))
            conv.parametrizations.weight.original0.copy_(
                torch.from_numpy(np.array(leaves["length"])).reshape(-1, 1, 1, 1)
            )
            conv.parametrizations.weight.original1.copy_(
                torch.from_numpy(np.array(leaves["direction"])).permute(3, 2, 0, 1)
            )
        x = conv(x)
        if not last:
            x = torch.nn.functional.leaky_relu(x, 0.2)
            features.append(x)
    return x, features


@pytest.fixture(scope="module")
def drawn() -> dict[str, Any]:
    with jax.enable_x64(True):
        module = MultiScaleSTFTDiscriminator(WINDOWS, FILTERS, jnp.float64)
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, 400)))["params"]
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape) * 0.5 + 0.1, shapes)
        real, fake = rng.uniform(-1, 1, (2, 2, 1, 400))
        opinions = [module.apply({"params": params}, jnp.asarray(audio)) for audio in (real, fake)]
    theirs = [
        [
            torch_scale(window, params[f"discriminators_{number}"], torch.from_numpy(audio))
            for number, window in enumerate(WINDOWS)
        ]
        for audio in (real, fake)
    ]
    return {"ours": opinions, "theirs": theirs}


def test_opinions_and_features_equal_those_of_torch(drawn: dict[str, Any]) -> None:
    for ours, theirs in zip(drawn["ours"], drawn["theirs"], strict=True):
        for (logits, features), (their_logits, their_features) in zip(ours, theirs, strict=True):
            for found, expected in zip([logits, *features], [their_logits, *their_features], strict=True):
                expected = expected.detach().permute(0, 2, 3, 1).numpy()
                assert found.shape == expected.shape
                np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def test_losses_equal_those_of_torch(drawn: dict[str, Any], x64: None) -> None:
    (real, fake), (their_real, their_fake) = drawn["ours"], drawn["theirs"]
    relu = torch.nn.functional.relu
    judged = sum(relu(1 - a[0]).mean() + relu(1 + b[0]).mean() for a, b in zip(their_real, their_fake)) / 2
    heard = sum(relu(1 - b[0]).mean() for b in their_fake) / 2
    pairs = [pair for a, b in zip(their_real, their_fake) for pair in zip(a[1], b[1], strict=True)]
    matched = sum(torch.nn.functional.l1_loss(b, a) / a.abs().mean() for a, b in pairs) / len(pairs)
    np.testing.assert_allclose(discriminator_loss(real, fake), judged.item(), rtol=1e-9)
    np.testing.assert_allclose(adversarial_loss(fake), heard.item(), rtol=1e-9)
    np.testing.assert_allclose(feature_matching_loss(real, fake), matched.item(), rtol=1e-9)


def test_lengths_begin_as_those_of_the_directions() -> None:
    module = MultiScaleSTFTDiscriminator((64,), 3)
    params = module.init(jax.random.key(0), jnp.zeros((1, 1, 128)))["params"]
    conv = params["discriminators_0"]["convs_1"]
    np.testing.assert_allclose(conv["length"] ** 2, (conv["direction"] ** 2).sum(axis=(0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize(
    "values, key",
    [
        ({"windows": (100,)}, "windows"),
        ({"filters": 0}, "filters"),
        ({"start_step": -1}, "start_step"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"b1": 1.0}, "b1"),
    ],
)
def test_bad_settings(values: dict, key: str) -> None:
    (problem,) = DiscriminatorConfig(**values).problems()
    assert problem.startswith(f"`{key}`: ")
