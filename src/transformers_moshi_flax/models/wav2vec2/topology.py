"""What follows from a configuration of Wav2Vec2 or HuBERT without a weight: lengths, and what is not supported."""

from __future__ import annotations

import math
from typing import Any

from ...input_checks import is_whole
from ...nn.activations import ACT2FN

GROUP, LAYER = "group", "layer"
"""The norms of the feature extractor: of the first layer's channels over time, or of every layer at each frame."""


def convolutions(config: Any) -> list[tuple[int, int, int]]:
    """Channels, width and stride of the feature extractor's layers."""
    return list(zip(config.conv_dim, config.conv_kernel, config.conv_stride))


def hop_length(config: Any) -> int:
    """Samples from one frame to the next."""
    return math.prod(config.conv_stride)


def samples_for(config: Any, frames: int) -> int:
    """The fewest samples that make so many frames."""
    length = frames
    for _, width, stride in reversed(convolutions(config)):
        length = (length - 1) * stride + width
    return length


def output_length(config: Any, samples: Any) -> Any:
    """Frames of so many samples, an int or an integer array; none of those that are too few for one."""
    length = samples
    for _, width, stride in convolutions(config):
        length = (length - width) // stride + 1
    return max(length, 0) if isinstance(length, int) else length.clip(0)


def check_config(config: Any) -> None:
    """Raises ``ValueError`` for what no model here does, and for sizes that do not go together."""
    kind = config.model_type

    def refuse(name: str, why: str) -> None:
        raise ValueError(f"`{name}` of this {kind!r} configuration is {getattr(config, name, None)!r}, {why}.")

    if getattr(config, "add_adapter", False):
        refuse("add_adapter", "but layers behind the encoder are not supported: set it to False")
    if getattr(config, "adapter_attn_dim", None) is not None:
        refuse("adapter_attn_dim", "but adapters of languages are not supported: set it to None")
    if getattr(config, "conv_pos_batch_norm", False):
        refuse("conv_pos_batch_norm", "but only weight norm is supported there: set it to False")
    if config.feat_extract_norm not in (GROUP, LAYER):
        refuse("feat_extract_norm", f"but must be {GROUP!r} or {LAYER!r}")
    for name in ("feat_extract_activation", "hidden_act"):
        if getattr(config, name) not in ACT2FN:
            refuse(name, f"which is not supported: use one of {', '.join(sorted(ACT2FN))}")
    for name in ("conv_dim", "conv_kernel", "conv_stride"):
        sizes = getattr(config, name)
        if len(sizes) != len(config.conv_dim) or not sizes or not all(is_whole(size) and size > 0 for size in sizes):
            refuse(name, f"but must be {len(config.conv_dim)} positive whole numbers, as many as `conv_dim` has")
    for name in ("num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "mask_time_length"):
        if not is_whole(getattr(config, name)) or getattr(config, name) < 1:
            refuse(name, "but must be a whole number of at least 1")
    for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
        if config.hidden_size % getattr(config, name):
            refuse(name, f"which does not divide the {config.hidden_size} channels (`hidden_size`): change one")
    for name in ("mask_time_prob", "mask_feature_prob"):
        if not 0 <= getattr(config, name) <= 1:
            refuse(name, "but must be in [0, 1]")
    if not 1 <= config.mask_feature_length <= config.hidden_size and config.mask_feature_prob:
        refuse("mask_feature_length", f"but must be in [1, {config.hidden_size}], which is `hidden_size`")
