"""A user's mistake is one line that names the option, and exit code 2; it is found before any model is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

import transformers_moshi_flax
from tests.random_model import RANDOM_MODEL


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Unloadable:
        @classmethod
        def from_pretrained(cls, *args: object, **kwargs: object) -> None:
            raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(transformers_moshi_flax, "FlaxMoshiForConditionalGeneration", Unloadable, raising=False)
    monkeypatch.chdir(tmp_path)


def assert_mistake(result, *words: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert result.err.count("\n") == 1 and result.err.endswith("\n")
    assert result.err.startswith("moshi-flax: error: ")
    for word in words:
        assert word in result.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["command"]),
        (["sing"], ["sing"]),
        (["generate", "--louder"], ["--louder"]),
        (["generate", "extra"], ["extra"]),
        (["generate", "--max-new-frames", "0"], ["--max-new-frames"]),
        (["generate", "--max-new-frames", "many"], ["--max-new-frames"]),
        (["generate", "--max-new-frames", "99999999999"], ["--max-new-frames", "1080000"]),
        (["generate", "--top-k", "99999999999"], ["--top-k", "2147483647"]),
        (["generate", "--depth-top-k", "99999999999"], ["--depth-top-k", "2147483647"]),
        (["converse", "--top-k", "99999999999"], ["--top-k", "2147483647"]),
        (["converse", "--extra-seconds", "1e9"], ["--extra-seconds", "1000000000.0", "86400"]),
        (["converse", "--extra-seconds", "1e308"], ["--extra-seconds", "86400"]),
        (["generate", "--temperature", "-1"], ["--temperature"]),
        (["generate", "--temperature", "nan"], ["--temperature"]),
        (["generate", "--temperature", "inf"], ["--temperature"]),
        (["generate", "--depth-temperature", "inf"], ["--depth-temperature"]),
        (["generate", "--top-k", "0"], ["--top-k"]),
        (["generate", "--depth-top-k", "-3"], ["--depth-top-k"]),
        (["generate", "--top-p", "0"], ["--top-p"]),
        (["generate", "--top-p", "1.5"], ["--top-p"]),
        (["generate", "--temperature", "0", "--top-k", "5"], ["--top-k", "--temperature 0"]),
        (["generate", "--depth-temperature", "0", "--depth-top-k", "5"], ["--depth-top-k", "--depth-temperature 0"]),
        (["generate", "--seed", "-1"], ["--seed"]),
        (["generate", "--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["generate", "--model", "missing"], ["--model", "missing"]),
        (["generate", "--model", "./missing/checkpoint"], ["--model", "missing"]),
        (["generate", "--user-audio", "missing.wav"], ["--user-audio", "missing.wav"]),
        (["generate", "--user-audio", "."], ["--user-audio"]),
        (["generate", "--output", "reply.txt"], ["--output", ".wav"]),
        (["generate", "--output", ""], ["--output"]),
        (["converse", "--temperature", "0", "--top-k", "5"], ["--top-k", "--temperature 0"]),
        (["converse", "--model", "missing"], ["--model", "missing"]),
        (["converse", "--user-audio", "missing.wav"], ["--user-audio", "missing.wav"]),
        (["converse", "--output", "reply.mp3"], ["--output", ".wav"]),
        (["converse", "--text", "reply.txt"], ["--text", "reply.txt", ".srt or .json"]),
        (["converse", "--text", ""], ["--text", ".srt"]),
        (["converse", "--extra-seconds", "-1"], ["--extra-seconds"]),
        (["converse", "--extra-seconds", "nan"], ["--extra-seconds"]),
        (["converse", "--extra-seconds", "inf"], ["--extra-seconds"]),
        (["convert"], ["SRC"]),
        (["convert", "missing"], ["DST"]),
        (["convert", "./missing", "new"], ["SRC", "missing"]),
        (["convert", "./missing", "new", "--to", "onnx"], ["--to", "onnx"]),
        (["convert", "./missing", "new", "--from", "tf"], ["--from", "kyutai"]),
        (["convert", "./missing", "new", "--from", "kyutai"], ["SRC", "missing"]),
        (["convert", "./missing", "new", "--max-shard-size", "big"], ["--max-shard-size", "big"]),
        (["convert", "./missing", "new", "--max-shard-size", "0MB"], ["--max-shard-size", "0MB"]),
        (["convert", "./missing", "new", "--push-to-hub", "a/b/c"], ["--push-to-hub", "a/b/c"]),
        (["convert", "./missing", "new", "--to", "kyutai", "--max-shard-size", "1GB"], ["--max-shard-size", "kyutai"]),
        (["convert", "./missing", "new", "--to", "kyutai", "--push-to-hub", "a/b"], ["--push-to-hub", "kyutai"]),
        (["inspect"], ["PATH_OR_ID"]),
        (["inspect", "missing"], ["PATH_OR_ID", "missing"]),
        (["inspect", "./missing/model.safetensors"], ["PATH_OR_ID", "missing"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_options(moshi_flax, args: list[str], words: list[str]):
    assert_mistake(moshi_flax(*args), *words)


def test_audio_that_is_text(moshi_flax, tmp_path: Path):
    path = tmp_path / "notes.wav"
    path.write_text("not audio\n")
    assert_mistake(moshi_flax("generate", "--user-audio", path), "--user-audio", "notes.wav", "cannot be read")


def test_audio_that_is_truncated(moshi_flax, speech: Path):
    speech.write_bytes(speech.read_bytes()[:20])
    assert_mistake(moshi_flax("generate", "--user-audio", speech), "--user-audio", "cannot be read")


def test_empty_audio(moshi_flax, tmp_path: Path):
    path = tmp_path / "empty.wav"
    soundfile.write(path, np.zeros(0), 24_000)
    assert_mistake(moshi_flax("generate", "--user-audio", path), "--user-audio", "no samples")


def test_audio_that_is_not_finite(moshi_flax, tmp_path: Path):
    path = tmp_path / "nan.wav"
    soundfile.write(path, np.array([0.0, np.nan, 0.1], np.float32), 24_000, subtype="FLOAT")
    assert_mistake(moshi_flax("generate", "--user-audio", path), "--user-audio", "NaN")


def test_output_over_the_input(moshi_flax, speech: Path):
    assert_mistake(moshi_flax("generate", "--user-audio", speech, "--output", speech), "--output", "--user-audio")


@pytest.mark.parametrize("option", ["--output", "--text"])
def test_files_of_a_dialogue(moshi_flax, tmp_path: Path, speech: Path, option: str):
    suffix = ".wav" if option == "--output" else ".srt"
    there = tmp_path / f"there{suffix}"
    there.write_text("mine")
    assert_mistake(moshi_flax("converse", option, there), option, "--overwrite")
    assert there.read_text() == "mine"
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    assert_mistake(moshi_flax("converse", option, folder, "--overwrite"), option, "directory")
    heard = speech.rename(tmp_path / f"heard{suffix}")
    result = moshi_flax("converse", "--user-audio", heard, option, heard, "--overwrite")
    assert_mistake(result, option, "--user-audio")
    assert_mistake(moshi_flax("converse", option, there / f"reply{suffix}"), option, "directory")


def test_output_under_a_file(moshi_flax, speech: Path):
    assert_mistake(moshi_flax("generate", "--output", speech / "reply.wav"), "--output", "directory")


def test_output_that_is_a_directory(moshi_flax, tmp_path: Path):
    (tmp_path / "reply.wav").mkdir()
    assert_mistake(moshi_flax("generate", "--output", "reply.wav"), "--output", "directory")


def test_transcript_that_is_a_directory(moshi_flax, tmp_path: Path):
    (tmp_path / "reply.json").mkdir()
    assert_mistake(moshi_flax("generate", "--output", "reply.wav"), "--output", "reply.json")


def test_output_without_permission(moshi_flax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # stands in for a locked directory, which would not stop root
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    assert_mistake(moshi_flax("generate", "--output", "locked/reply.wav"), "--output", "permission")


def test_model_directory_without_config(moshi_flax, tmp_path: Path):
    assert_mistake(moshi_flax("generate", "--model", tmp_path), "--model", "config.json")


def test_model_that_is_a_file(moshi_flax, speech: Path):
    assert_mistake(moshi_flax("generate", "--model", speech), "--model", "is a file")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_model_with_broken_config(moshi_flax, tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    assert_mistake(moshi_flax("generate", "--model", tmp_path), "--model")


@pytest.mark.parametrize("command", [["generate", "--model"], ["convert"]])
def test_another_model(moshi_flax, tmp_path: Path, command: list[str]):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    args = [*command, tmp_path] + (["new"] if command == ["convert"] else [])
    assert_mistake(moshi_flax(*args), "bert")


def test_destination_that_is_the_source(moshi_flax):
    assert_mistake(moshi_flax("convert", RANDOM_MODEL, RANDOM_MODEL, "--overwrite"), "DST")


@pytest.mark.parametrize("config", [None, {"dim": 4096, "depformer_dim": 1024}])
def test_source_without_a_model_in_its_config(moshi_flax, tmp_path: Path, config: dict | None):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert_mistake(moshi_flax("convert", tmp_path, "new"), "SRC", "config.json", "--from kyutai")


def test_mimi_has_no_layout_of_kyutai(moshi_flax, layouts: dict):
    assert_mistake(moshi_flax("convert", layouts["pt"], "new", "--to", "kyutai"), "--to kyutai", "FlaxMimiModel")


def test_destination_that_is_a_file(moshi_flax, speech: Path):
    assert_mistake(moshi_flax("convert", RANDOM_MODEL, speech), "DST", "file")


def test_destination_that_is_not_empty(moshi_flax, speech: Path):
    assert_mistake(moshi_flax("convert", RANDOM_MODEL, speech.parent), "DST", "--overwrite")
    assert speech.exists()
