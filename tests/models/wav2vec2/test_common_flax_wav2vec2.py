"""The common tests on the classes of Wav2Vec2 and HuBERT."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from transformers import HubertModel, Wav2Vec2Model

from tests.configs import tiny_wav2vec2_config
from tests.models.wav2vec2.pairs import draw_recordings
from tests.test_modeling_flax_common import Case, FlaxModelTesterMixin
from transformers_moshi_flax import FlaxHubertModel, FlaxWav2Vec2Model

SMALL = {"num_hidden_layers": 2, "feat_extract_norm": "layer", "conv_bias": True}


def _inputs(config: Any) -> dict[str, np.ndarray]:
    recordings = draw_recordings((150, 111))
    return {"input_values": recordings.audio, "attention_mask": recordings.mask}


def _layers(config: Any) -> dict[str, tuple[int, int]]:
    return {"hidden_states": (config.num_hidden_layers, config.hidden_size)}


def _heads(config: Any) -> dict[str, tuple[int, int]]:
    return {"attentions": (config.num_hidden_layers, config.num_attention_heads)}


def _case(model_type: str, ours: type, theirs: type) -> Case:
    config = partial(tiny_wav2vec2_config, model_type, **SMALL)
    return Case(ours, theirs, config, _inputs, "last_hidden_state", _layers, _heads)


class TestFlaxWav2Vec2Common(FlaxModelTesterMixin):
    cases = (
        _case("wav2vec2", FlaxWav2Vec2Model, Wav2Vec2Model),
        _case("hubert", FlaxHubertModel, HubertModel),
    )
