"""Wav2Vec2, an encoder of audio."""

from .modeling_flax_wav2vec2 import FlaxWav2Vec2Model, FlaxWav2Vec2PreTrainedModel
from .modules_flax_wav2vec2 import FlaxWav2Vec2BaseModelOutput, FlaxWav2Vec2Module

__all__ = [
    "FlaxWav2Vec2BaseModelOutput",
    "FlaxWav2Vec2Model",
    "FlaxWav2Vec2Module",
    "FlaxWav2Vec2PreTrainedModel",
]
