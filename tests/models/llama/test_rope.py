"""Language models on texts beyond the original length, with every kind of rotary embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest
import torch

from tests.models.llama.pairs import draw_batch, tiny_pair
from tests.torch_oracle import assert_close

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.mark.parametrize("rope_type", ROPES)
def test_beyond_the_original_length(rope_type: str, tmp_path: Path):
    rope = {"rope_type": rope_type, "rope_theta": 100.0, **ROPES[rope_type]}
    length = 16 if rope_type == "dynamic" else 64
    pair = tiny_pair("qwen3", tmp_path, max_position_embeddings=length, rope_parameters=rope, num_hidden_layers=1)
    ids = draw_batch(99, (40, 40)).ids
    ours = jax.jit(lambda ids: pair.ours(ids).logits)(ids)
    assert_close(ours, pair.upstream(input_ids=torch.tensor(ids).long()).logits, 1e-5)


def test_eager_calls_are_as_long_as_they_are(tmp_path: Path):
    """What other models round up to a length with a program would change the frequencies."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    pair = tiny_pair("llama", tmp_path, max_position_embeddings=4, rope_parameters=rope, num_hidden_layers=1)
    ids = draw_batch(99, (9,)).ids
    assert_close(pair.ours(ids).logits, pair.upstream(input_ids=torch.tensor(ids).long()).logits, 1e-5)
