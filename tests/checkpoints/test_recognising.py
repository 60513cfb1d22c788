"""What checkpoints are called that cannot be loaded as they lie."""

import pytest

from transformers_moshi_flax.checkpoints.files import Source
from transformers_moshi_flax.checkpoints.recognising import foreign, foreign_tensors, no_model

FOLDERS = {
    "a LoRA adapter of moshi-finetune": ["lora.safetensors", "config.json"],
    "an adapter of PEFT": ["adapter_config.json", "adapter_model.safetensors"],
    "the folder of a training run": ["checkpoints", "config.yaml"],
    "model.q4_k.gguf is of a type that is not read": [
        "model.q4_k.gguf",
        "tokenizer-e351c8d8-checkpoint125.safetensors",
    ],
}


@pytest.mark.parametrize("told", FOLDERS)
def test_by_the_files(tmp_path, told):
    for name in FOLDERS[told]:
        (tmp_path / name).touch()
    assert told in no_model(Source.locate(tmp_path), None) and told in foreign(Source.locate(tmp_path), None)
    with pytest.raises(OSError, match=r"has no weights: it .*" + told.split()[-1]):
        Source.locate(tmp_path).weights()


def test_kyutais(tmp_path):
    assert foreign(Source.locate(tmp_path), None) is None
    (tmp_path / "tokenizer_spm_32k_3.model").touch()
    assert "from_kyutai" in foreign(Source.locate(tmp_path), None)
    assert no_model(Source.locate(tmp_path), None) is None
    assert "from_kyutai" in foreign(Source.locate(tmp_path), {"moshi_name": "model.safetensors"})
    assert foreign(Source.locate(tmp_path), {"model_type": "moshi"}) is None


def test_quantized_beside_the_weights(tmp_path):
    for name in ("model.q4_k.gguf", "model.safetensors"):
        (tmp_path / name).touch()
    assert no_model(Source.locate(tmp_path), None) is None


@pytest.mark.parametrize("name", ["model.q8.safetensors", "model.q4.safetensors", "model.q8.gguf"])
def test_quantized_alone(tmp_path, name):
    (tmp_path / name).touch()
    (tmp_path / "model.q4_k.gguf").touch()
    assert no_model(Source.locate(tmp_path), None) is None
    assert "from_kyutai" in foreign(Source.locate(tmp_path), None)


@pytest.mark.parametrize(
    "key, told",
    [
        ("depformer_in.0.weight", "Kyutai's own files"),
        ("quantizer.rvq_first.vq.layers.0._codebook.embedding_sum", "Kyutai's own files"),
        ("base_model.model.decoder.model.layers.0.self_attn.q_proj.linear.lora_A.weight", "an adapter"),
    ],
)
def test_by_the_tensors(key, told):
    assert told in foreign_tensors([key, "x"]) and foreign_tensors(["x"]) is None
