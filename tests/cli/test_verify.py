"""``moshi-flax verify``: damage is found and named; two checkpoints are compared by weights and by outputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.random_model import RANDOM_MODEL
from transformers_moshi_flax.cli import outputs

KEY = "upsample.conv.weight"
PATH = "upsample/conv/kernel"


def report_of(result, code: int) -> dict:
    assert result.code == code, result.err
    return json.loads(result.out)


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def altered(layouts: dict, tmp_path: Path, name: str, **tensors: np.ndarray) -> Path:
    """Upstream's checkpoint with other tensors, under the names with "__" for "."."""
    folder = copy(layouts["upstream"], tmp_path)
    changed = {key.replace("__", "."): value for key, value in tensors.items()}
    save_file({**load_file(folder / name), **changed}, folder / name, metadata={"format": "pt"})
    return folder


def flip_bit(path: Path, key: str) -> None:
    """One bit of the last byte of a tensor: a large, finite change."""
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    end = json.loads(content[8 : 8 + length])[key]["data_offsets"][1]
    content[8 + length + end - 1] ^= 0x02
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["upstream", "flax", "flax-shards", "file", "msgpack", "pt", "pt-shards"])
def test_undamaged(moshi_flax, layouts: dict, name: str):
    report = report_of(moshi_flax("verify", layouts[name], "--json"), 0)
    (entry,) = report["checkpoints"]
    assert report["ok"] is True and entry["damaged"] == {} and entry["error"] is None
    assert entry["tensors"] > 100
    assert entry["checksums"] == (0 if name in ("upstream", "msgpack") else entry["tensors"])


@pytest.mark.parametrize("layout", ["pt", "flax-shards"])
def test_flipped_bit(moshi_flax, layouts: dict, tmp_path: Path, layout: str):
    folder = copy(layouts[layout], tmp_path)
    key = KEY if layout == "pt" else PATH.replace("/", ".")
    holder = folder / "model.safetensors"
    if layout == "flax-shards":
        index = json.loads((folder / "flax_model.safetensors.index.json").read_text())
        holder = folder / index["weight_map"][key]
    flip_bit(holder, key)
    (entry,) = report_of(moshi_flax("verify", folder, "--json"), 1)["checkpoints"]
    assert list(entry["damaged"]) == [key] and holder.name in entry["damaged"][key]
    result = moshi_flax("verify", folder)
    assert result.code == 1 and "1 damaged" in result.out
    assert any(key in line and "checksum" in line for line in result.out.splitlines())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(moshi_flax, layouts: dict, tmp_path: Path, value: float):
    bad = np.ones((32, 1, 4), np.float32)
    bad[3, 0, 1:3] = value
    folder = altered(layouts, tmp_path, "model.safetensors", upsample__conv__weight=bad)
    (entry,) = report_of(moshi_flax("verify", folder, "--json"), 1)["checkpoints"]
    assert list(entry["damaged"]) == [KEY] and "2 of its 128" in entry["damaged"][KEY]


@pytest.mark.parametrize("harm", ["truncated", "shard missing", "msgpack"])
def test_files_that_cannot_be_opened(moshi_flax, layouts: dict, tmp_path: Path, harm: str):
    name = {"truncated": "flax", "shard missing": "flax-shards", "msgpack": "msgpack"}[harm]
    folder = copy(layouts[name], tmp_path)
    if harm == "shard missing":
        wounded = folder / "flax_model-00003-of-00005.safetensors"
        wounded.unlink()
    else:
        (wounded,) = folder.glob("flax_model.*")
        wounded.write_bytes(wounded.read_bytes()[:-9])
    (entry,) = report_of(moshi_flax("verify", folder, "--json"), 1)["checkpoints"]
    assert wounded.name in entry["error"]
    result = moshi_flax("verify", folder)
    assert result.code == 1 and "damaged" in result.out and "\n" not in result.err


def test_damaged_checksums(moshi_flax, tmp_path: Path):
    path = tmp_path / "some.safetensors"
    save_file({"a": np.ones(3)}, path, metadata={"format": "pt", "checksums": "{"})
    (entry,) = report_of(moshi_flax("verify", path, "--json"), 1)["checkpoints"]
    assert "checksums" in entry["error"]


@pytest.mark.parametrize("name", ["pt-shards", "flax-shards", "file", "msgpack"])
def test_the_same_weights_in_another_layout(moshi_flax, layouts: dict, name: str):
    report = report_of(moshi_flax("verify", layouts["upstream"], layouts[name], "--no-outputs", "--json"), 0)
    assert report["ok"] is True and report["differences"] == [] and report["misfits"] is None
    assert report["class"] == "FlaxMimiModel" and report["outputs"] is None
    assert [entry["path"] for entry in report["checkpoints"]] == [str(layouts["upstream"]), str(layouts[name])]


def test_values_differ(moshi_flax, layouts: dict, tmp_path: Path):
    weights = load_file(layouts["upstream"] / "model.safetensors")[KEY]
    weights[5, 0, 2] += 0.25
    folder = altered(layouts, tmp_path, "model.safetensors", upsample__conv__weight=weights)
    report = report_of(moshi_flax("verify", layouts["flax"], folder, "--no-outputs", "--json"), 1)
    (difference,) = report["differences"]
    assert (difference["path"], difference["kind"]) == (PATH, "values")
    assert difference["max_abs_difference"] == pytest.approx(0.25, rel=1e-6)
    result = moshi_flax("verify", layouts["flax"], folder, "--no-outputs")
    assert result.code == 1 and PATH in result.out and "0.25" in result.out


