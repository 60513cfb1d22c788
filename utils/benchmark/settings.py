"""What the benchmark of generation measures: models, and the settings that they are measured in."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

SMALL_MIMI = {
    "hidden_size": 32,
    "num_filters": 2,
    "codebook_dim": 8,
    "vector_quantization_hidden_dimension": 8,
    "upsample_groups": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Size:
    """A model to measure.

    Attributes:
        config: fields of ``MoshiConfig``; Mimi is full-size where ``audio_encoder_config`` only names its type.
        frames: timed frames of one run. The smallest model needs more of them: 32 take 2 ms there.
        memory_bound: whether the weights are too large for the processor's cache, so that memory sets a limit.
    """

    config: dict[str, Any]
    frames: int = 32
    memory_bound: bool = True


def full_mimi(
    vocab_size: int, hidden: int, layers: int, depth_hidden: int, depth_layers: int, codebooks: int = 8
) -> dict[str, Any]:
    """Fields of ``MoshiConfig`` with moshiko's proportions: heads of 64 dimensions, MLPs of 5.5 times the width."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "ffn_dim": hidden * 11 // 2,
        "num_codebooks": codebooks,
        "audio_encoder_config": {"model_type": "mimi"},
        "depth_decoder_config": {
            "hidden_size": depth_hidden,
            "num_hidden_layers": depth_layers,
            "num_attention_heads": depth_hidden // 64,
            "ffn_dim": depth_hidden * 11 // 2,
            "max_position_embeddings": codebooks + 1,
            "sliding_window": codebooks + 1,
        },
    }


SIZES = {
    "0.7M": Size(
        {
            "vocab_size": 1024,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 256,
            "num_codebooks": 4,
            "audio_encoder_config": {"model_type": "mimi", "codebook_size": 512, **SMALL_MIMI},
            "depth_decoder_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
            | {"ffn_dim": 128, "max_position_embeddings": 5, "sliding_window": 5},
        },
        frames=256,
        memory_bound=False,
    ),
    "68M": Size(full_mimi(8_000, 512, 4, 256, 3)),
    "331M": Size(full_mimi(28_000, 1024, 8, 512, 4)),
    "523M": Size(full_mimi(32_000, 1024, 12, 512, 6)),
}
"""Parameters with Mimi name the first and the last, those without Mimi (79 M) the others."""

BATCHES = (1, 4, 16)
CONTEXTS = (16, 250, 1000, 3000)
DECODINGS = ("greedy", "sampling")


@dataclass(frozen=True)
class Setting:
    """One measurement.

    Attributes:
        size: key of :data:`SIZES`.
        batch: rows.
        context: frames of the prompt.
        decoding: greedy, or sampling with the defaults of ``GenerationConfig`` (temperature 1, the best 50) for text
            and codes.
        capacity: frames that this library's caches have room for at least; None for as many as are used.
    """

    size: str
    batch: int = 1
    context: int = 16
    decoding: str = "greedy"
    capacity: int | None = None

    @property
    def frames(self) -> int:
        """Timed frames."""
        return SIZES[self.size].frames

    @property
    def sampled(self) -> bool:
        return self.decoding == "sampling"

    def __str__(self) -> str:
        room = f", capacity {self.capacity}" if self.capacity else ""
        return f"{self.size}, batch {self.batch}, context {self.context}, {self.decoding}{room}"


def settings_of(size: str, full: bool) -> list[Setting]:
    """The settings of one model: the whole grid, or what all models fit into a quarter of an hour with.

    A prompt of 3000 frames takes minutes on other sides, so it is of the whole grid only.
    """
    unused = Setting(size, capacity=3072)
    if full:
        grid = itertools.product(BATCHES, CONTEXTS, DECODINGS)
        return [*(Setting(size, *point) for point in grid), unused]
    settings = [Setting(size)]
    if size == "0.7M":
        settings.append(Setting(size, batch=16))
    if size == "523M":
        settings += [Setting(size, context=context) for context in (250, 1000)]
        settings += [Setting(size, batch=batch) for batch in BATCHES[1:]]
        settings += [Setting(size, decoding="sampling"), unused]
    return settings
