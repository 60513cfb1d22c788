"""Mimi, the neural audio codec of Moshi."""

from .modeling_flax_mimi import (
    FlaxMimiDecoderModel,
    FlaxMimiDecoderModule,
    FlaxMimiDecoderOutput,
    FlaxMimiEncoderModel,
    FlaxMimiEncoderModelOutput,
    FlaxMimiEncoderModule,
    FlaxMimiEncoderOutput,
    FlaxMimiModel,
    FlaxMimiModule,
    FlaxMimiOutput,
    FlaxMimiPreTrainedModel,
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
