"""Distances between waveforms next to constructions from ``torch.stft``."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from transformers_moshi_flax.training.codec.losses import (
    LossConfig,
    cosine_distance,
    log_mel,
    reconstruction_losses,
    si_sdr,
    spectral_distances,
    spectrogram,
    stft,
    weighted,
)

RATE = 24_000


def draw(rows: int = 2, samples: int = 1024, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two waveforms, the second of which is quieter."""
    rng = np.random.default_rng(seed)
    audio = rng.uniform(-1, 1, (rows, 1, samples))
    return audio, 0.3 * audio + 0.1 * rng.standard_normal(audio.shape)


def torch_magnitudes(audio: np.ndarray, window: int) -> torch.Tensor:
    """``(rows, frames, bins)``."""
    hann = torch.hann_window(window, dtype=torch.float64)
    pad = (window - window // 4) // 2
    padded = torch.nn.functional.pad(torch.from_numpy(audio), (pad, pad), mode="reflect")[:, 0]
    found = torch.stft(padded, window, window // 4, window=hann, center=False, return_complex=True)
    return found.abs().swapaxes(1, 2) / hann.square().sum().sqrt()


def slaney_filters(window: int, mels: int) -> np.ndarray:
    """Triangles between points that are equally far apart in Slaney's mel scale: linear to 1 kHz, then logarithmic."""
    step = math.log(6.4) / 27

    def to_hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(step * (mel - 15)))

    top = 15 + math.log(RATE / 2 / 1000) / step
    points = to_hertz(np.linspace(0, top, mels + 2))
    bins = np.linspace(0, RATE / 2, window // 2 + 1)[:, None]
    up = (bins - points[:-2]) / (points[1:-1] - points[:-2])
    down = (points[2:] - bins) / (points[2:] - points[1:-1])
    filters = np.maximum(np.minimum(up, down), 0)
    return filters / filters.sum(axis=0)


@pytest.mark.parametrize("window", [32, 128, 512])
def test_spectra_equal_those_of_torch(window: int, x64: None) -> None:
    audio, _ = draw()
    expected = torch_magnitudes(audio, window)
    found = spectrogram(jnp.asarray(audio), window)
    assert found.shape == (2, 1, 1024 * 4 // window, window // 2 + 1)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-10, atol=1e-12)
    bands = np.log(expected.numpy() @ slaney_filters(window, min(40, window // 8)) + 0.02)
    np.testing.assert_allclose(log_mel(found, window, 40, 0.02, RATE)[:, 0], bands, rtol=1e-9, atol=1e-9)


def test_distances_equal_those_of_torch_in_float32() -> None:
    audio, target = draw()
    windows = (64, 256)
    config = LossConfig(windows=windows, waveform_l1=0.5, waveform_l2=2.0, floor=0.02)
    expected = {"log_mel": 0.0, "magnitude": 0.0}
    for window in windows:
        ours, theirs = torch_magnitudes(audio, window), torch_magnitudes(target, window)
        expected["magnitude"] += (ours - theirs).abs().mean(dim=(1, 2)).numpy() / 2
        filters = torch.from_numpy(slaney_filters(window, min(64, window // 8)))
        ours, theirs = ((each @ filters + config.floor).log() for each in (ours, theirs))
        expected["log_mel"] += (ours - theirs).abs().mean(dim=(1, 2)).numpy() / 2
    single = [jnp.asarray(each, jnp.float32) for each in (audio, target)]
    found = spectral_distances(*single, config, RATE)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5)
    losses = reconstruction_losses(*single, config, RATE)
    tensors = torch.from_numpy(audio), torch.from_numpy(target)
    l1 = torch.nn.functional.l1_loss(*tensors, reduction="none").mean(dim=(1, 2))
    l2 = torch.nn.functional.mse_loss(*tensors, reduction="none").mean(dim=(1, 2))
    np.testing.assert_allclose(losses["waveform_l1"], l1, rtol=1e-5)
    np.testing.assert_allclose(losses["waveform_l2"], l2, rtol=1e-5)
    total = expected["log_mel"] + 0.5 * expected["magnitude"] + 0.5 * l1.numpy() + 2 * l2.numpy()
    np.testing.assert_allclose(weighted(losses, config), total, rtol=1e-5)


def test_a_band_that_is_silent_learns_that_it_should_not_be() -> None:
    """A codec begins almost silent: where a logarithm had a lower limit, it would hear of no band below it."""
    config = LossConfig(windows=(64,), magnitude=0.0, waveform_l1=0.0)
    target = jnp.asarray(draw()[1], jnp.float32)

    def loss(scale: jax.Array) -> jax.Array:
        return jnp.mean(weighted(reconstruction_losses(scale * target, target, config, RATE), config))

    assert jax.grad(loss)(jnp.float32(1e-5)) < -1


def test_gradients_of_silence_are_finite() -> None:
    config = LossConfig(windows=(64,), waveform_l2=1.0)

    def loss(audio: jax.Array) -> jax.Array:
        return jnp.sum(weighted(reconstruction_losses(audio, jnp.zeros_like(audio), config, RATE), config))

    assert np.isfinite(jax.grad(loss)(jnp.zeros((1, 1, 256)))).all()


def test_si_sdr_of_known_mixtures(x64: None) -> None:
    time = np.arange(2400) / RATE
    tone, other = np.sin(2 * np.pi * 200 * time), np.sin(2 * np.pi * 400 * time)  # orthogonal, of equal power
    target = jnp.asarray(np.stack([tone] * 3 + [np.zeros(2400)])[:, None])
    audio = jnp.asarray(np.stack([0.2 * (tone + 0.1 * other), tone + other, 0.5 + tone + 10 * other, tone])[:, None])
    np.testing.assert_allclose(si_sdr(audio, target), [20, 0, -20, 0], atol=1e-6)


def test_cosine_distance() -> None:
    ours = jnp.asarray([[[1.0, 0.0], [0.0, 2.0]]])
    np.testing.assert_allclose(cosine_distance(ours, jnp.asarray([[[3.0, 0.0], [5.0, 0.0]]])), [0.5])


def test_whole_windows_are_not_reflected() -> None:
    assert stft(jnp.zeros((1, 256)), 128, reflects=False).shape == (1, 5, 65)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"log_mel": -1.0}, "`log_mel` must be a finite number, at least 0, but is -1.0"),
        ({"log_mel": 0.0, "magnitude": 0.0, "waveform_l1": 0.0}, "are all 0; give one a weight"),
        ({"windows": (100,)}, r"`windows` must be multiples of 32, but are \[100\]"),
        ({"windows": ()}, "`windows` must be multiples"),
        ({"mel_bins": 0}, "`mel_bins` must be at least 1"),
    ],
)
def test_bad_weights(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)
