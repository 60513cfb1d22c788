"""``moshi-flax convert``: there and back is the same file; what lies beside the weights comes along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from transformers_moshi_flax.cli.checkpoints import EMBEDDED_MODEL


def test_there_and_back(moshi_flax, tmp_path: Path):
    assert moshi_flax("convert", EMBEDDED_MODEL, tmp_path / "flax").code == 0
    assert moshi_flax("convert", tmp_path / "flax", tmp_path / "pt", "--to", "pt").code == 0
    before, after = (load_file(path / "model.safetensors") for path in (EMBEDDED_MODEL, tmp_path / "pt"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        np.testing.assert_array_equal(value, after[key], err_msg=key)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "pt" / name).read_bytes() == (EMBEDDED_MODEL / name).read_bytes()
    for layout in ("flax", "pt"):
        written = json.loads((tmp_path / layout / "generation_config.json").read_text())
        assert written["depth_decoder_config"]["top_k"] == 128
    assert not (tmp_path / "flax" / "model.safetensors").exists()


def test_upstream_loads_the_result(moshi_flax, tmp_path: Path):
    from transformers import MoshiForConditionalGeneration

    assert moshi_flax("convert", EMBEDDED_MODEL, tmp_path / "pt", "--to", "pt").code == 0
    _, info = MoshiForConditionalGeneration.from_pretrained(tmp_path / "pt", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_dtype(moshi_flax, tmp_path: Path):
    assert moshi_flax("convert", EMBEDDED_MODEL, tmp_path / "half", "--to", "pt", "--dtype", "float16").code == 0
    assert {str(value.dtype) for value in load_file(tmp_path / "half" / "model.safetensors").values()} == {"float16"}


def test_overwrite_leaves_no_weights_of_the_other_layout(moshi_flax, tmp_path: Path):
    destination = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, destination)
    (destination / "notes.txt").write_text("mine")
    assert moshi_flax("convert", EMBEDDED_MODEL, destination, "--overwrite").code == 0
    weights = [path.name for path in destination.glob("*.safetensors")]
    assert weights == ["flax_model.safetensors"]
    assert (destination / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_broken_weights_leave_the_destination_alone(moshi_flax, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(EMBEDDED_MODEL, broken)
    (broken / "model.safetensors").write_bytes((EMBEDDED_MODEL / "model.safetensors").read_bytes()[:1000])
    result = moshi_flax("convert", broken, tmp_path / "new")
    assert result.code == 2 and result.err.count("\n") == 1 and "SRC" in result.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("architecture", ["MimiModel", None])
def test_mimi_alone(moshi_flax, tmp_path: Path, architecture: str | None):
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())["audio_encoder_config"]
    source = tmp_path / "mimi"
    source.mkdir()
    weights = load_file(EMBEDDED_MODEL / "model.safetensors")
    prefix = "audio_encoder."
    from safetensors.numpy import save_file

    mimi = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    save_file(mimi, source / "model.safetensors", metadata={"format": "pt"})
    config["architectures"] = [architecture] if architecture else None
    (source / "config.json").write_text(json.dumps(config))
    result = moshi_flax("convert", source, tmp_path / "flax")
    assert result.code == 0, result.err
    assert "FlaxMimiModel" in result.err
