"""One interface for the encoders of audio."""

from .modeling_flax_audio_encoder import FlaxAudioEncoder

__all__ = ["FlaxAudioEncoder"]
