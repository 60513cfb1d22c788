"""The encoder of Whisper."""

from .features_flax_whisper import log_mel
from .modeling_flax_whisper import FlaxWhisperEncoder
from .modules_flax_whisper import FlaxWhisperEncoderModule

__all__ = ["FlaxWhisperEncoder", "FlaxWhisperEncoderModule", "log_mel"]
