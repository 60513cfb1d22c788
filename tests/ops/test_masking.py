"""Random spans against upstream's, as distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

from transformers_moshi_flax.ops.masking import masked_spans

DRAWS, SIZE = 400, 30


def ours(lengths: list[int], probability: float, span: int, least: int) -> np.ndarray:
    def draw(key: jax.Array) -> jax.Array:
        return masked_spans(key, jnp.array(lengths, jnp.int32), SIZE, probability, span, least)

    return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), DRAWS)))


def theirs(lengths: list[int], probability: float, span: int, least: int) -> np.ndarray:
    np.random.seed(0)
    mask = torch.arange(SIZE)[None] < torch.tensor(lengths)[:, None]
    shape = (len(lengths), SIZE)
    return np.stack([_compute_mask_indices(shape, probability, span, mask.long(), least) for _ in range(DRAWS)])


@pytest.mark.parametrize(
    "probability, span, least", [(0.3, 4, 0), (0.05, 10, 2), (0.9, 7, 1), (0.0, 3, 0), (1.0, 1, 0), (0.2, 30, 1)]
)
def test_as_often_as_upstream(probability: float, span: int, least: int):
    """At every place, and so many in a row; padding apart, a frame of which upstream masks for want of spans."""
    lengths = [SIZE, 17, 3]
    found, expected = (draw(lengths, probability, span, least) for draw in (ours, theirs))
    for row, length in enumerate(lengths):
        assert not found[:, row, length:].any()
        mine, others = found[:, row, :length], expected[:, row, :length]
        # six standard errors of a difference of two shares
        assert np.abs(mine.mean(0) - others.mean(0)).max() < 6 * np.sqrt(0.5 / DRAWS)
        assert abs(mine.sum(1).mean() - others.sum(1).mean()) < 6 * np.sqrt(2 / DRAWS) * max(others.sum(1).std(), 0.2)


def test_spans_are_whole():
    masked = ours([SIZE], 0.3, 5, 1)[:, 0]
    edges = np.diff(np.pad(masked, ((0, 0), (1, 1))).astype(int), axis=1)
    lengths = np.argwhere(edges < 0)[:, 1] - np.argwhere(edges > 0)[:, 1]
    assert lengths.min() == 5
