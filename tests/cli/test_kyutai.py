"""Kyutai's layout through the command line, there and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.configs import tiny_moshi_config
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration


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
    assert moshi_flax("convert", tmp_path / "kyutai", tmp_path / "back", "--from", "kyutai").code == 0
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"a SentencePiece model"
    result = moshi_flax("verify", flax_folder, tmp_path / "back", "--no-outputs", "--json")
    assert result.code == 0 and json.loads(result.out)["differences"] == []
    # without a conversion as well, either way round, with what the models make of it
    result = moshi_flax("verify", tmp_path / "kyutai", flax_folder, "--json")
    report = json.loads(result.out)
    assert result.code == 0 and report["differences"] == [] and len(report["outputs"]) == 4
    assert all(entry["checksums"] == entry["tensors"] > 0 for entry in report["checkpoints"])
    assert json.loads(moshi_flax("inspect", tmp_path / "kyutai", "--json").out)["layout"] == "kyutai"


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
