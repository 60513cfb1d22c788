"""Kyutai's layout through the command line, there and back."""

from __future__ import annotations

import dataclasses
import json
import string
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration, MoshiProcessor, QuantizationConfig
from transformers_moshi_flax.training.data.prepared import open_dataset


@pytest.fixture(scope="module")
def flax_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kyutai") / "flax"
    # widths that Kyutai's rule for gated layers can express
    config = tiny_moshi_config(ffn_dim=142, depth_decoder_config={"ffn_dim": 62})
    model = FlaxMoshiForConditionalGeneration(config, seed=2)
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"a SentencePiece model")
    return folder


def test_there_and_back(moshi_flax, flax_folder: Path, tmp_path: Path):
    assert moshi_flax("convert", flax_folder, tmp_path / "kyutai", "--to", "kyutai").code == 0
    assert json.loads((tmp_path / "kyutai" / "config.json").read_text())["tokenizer_name"] == "tokenizer.model"
    result = moshi_flax("convert", tmp_path / "kyutai", tmp_path / "back", "--from", "kyutai")
    assert result.code == 0 and "tokenizer.model' is no SentencePiece model" in result.err
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"a SentencePiece model"
    result = moshi_flax("verify", flax_folder, tmp_path / "back", "--no-outputs", "--json")
    assert result.code == 0 and json.loads(result.out)["differences"] == []
    # without a conversion as well, either way round, with what the models make of it
    result = moshi_flax("verify", tmp_path / "kyutai", flax_folder, "--json")
    report = json.loads(result.out)
    assert result.code == 0 and report["differences"] == [] and len(report["outputs"]) == 4
    assert all(entry["checksums"] == entry["tensors"] > 0 for entry in report["checkpoints"])
    assert json.loads(moshi_flax("inspect", tmp_path / "kyutai", "--json").out)["layout"] == "kyutai"


def test_quantized_there_and_back(moshi_flax, flax_folder: Path, tmp_path: Path):
    """Kyutai's q8: codes as the package here makes them, of all but Mimi."""
    theirs, back, floats = (tmp_path / name for name in ("theirs", "back", "floats"))
    assert moshi_flax("convert", flax_folder, theirs, "--to", "kyutai", "--quantize", "int8").code == 0
    config = json.loads((theirs / "config.json").read_text())
    assert config["quantize"] is True and config["moshi_name"] == "model.q8.safetensors"
    result = moshi_flax("convert", theirs, back, "--from", "kyutai")
    assert result.code == 0 and "int8 (8 bits, a scale for each output, without audio_encoder)" in result.err
    result = moshi_flax("verify", theirs, back, "--no-outputs", "--json")
    assert result.code == 0 and json.loads(result.out)["differences"] == []
    told = json.loads(moshi_flax("inspect", theirs, "--json").out)["quantization"]
    assert told == {"layers": 37, **dataclasses.asdict(QuantizationConfig("int8", skip=["audio_encoder"]))}
    assert "37 matrices, int8" in moshi_flax("inspect", theirs).out
    assert moshi_flax("convert", theirs, floats, "--from", "kyutai", "--quantize", "none").code == 0
    again = FlaxMoshiForConditionalGeneration.from_pretrained(floats)
    assert again.quantization is None and again.params_shape_tree.keys() == again.params.keys()
    result = moshi_flax("convert", flax_folder, tmp_path / "new", "--to", "kyutai", "--quantize", "int4")
    assert result.code == 2 and "--quantize int4: not with --to kyutai" in " ".join(result.err.split())


def test_differences_are_found(moshi_flax, flax_folder: Path, tmp_path: Path):
    model = FlaxMoshiForConditionalGeneration.from_pretrained(flax_folder)
    kernel = model.params["decoder"]["model"]["layers"]["1"]["self_attn"]["k_proj"]["linear"]["kernel"]
    model.params["decoder"]["model"]["layers"]["1"]["self_attn"]["k_proj"]["linear"]["kernel"] = kernel.at[2, 3].add(1)
    model.save_kyutai(tmp_path / "kyutai")
    result = moshi_flax("verify", flax_folder, tmp_path / "kyutai", "--no-outputs", "--json")
    (difference,) = json.loads(result.out)["differences"]
    assert result.code == 1 and difference["path"] == "decoder/model/layers/1/self_attn/k_proj/linear/kernel"
    np.testing.assert_allclose(difference["max_abs_difference"], 1, rtol=1e-5)


