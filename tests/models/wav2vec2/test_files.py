"""Files of Wav2Vec2 and HuBERT: older forms, models with a head, adapters and quantized weights."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import HubertForCTC, Wav2Vec2ForPreTraining

from tests.configs import WAV2VEC2S, tiny_wav2vec2_config
from tests.models.wav2vec2.pairs import draw_recordings, tiny_pair
from tests.test_modeling_flax_common import assert_same_params
from tests.torch_oracle import assert_close
from transformers_moshi_flax import (
    FlaxAutoModel,
    FlaxHubertModel,
    FlaxWav2Vec2Model,
    LoraConfig,
    QuantizationConfig,
)

AUDIO = draw_recordings((150, 99)).audio


@pytest.mark.parametrize("model_type", WAV2VEC2S)
def test_both_forms_of_weight_norm(model_type: str, tmp_path: Path):
    """The older names, as files on the Hub have them; written are those of today."""
    pair = tiny_pair(model_type, tmp_path / "new")
    tensors = load_file(pair.directory / "model.safetensors")
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    older = {}
    for key, tensor in tensors.items():
        for new, old in names.items():
            key = key.replace(new, old)
        older[key] = tensor
    assert sum(key.endswith(("weight_g", "weight_v")) for key in older) == 2
    pair.ours.config.save_pretrained(tmp_path / "old")
    save_file(older, tmp_path / "old/model.safetensors", metadata={"format": "pt"})
    model = FlaxAutoModel.from_pretrained(tmp_path / "old")
    assert type(model) is type(pair.ours)
    assert_same_params(model.params, pair.ours.params)


def test_from_models_with_a_head(tmp_path: Path):
    """Their other parts are not read."""
    ctc = HubertForCTC(tiny_wav2vec2_config("hubert", vocab_size=7))
    ctc.save_pretrained(tmp_path / "ctc")
    model, info = FlaxHubertModel.from_pretrained(tmp_path / "ctc", output_loading_info=True)
    assert not info["missing_keys"]
    trained = Wav2Vec2ForPreTraining(tiny_wav2vec2_config(codevector_dim=8, proj_codevector_dim=6))
    trained.save_pretrained(tmp_path / "trained")
    other = FlaxWav2Vec2Model.from_pretrained(tmp_path / "trained")
    for ours, theirs in ((model, ctc.hubert), (other, trained.wav2vec2)):
        kernel = ours.params["feature_projection"]["projection"]["kernel"]
        np.testing.assert_array_equal(kernel, theirs.feature_projection.projection.weight.detach().numpy().T)


def test_a_vector_that_only_training_needs_may_be_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """As in files of models that were fine-tuned without masking; anything else may not."""
    pair = tiny_pair("wav2vec2", tmp_path / "whole")
    tensors = load_file(pair.directory / "model.safetensors")
    del tensors["masked_spec_embed"]
    pair.ours.config.save_pretrained(tmp_path / "part")
    save_file(tensors, tmp_path / "part/model.safetensors", metadata={"format": "pt"})
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model = FlaxWav2Vec2Model.from_pretrained(tmp_path / "part")
    finally:
        logger.removeHandler(caplog.handler)
    assert "no weights for ['masked_spec_embed']" in caplog.text and "only training" in caplog.text
    assert model.params["masked_spec_embed"].shape == (24,)
    assert_close(model(AUDIO).last_hidden_state, np.asarray(pair.ours(AUDIO).last_hidden_state), 1e-5)
    del tensors["encoder.layer_norm.bias"]
    save_file(tensors, tmp_path / "part/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for \['encoder/layer_norm/bias'\]"):
        FlaxWav2Vec2Model.from_pretrained(tmp_path / "part")


@pytest.mark.parametrize("model_type", WAV2VEC2S)
def test_adapters_and_quantized_weights(model_type: str, tmp_path: Path):
    """LoRA beside nf4, saved and loaded; the linear layers are those of all models."""
    pair = tiny_pair(model_type, tmp_path / "base", num_hidden_layers=2)
    quantization = QuantizationConfig("nf4", group_size=2)
    model = type(pair.ours).from_pretrained(pair.directory, quantization=quantization)
    assert "kernel_nf4" in model.params["encoder"]["layers"]["0"]["attention"]["q_proj"]
    exact, quantized = (np.asarray(each(AUDIO).last_hidden_state) for each in (pair.ours, model))
    assert 0 < np.abs(exact - quantized).max() < 2 * np.abs(exact).max()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "output_dense"], init_lora_weights=False))
    assert model.num_parameters(only_trainable=True) == 2 * 2 * ((24 + 24) + (40 + 24))
    adapted = np.asarray(model(AUDIO).last_hidden_state)
    assert np.abs(adapted - quantized).max() > 1e-3
    model.save_adapter(tmp_path / "adapter")
    again = type(pair.ours).from_pretrained(pair.directory, quantization=quantization)
    again.load_adapter(tmp_path / "adapter")
    assert_close(again(AUDIO).last_hidden_state, adapted, 1e-5)
