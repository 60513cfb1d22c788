"""Generation that the models share: options, sampling and the mixin with ``generate``."""

from .running import StopGeneration
from .utils import (
    FlaxGenerationMixin,
    FlaxGreedySearchOutput,
    FlaxSampleOutput,
)

__all__ = ["FlaxGenerationMixin", "FlaxGreedySearchOutput", "FlaxSampleOutput", "StopGeneration"]
