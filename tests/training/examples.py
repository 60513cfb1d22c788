"""A tiny Moshi with drawn parameters, and batches as the loader makes them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import MoshiConfig

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.models.moshi.delay_pattern import delay


def small_config(**overrides: Any) -> MoshiConfig:
    """One layer in each decoder, three codebooks: what compiles quickly."""
    depth = {"num_hidden_layers": 1, **overrides.pop("depth_decoder_config", {})}
    fields = {"num_hidden_layers": 1, "num_codebooks": 3, **overrides}
    return tiny_moshi_config(**fields, depth_decoder_config=depth)


def make_module(
    config: MoshiConfig, dtype: Any = jnp.float32, seed: int = 0, **kwargs: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The module and NumPy parameters, with which no activation grows or vanishes."""
    model = FlaxMoshiForConditionalGeneration(config, dtype=dtype, _do_init=False, **kwargs)
    rng = np.random.default_rng(seed)

    def drawn(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        if path[-1] == "scale":
            return 1 + 0.1 * rng.standard_normal(shape, np.float32)
        return rng.standard_normal(shape, np.float32) * (shape[0] ** -0.5 if path[-1] == "kernel" else 0.5)

    flat = {path: drawn(path, leaf.shape) for path, leaf in flatten_dict(model.params_shape_tree).items()}
    return model.module, unflatten_dict(flat)


def draw_batch(
    config: MoshiConfig, lengths: tuple[int, ...], frames: int, seed: int = 0, unknown: bool = False
) -> dict[str, np.ndarray]:
    """Rows of ``lengths`` frames, the start frame included, padded on the right to ``frames``; 0 is an empty row.

    ``unknown`` puts -100 among the labels of real frames. A third of the text is padding.
    """
    rng = np.random.default_rng(seed)
    rows, codebooks, start = len(lengths), config.num_codebooks, config.audio_vocab_size
    mask = np.arange(frames) < np.array(lengths)[:, None]
    text = rng.integers(0, config.vocab_size, (rows, frames))
    text = np.where(rng.random(text.shape) < 0.3, rng.choice([0, 3], text.shape), text)
    codes = {name: rng.integers(0, start, (rows, codebooks, frames)) for name in ("user", "moshi")}
    text[:, 0] = config.vocab_size
    for of_one in codes.values():
        of_one[..., 0] = start
    text_labels, audio_labels = text.copy(), codes["moshi"].copy()
    if unknown:
        text_labels[rng.random(text.shape) < 0.2] = -100
        audio_labels[rng.random(audio_labels.shape) < 0.2] = -100
    batch = {
        "input_ids": np.where(mask, text, 3),
        "attention_mask": mask,
        "user_audio_codes": np.where(mask[:, None], delay(codes["user"], start), start),
        "moshi_audio_codes": np.where(mask[:, None], delay(codes["moshi"], start), start),
        "text_labels": np.where(mask, text_labels, -100),
        "audio_labels": np.where(mask[:, None], audio_labels, -100),
    }
    return {name: array.astype(np.int32) for name, array in batch.items()}
