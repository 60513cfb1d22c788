"""``moshi-flax export``, and ``verify`` with an export: written, held against the model, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax.export import verifying
from transformers_moshi_flax.export.verifying import Agreement
from transformers_moshi_flax.runtime import OnnxMoshi
from transformers_moshi_flax.runtime.command import main as moshi_onnx


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports") / "greedy"


def test_export_verify_and_converse(moshi_flax, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The embedded model, which is the random one here, greedily."""
    result = moshi_flax("export", "onnx", folder, "--greedy", "--context", "20")
    assert result.code == 0, result.err + result.out
    assert "agrees" in result.out and "100, the same in the first 100" in result.out
    exported = OnnxMoshi(folder)
    assert exported.numbers == {} and exported.manifest["context"] == 20

    user, reply = tmp_path / "user.wav", tmp_path / "reply.wav"
    samples = np.random.default_rng(0).uniform(-0.2, 0.2, 2 * exported.frame_size + 5).astype(np.float32)
    soundfile.write(user, samples, exported.sampling_rate, subtype="FLOAT")
    with pytest.raises(SystemExit) as stop:
        moshi_onnx(["converse", str(folder), str(user), "-o", str(reply)])
    sound, text_ids = exported.converse(samples)
    assert stop.value.code == 0 and len(text_ids) == 3
    assert capsys.readouterr().out.strip() == "".join(map(exported.piece, text_ids.tolist())).strip()
    np.testing.assert_allclose(soundfile.read(reply)[0], sound, atol=1e-4)


def test_what_does_not_agree(moshi_flax, random_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def compare(model: Any, exported: OnnxMoshi, audio: np.ndarray) -> Agreement:
        heard.append(len(audio) / exported.frame_size)
        return Agreement(100, 7, 0.5, 0.25, 1e-6, 1e-6, 3.0, 1.0, 2.0, 1e-4, agrees=False)

    monkeypatch.setattr(verifying, "compare", compare)
    user = tmp_path / "user.wav"
    soundfile.write(user, np.zeros(24_000), 24_000)
    result = moshi_flax("verify", RANDOM_MODEL, random_export, "--audio", user, "--json")
    report = json.loads(result.out)
    assert result.code == 1 and heard == [100] and report["agrees"] is False and report["same_frames"] == 7
    weights = sum(path.stat().st_size for path in random_export.glob("*.data"))
    assert weights < report["bytes"] < 2 * weights
    assert "differs" in moshi_flax("verify", RANDOM_MODEL, random_export).out


def test_a_page(moshi_flax, npm_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agreement = Agreement(100, 100, 1.0, 1.0, 0.0, 0.0, 99.0, 1.0, 1.0, 1e-4, agrees=True)
    monkeypatch.setattr(verifying, "compare", lambda *given: agreement)
    page = tmp_path / "page"
    result = moshi_flax("export", "web", RANDOM_MODEL, page, "--onnxruntime-web", npm_package, "--context", "8")
    assert result.code == 0 and "agrees" in result.out and "http.server" in result.err
    assert (page / "index.html").is_file() and OnnxMoshi(page / "model").manifest["context"] == 8


def test_inspect_an_export(moshi_flax, random_export: Path, tmp_path: Path) -> None:
    report = json.loads(moshi_flax("inspect", random_export, "--json").out)
    assert report["ok"] and report["quantization"] == "none" and report["batch_size"] == 2
    assert set(report["steps"]) == {"mimi_encode_step", "moshi_step", "mimi_decode_step"}
    step = report["steps"]["moshi_step"]
    assert step["nodes"]["MatMul"] > 10 and step["inputs"]["uniforms.0"]["shape"] == [2, 64]
    manifest = OnnxMoshi(random_export).manifest
    for name, step in report["steps"].items():
        state = [np.zeros(entry["shape"], entry["dtype"]) for entry in manifest["steps"][name]["state"]]
        assert step["state"] == {"arrays": len(state), "bytes": sum(array.nbytes for array in state)}
    weights = sum(path.stat().st_size for path in random_export.glob("*.data"))
    assert 0.8 * weights < sum(report["dtypes"].values()) < 1.2 * weights
    shown = moshi_flax("inspect", random_export).out
    assert "MatMul" in shown and "tokenizer.json" in shown and "damaged" not in shown

    copy = tmp_path / "copy"
    shutil.copytree(random_export, copy)
    (copy / "mimi_encode_step.onnx").write_bytes(b"something else")
    (copy / "moshi_step.onnx.data").unlink()
    result = moshi_flax("inspect", copy, "--json")
    report = json.loads(result.out)
    problems = {file["name"]: file["problem"] for file in report["files"] if file["problem"]}
    assert result.code == 1 and not report["ok"] and set(report["steps"]) == {"moshi_step", "mimi_decode_step"}
    assert list(problems) == ["mimi_encode_step.onnx", "moshi_step.onnx.data"]
    assert "damaged" in problems["mimi_encode_step.onnx"] and "missing" in problems["moshi_step.onnx.data"]
    (copy / "moshi_export.json").write_text("{")
    result = moshi_flax("inspect", copy)
    assert result.code == 1 and "PATH_OR_ID:" in result.err and "damaged" in result.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["export", "onnx"], ["DIR"]),
        (["export", "tflite", "{new}"], ["FORMAT", "onnx"]),
        (["export", "onnx", "{used}"], ["DIR:", "not empty"]),
        (["export", "onnx", "./missing", "{new}"], ["MODEL:", "missing"]),
        (["export", "onnx", "a/b", "{new}", "more"], ["one too many"]),
        (["export", "onnx", "{new}", "--greedy", "--top-k", "5"], ["--greedy"]),
        (["export", "onnx", "{new}", "--context", "100000"], ["context", "sliding_window"]),
        (["export", "onnx", "{new}", "--onnxruntime-web", "."], ["--onnxruntime-web", "no effect"]),
        (["export", "web", "{new}", "--batch-size", "2"], ["--batch-size", "one dialogue"]),
        (["export", "web", "{new}", "--onnxruntime-web", "."], ["onnxruntime_web", "no package"]),
        (["inspect", "{export}", "--part", "a"], ["--part", "export"]),
        (["verify", "{export}", "{export}"], ["A:", "is an export"]),
        (["verify", "{random}", "{export}", "--no-outputs"], ["--no-outputs"]),
        (["verify", "{random}", "--audio", "a.wav"], ["--audio"]),
    ],
    ids=" ".join,
)
def test_wrong_use(moshi_flax, random_export: Path, tmp_path: Path, monkeypatch, args: list[str], words: list[str]):
    monkeypatch.chdir(tmp_path)
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    places = {"new": tmp_path / "new", "used": used, "export": random_export, "random": RANDOM_MODEL}
    result = moshi_flax(*(arg.format(**places) for arg in args))
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
    for word in words:
        assert word in result.err
    assert not (tmp_path / "new").exists()


def test_a_damaged_export(moshi_flax, random_export: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(random_export, copy)
    with (copy / "moshi_step.onnx.data").open("ab") as file:
        file.write(b"more")
    result = moshi_flax("verify", RANDOM_MODEL, copy)
    assert result.code == 1 and "B:" in result.err and "moshi_step.onnx.data" in result.err
