"""The encoders of audio as the joined model calls them: what goes in, how many frames come out."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped
from transformers import HubertConfig, PreTrainedConfig, VoxtralEncoderConfig, Wav2Vec2Config, WhisperConfig
from transformers.models.mimi.configuration_mimi import MimiEncoderConfig

from ...input_checks import Input
from ...modeling_flax_utils import FlaxPreTrainedModel
from ..hubert import FlaxHubertModel
from ..mimi import FlaxMimiEncoderModel
from ..mimi.topology import encoded_length, samples_per_frame
from ..wav2vec2 import FlaxWav2Vec2Model
from ..wav2vec2.topology import convolutions, output_length, samples_for
from ..whisper import FlaxWhisperEncoder
from ..whisper.features_flax_whisper import HOP, SAMPLING_RATE

Convolution = tuple[int, int]
"""Width and stride."""


@dataclasses.dataclass(frozen=True)
class Tower:
    """An encoder of audio.

    Attributes:
        config: its configuration.
        model_class: of the encoder alone.
        input_name: what its input is called.
    """

    config: Any
    model_class: ClassVar[type[FlaxPreTrainedModel]]
    input_name: ClassVar[str] = "input_values"

    @property
    def sampling_rate(self) -> int:
        """Samples a second that it hears."""
        return SAMPLING_RATE

    @property
    def feature_size(self) -> int:
        """Channels of its input, or mel bins."""
        return 1

    @property
    def max_samples(self) -> int | None:
        """Samples that it hears at once, None for any number; fewer are padded to as many."""
        return None

    @property
    def convolutions(self) -> list[Convolution]:
        """What makes frames of samples, first to last; of width 1 where the last frame may be of part of a stride."""
        raise NotImplementedError

    @property
    def inputs(self) -> dict[str, Input]:
        """Its input, and the mask of what counts in it, which has the last axis of it."""
        raise NotImplementedError

    def shape_of_one(self) -> tuple[int, ...]:
        """The shape of an input of a recording that makes a frame, or more."""
        raise NotImplementedError

    def module(self, dtype: DTypeLike, gradient_checkpointing: bool) -> nn.Module:
        return self.model_class.module_class(self.config, dtype, gradient_checkpointing)

    def frames(self, steps: Any) -> Any:
        """Frames of so many steps of the input's last axis, an int or an integer array."""
        raise NotImplementedError

    def states(
        self, module: Any, audio: Any, mask: Shaped[Array, "recordings steps"] | None, deterministic: bool
    ) -> Float[Array, "recordings frames hidden"]:
        """The last hidden states of a bound module."""
        raise NotImplementedError


class WhisperTower(Tower):
    """Whisper's encoder, which hears 30 s always."""

    model_class = FlaxWhisperEncoder
    input_name = "input_features"

    @property
    def feature_size(self) -> int:
        return self.config.num_mel_bins

    @property
    def max_samples(self) -> int:
        return 2 * HOP * self.config.max_source_positions

    @property
    def convolutions(self) -> list[Convolution]:
        return [(1, 2 * HOP)]

    @property
    def inputs(self) -> dict[str, Input]:
        mel_frames = {"mel_frames": 2 * self.config.max_source_positions}
        hint = "pad audio to what the encoder hears"
        return {
            self.input_name: Input(
                {"recordings": None, "bins": self.config.num_mel_bins, **mel_frames}, "floats", hint=hint
            ),
            "audio_attention_mask": Input({"recordings": None, **mel_frames}, "mask"),
        }

    def shape_of_one(self) -> tuple[int, ...]:
        return 1, self.config.num_mel_bins, 2 * self.config.max_source_positions

    def frames(self, steps: Any) -> Any:
        return -(-steps // 2)

    def states(self, module: Any, audio: Any, mask: Any, deterministic: bool) -> Array:
        return module(audio, deterministic).last_hidden_state


class Wav2Vec2Tower(Tower):
    """Wav2Vec2."""

    model_class: ClassVar[type[FlaxPreTrainedModel]] = FlaxWav2Vec2Model

    @property
    def convolutions(self) -> list[Convolution]:
        return [(width, stride) for _, width, stride in convolutions(self.config)]

    @property
    def inputs(self) -> dict[str, Input]:
        axes = {"recordings": None, "samples": None}
        return {self.input_name: Input(axes, "floats"), "audio_attention_mask": Input(axes, "mask")}

    def shape_of_one(self) -> tuple[int, ...]:
        return 1, samples_for(self.config, 1)

    def frames(self, steps: Any) -> Any:
        return output_length(self.config, steps)

    def states(self, module: Any, audio: Any, mask: Any, deterministic: bool) -> Array:
        return module(audio, mask, deterministic=deterministic).last_hidden_state


class HubertTower(Wav2Vec2Tower):
    """HuBERT."""

    model_class = FlaxHubertModel


class MimiTower(Tower):
    """The half of Mimi that hears: its frames before they are quantized."""

    model_class = FlaxMimiEncoderModel

    @property
    def sampling_rate(self) -> int:
        return self.config.sampling_rate

    @property
    def feature_size(self) -> int:
        return self.config.audio_channels

    @property
    def convolutions(self) -> list[Convolution]:
        return [(1, samples_per_frame(self.config))]

    @property
    def inputs(self) -> dict[str, Input]:
        audio = Input({"recordings": None, "channels": self.config.audio_channels, "samples": None}, "audio")
        return {
            self.input_name: audio,
            "audio_attention_mask": Input({"recordings": None, "samples": None}, "mask"),
        }

    def shape_of_one(self) -> tuple[int, ...]:
        return 1, self.config.audio_channels, 1

    def frames(self, steps: Any) -> Any:
        return encoded_length(self.config, steps)

    def states(self, module: Any, audio: Any, mask: Any, deterministic: bool) -> Array:
        mask = None if mask is None else mask.astype(bool)
        return module(audio, mask, deterministic=deterministic).latents.swapaxes(1, 2)


TOWERS: dict[type[PreTrainedConfig], type[Tower]] = {
    WhisperConfig: WhisperTower,
    VoxtralEncoderConfig: WhisperTower,
    Wav2Vec2Config: Wav2Vec2Tower,
    HubertConfig: HubertTower,
    MimiEncoderConfig: MimiTower,
}
"""The encoders by the class of their configuration."""


def tower_of(config: Any) -> Tower:
    """The encoder of a configuration.

    Raises:
        ValueError: its type is not supported.
    """
    tower = TOWERS.get(type(config))
    if tower is None:
        known = ", ".join(each.model_type for each in TOWERS)
        raise ValueError(
            f"`audio_config` has model_type={config.model_type!r}, which is no encoder of audio that is supported: "
            f"use one of {known}."
        )
    return tower(config)
