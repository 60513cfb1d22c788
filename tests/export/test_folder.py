"""The folder of an export: what it refuses, what it says, and that it comes whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax import FlaxMoshiForConditionalGeneration
from transformers_moshi_flax.export import export_onnx
from transformers_moshi_flax.export import folder as folders
from transformers_moshi_flax.export.folder import licence_of


@pytest.fixture(scope="module")
def model() -> FlaxMoshiForConditionalGeneration:
    return FlaxMoshiForConditionalGeneration.from_pretrained(RANDOM_MODEL, dtype=jnp.float32)


def test_the_manifest_says_what_a_runtime_needs(random_export: Path) -> None:
    manifest = json.loads((random_export / "moshi_export.json").read_text("utf-8"))
    assert manifest["batch_size"] == 2 and manifest["sampling"]["depth_decoder_top_k"] == 128
    assert set(manifest["steps"]) == {"mimi_encode_step", "moshi_step", "mimi_decode_step"}
    assert set(manifest["files"]) | {"moshi_export.json"} == {path.name for path in random_export.iterdir()}
    assert "tokenizer.json" in manifest["tokenizer"]
    caches = [
        entry for entry in manifest["steps"]["moshi_step"]["state"] if entry["name"].startswith("dialogue.cache.k")
    ]
    assert caches and all(entry["in_place"] for entry in caches)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 0}, "context"),
        ({"context": 10**6}, "sliding_window"),
        ({"batch_size": 0}, "batch_size"),
        ({"quantization": "int3"}, "'int8'"),
        ({"generation_config": object()}, "plain numbers"),
        ({"num_beams": 2}, "num_beams"),
        ({"temperatur": 2.0}, "temperatur"),
    ],
)
def test_wrong_options(model: Any, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        export_onnx(model, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_a_folder_in_use(model: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export_onnx(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_other_models(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FlaxMimiModel"):
        export_onnx(model.audio_encoder, tmp_path / "out")
    narrow = FlaxMoshiForConditionalGeneration(model.config, dtype=jnp.bfloat16, _do_init=False)
    with pytest.raises(ValueError, match="bfloat16"):
        export_onnx(narrow, tmp_path / "out")


def test_an_interrupted_export_leaves_nothing(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "dialogue_steps", lambda *args: {})
    monkeypatch.setattr(folders, "checksum", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(model, tmp_path / "out", RANDOM_MODEL)
    assert not any(tmp_path.iterdir())


def test_a_shorter_context(model: Any) -> None:
    shorter, params = folders.with_context(model, 4)
    assert shorter.config.sliding_window == 4 and model.config.sliding_window > 4
    assert params is model.params and folders.with_context(model, None)[0] is model


@pytest.mark.parametrize(
    ("card", "licence"),
    [("---\nlicense: mit\n---\n", "mit"), ("---\na: b\n---\nlicense: mit", None), ("no card", None), ("", None)],
)
def test_licences(card: str, licence: str | None) -> None:
    assert licence_of(card) == licence