def test_damage_in_either_file_is_found(moshi_flax, flax_folder: Path, tmp_path: Path):
    assert moshi_flax("convert", flax_folder, tmp_path / "kyutai", "--to", "kyutai").code == 0
    for name in ("moshi_name", "mimi_name"):
        path = tmp_path / "kyutai" / json.loads((tmp_path / "kyutai" / "config.json").read_text())[name]
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)
    result = moshi_flax("verify", tmp_path / "kyutai", "--json")
    assert result.code == 1 and len(json.loads(result.out)["checkpoints"][0]["damaged"]) == 2


def test_a_conversion_can_prepare_recordings(moshi_flax, flax_folder: Path, tmp_path: Path):
    """The ids of words are those of Kyutai's tokenizer."""
    spoken = ["hello world", "how are you", "the sky is blue", "", "Ä"]
    SentencePieceTrainer.train(
        sentence_iterator=iter([*spoken[:3], *string.ascii_lowercase] * 9),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=55,
        pad_id=3,
        unk_id=0,
        hard_vocab_limit=False,
        minloglevel=9,
    )
    model = FlaxMoshiForConditionalGeneration.from_pretrained(flax_folder)
    model.save_kyutai(tmp_path / "kyutai", tokenizer=tmp_path / "spm.model")
    assert moshi_flax("convert", tmp_path / "kyutai", tmp_path / "flax", "--from", "kyutai").code == 0
    processor = MoshiProcessor.from_pretrained(tmp_path / "flax")
    theirs = SentencePieceProcessor(str(tmp_path / "spm.model"))
    assert len(processor.tokenizer) == theirs.vocab_size()
    for text in spoken:
        ids = processor.tokenizer.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text)
        assert text == "Ä" or processor.tokenizer.decode(ids) == theirs.decode(ids)
    codec = model.config.audio_encoder_config
    assert (processor.sampling_rate, processor.frame_size) == (codec.sampling_rate, codec.frame_size)

    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (codec.sampling_rate // 10, 2))
    soundfile.write(tmp_path / "said.wav", noise, codec.sampling_rate)
    words = {"alignments": [["hello", [0, 0.05], "SPEAKER_MAIN"]]}
    (tmp_path / "said.json").write_text(json.dumps(words))
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "said.wav"}) + "\n")
    result = moshi_flax("prepare", tmp_path / "list.jsonl", tmp_path / "out", "--model", tmp_path / "flax")
    assert result.code == 0, result.err
    (conversation,) = open_dataset(tmp_path / "out")
    assert set(theirs.encode("hello")) <= set(conversation.moshi_text_tokens.tolist())


def test_kyutais_files_are_known_for_what_they_are(moshi_flax, flax_folder: Path, tmp_path: Path):
    assert moshi_flax("convert", flax_folder, tmp_path / "kyutai", "--to", "kyutai").code == 0
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "said.wav"}) + "\n")
    for config in (True, False):  # moshiko was first published without one
        if not config:
            (tmp_path / "kyutai" / "config.json").unlink()
        for args in (
            ("convert", tmp_path / "kyutai", tmp_path / "out"),
            ("generate", "--model", tmp_path / "kyutai"),
            ("converse", "--model", tmp_path / "kyutai"),
            ("prepare", tmp_path / "list.jsonl", tmp_path / "out", "--model", tmp_path / "kyutai"),
        ):
            result = moshi_flax(*args)
            assert result.code == 2 and "moshi-flax convert --from kyutai" in result.err, args


def test_adapters_are_known_for_what_they_are(moshi_flax, tmp_path: Path):
    (tmp_path / "lora.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps({"dim": 4096, "depformer_dim": 1024, "lora": True}))
    for args in (
        ("convert", tmp_path, tmp_path / "out"),
        ("convert", tmp_path, tmp_path / "out", "--from", "kyutai"),
        ("inspect", tmp_path),
        ("generate", "--model", tmp_path),
    ):
        result = moshi_flax(*args)
        assert result.code == 2 and "LoRA adapter of moshi-finetune, no whole model: load its base" in result.err, args
    result = moshi_flax("verify", tmp_path)
    assert result.code == 2 and "load its base" in result.err
