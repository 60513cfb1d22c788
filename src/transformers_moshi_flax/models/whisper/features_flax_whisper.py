"""The log-mel spectrogram that Whisper hears, as a function of arrays, for use inside of programs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from transformers.audio_utils import mel_filter_bank

from ...ops.precision import at_least_float32

SAMPLING_RATE = 16_000
HOP, WIDTH = 160, 400
"""Samples from one mel frame to the next, and of the window around each."""


@functools.cache
def mel_filters(num_mel_bins: int) -> np.ndarray:
    """Slaney's mel filters up to 8 kHz, ``(1 + WIDTH / 2, num_mel_bins)`` float64."""
    return mel_filter_bank(
        num_frequency_bins=1 + WIDTH // 2,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=SAMPLING_RATE / 2,
        sampling_rate=SAMPLING_RATE,
        norm="slaney",
        mel_scale="slaney",
    )


@functools.cache
def windowed_transform() -> np.ndarray:
    """Hann's window and the Fourier transform as one matrix, ``(WIDTH, 2 * (1 + WIDTH / 2))`` float64: the real parts,
    then the imaginary ones."""
    places = np.arange(WIDTH)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * places / WIDTH)
    # whole turns taken off before they are rounded
    angles = 2 * np.pi * (np.outer(places, np.arange(1 + WIDTH // 2)) % WIDTH) / WIDTH
    return window[:, None] * np.concatenate([np.cos(angles), -np.sin(angles)], axis=1)


def transformed(frames: Float[Array, "batch frames width"]) -> Float[Array, "batch frames parts"]:
    """Frames times :func:`windowed_transform`.

    The logarithm shows what is far below the rest of a frame, where a sum in float32 has lost it. So the leading bits
    of both factors are multiplied apart: of those, the sums are exact.
    """
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    matrix = windowed_transform()
    leading = np.round(matrix * 2.0**8) / 2.0**8
    _, exponent = jnp.frexp(jnp.max(jnp.abs(frames), axis=2, keepdims=True))
    unit = jnp.ldexp(jnp.ones((), frames.dtype), exponent - 10)
    first = jnp.round(frames / unit) * unit
    small = product(first, jnp.asarray(matrix - leading, frames.dtype))
    small = small + product(frames - first, jnp.asarray(matrix, frames.dtype))
    return product(first, jnp.asarray(leading, frames.dtype)) + small


@functools.partial(jax.jit, static_argnums=1)
def log_mel(audio: Float[Array, "batch samples"], num_mel_bins: int = 80) -> Float[Array, "batch bins frames"]:
    """A frame every 160 samples; what ``transformers.WhisperFeatureExtractor`` gives for audio of this length.

    Args:
        audio: 16 kHz, in [-1, 1], more than 200 samples. What the encoder is to hear is padded with zeros to 30 s
            before, as the loudest frame of all sets the floor.
        num_mel_bins: of the encoder, 80 or 128.

    Returns:
        In the dtype of ``audio``, about [-1, 1]; ``samples // 160`` frames.
    """
    wide, frames = at_least_float32(audio.dtype), audio.shape[1] // HOP
    padded = jnp.pad(audio.astype(wide), ((0, 0), (WIDTH // 2, WIDTH // 2)), mode="reflect")
    # windows that overlap, of pieces that do not
    pieces = -(-WIDTH // HOP)
    padded = jnp.pad(padded, ((0, 0), (0, max(0, (frames + pieces - 1) * HOP - padded.shape[1]))))
    padded = padded[:, : (frames + pieces - 1) * HOP].reshape(-1, frames + pieces - 1, HOP)
    windows = jnp.concatenate([padded[:, start : start + frames] for start in range(pieces)], axis=2)[..., :WIDTH]
    real, imaginary = jnp.split(transformed(windows), 2, axis=2)
    power = jnp.square(real) + jnp.square(imaginary)
    filters = jnp.asarray(mel_filters(num_mel_bins), wide)
    mel = jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST)
    logs = jnp.log10(jnp.maximum(mel, 1e-10)).swapaxes(1, 2)
    logs = jnp.maximum(logs, jnp.max(logs, axis=(1, 2), keepdims=True) - 8.0)
    return ((logs + 4.0) / 4.0).astype(audio.dtype)
