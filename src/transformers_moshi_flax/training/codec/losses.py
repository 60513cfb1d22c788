"""Distances between a waveform and what the codec makes of it: spectra at several resolutions, samples.

A resolution is a Hann window of n samples every n / 4, scaled such that its squares add up to 1. The ends are
reflected, so that a row of whole hops has as many frames as hops. A mel band is the mean of magnitudes by a filter of
``transformers.audio_utils`` (Slaney's scale).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from functools import reduce

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from transformers.audio_utils import mel_filter_bank

from ...ops.precision import at_least_float32

_LEAST_POWER = 1e-20
"""Keeps the gradient of a root finite at 0."""


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The weights of the parts of the loss; those with 0 are not computed.

    Attributes:
        log_mel: of the mean absolute difference of logarithms of mel bands, averaged over ``windows``.
        magnitude: of the mean absolute difference of magnitudes, averaged over ``windows``.
        waveform_l1, waveform_l2: of the mean absolute and the mean squared difference of samples.
        commitment: of the distance of latents from their entries, as a share of the variance that the entries have.
        adversarial: of the discriminators' opinion (hinge).
        feature_matching: of the discriminators' features, each as a share of its own size.
        distillation: of the cosine distance between codebook 0 and a teacher's features.
        windows: samples of each window, multiples of 32.
        mel_bins: the most bands of a window; a window of n samples has n / 8 at most.
        floor: added to a mel band (white noise of a deviation of 1 has 1) before its logarithm: far below it is
            silence, which would count for more than speech. A limit instead would leave silent bands without a
            gradient, and a codec begins silent.

    Raises:
        ValueError: a weight is negative or not finite, no distance has one, a window is no multiple of 32, or the
            floor is not above 0.
    """

    log_mel: float = 1.0
    magnitude: float = 0.5
    waveform_l1: float = 0.3
    waveform_l2: float = 0.0
    commitment: float = 0.25
    adversarial: float = 0.0
    feature_matching: float = 0.0
    distillation: float = 0.0
    windows: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    mel_bins: int = 64
    floor: float = 1e-3

    def __post_init__(self):
        for name in (*RECONSTRUCTION, "commitment", "adversarial", "feature_matching", "distillation"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` must be a finite number, at least 0, but is {value}.")
        if not any(getattr(self, name) for name in RECONSTRUCTION):
            raise ValueError(f"{', '.join(f'`{name}`' for name in RECONSTRUCTION)} are all 0; give one a weight.")
        if not self.windows or any(window < 32 or window % 32 for window in self.windows):
            raise ValueError(f"`windows` must be multiples of 32, but are {list(self.windows)}.")
        if self.mel_bins < 1:
            raise ValueError(f"`mel_bins` must be at least 1, but is {self.mel_bins}.")
        if not (math.isfinite(self.floor) and self.floor > 0):
            raise ValueError(f"`floor` must be a finite number above 0, but is {self.floor}.")

    @property
    def uses_discriminator(self) -> bool:
        """Whether discriminators are trained."""
        return bool(self.adversarial or self.feature_matching)

    def problems(self) -> Iterator[str]:
        """As of ``ModelConfig``."""
        if self.feature_matching and not self.adversarial:
            yield (
                "`feature_matching`: it compares features of discriminators, which are trained only where "
                "losses.adversarial has a weight; give it one"
            )


RECONSTRUCTION = ("log_mel", "magnitude", "waveform_l1", "waveform_l2")


def spectrogram(audio: Float[Array, "*shape samples"], window: int) -> Float[Array, "*shape frames bins"]:
    """Magnitudes of a short-time Fourier transform, in at least float32.

    Args:
        audio: more samples than ``3 / 8`` windows.
        window: samples of a Hann window; a frame begins every ``window / 4``.
    """
    spectrum = stft(audio, window)
    return jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + _LEAST_POWER)


def stft(audio: Float[Array, "*shape samples"], window: int, reflects: bool = True) -> Array:
    """The complex spectrum ``(*shape, frames, bins)``, with the ends reflected or of whole windows alone."""
    hop = window // 4
    audio = audio.astype(at_least_float32(audio.dtype))
    if reflects:
        padding = (window - hop) // 2
        audio = jnp.pad(audio, ((0, 0),) * (audio.ndim - 1) + ((padding, padding),), mode="reflect")
    hops = audio.shape[-1] // hop
    pieces = audio[..., : hops * hop].reshape(*audio.shape[:-1], hops, hop)
    frames = jnp.concatenate([pieces[..., part : hops - 3 + part, :] for part in range(4)], axis=-1)
    return jnp.fft.rfft(frames * jnp.asarray(hann(window), audio.dtype).reshape(*[1] * audio.ndim, -1))


@functools.cache
def hann(size: int) -> Float[np.ndarray, "size"]:
    """A periodic Hann window whose squares add up to 1: the spectrum of white noise is as large as its samples."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    return window / np.sqrt(np.sum(window**2))


@functools.cache
def mel_filters(window: int, bins: int, sampling_rate: int) -> Float[np.ndarray, "frequencies mels"]:
    """Weights of the frequencies of a window in each mel band, which add up to 1."""
    mels, highest = min(bins, window // 8), sampling_rate / 2
    filters = mel_filter_bank(window // 2 + 1, mels, 0.0, highest, sampling_rate, mel_scale="slaney")
    return filters / filters.sum(axis=0)


def log_mel(
    magnitudes: Float[Array, "*shape frames bins"], window: int, bins: int, floor: float, sampling_rate: int
) -> Float[Array, "*shape frames mels"]:
    """Natural logarithms of mel bands and ``floor``, so that silence has one; from :func:`spectrogram`."""
    filters = jnp.asarray(mel_filters(window, bins, sampling_rate), magnitudes.dtype)
    return jnp.log(magnitudes @ filters + floor)


def spectral_distances(
    audio: Float[Array, "rows channels samples"],
    target: Float[Array, "rows channels samples"],
    config: LossConfig,
    sampling_rate: int,
) -> dict[str, Float[Array, "rows"]]:
    """``log_mel`` and ``magnitude`` of every row: mean absolute differences, averaged over the windows."""
    sums: dict[str, list[Array]] = {"log_mel": [], "magnitude": []}
    for window in config.windows:
        ours, theirs = spectrogram(audio, window), spectrogram(target, window)
        sums["magnitude"].append(jnp.mean(jnp.abs(ours - theirs), axis=(1, 2, 3)))
        ours, theirs = (log_mel(each, window, config.mel_bins, config.floor, sampling_rate) for each in (ours, theirs))
        sums["log_mel"].append(jnp.mean(jnp.abs(ours - theirs), axis=(1, 2, 3)))
    return {name: reduce(jnp.add, parts) / len(config.windows) for name, parts in sums.items()}


def reconstruction_losses(
    audio: Float[Array, "rows channels samples"],
    target: Float[Array, "rows channels samples"],
    config: LossConfig,
    sampling_rate: int,
) -> dict[str, Float[Array, "rows"]]:
    """The parts of the loss that compare waveforms, of every row."""
    audio, target = (each.astype(at_least_float32(each.dtype)) for each in (audio, target))
    losses: dict[str, Array] = {}
    if config.log_mel or config.magnitude:
        losses |= spectral_distances(audio, target, config, sampling_rate)
    if config.waveform_l1:
        losses["waveform_l1"] = jnp.mean(jnp.abs(audio - target), axis=(1, 2))
    if config.waveform_l2:
        losses["waveform_l2"] = jnp.mean(jnp.square(audio - target), axis=(1, 2))
    return losses


def weighted(losses: Mapping[str, Array], config: LossConfig) -> Array:
    """The sum of the parts by their weights."""
    return sum(getattr(config, name) * loss for name, loss in losses.items())


def si_sdr(
    audio: Float[Array, "rows channels samples"], target: Float[Array, "rows channels samples"]
) -> Float[Array, "rows"]:
    """Scale-invariant ratio of signal to distortion in dB (Le Roux et al., 2019), without means; 0 of silence."""
    audio, target = (each.reshape(len(each), -1).astype(at_least_float32(each.dtype)) for each in (audio, target))
    audio, target = (each - each.mean(axis=1, keepdims=True) for each in (audio, target))
    power = jnp.sum(target * target, axis=1)
    least = jnp.finfo(audio.dtype).tiny * 1e8
    scaled = (jnp.sum(audio * target, axis=1) / jnp.maximum(power, least))[:, None] * target
    signal, distortion = jnp.sum(scaled**2, axis=1), jnp.sum((audio - scaled) ** 2, axis=1)
    ratio = 10 * jnp.log10(jnp.maximum(signal, least) / jnp.maximum(distortion, least))
    return jnp.where(power > least, ratio, 0)


def cosine_distance(
    ours: Float[Array, "rows frames dim"], theirs: Float[Array, "rows frames dim"]
) -> Float[Array, "rows"]:
    """One less the cosine of the angle between vectors, averaged over the frames of a row."""
    norms = jnp.linalg.norm(ours, axis=-1) * jnp.linalg.norm(theirs, axis=-1)
    cosines = jnp.sum(ours * theirs, axis=-1) / jnp.maximum(norms, 1e-8)
    return jnp.mean(1 - cosines, axis=-1)
