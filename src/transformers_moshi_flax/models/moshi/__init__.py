"""Moshi: backbone, depth decoder and the whole model with nested generation."""

from .modeling_flax_moshi import (
    FlaxMoshiDepthDecoder,
    FlaxMoshiForCausalLM,
    FlaxMoshiForConditionalGeneration,
    FlaxMoshiModel,
    FlaxMoshiPreTrainedModel,
)

__all__ = [
    "FlaxMoshiDepthDecoder",
    "FlaxMoshiForCausalLM",
    "FlaxMoshiForConditionalGeneration",
    "FlaxMoshiModel",
    "FlaxMoshiPreTrainedModel",
]