def test_dtypes_differ(moshi_flax, layouts: dict, tmp_path: Path):
    weights = load_file(layouts["upstream"] / "model.safetensors")[KEY].astype(np.float16)
    folder = altered(layouts, tmp_path, "model.safetensors", upsample__conv__weight=weights)
    report = report_of(moshi_flax("verify", layouts["flax"], folder, "--no-outputs", "--json"), 1)
    (difference,) = report["differences"]
    assert (difference["path"], difference["kind"]) == (PATH, "dtype")
    assert (difference["a"], difference["b"]) == ("float32", "float16")
    assert 0 < difference["max_abs_difference"] < 2e-3


def test_tensors_that_do_not_fit(moshi_flax, layouts: dict, tmp_path: Path):
    wrong = {
        "encoder__layers__99__w": np.ones(2, np.float32),
        "upsample__conv__weight": np.ones((1, 2, 3), np.float32),
    }
    folder = altered(layouts, tmp_path, "model.safetensors", **wrong)
    report = report_of(moshi_flax("verify", layouts["flax"], folder, "--json"), 1)
    assert report["misfits"]["b"]["unexpected"] == ["encoder.layers.99.w"]
    assert [entry[0] for entry in report["misfits"]["b"]["mismatched"]] == [KEY]
    assert [(entry["path"], entry["kind"], entry["b"]) for entry in report["differences"]] == [(PATH, "missing", None)]
    assert report["outputs"] is None
    result = moshi_flax("verify", layouts["flax"], folder)
    assert result.code == 1 and "encoder.layers.99.w" in result.out


def test_a_part_and_the_whole(moshi_flax, tmp_path: Path):
    """The class is A's, so Mimi is compared with the Mimi in Moshi."""
    weights, prefix = load_file(RANDOM_MODEL / "model.safetensors"), "audio_encoder."
    part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    part["upsample.conv.weight"] = part["upsample.conv.weight"] * 2
    save_file(part, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((RANDOM_MODEL / "config.json").read_text())["audio_encoder_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = report_of(moshi_flax("verify", tmp_path, RANDOM_MODEL, "--no-outputs", "--json"), 1)
    assert report["class"] == "FlaxMimiModel" and report["misfits"] is None
    assert [difference["path"] for difference in report["differences"]] == [PATH]


def test_outputs_of_mimi_agree_with_upstream(moshi_flax, layouts: dict):
    report = report_of(moshi_flax("verify", layouts["upstream"], layouts["flax"], "--json"), 0)
    assert report["implementations"] == ["pytorch", "flax"]
    assert {entry["name"]: entry["agrees"] for entry in report["outputs"]} == {
        "audio_codes": True,
        "audio_values": True,
    }
    # two programs, not the same one twice
    assert 0 < max(entry["relative"] for entry in report["outputs"]) < 1e-5


def test_outputs_of_moshi_agree_with_upstream(moshi_flax, moshi: dict):
    result = moshi_flax("verify", moshi["flax"], moshi["pt"])
    assert result.code == 0, result.out
    assert "A by flax, B by pytorch" in result.out
    for name in ("text_logits", "audio_logits", "audio_codes", "audio_values"):
        (line,) = [line for line in result.out.splitlines() if name in line]
        assert "agrees" in line
    assert "the parameters of FlaxMoshiForConditionalGeneration are the same" in result.out


def test_outputs_that_differ_fail(moshi_flax, layouts: dict, monkeypatch: pytest.MonkeyPatch):
    """Same weights, other outputs: as if a layout were read wrongly by one of the two."""
    wrong = {"flax": 1.5, "pytorch": 1.0}

    def run(checkpoint, model_class) -> dict:
        return {"audio_values": np.array([1.0, wrong[outputs.implementation(checkpoint, model_class)]])}

    monkeypatch.setattr(outputs, "run", run)
    report = report_of(moshi_flax("verify", layouts["upstream"], layouts["flax"], "--json"), 1)
    assert report["ok"] is False and report["differences"] == []
    assert [(entry["name"], entry["agrees"]) for entry in report["outputs"]] == [("audio_values", False)]


def test_without_torch_both_are_ours(moshi_flax, layouts: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outputs.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(outputs, "run", lambda checkpoint, model_class: {"audio_values": np.ones(3)})
    report = report_of(moshi_flax("verify", layouts["upstream"], layouts["flax"], "--json"), 0)
    assert report["implementations"] == ["flax", "flax"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["'A'"]),
        (["./missing"], ["A:", "missing"]),
        (["{flax}", "./missing"], ["B:", "missing"]),
        (["{flax}", "--no-outputs"], ["--no-outputs"]),
        (["{empty}"], ["A:", "no weights"]),
        (["{pickle}"], ["A:", "--from pt"]),
        (["{bare}", "{flax}"], ["A:", "config.json"]),
        (["{bert}", "{flax}"], ["A:", "bert"]),
        (["{flax}", "{kyutai}"], ["B:", "a whole Moshi, but the other is another model"]),
    ],
    ids=" ".join,
)
def test_wrong_use(moshi_flax, layouts: dict, tmp_path: Path, monkeypatch, args: list[str], words: list[str]):
    monkeypatch.chdir(tmp_path)
    places = {name: tmp_path / name for name in ("empty", "bare", "bert")}
    for folder in places.values():
        folder.mkdir()
    for folder in (places["bare"], places["bert"]):
        shutil.copy(layouts["upstream"] / "model.safetensors", folder)
    (places["bert"] / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    save_file({"depformer_in.0.weight": np.ones(3)}, tmp_path / "kyutai.safetensors")
    places |= {"kyutai": tmp_path / "kyutai.safetensors"}
    places |= {"flax": layouts["flax"], "pickle": tmp_path / "pytorch_model.bin"}
    result = moshi_flax("verify", *(arg.format(**places) for arg in args))
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
    for word in words:
        assert word in result.err
