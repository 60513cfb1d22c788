"""The common tests on the joined model, as upstream's Voxtral."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import VoxtralForConditionalGeneration

from tests.configs import AUDIO_TOKEN, tiny_voxtral_config
from tests.test_modeling_flax_common import Case, FlaxModelTesterMixin
from transformers_moshi_flax import FlaxSpeechLanguageModel


def _inputs(config: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(8, config.text_config.vocab_size, (2, 7), dtype=np.int32)
    ids[:, 1:5] = AUDIO_TOKEN
    features = rng.normal(size=(2, config.audio_config.num_mel_bins, 32)).astype(np.float32)
    labels = np.where(ids == AUDIO_TOKEN, -100, ids)
    return {"input_ids": ids, "input_features": features, "attention_mask": np.ones_like(ids), "labels": labels}


VOXTRAL = Case(
    FlaxSpeechLanguageModel,
    VoxtralForConditionalGeneration,
    tiny_voxtral_config,
    _inputs,
    "logits",
    lambda config: {"hidden_states": (config.text_config.num_hidden_layers, config.text_config.hidden_size)},
    lambda config: {"attentions": (config.text_config.num_hidden_layers, config.text_config.num_attention_heads)},
    only_ours=("input_values", "audio_attention_mask"),
)


class TestFlaxSpeechLanguageCommon(FlaxModelTesterMixin):
    cases = (VOXTRAL,)

    # of the base class alone, as the tests of other models show
    test_new_params_are_float32_whatever_the_dtype = None
    test_without_init = None
    test_the_configuration_asks_for_what_is_returned = None
    test_half_precision_files = None
    test_mismatched_shapes = None

    def test_names(self, case: Case):
        """One class for several configurations, of which upstream's is one."""
        assert case.upstream.config_class in case.ours.known_configs()
        assert case.ours(case.config(), _do_init=False).upstream_name == case.upstream.__name__
        assert case.ours.main_input_name == case.upstream.main_input_name
