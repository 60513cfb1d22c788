"""Mimi, the neural audio codec of Moshi."""

from .modeling_flax_mimi import FlaxMimiDecoderModel, FlaxMimiEncoderModel, FlaxMimiModel, FlaxMimiPreTrainedModel
from .modules_flax_mimi import (
    FlaxMimiDecoderModule,
    FlaxMimiDecoderOutput,
    FlaxMimiEncoderModelOutput,
    FlaxMimiEncoderModule,
    FlaxMimiEncoderOutput,
    FlaxMimiModule,
    FlaxMimiOutput,
)

__all__ = [
    "FlaxMimiDecoderModel",
    "FlaxMimiDecoderModule",
    "FlaxMimiDecoderOutput",
    "FlaxMimiEncoderModel",
    "FlaxMimiEncoderModelOutput",
    "FlaxMimiEncoderModule",
    "FlaxMimiEncoderOutput",
    "FlaxMimiModel",
    "FlaxMimiModule",
    "FlaxMimiOutput",
    "FlaxMimiPreTrainedModel",
]
