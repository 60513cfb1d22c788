"""Features of a speech encoder, at the frame rate of a codec: what codebook 0 may learn from, as Mimi's does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import soxr
from jaxtyping import Float, Float32


class TransformersTeacher:
    """Hidden states of an encoder of ``transformers`` that takes waveforms, such as WavLM; needs torch.

    Every frame of the codec gets the mean of the two frames' worth of hidden states around it, as in Mimi's training.

    Args:
        name_or_path: a directory, or an id on the Hub.
        layer: whose hidden states; the last one if None.
        sampling_rate, frame_rate: of the codec.

    Raises:
        ImportError: torch is not installed.
        ValueError: the encoder takes no waveforms, has no such layer, or a rate that is no multiple of the codec's.
        OSError: it cannot be loaded.
    """

    def __init__(self, name_or_path: str, layer: int | None, sampling_rate: int, frame_rate: float):
        self._name, self._layer, self._rate = name_or_path, layer, sampling_rate
        self._model: Any = None
        config = self._loaded().config
        strides = getattr(config, "conv_stride", None)
        if strides is None:
            raise ValueError(f"{name_or_path!r} ({config.model_type}) takes no waveforms; give one such as WavLM")
        self._hop = math.prod(strides)
        # what the convolutions see of a frame, beyond its hop
        reach, step = 1, 1
        for kernel, stride in zip(config.conv_kernel, strides):
            reach, step = reach + (kernel - 1) * step, step * stride
        self._beyond = reach - self._hop
        rate = self._own_rate / self._hop
        self._ratio = round(rate / frame_rate)
        if self._ratio < 1 or not math.isclose(self._ratio * frame_rate, rate):
            raise ValueError(
                f"{name_or_path!r} has {rate:g} features a second, which is no multiple of the codec's {frame_rate:g} "
                "frames; choose another teacher"
            )
        layers = config.num_hidden_layers
        if layer is not None and not 0 <= layer <= layers:
            raise ValueError(f"`layer` is {layer}, but {name_or_path!r} has 0 (before all layers) to {layers}")

    _own_rate = 16_000

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def _loaded(self) -> Any:
        if self._model is None:
            try:
                import torch  # noqa: F401
            except ImportError as error:
                raise ImportError(
                    'a teacher of transformers needs torch: run `pip install "transformers-moshi-flax[torch]"`'
                ) from error
            from transformers import AutoModel

            self._model = AutoModel.from_pretrained(self._name).eval()
        return self._model

    def __call__(self, audio: Float32[np.ndarray, "rows samples"]) -> Float[np.ndarray, "rows frames dim"]:
        """Features, one vector a frame of the codec."""
        import torch

        audio = soxr.resample(audio.T, self._rate, self._own_rate).T
        audio = audio - audio.mean(axis=1, keepdims=True)
        audio = audio / np.sqrt(np.var(audio, axis=1, keepdims=True) + 1e-7)
        steps = round(audio.shape[1] / self._hop)
        size = steps * self._hop + self._beyond
        audio = np.pad(audio[:, :size], ((0, 0), (0, max(size - audio.shape[1], 0))))
        with torch.no_grad():
            outputs = self._loaded()(torch.from_numpy(audio.astype(np.float32)), output_hidden_states=True)
        states = outputs.hidden_states[-1 if self._layer is None else self._layer].numpy()
        return pooled(states, self._ratio)


def pooled(states: Float[np.ndarray, "rows steps dim"], ratio: int) -> Float[np.ndarray, "rows frames dim"]:
    """Means of ``2 * ratio`` steps every ``ratio``, around each frame; what lies beyond the ends does not count."""
    steps, before = states.shape[1], ratio // 2
    sums = np.concatenate([np.zeros_like(states[:, :1]), np.cumsum(states, axis=1)], axis=1)
    first = np.arange(steps // ratio) * ratio - before
    begin, end = np.clip(first, 0, steps), np.clip(first + 2 * ratio, 0, steps)
    return (sums[:, end] - sums[:, begin]) / (end - begin)[:, None]
