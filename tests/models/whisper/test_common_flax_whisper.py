"""The common tests on the encoder of Whisper."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.configs import tiny_whisper_config
from tests.test_modeling_flax_common import Case, FlaxModelTesterMixin
from transformers_moshi_flax import FlaxWhisperEncoder


def _inputs(config: Any) -> dict[str, np.ndarray]:
    shape = (2, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": np.random.default_rng(0).normal(size=shape).astype(np.float32)}


ENCODER = Case(
    FlaxWhisperEncoder,
    WhisperEncoder,
    partial(tiny_whisper_config, encoder_layers=2),
    _inputs,
    "last_hidden_state",
    lambda config: {"hidden_states": (config.encoder_layers, config.d_model)},
    lambda config: {"attentions": (config.encoder_layers, config.encoder_attention_heads)},
    not_ours=frozenset({"attention_mask"}),  # which upstream takes and does not use
)


class TestFlaxWhisperCommon(FlaxModelTesterMixin):
    cases = (ENCODER,)
