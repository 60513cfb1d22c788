"""What Moshi predicts at each frame, built from upstream's PyTorch modules apart from the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def frame_pairs(inputs: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """Row and frame t wherever frames t and t + 1 both count."""
    rows, frames = inputs["text_labels"].shape
    mask = inputs.get("attention_mask", np.ones((rows, frames), np.int32))
    return [(row, t) for row in range(rows) for t in range(frames - 1) if mask[row, t] and mask[row, t + 1]]


def delayed_codes(inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The codes that belong to the hidden state of each pair: of frame t + 1, from codebook 1 on of frame t."""
    labels = inputs["audio_labels"]
    return np.array([[labels[row, 0, t + 1], *labels[row, 1:, t]] for row, t in frame_pairs(inputs)])


def depth_inputs(inputs: dict[str, np.ndarray]) -> torch.Tensor:
    """The tokens that the depth decoder reads at each pair, ``(pairs, codebooks)``."""
    text = np.array([inputs["text_labels"][row, t + 1] for row, t in frame_pairs(inputs)])
    return torch.from_numpy(np.concatenate([text[:, None], delayed_codes(inputs)[:, :-1]], axis=1)).long()


def next_labels(inputs: dict[str, np.ndarray], audio_vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Text ``(pairs,)`` and codes ``(pairs, codebooks)`` to be predicted, -100 for none."""
    text = np.array([inputs["text_labels"][row, t + 1] for row, t in frame_pairs(inputs)])
    codes = delayed_codes(inputs)
    return torch.from_numpy(text).long(), torch.from_numpy(np.where(codes == audio_vocab_size, -100, codes)).long()


def upstream_logits(model: Any, inputs: dict[str, np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Text logits ``(pairs, vocabulary)`` and audio logits ``(pairs, codebooks, audio vocabulary)``, with gradients.

    The depth decoder's inputs are embedded by hand, since upstream cannot embed -100.
    """
    outputs = model(**{name: torch.from_numpy(value).long() for name, value in inputs.items() if "labels" not in name})
    pairs = frame_pairs(inputs)
    depth, tokens = model.depth_decoder, depth_inputs(inputs)
    tables = [depth.text_embed_tokens, *depth.embed_tokens]
    embeds = torch.stack(
        [
            table(column.clamp(min=0)) * (column != -100)[:, None]
            for table, column in zip(tables, tokens.unbind(1), strict=True)
        ],
        dim=1,
    )
    depth_outputs = depth(
        input_ids=tokens,
        inputs_embeds=embeds,
        last_hidden_state=torch.stack([outputs.last_hidden_state[row, t] for row, t in pairs])[:, None],
        attention_mask=torch.ones_like(tokens),
    )
    return torch.stack([outputs.logits[row, t] for row, t in pairs]), depth_outputs.logits
